"""Routing: the host view agrees with the plain sort, and everything is computed at most once."""

from __future__ import annotations

import pytest
import torch

from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.ops import moe_lora_align
from tests.moe_cases import ROUTINGS, make_case
from tests.references import ref_sorted_pairs


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("m", [1, 7, 133])
def test_host_view(routing: str, m: int) -> None:
    case = make_case(m=m, routing=routing, hidden=8, inter=8, ranks=(1,))
    view = Routing(case.topk_ids, case.token_slots, 8, case.num_slots)
    expected = [item for item in ref_sorted_pairs(case.topk_ids, case.token_slots, 8, case.num_slots) if item[0] < 8]
    assert view.order.tolist() == [pair for _, _, pair in expected]
    assert view.tokens.tolist() == [pair // 2 for _, _, pair in expected]
    flat = [(expert, slot) for expert, slot, rows in view.groups for _ in range(rows)]
    assert flat == [(expert, slot) for expert, slot, _ in expected]
    assert len(set(flat)) == len(view.groups), "a group appears once"
    by_expert = [expert for expert, rows in view.base_runs for _ in range(rows)]
    assert by_expert == [expert for expert, _, _ in expected] and len({e for e, _ in view.base_runs}) == len(view.base_runs)
    assert torch.equal(view.gather(case.x), case.x[view.tokens])
    assert torch.equal(view.sorted_pairs[: len(expected)].long(), view.order)


def test_sorts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real_sort, real_align = moe_lora_align.sort_pairs, moe_lora_align.moe_lora_align_block_size
    case = make_case(m=9, hidden=8, inter=8, ranks=(1,))
    monkeypatch.setattr(moe_lora_align, "sort_pairs", lambda *a: calls.append("sort") or real_sort(*a))
    view = Routing(case.topk_ids, case.token_slots, 8, case.num_slots)
    assert calls == []
    _ = view.order, view.groups, view.base_runs, view.tokens
    first = view.gather(case.x)
    assert calls == ["sort"] and view.gather(case.x) is first
    monkeypatch.setattr(moe_lora_align, "sort_pairs", real_sort)
    monkeypatch.setattr(moe_lora_align, "moe_lora_align_block_size", lambda *a, **k: calls.append("align") or real_align(*a, **k))
    _ = view.alignment, view.sorted_pairs
    assert calls == ["sort", "align"]


def test_without_slots_there_are_no_lora_groups() -> None:
    case = make_case(m=9, hidden=8, inter=8, ranks=(1,))
    view = Routing(case.topk_ids, None, 8, case.num_slots)
    assert view.num_slots == 0 and all(slot == -1 for _, slot, _ in view.groups)
    assert view.alignment.counts[2:].tolist() == [0, 0]
