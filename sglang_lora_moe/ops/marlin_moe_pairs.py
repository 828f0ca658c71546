"""The two expert GEMMs of a few tokens over the layout of `ops/marlin_moe.py`, a pair at a time, with their adapters inside.

    gate_up   out[p] = act(w13[e] x[m] + b13[e] + B13 s13)                               p = m * K + k, e = topk_ids[m, k]
    down      out[m] = sum over k of weight[m, k] * (w2[e] act[p] + b2[e] + B2 s2)       the combine is inside

s13 = scaling * A13 x is made in shares by each pair's first blocks, s2 = scaling * A2 act in parts by all of gate_up's. Both are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from sglang_lora_moe.lora.stacks import ExpertStacks, Stack
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import define
from sglang_lora_moe.ops.lora_linear import LinearAddend
from sglang_lora_moe.ops.marlin_moe import MarlinWeight, activation_of, padded_units
from sglang_lora_moe.ops.skinny_linear import empty_s

define(
    "marlin_moe_pairs(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, Tensor topk_ids, Tensor? topk_weights, Tensor? slots, "
    "Tensor? a_pool, Tensor? a_offset, Tensor? a_stride, Tensor? b_pool, Tensor? b_offset, Tensor? b_stride, Tensor? rank, Tensor? split, Tensor? scaling, "
    "Tensor? next_pool, Tensor? next_offset, Tensor? next_stride, Tensor? next_rank, Tensor? next_scaling, Tensor? then_pool, Tensor? then_offset, "
    "Tensor? then_stride, Tensor(b!)? s, Tensor(c!)? other_s, Tensor(a!) out, int rows, int group_size, float alpha, float cubic, float limit, "
    "float shift, int units, int shrinks, bool alone, bool overlap) -> ()"
)
define(
    "marlin_linear_pairs(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, Tensor ids, Tensor weights, Tensor? s, Tensor? slots, "
    "Tensor? pool, Tensor? offset, Tensor? rank, Tensor? scaling, Tensor? starts, Tensor(a!) out, int group_size, int part_stride, int units, bool alone) -> ()"
)

MOST_SHRINKS, SHARES = 16, 8  # blocks that share a pair's A x and wait for each other; shares of A's columns
MOST_CHOSEN = 32  # experts of a token
MEMORY = 113 * 1024  # bytes of shared memory that a block may want, kBeside of csrc/marlin_moe_pairs_lora.cuh: more than GPUs but sm_80, 90 and 100 have
MOST_UNITS, RESIDENT = 16, 2  # units of a block of gate_up; blocks that a multiprocessor holds
FEW_RANKS, AT_ONCE = 16, 2048  # no more ranks than these gain by warps of their own only where A has so few columns, as in csrc/marlin_moe_pairs_lora.cuh


@dataclass(frozen=True)
class PairAdapters:
    """A layer's adapters for tokens of these slots (int32 [M], -1 = none), and what its launches hand on, float32: s13 [P, shares of A's columns, width],
    `empty_s` before and after the layer, s2 [P, gate_up's blocks of a pair, width]. Widths are of ranks in sixteens."""

    stacks: ExpertStacks
    slots: torch.Tensor
    s13: torch.Tensor
    s2: torch.Tensor
    shrinks: int  # blocks that share a pair's A x
    alone: int  # units of a block of gate_up up to which it is alone on a multiprocessor

    @classmethod
    def allocate(cls, stacks: ExpertStacks, slots: torch.Tensor, spec: MoESpec, workspace: Workspace) -> PairAdapters:
        sms, pairs = launch.multiprocessors(slots.device), slots.shape[0] * spec.top_k
        row_units, _ = padded_units(spec.w13_rows, spec.hidden_size, 2)
        alone = _units_alone(stacks, slots.device)
        parts = -(-row_units // units_of(pairs, row_units, sms, False, alone))  # gate_up's blocks of a pair
        shape = (pairs, SHARES, _sixteens(stacks.a13))
        elements = math.prod(shape)
        s13 = _exchange(1 << max(12, (elements - 1).bit_length()), slots.device)[:elements].view(shape)
        s2 = workspace.get("lora.2.s", (pairs, parts, _sixteens(stacks.a2)), torch.float32)
        return cls(stacks, slots, s13, s2, max(1, min(MOST_SHRINKS, parts, sms // 2)), alone)

    def arguments(self, down: bool) -> tuple[torch.Tensor | None, ...]:
        s = self.stacks
        if down:
            tables = (None, None, None, s.b2.pool, s.b2.offset, s.b2.expert_stride, s.b2.rank, s.b2.split_a, s.b2.scaling, *(None,) * 8)
            return (self.slots, *tables, self.s2, self.s13)
        first = (s.a13.pool, s.a13.offset, s.a13.expert_stride, s.b13.pool, s.b13.offset, s.b13.expert_stride, s.b13.rank, s.b13.split_a, s.b13.scaling)
        second = (s.a2.pool, s.a2.offset, s.a2.expert_stride, s.a2.rank, s.b2.scaling, s.b2.pool, s.b2.offset, s.b2.expert_stride)
        return (self.slots, *first, *second, self.s13, self.s2)


def _sixteens(a: Stack) -> int:
    return -(-a.max_rank // 16) * 16 * (2 if a.may_split else 1)


def _units_alone(stacks: ExpertStacks, device: torch.device) -> int:
    """Up to which one block a multiprocessor, with more warps for adapters, takes less than two: measured on Qwen3, DeepSeek and gpt-oss."""
    rank = stacks.a2.max_rank
    if not launch.has_wgmma(device) or (rank <= FEW_RANKS and stacks.a13.dim > AT_ONCE):
        return 0
    return 6 if rank <= 2 * FEW_RANKS else 12


@lru_cache(maxsize=64)
def _exchange(elements: int, device: torch.device) -> torch.Tensor:
    return empty_s(elements, device)


@lru_cache(maxsize=256)
def units_of(owners: int, row_units: int, sms: int, down: bool, alone: int = 0) -> int:
    """Units of 32 rows of a block: as few as let all blocks run at once, each alone on a multiprocessor where `alone` units suffice.

    For down 1, or 0 for half of one."""
    if down:
        return int(10 * owners * row_units > 9 * sms)
    if alone and owners * -(-row_units // alone) <= sms:
        return next(units for units in range(1, alone + 1) if owners * -(-row_units // units) <= sms)
    return next((units for units in range(1, MOST_UNITS) if owners * -(-row_units // units) <= RESIDENT * sms), MOST_UNITS)


def marlin_moe_pairs(
    x: torch.Tensor, weight: MarlinWeight, topk_ids: torch.Tensor, topk_weights: torch.Tensor | None, out: torch.Tensor, *,
    activation: MoESpec | None = None, adapters: PairAdapters | None = None,
) -> torch.Tensor:  # fmt: skip
    """gate_up with an `activation`: x [M, k] -> out [P, rows / 2]; down with `topk_weights` [M, K]: x [P, k] -> out [M, rows]. Returns out.

    Rows of gate_up of pairs without an expert are not written, and not read by down. Ids and weights must be older than what the kernel
    before down wrote. ValueError unless exactly one of both is given; RuntimeError for wrong shapes, types and devices.
    """
    down = topk_weights is not None
    if down == (activation is not None):
        raise ValueError("marlin_moe_pairs: gate_up has an activation and down router weights, never both")
    sms = launch.multiprocessors(x.device)
    row_units = weight.packed.shape[1]
    units = units_of(topk_ids.shape[0] if down else topk_ids.numel(), row_units, sms, down, 0 if adapters is None else adapters.alone)
    blocks = topk_ids.shape[0] * row_units * (2 - units) if down else topk_ids.numel() * -(-row_units // units)
    alone = blocks <= sms and launch.has_wgmma(x.device)
    if x.is_cuda:
        build.load()
    torch.ops.sglang_lora_moe.marlin_moe_pairs(
        x, weight.packed, weight.scales, weight.zeros, weight.bias, topk_ids, topk_weights,
        *((None,) * 20 if adapters is None else adapters.arguments(down)),
        out, weight.rows, weight.group_size, *activation_of(activation)[1:], units, 1 if adapters is None else adapters.shrinks, alone, True,
    )  # fmt: skip
    return out


@lru_cache(maxsize=64)
def _one_expert(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of a linear's tokens, as of a layer with one expert. Kept: captured graphs read them."""
    return torch.zeros(tokens, dtype=torch.int32, device=device), torch.ones(tokens, dtype=torch.float32, device=device)


def marlin_linear_pairs(x: torch.Tensor, weight: MarlinWeight, addend: LinearAddend | None = None) -> torch.Tensor:
    """x [M, k] times a weight of one expert, and what its adapters add, whose s the kernel before has filled: [M, rows]."""
    tokens, row_units, sms = x.shape[0], weight.packed.shape[1], launch.multiprocessors(x.device)
    units = units_of(tokens, row_units, sms, True)
    low: tuple = (None,) * 7
    if addend is not None:
        b = addend.tables.b
        low = (addend.s, addend.slots, b.pool, b.offset, b.rank, b.scaling, addend.tables.starts)
    if x.is_cuda:
        build.load()
    out, alone = x.new_empty(tokens, weight.rows), tokens * row_units * (2 - units) <= sms and launch.has_wgmma(x.device)
    torch.ops.sglang_lora_moe.marlin_linear_pairs(
        x, weight.packed, weight.scales, weight.zeros, weight.bias, *_one_expert(tokens, x.device), *low, out, weight.group_size,
        0 if addend is None else addend.tables.stride, units, alone,
    )  # fmt: skip
    return out


def can_add(addend: LinearAddend, x: torch.Tensor) -> bool:
    """Whether `marlin_linear_pairs` can: a block's rows lie in one part, s is read four ranks at a time."""
    return addend.tables.divisor % 32 == 0 and addend.s.shape[3] % 4 == 0 and addend.tables.b.pool.dtype == x.dtype
