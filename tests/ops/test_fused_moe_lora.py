"""fused_moe_lora, its two halves and the delta forms of activation and combine, against loops in float32."""

from __future__ import annotations

import pytest
import torch

from benchmarks.moe_inputs import align_on_host, has_cuda_align
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops.fused_moe_lora import fused_moe_lora
from tests.ops.moe_triton_cases import delta, make_routing, make_slots, make_stacks, relative_error

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


def check(spec: MoESpec, tokens: int, ranks: list[int], dtype: torch.dtype, device, *, rows: str, half: str, routing: str = "uniform", **layout) -> None:
    """y += delta on random y; rows without an adapter, and pairs without an expert, must keep their bits."""
    stacks = make_stacks(spec, ranks, dtype, device, **layout)
    a, b, gather = (stacks.a13, stacks.b13, True) if half == "13" else (stacks.a2, stacks.b2, False)
    made = Routing(make_routing(tokens, spec, device, routing), make_slots(tokens, len(ranks), device), spec.num_experts, len(ranks), rows=rows)
    if not has_cuda_align():
        align_on_host(made)
    pairs = torch.arange(made.num_pairs, device=device) if rows == "pair" else made.sorted_pairs.long()
    x = torch.randn(tokens if gather else made.num_pairs, a.dim, device=device, dtype=dtype)
    y = torch.randn(made.num_pairs, b.dim, device=device, dtype=dtype)
    before = y.clone()
    assert fused_moe_lora(y, x, a, b, made, Workspace(device), gather=gather) is y
    experts, slots = made.topk_ids.view(-1)[pairs].long(), made.token_slots[pairs // spec.top_k]
    added, expected = torch.zeros_like(y, dtype=torch.float32), torch.zeros_like(y, dtype=torch.float32)
    for expert, slot in {(int(e), int(s)) for e, s in zip(experts, slots, strict=True) if e >= 0 and s >= 0}:
        places = ((experts == expert) & (slots == slot)).nonzero().view(-1)
        source = x[pairs[places] // spec.top_k] if gather else x[places]
        expected[places] = delta(a, b, slot, expert, source)
        added[places] = y[places].float() - before[places].float()
    untouched = (experts < 0) | (slots < 0)
    assert torch.equal(y[untouched], before[untouched])
    total = before.float() + expected
    error = relative_error(y, total)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"
    if dtype == torch.float32:
        assert torch.allclose(added, expected, atol=1e-4)


@pytest.mark.parametrize("rows", ["pair", "sorted"])
@pytest.mark.parametrize("half", ["13", "2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_loop(device, rows, half, dtype) -> None:
    torch.manual_seed(0)
    layout = {"split": [True, False, True], "shared": [False, True, False]}
    check(MoESpec(4, 2, 40, 24), 9, [8, 3, 20], dtype, device, rows=rows, half=half, routing="holes", **layout)


@pytest.mark.parametrize("rows", ["pair", "sorted"])
def test_not_gated(device, rows) -> None:
    torch.manual_seed(1)
    check(MoESpec(4, 2, 32, 32, activation="relu2", gated=False), 5, [8, 0], torch.float32, device, rows=rows, half="13")


def test_refuses_wrong_rows(device) -> None:
    spec = MoESpec(4, 2, 32, 32)
    stacks = make_stacks(spec, [8], torch.float32, device)
    made = Routing(make_routing(3, spec, device), make_slots(3, 1, device), 4, 1, rows="pair")
    with pytest.raises(ValueError, match=r"moe_shrink: rows: expected contiguous torch.float32 \(3, 32\)"):
        fused_moe_lora(torch.zeros(6, 64, device=device), torch.zeros(3, 31, device=device), stacks.a13, stacks.b13, made, Workspace(device), gather=True)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [6, 12])
@pytest.mark.parametrize("adapters", [4, 6, 16])
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("half", ["13", "2"])
def test_peers_grid(device, top_k, adapters, rank, half) -> None:
    """The case grid that vLLM and SGLang publish for this op: 100 tokens, 64 experts, 2048 -> 1408."""
    torch.manual_seed(rank)
    check(MoESpec(64, top_k, 2048, 1408), 100, [rank] * adapters, torch.bfloat16, device, rows="sorted", half=half)
