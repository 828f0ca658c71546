"""The kernels of dense LoRA on a GPU at the widths of Qwen3-30B-A3B, against loops over slots in float32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.layers import LinearWithLoRA
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.targets import LinearTarget
from sglang_lora_moe.lora.triton_dense import TritonDense
from sglang_lora_moe.lora.weights import LinearLoRA
from tests.moe_cases import Noise, generator, make_token_slots
from tests.references import assert_near, order_slots, ref_linear
from tests.slots import write_slot

pytestmark = pytest.mark.gpu
QKV, O = ((("q", 4096), ("k", 512), ("v", 512)), 2048), ((("o", 2048),), 4096)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 17, 64, 256, 257, 1024, 4097])
@pytest.mark.parametrize(("parts", "width"), [QKV, O], ids=["qkv", "o"])
def test_linear(parts: tuple[tuple[str, int], ...], width: int, tokens: int, dtype: torch.dtype) -> None:
    """Slots 1 to 64, ranks mixed, a part missing here and there; two runs and a captured graph give the same bits."""
    g = generator(tokens, "cuda")
    noise = Noise(g, dtype)
    base = Linear(parts, width, biased_parts=(), dtype=dtype, device="cuda")
    base.weight.data.copy_(noise(*base.weight.shape, std=width**-0.5))
    for slots, popularity in ((1, "identical"), (4, "uniform"), (64, "distinct"), (64, "zipf")):
        ctx = StepContext(tokens, 8, 4, 16, "cuda")
        pool = LoRAMemoryPool([LinearTarget(name, width, rows) for name, rows in parts], slots, 64, dtype, "cuda")
        pool.pool.fill_(float("nan"))
        for slot in range(slots):
            rank = (16, 64, 1, 7)[slot % 4]
            some = [part for i, part in enumerate(parts) if slot % 4 != 3 or i == slot % len(parts)]
            adapter = {name: LinearLoRA(noise(rank, width, std=width**-0.5), noise(rows, rank, std=rank**-0.5), 0.5 + slot % 3) for name, rows in some}
            write_slot(pool, slot, adapter)
        ctx.token_slots.copy_(make_token_slots(popularity, tokens, slots, g, base_share=0.2))
        order_slots(ctx, tokens)
        ctx.lora_active = True
        stacks = [pool.stacks_for(name) for name, _ in parts]
        layer, x = LinearWithLoRA(base, stacks, ctx, TritonDense(ctx)), noise(tokens, width)
        found, plain = layer(x), base(x)
        assert_near(found, ref_linear(x, base.weight, None, stacks, ctx.token_slots), "dense LoRA linear", f"{slots} {popularity}")
        assert torch.equal(found[ctx.token_slots < 0], plain[ctx.token_slots < 0]), "rows without an adapter changed"
        assert torch.equal(found, layer(x)), "two runs differ"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, out), "the replay differs"
