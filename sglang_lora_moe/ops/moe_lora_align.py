"""moe_lora_align_block_size: one sort of a layer's routed pairs by (expert, slot), and tile lists over it.

    sorted_pairs[i] = the pair (m * K + k) at place i; pairs are ordered by (expert, slot, pair), slot -1 first in each
    expert, nothing is padded; pairs with an id < 0 or >= E come last, after `counts[0]` valid ones.
    base_tiles: (expert, start, rows) with rows <= base_block, covering each expert's run, experts ascending.
    lora_tiles: (expert, slot, start, rows) with rows <= lora_block, covering each (expert, slot >= 0) run.
    counts = (valid pairs, base tiles, lora tiles, lora groups).

Worked example, E = 3, base_block 2: topk_ids [[0, 2], [2, 0], [2, -1]], token_slots [1, -1, -1]
    expert 0: pair 3 (slot -1), pair 0 (slot 1);  expert 2: pairs 2, 4 (slot -1), pair 1 (slot 1);  pair 5 has no expert
    sorted_pairs [3, 0, 2, 4, 1, 5], base_tiles [(0, 0, 2), (2, 2, 2), (2, 4, 1)], lora_tiles [(0, 1, 1, 1), (2, 1, 4, 1)],
    counts [5, 3, 2, 2]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Alignment:
    """Buffers of one alignment, owned by the caller. All int32. Entries beyond the counts are undefined."""

    sorted_pairs: torch.Tensor  # [P]
    base_tiles: torch.Tensor  # [max base tiles, 3]
    lora_tiles: torch.Tensor  # [max lora tiles, 4]
    counts: torch.Tensor  # [4]


def max_base_tiles(pairs: int, experts: int, block: int) -> int:
    """Most tiles that `pairs` pairs over `experts` runs can need: every run may end in one partial tile."""
    return min(pairs, pairs // block + min(experts, pairs))


def max_lora_tiles(pairs: int, experts: int, slots: int, block: int) -> int:
    return min(pairs, pairs // block + min(experts * slots, pairs))
