"""Adapters on linears, fused linears, logits and the embedding; slot runs."""

from __future__ import annotations

import pytest
import torch

from sglang_lora_moe.layers.embedding import Embedding
from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.dense import compute_slot_runs, slot_runs
from sglang_lora_moe.lora.layers import EmbeddingWithLoRA, LinearWithLoRA
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.targets import EmbeddingTarget, LinearTarget
from sglang_lora_moe.lora.weights import EmbeddingLoRA, LinearLoRA
from tests.references import order_slots, ref_linear, relative_error
from tests.slots import write_slot

PARTS = (("attn.q_proj", 48), ("attn.k_proj", 16), ("attn.v_proj", 24))
SLOT_PATTERNS = {
    "base": [-1] * 9,
    "one": [2] * 9,
    "prefill": [0] * 40 + [-1] * 3 + [2] * 60 + [0] * 5,
    "decode": [0, 2, -1, 3, 0, 1, 2, -1, 0, 3, 3, 1, 0, -1, 2, 0, 1, 0, 2],
    "single": [3],
}


def noise(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(shape) * std


def make_pool(dtype: torch.dtype = torch.float32) -> LoRAMemoryPool:
    """Four slots: 0 and 2 on all parts at mixed ranks, 1 on q alone, 3 on k and v alone."""
    torch.manual_seed(3)
    pool = LoRAMemoryPool([LinearTarget(name, 32, rows) for name, rows in PARTS], 4, 16, dtype)
    for slot, rank, names in ((0, 16, "qkv"), (1, 1, "q"), (2, 5, "qkv"), (3, 8, "kv")):
        modules = {name: LinearLoRA(noise(rank, 32, std=0.2), noise(rows, rank, std=0.4), 0.5 + slot) for name, rows in PARTS if name[5] in names}
        write_slot(pool, slot, modules)
    return pool


def make_linear(dtype: torch.dtype = torch.float32, slot_source: str = "tokens") -> Linear:
    base = Linear(PARTS, 32, biased_parts=("attn.q_proj",), dtype=dtype, device="cpu", slot_source=slot_source)
    base.weight.data.normal_(std=0.2)
    assert base.bias is not None
    base.bias.data[:48].normal_()
    return base


def make_context(slots: list[int]) -> StepContext:
    ctx = StepContext(256, 8, 4, 16)
    ctx.token_slots[: len(slots)] = torch.tensor(slots, dtype=torch.int32)
    order_slots(ctx, len(slots))
    ctx.lora_active = any(slot >= 0 for slot in slots)
    return ctx


@pytest.mark.parametrize("pattern", SLOT_PATTERNS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_linear(pattern: str, dtype: torch.dtype, bound: float) -> None:
    slots = SLOT_PATTERNS[pattern]
    pool, base, ctx = make_pool(dtype), make_linear(dtype), make_context(slots)
    parts = [pool.stacks_for(name) for name, _ in PARTS]
    layer = LinearWithLoRA(base, parts, ctx)
    x = torch.randn(1, len(slots), 32).to(dtype)
    y = layer(x)
    assert y.shape == (1, len(slots), 88) and y.dtype == dtype
    assert relative_error(y[0], ref_linear(x[0], base.weight, base.bias, parts, torch.tensor(slots))) < bound
    assert torch.equal(y, layer(x))
    for row, slot in enumerate(slots[:20]):  # mixed equals solo
        ctx.token_slots[0] = slot
        assert relative_error(layer(x[:, row, None]), y[:, row, None]) < bound


def test_float32_router_over_a_bfloat16_pool() -> None:
    """A gate in float32 takes adapters that are stored in the activation dtype."""
    pool, base, slots = make_pool(torch.bfloat16), make_linear(torch.float32), SLOT_PATTERNS["decode"]
    parts = [pool.stacks_for(name) for name, _ in PARTS]
    x = torch.randn(len(slots), 32)
    y = LinearWithLoRA(base, parts, make_context(slots))(x)
    assert y.dtype == torch.float32 and relative_error(y, ref_linear(x, base.weight, base.bias, parts, torch.tensor(slots))) < 1e-6


def test_inactive_step_is_the_base() -> None:
    pool, base, ctx = make_pool(), make_linear(), make_context(SLOT_PATTERNS["decode"])
    ctx.lora_active = False
    x = torch.randn(19, 32)
    assert torch.equal(LinearWithLoRA(base, [pool.stacks_for(name) for name, _ in PARTS], ctx)(x), base(x))


def test_base_rows_of_a_mixed_step_are_bit_identical() -> None:
    slots = SLOT_PATTERNS["decode"]
    pool, base, ctx = make_pool(), make_linear(), make_context(slots)
    x, is_base = torch.randn(19, 32), torch.tensor(slots) < 0
    y = LinearWithLoRA(base, [pool.stacks_for(name) for name, _ in PARTS], ctx)(x)
    assert torch.equal(y[is_base], base(x)[is_base]) and not torch.equal(y[~is_base], base(x)[~is_base])


def test_logits_take_their_own_slots() -> None:
    pool, base, ctx = make_pool(), make_linear(slot_source="logits"), make_context([0] * 9)
    ctx.logit_slots[:3] = torch.tensor([2, -1, 0])
    parts = [pool.stacks_for(name) for name, _ in PARTS]
    x = torch.randn(3, 32)
    assert relative_error(LinearWithLoRA(base, parts, ctx)(x), ref_linear(x, base.weight, base.bias, parts, torch.tensor([2, -1, 0]))) < 1e-6


@pytest.mark.parametrize("pattern", SLOT_PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(pattern: str, dtype: torch.dtype) -> None:
    slots = SLOT_PATTERNS[pattern]
    pool = LoRAMemoryPool([EmbeddingTarget("embed_tokens", 50, 32)], 4, 8, dtype)
    adapters = {slot: EmbeddingLoRA(noise(3 + slot, 50).to(dtype), noise(32, 3 + slot).to(dtype), 0.5) for slot in (0, 1, 3)}
    for slot, module in adapters.items():
        write_slot(pool, slot, {"embed_tokens": module})
    base = Embedding("embed_tokens", 50, 32, dtype=dtype, device="cpu")
    base.weight.data.normal_()
    ids = torch.randint(0, 50, (1, len(slots)))
    y = EmbeddingWithLoRA(base, pool.stacks_for("embed_tokens"), make_context(slots))(ids)
    expected = base.weight[ids[0]].float()
    for row, slot in enumerate(slots):
        if slot in adapters:
            expected[row] += 0.5 * adapters[slot].b.float() @ adapters[slot].a.float()[:, ids[0, row]]
    assert y.shape == (1, len(slots), 32) and relative_error(y[0], expected) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("pattern", SLOT_PATTERNS)
def test_slot_runs_cover_each_row_with_an_adapter_once(pattern: str) -> None:
    slots = SLOT_PATTERNS[pattern]
    runs = compute_slot_runs(torch.tensor(slots, dtype=torch.int32))
    rows = list(range(len(slots))) if runs.order is None else runs.order.tolist()
    covered = [(rows[i], slot) for slot, start, count in runs.runs for i in range(start, start + count)]
    assert sorted(covered) == [(row, slot) for row, slot in enumerate(slots) if slot >= 0]
    assert len(runs.runs) <= 2 * len({slot for slot in slots if slot >= 0})


def test_slot_runs_follow_the_step() -> None:
    ctx = make_context([0, 1, 2, -1])
    first = slot_runs(ctx, "tokens", 4)
    assert slot_runs(ctx, "tokens", 4) is first
    ctx.token_slots[3] = 1
    assert slot_runs(ctx, "tokens", 4).runs == [(0, 0, 1), (1, 1, 1), (2, 2, 1), (1, 3, 1)]
    assert slot_runs(ctx, "tokens", 2).runs == [(0, 0, 1), (1, 1, 1)]
    assert slot_runs(ctx, "logits", 4).runs == []


def test_wrappers_refuse_what_does_not_fit() -> None:
    pool, base, ctx = make_pool(), make_linear(), make_context([0])
    stacks = [pool.stacks_for(name) for name, _ in PARTS]
    with pytest.raises(ValueError, match=r"expected stacks for 3 parts \(attn.q_proj, attn.k_proj, attn.v_proj\), got 2"):
        LinearWithLoRA(base, stacks[:2], ctx)
    with pytest.raises(ValueError, match=r"attn.q_proj: expected stacks of dims \(32, 48\), got \(32, 24\)"):
        LinearWithLoRA(base, stacks[::-1], ctx)
