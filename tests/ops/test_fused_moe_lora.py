"""fused_moe_lora, its two halves and the shrink for tensor cores per pair, against loops in float32."""

from __future__ import annotations

import pytest
import torch

from benchmarks.moe_inputs import align_on_host, has_cuda_align
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops.fused_moe_lora import fused_moe_lora
from tests.moe_cases import LAYOUTS, MoECase, make_case
from tests.references import assert_near, on_host, ref_delta


def check(case: MoECase, *, rows: str, half: str) -> None:
    """y += delta on random y; rows without an adapter, and pairs without an expert, must keep their bits."""
    device, spec = case.x.device, case.spec
    a, b, gather = (case.stacks.a13, case.stacks.b13, True) if half == "13" else (case.stacks.a2, case.stacks.b2, False)
    made = Routing(case.topk_ids, case.token_slots, spec.num_experts, case.num_slots, rows=rows)
    if not has_cuda_align():
        align_on_host(made)
    pairs = torch.arange(made.num_pairs, device=device) if rows == "pair" else made.sorted_pairs.long()
    x = case.x if gather else torch.randn(made.num_pairs, a.dim, device=device).to(case.x.dtype)
    y = torch.randn(made.num_pairs, b.dim, device=device).to(case.x.dtype)
    before = y.clone()
    assert fused_moe_lora(y, x, a, b, made, Workspace(device), gather=gather) is y
    experts, slots = case.topk_ids.view(-1)[pairs].long(), case.token_slots[pairs // spec.top_k]
    expected, a_host, b_host = torch.zeros_like(y, dtype=torch.float32), on_host(a), on_host(b)
    untouched = (experts < 0) | (experts >= spec.num_experts) | (slots < 0)
    for expert, slot in set(zip(experts[~untouched].tolist(), slots[~untouched].tolist(), strict=True)):
        places = ((experts == expert) & (slots == slot)).nonzero().view(-1)
        expected[places] = ref_delta((x[pairs[places] // spec.top_k] if gather else x[places]).float(), a_host, b_host, slot, expert)
    assert torch.equal(y[untouched], before[untouched])
    assert_near(y, before.float() + expected, f"fused_moe_lora, {rows} rows", case.name)
    if y.dtype == torch.float32:
        assert torch.allclose(y - before, expected, atol=1e-4)
    again = before.clone()
    fused_moe_lora(again, x, a, b, made, Workspace(device), gather=gather)
    assert torch.equal(y, again), "two runs differ"


@pytest.mark.parametrize("rows", ["pair", "sorted"])
@pytest.mark.parametrize("half", ["13", "2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_loop(device, rows, half, dtype) -> None:
    case = make_case(spec=MoESpec(4, 2, 40, 24), m=9, ranks=(8, 3, 20), layouts=LAYOUTS, active=6, slots=6, dtype=dtype, device=device, routing="partial")
    check(case, rows=rows, half=half)


@pytest.mark.parametrize("rows", ["pair", "sorted"])
def test_not_gated(device, rows) -> None:
    check(make_case(spec=MoESpec(4, 2, 32, 32, activation="relu2", gated=False), m=5, ranks=(8, 0), active=2, device=device), rows=rows, half="13")


def test_many_tokens(device) -> None:
    case = make_case(spec=MoESpec(3, 1, 16, 16), m=4097, device=device, ranks=(4, 8), active=2, slots=2, popularity="zipf", routing="zipf")
    check(case, rows="sorted", half="13")


def test_refuses_wrong_rows(device) -> None:
    case = make_case(spec=MoESpec(4, 2, 32, 32), m=3, ranks=(8,), active=1, slots=1, device=device)
    made = Routing(case.topk_ids, case.token_slots, 4, 1, rows="pair")
    x, y = torch.zeros(3, 31, device=device), torch.zeros(6, 64, device=device)
    with pytest.raises(ValueError, match=r"moe_shrink: rows: expected contiguous torch.float32 \(3, 32\)"):
        fused_moe_lora(y, x, case.stacks.a13, case.stacks.b13, made, Workspace(device), gather=True)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [6, 12])
@pytest.mark.parametrize("adapters", [4, 6, 16])
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("half", ["13", "2"])
def test_peers_grid(device, top_k, adapters, rank, half) -> None:
    """The case grid that vLLM and SGLang publish for this op: 100 tokens, 64 experts, 2048 -> 1408."""
    sizes = {"ranks": (rank,), "layouts": ("split",), "active": adapters, "slots": adapters}
    check(make_case(spec=MoESpec(64, top_k, 2048, 1408), m=100, dtype=torch.bfloat16, device=device, **sizes), rows="sorted", half=half)
