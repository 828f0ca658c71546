"""moe_combine with an addend against loops in float32: ranks and layouts mixed, tokens without an adapter, pairs without an expert."""

from __future__ import annotations

import pytest
import torch

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.moe_combine import moe_combine
from tests.moe_cases import LAYOUTS, MoECase, make_case
from tests.references import assert_near, stack_matrix


def check(case: MoECase) -> None:
    """What pairs without an expert would have, and columns of s beyond a row's rank, are NaN: never to be read."""
    spec, b, device = case.spec, case.stacks.b2, case.x.device
    tokens, top_k = case.topk_ids.shape
    down = torch.randn(tokens * top_k, spec.hidden_size, device=device).to(case.x.dtype)
    s = torch.randn(1, tokens * top_k, b.shrink_width, device=device).to(case.x.dtype)
    expected = torch.zeros(tokens, spec.hidden_size, device=device)
    for pair, expert in enumerate(case.topk_ids.view(-1).tolist()):
        slot = int(case.token_slots[pair // top_k])
        if not 0 <= expert < spec.num_experts:
            down[pair], s[0, pair] = float("nan"), float("nan")
            continue
        matrix = stack_matrix(b, slot, expert, False) if 0 <= slot < case.num_slots else None
        rank = 0 if matrix is None else matrix.shape[1]
        s[0, pair, rank:] = float("nan")
        delta = 0.0 if matrix is None else matrix @ s[0, pair, :rank].float()
        expected[pair // top_k] += case.topk_weights.view(-1)[pair] * (down[pair].float() + delta)
    out = torch.full((tokens, spec.hidden_size), float("nan"), device=device, dtype=case.x.dtype)
    low = LowRank(s, b, case.token_slots)
    assert moe_combine(down, case.topk_ids, case.topk_weights, spec.num_experts, out, low) is out
    assert_near(out, expected, "moe_combine with an addend", case.name)
    again = moe_combine(down, case.topk_ids, case.topk_weights, spec.num_experts, torch.empty_like(out), low)
    assert torch.equal(out, again), "two runs differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ["uniform", "some_invalid", "partial", "all_invalid"])
def test_equals_loop(device, dtype, routing) -> None:
    spec = MoESpec(4, 3, 40, 24)
    check(make_case(spec=spec, m=9, ranks=(8, 3, 20), layouts=LAYOUTS, active=6, slots=7, base_share=0.3, dtype=dtype, device=device, routing=routing))


@pytest.mark.parametrize("ranks", [(1,), (16,), (256, 24), (0, 64)], ids=str)
def test_ranks(device, ranks) -> None:
    check(make_case(spec=MoESpec(4, 2, 72, 16), m=5, ranks=ranks, active=2, slots=2, dtype=torch.float16, device=device, popularity="distinct"))


@pytest.mark.parametrize("slots", [(-1, -1), (-5, 2), (2, 9)], ids=str)
def test_tokens_without_an_adapter(device, slots) -> None:
    """Slots outside the table count as none."""
    case = make_case(spec=MoESpec(4, 2, 72, 16), m=2, ranks=(8,), active=2, slots=2, device=device)
    case.token_slots = torch.tensor(slots, dtype=torch.int32, device=device)
    check(case)


def test_real_widths(device) -> None:
    check(make_case(spec=MoESpec(16, 8, 2048, 16), m=16, ranks=(16,), active=4, slots=4, base_share=0.1, dtype=torch.float16, device=device))
