"""moe_lora_align_block_size on the CPU: invariants against a plain sort, the worked example, buffers, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_lora_moe.ops.moe_lora_align import (
    Alignment,
    empty_alignment,
    max_tiles,
    moe_lora_align_block_size,
)
from tests.moe_cases import POPULARITIES, ROUTINGS, TOKENS, make_case
from tests.references import assert_alignment


def test_worked_example() -> None:
    ids, slots = torch.tensor([[0, 2], [2, 0], [2, -1]]), torch.tensor([1, -1, -1], dtype=torch.int32)
    result = moe_lora_align_block_size(ids, slots, 3, 2, 2, 2)
    assert result.sorted_pairs.tolist() == [3, 0, 2, 4, 1, 5]
    assert result.base_tiles[:3].tolist() == [[0, 0, 2], [2, 2, 2], [2, 4, 1]]
    assert result.lora_tiles[:2].tolist() == [[0, 1, 1, 1], [2, 1, 4, 1]]
    assert result.counts.tolist() == [5, 3, 2, 2]


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_invariants(m: int, routing: str) -> None:
    for popularity in POPULARITIES:
        case = make_case(m=m, routing=routing, popularity=popularity, hidden=8, inter=8, ranks=(1,))
        for base_block, lora_block in ((16, 16), (1, 1), (64, 8), (3, 5)):
            args = (case.topk_ids, case.token_slots, case.spec.num_experts, case.num_slots, base_block, lora_block)
            assert_alignment(moe_lora_align_block_size(*args), *args)


@pytest.mark.parametrize("experts, slots", [(1, 1), (1024, 256), (7, 256)])
def test_extreme_sizes(experts: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, experts, (65, 3), generator=generator)
    token_slots = torch.randint(-1, slots, (65,), generator=generator, dtype=torch.int32)
    assert_alignment(moe_lora_align_block_size(ids, token_slots, experts, slots, 16, 8), ids, token_slots, experts, slots, 16, 8)


def test_no_tokens_no_experts_no_slots() -> None:
    empty = moe_lora_align_block_size(torch.empty(0, 4, dtype=torch.int32), torch.empty(0, dtype=torch.int32), 8, 2, 16, 16)
    assert empty.counts.tolist() == [0, 0, 0, 0]
    nowhere = moe_lora_align_block_size(torch.full((3, 2), -1), torch.zeros(3, dtype=torch.int32), 8, 2, 16, 16)
    assert nowhere.counts.tolist() == [0, 0, 0, 0] and nowhere.sorted_pairs.tolist() == [0, 1, 2, 3, 4, 5]
    ids = torch.tensor([[5, 0], [5, 9], [0, -7]])  # 9 and -7 are no experts
    assert_alignment(moe_lora_align_block_size(ids, None, 8, 3, 2, 2), ids, None, 8, 3, 2, 2)
    beyond = torch.tensor([3, -5, 1], dtype=torch.int32)  # only slot 1 exists
    assert_alignment(moe_lora_align_block_size(ids, beyond, 8, 3, 2, 2), ids, beyond, 8, 3, 2, 2)


def test_base_alignment_is_the_same_op_without_slots() -> None:
    case = make_case(m=133, hidden=8, inter=8, ranks=(1,))
    with_slots = moe_lora_align_block_size(case.topk_ids, case.token_slots, 8, case.num_slots, 16, 16)
    without = moe_lora_align_block_size(case.topk_ids, None, 8, case.num_slots, 16, 16)
    tiles = int(without.counts[1])
    assert torch.equal(without.base_tiles[:tiles], with_slots.base_tiles[:tiles])
    assert without.counts[2:].tolist() == [0, 0]


def test_bounds_hold_for_the_worst_routing() -> None:
    """As many groups as there can be, each one pair beyond a full tile."""
    experts, slots, block = 4, 3, 4
    expert = torch.arange(experts).repeat_interleave(slots).repeat_interleave(block + 1)
    slot = torch.arange(slots).repeat_interleave(block + 1).repeat(experts).to(torch.int32)
    result = moe_lora_align_block_size(expert[:, None], slot, experts, slots, block, block)
    assert_alignment(result, expert[:, None], slot, experts, slots, block, block)
    pairs = expert.numel()
    assert int(result.counts[2]) == 2 * experts * slots <= max_tiles(pairs, experts * slots, block) == result.lora_tiles.shape[0]
    assert int(result.counts[1]) <= max_tiles(pairs, experts, block) == result.base_tiles.shape[0]


def test_callers_buffers_are_used_and_repeat_equal() -> None:
    case = make_case(m=40, hidden=8, inter=8, ranks=(1,))
    args = (case.topk_ids, case.token_slots, 8, case.num_slots, 16, 8)
    buffers = empty_alignment(80, 8, case.num_slots, 16, 8, torch.device("cpu"))
    first = moe_lora_align_block_size(*args, buffers=buffers)
    assert first is buffers
    assert torch.equal(first.sorted_pairs, moe_lora_align_block_size(*args).sorted_pairs)


def test_fake_and_schema() -> None:
    case = make_case(m=5, hidden=8, inter=8, ranks=(1,))
    buffers = empty_alignment(10, 8, case.num_slots, 16, 8, torch.device("cpu"))
    tensors = (buffers.sorted_pairs.zero_(), buffers.base_tiles.zero_(), buffers.lora_tiles.zero_(), buffers.counts.zero_(), torch.empty(0, dtype=torch.int32))
    op = torch.ops.sglang_lora_moe.moe_lora_align_block_size.default
    torch.library.opcheck(op, (case.topk_ids, case.token_slots, 8, case.num_slots, 16, 8, *tensors), test_utils=("test_schema", "test_faketensor"))


IDS, SLOTS = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"topk_ids": IDS.float()}, "expected topk_ids to be contiguous int32 or int64 [M, K], got torch.float32 (3, 2)"),
        ({"topk_ids": torch.zeros(2, 3, dtype=torch.int32).t()}, "with strides (1, 3)"),
        ({"topk_ids": IDS[0]}, "got torch.int32 (2,)"),
        ({"token_slots": SLOTS[:2]}, "token_slots: expected contiguous int32 (3,) on cpu, got torch.int32 (2,)"),
        ({"token_slots": SLOTS.long()}, "got torch.int64 (3,)"),
        ({"num_experts": 0}, "expected num_experts in 1..1024, got 0"),
        ({"num_experts": 1025}, "expected num_experts in 1..1024, got 1025"),
        ({"num_slots": 257}, "expected num_slots in 0..256, got 257"),
        ({"base_block": 0}, "got base_block 0, lora_block 16"),
        ({"buffers": empty_alignment(5, 4, 2, 16, 16, torch.device("cpu"))}, "sorted_pairs: expected contiguous int32 (6,) on cpu, got torch.int32 (5,)"),
    ],
)
def test_errors_name_expected_and_actual(change: dict[str, Any], sentence: str) -> None:
    args: dict[str, Any] = {"topk_ids": IDS, "token_slots": SLOTS, "num_experts": 4, "num_slots": 2, "base_block": 16, "lora_block": 16} | change
    with pytest.raises(ValueError, match="moe_lora_align_block_size") as error:
        moe_lora_align_block_size(**args)
    assert sentence in str(error.value)


def test_larger_tile_buffers_are_accepted_and_smaller_refused() -> None:
    good = empty_alignment(6, 4, 2, 16, 16, torch.device("cpu"))
    wide = Alignment(good.sorted_pairs, torch.empty(99, 3, dtype=torch.int32), good.lora_tiles, good.counts)
    moe_lora_align_block_size(IDS, SLOTS, 4, 2, 16, 16, buffers=wide)
    narrow = Alignment(good.sorted_pairs, good.base_tiles[:1], good.lora_tiles, good.counts)
    with pytest.raises(ValueError, match=r"base_tiles: expected contiguous int32 at least \(4, 3\) on cpu, got torch.int32 \(1, 3\)"):
        moe_lora_align_block_size(IDS, SLOTS, 4, 2, 16, 16, buffers=narrow)
