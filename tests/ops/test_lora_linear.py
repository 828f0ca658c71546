"""The Triton kernels of dense LoRA against the reference, and their fused consumers against the unfused way, through a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.layers.embedding import Embedding
from sglang_lora_moe.lora.layers import EmbeddingWithLoRA, LinearWithLoRA, wrap_layers
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.targets import EmbeddingTarget, ExpertTarget, LinearTarget, choose_targets
from sglang_lora_moe.lora.triton_dense import TritonDense
from sglang_lora_moe.lora.weights import EmbeddingLoRA, LinearLoRA
from sglang_lora_moe.models.build import build_model
from sglang_lora_moe.models.served import ServedModel
from sglang_lora_moe.ops import lora_linear
from tests.lora.test_linear_lora import PARTS, SLOT_PATTERNS, make_linear, make_pool
from tests.lora.test_linear_lora import make_context as make_slots
from tests.models.driver import Driver, Sequence, make_context
from tests.models.test_against_transformers import random_tokens
from tests.references import ref_linear, relative_error
from tests.slots import write_slot
from tests.tiny_models import make_tiny_model

INTERPRETED = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tensors of these tests are on the CPU; test_gpu_engine.py covers the GPU")


@pytest.mark.parametrize("pattern", SLOT_PATTERNS)
def test_linear(pattern: str) -> None:
    slots = SLOT_PATTERNS[pattern][:70]
    pool, base, ctx = make_pool(), make_linear(), make_slots(slots)
    parts = [pool.stacks_for(name) for name, _ in PARTS]
    layer = LinearWithLoRA(base, parts, ctx, TritonDense(ctx))
    x = torch.randn(len(slots), 32)
    want = ref_linear(x, base.weight, base.bias, parts, torch.tensor(slots))
    assert relative_error(layer(x), want) < 1e-6
    assert torch.equal(layer(x)[[i for i, slot in enumerate(slots) if slot < 0]], base(x)[[i for i, slot in enumerate(slots) if slot < 0]])
    layer.used = False
    assert torch.equal(layer(x), base(x))


def test_logit_slots_and_a_wider_activation() -> None:
    slots = SLOT_PATTERNS["decode"]
    pool, base, ctx = make_pool(torch.float16), make_linear(torch.float32, "logits"), make_slots([-1] * 3)
    ctx.logit_slots[: len(slots)] = torch.tensor(slots, dtype=torch.int32)
    ctx.lora_active = True
    parts = [pool.stacks_for(name) for name, _ in PARTS]
    x = torch.randn(len(slots), 32)
    want = ref_linear(x, base.weight, base.bias, parts, torch.tensor(slots))
    assert relative_error(LinearWithLoRA(base, parts, ctx, TritonDense(ctx))(x), want) < 1e-6


def test_embedding() -> None:
    torch.manual_seed(0)
    pool = LoRAMemoryPool([EmbeddingTarget("embed", 50, 40)], 3, 16, torch.float32)
    for slot, rank in ((0, 16), (2, 3)):
        write_slot(pool, slot, {"embed": EmbeddingLoRA(torch.randn(rank, 50), torch.randn(40, rank), 0.5 + slot)})
    base = Embedding("embed", 50, 40, dtype=torch.float32, device="cpu")
    base.weight.data.normal_()
    ctx = make_slots([0, -1, 2, 1, 2])
    ids = torch.tensor([3, 49, 0, 7, 7])
    stacks = pool.stacks_for("embed")
    expected = EmbeddingWithLoRA(base, stacks, ctx)(ids)
    assert relative_error(EmbeddingWithLoRA(base, stacks, ctx, TritonDense(ctx))(ids), expected) < 1e-6


def test_parts_must_share_a_pool() -> None:
    pools = [make_pool(), make_pool()]
    a, b, c = (pools[i].stacks_for(name) for i, (name, _) in zip((0, 1, 0), PARTS, strict=True))
    with pytest.raises(ValueError, match="equal distances"):
        lora_linear.PartTables([(a, 0, 48), (b, 48, 16), (c, 64, 24)])


def served(path: Path, backend: str) -> ServedModel:
    """A model with random adapters on all its linears in slots 0 (rank 3) and 1 (rank 16); experts without."""
    model = build_model(path, ctx=make_context(), dtype=torch.float32, device="cpu", attention_backend="triton", show_progress=False)
    targets = choose_targets(model.hf)[0]
    pool = LoRAMemoryPool(list(targets.values()), 2, 16, torch.float32)
    wrap_layers(model.hf, pool, model.ctx, backend)
    torch.manual_seed(5)
    for slot, rank in ((0, 3), (1, 16)):
        modules: dict[str, LinearLoRA | EmbeddingLoRA] = {}
        for name, target in targets.items():
            if isinstance(target, LinearTarget):
                modules[name] = LinearLoRA(torch.randn(rank, target.in_features) * 0.1, torch.randn(target.out_features, rank) * 0.3, 0.7)
            elif not isinstance(target, ExpertTarget):
                modules[name] = EmbeddingLoRA(torch.randn(rank, target.in_features) * 0.3, torch.randn(target.out_features, rank) * 0.3, 0.7)
        write_slot(pool, slot, modules)
    return model


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_whole_model(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tiny_model(arch, tmp_path, num_key_value_heads=1)
    found = []
    for backend in ("torch_native", "triton"):
        driver = Driver(served(path, backend))
        seqs = [Sequence(random_tokens(seed, n), slot=slot) for seed, (n, slot) in enumerate(((10, 0), (8, -1), (9, 1)))]
        driver.ctx.lora_active = True
        logits = [*driver.step([(seq, len(seq.tokens) - 4) for seq in seqs]), *driver.step([(seq, 1) for seq in seqs])]
        monkeypatch.setattr("sglang_lora_moe.ops.paged_attention.MAX_SPLITS", 1)  # no merge: the linear begins by itself
        found_more = driver.step([(seq, 1) for seq in seqs[:2]])
        monkeypatch.setattr("sglang_lora_moe.lora.triton_dense.ROWS_MAX", 0)  # from here on kernels own tiles, as for many tokens
        monkeypatch.setattr("sglang_lora_moe.ops.qk_norm_rope.ROWS_MAX", 0)
        monkeypatch.setattr("sglang_lora_moe.ops.rms_norm.ADD_ROWS_MAX", 0)
        found_more = torch.cat([*found_more, *driver.step([(seq, 1) for seq in seqs[1:]])])
        found.append(torch.cat([*logits, found_more, *driver.step([(seq, 1) for seq in seqs])]))
        monkeypatch.undo()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-4)
    driver.ctx.lora_active = False
    base = driver.step([(Sequence(random_tokens(0, 3)), 3)])[0]
    assert (base - found[1][:3]).abs().max() > 0.1, "the adapters do nothing"
