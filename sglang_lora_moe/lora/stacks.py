"""Device tables through which every LoRA kernel finds an adapter's weights. One `Stack` per projection.

Slot s of a stack is a row-major matrix set inside one flat pool of the activation dtype:

    matrix(s, e) = pool[offset[s] + e * expert_stride[s] :].view(rows, cols)        expert_stride 0 = shared by all experts

    A stacks:  [c * rank[s], cols]   c = 2 if split_a[s] (gate rows, then up rows, each of rank[s]) else 1
    B stacks:  [rows, rank[s]]       with split_a: rows [0, rows/2) multiply the gate half of A x, the rest the up half

    y += scaling[s] * B(s, e) (A(s, e) x)       Hu et al. 2021; scaling = alpha / R, or alpha / sqrt(R) for rsLoRA

rank[s] = 0 means that slot s has nothing for this projection. Ranks and layouts mix freely in one batch.
The tables are written by `lora/memory_pool.py` alone, in stream order, and never move.
"""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Stack:
    """Table of one A or B projection over all slots. `dim` = cols of an A stack (inputs), rows of a B stack (outputs)."""

    pool: torch.Tensor  # [N] activation dtype
    offset: torch.Tensor  # int64 [S], elements into pool
    expert_stride: torch.Tensor  # int64 [S]
    rank: torch.Tensor  # int32 [S]
    scaling: torch.Tensor  # float32 [S]
    split_a: torch.Tensor  # int32 [S], 0 or 1
    dim: int
    max_rank: int  # upper bound of rank[s], static; buffers for A x have (2 if may_split else 1) * max_rank columns
    may_split: bool = False
    # slot -> what torch implementations on the host derived from its table entries; dropped when the slot is written
    host_cache: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_slots(self) -> int:
        return self.rank.shape[0]

    @property
    def shrink_width(self) -> int:
        """Columns that A x may need: max_rank, or 2 * max_rank where gate and up may have their own A."""
        return self.max_rank * (2 if self.may_split else 1)


@dataclass(frozen=True)
class LinearStacks:
    """One LoRA pair of a linear part, a router or the language-model head."""

    a: Stack
    b: Stack


class EmbeddingStacks(LinearStacks):
    """The LoRA pair of the token embedding. `a` holds A transposed, [V, rank], so that a token reads one row of it."""


@dataclass(frozen=True)
class ExpertStacks:
    """The four projections of one layer's experts: A13 [.., H], B13 [2I, ..], A2 [.., I], B2 [H, ..]."""

    a13: Stack
    b13: Stack
    a2: Stack
    b2: Stack


def check_dims(name: str, stacks: ExpertStacks | LinearStacks, *expected: int) -> None:
    """Refuse stacks that were made for another layer than `name`."""
    found = tuple(stack.dim for stack in vars(stacks).values())
    if found != expected:
        raise ValueError(f"{name}: expected stacks of dims {expected}, got {found}")
