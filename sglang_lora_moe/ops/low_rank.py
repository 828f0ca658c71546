"""What every kernel with a low-rank delta shares: the addend it is given, and the device functions that add it.

    acc[row, n] += sum over r of B(t, expert)[n, r] * s[row, r]        t = the row's slot; none if t < 0

s [splits, P, width] holds scaling * A x, as a sum over `splits`: float32 per pair, grouped in the activation dtype that the
tensor cores take (scaled in float32, rounded once). Columns [0, R); with split_a these are the gate half's, and the up half's
are [max_rank, max_rank + R). Columns beyond a row's own rank, and rows without an adapter, are never read.

Grouped, the shrink also leaves a record per LoRA tile, so that a GEMM needs no search: int64 (first row, rows, rank, split,
place of B in the pool in units of 16 bytes); and per base tile the range of records that overlap it.

Offsets and expert strides of a stack are multiples of 16 bytes (the memory pool pads matrices to that), so that B is read in
16-byte pieces where the rank allows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_lora_moe.lora.stacks import Stack

RECORD = tl.constexpr(5)  # int64 fields of a record


@dataclass(frozen=True)
class LowRank:
    """An addend of an expert GEMM: s [splits, P, width] in the GEMM's row order, and B by slot; records and ranges if grouped."""

    s: torch.Tensor
    b: Stack
    token_slots: torch.Tensor  # int32 [M]
    records: torch.Tensor | None = None  # int64 [LoRA tiles, 5]
    ranges: torch.Tensor | None = None  # int32 [base tiles, 2]

    @property
    def rank_block(self) -> int:
        """Rank columns that a kernel takes at once; a tensor-core product needs at least 16."""
        return min(64, max(16, triton.next_power_of_2(self.b.max_rank)))

    def pair_args(self) -> tuple:
        b = self.b
        return (self.token_slots, self.s, b.pool, b.offset, b.expert_stride, b.rank, b.split_a, self.s.shape[2])

    def pair_options(self) -> dict[str, int | bool]:
        return {**self.tile_options(), "SPLITS": self.s.shape[0]}

    def tile_args(self) -> tuple:
        assert self.records is not None and self.ranges is not None and self.s.shape[0] == 1, "a grouped kernel needs the addend of a grouped shrink"
        return (self.s, self.b.pool, self.records, self.ranges, self.s.shape[2])

    def tile_options(self) -> dict[str, int | bool]:
        return {"ADDEND": True, "RANK_BLOCK": self.rank_block, "MAX_RANK": self.b.max_rank, "ALIGN": 16 // self.b.pool.element_size()}


NO_PAIR_ARGS = (None,) * 7 + (0,)
NO_TILE_ARGS = (None,) * 4 + (0,)
NO_TILE_OPTIONS = {"ADDEND": False, "RANK_BLOCK": 16, "MAX_RANK": 16, "ALIGN": 8}
NO_PAIR_OPTIONS = {**NO_TILE_OPTIONS, "SPLITS": 1}


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for the kernel before this one, then let the one after start. NOTE: every program must call it, exiting ones too;
    a dependent may then rely on all kernels before its predecessor being complete."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def load_s(s_ptr, row, num_pairs, width, column, mask, SPLITS: tl.constexpr):
    """The sum over the splits of s[row, column]; row and column are broadcast against each other."""
    low = tl.load(s_ptr + row.to(tl.int64) * width + column, mask=mask, other=0.0)
    for i in tl.static_range(1, SPLITS):
        low += tl.load(s_ptr + (row + i * num_pairs).to(tl.int64) * width + column, mask=mask, other=0.0)
    return low


@triton.jit
def load_record(records_ptr, t, inside):
    """(first row, rows, rank, split, B's place) of LoRA tile t; no rows where not `inside`."""
    ptr = records_ptr + RECORD * t
    start = tl.load(ptr, mask=inside, other=0)
    rows = tl.load(ptr + 1, mask=inside, other=0)
    rank = tl.load(ptr + 2, mask=inside, other=0).to(tl.int32)
    return start, rows, rank, tl.load(ptr + 3, mask=inside, other=0).to(tl.int32), tl.load(ptr + 4, mask=inside, other=0)


@triton.jit
def _half_delta(
    acc, s_ptr, width, mine, place, column, pool_ptr, b_place, brow, in_rows, rank, r0,
    RANK_BLOCK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += s[place, column + r0 ..] @ B[brow, r0 ..]^T over one block of rank columns."""
    r = r0 + tl.arange(0, RANK_BLOCK)
    s_ptrs = s_ptr + place.to(tl.int64)[:, None] * width + (column + r)[None, :]
    b_ptr = pool_ptr + b_place * ALIGN
    if rank % ALIGN == 0:
        fits = tl.max_constancy(r // ALIGN < rank // ALIGN, ALIGN)  # the hint lets loads take 16 bytes
        low = tl.load(s_ptrs, mask=mine[:, None] & fits[None, :], other=0.0)
        b = tl.load(b_ptr + brow[None, :] * (rank // ALIGN * ALIGN) + r[:, None], mask=fits[:, None] & in_rows[None, :], other=0.0)
    else:
        fits = r < rank
        low = tl.load(s_ptrs, mask=mine[:, None] & fits[None, :], other=0.0)
        b = tl.load(b_ptr + brow[None, :] * rank + r[:, None], mask=fits[:, None] & in_rows[None, :], other=0.0)
    return tl.dot(low, b, acc, input_precision=PRECISION)


@triton.jit
def tile_delta(
    acc, acc_up, first, last, start, rows, rank, split, b_place, place, rn, N, s_ptr, width, pool_ptr, records_ptr,
    GATED: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the delta to a tile [BM, BN] whose sorted places are `place`, from records first .. last - 1; the first one's fields are given."""
    brow = rn.to(tl.int64)
    for t in tl.range(first, last, num_stages=1):
        start1, rows1, rank1, split1, b_place1 = load_record(records_ptr, t + 1, t + 1 < last)
        mine = (place >= start) & (place < start + rows)
        for r0 in tl.range(0, rank, RANK_BLOCK, num_stages=1):
            acc = _half_delta(acc, s_ptr, width, mine, place, 0, pool_ptr, b_place, brow, rn < N, rank, r0, RANK_BLOCK, ALIGN, PRECISION)
            if GATED:
                column = split * MAX_RANK
                acc_up = _half_delta(acc_up, s_ptr, width, mine, place, column, pool_ptr, b_place, brow + N, rn < N, rank, r0, RANK_BLOCK, ALIGN, PRECISION)
        start, rows, rank, split, b_place = start1, rows1, rank1, split1, b_place1
    return acc, acc_up


@triton.jit
def row_delta(s_ptr, num_pairs, width, pair, column, pool_ptr, place, rn, N, rank, r0, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """sum over r >= r0 of B[rn, r] s[pair, column + r] of one pair, [BN] float32; `place` of B's row 0, in units of 16 bytes."""
    total = tl.zeros(rn.shape, dtype=tl.float32)
    for start in tl.range(r0, rank, RANK_BLOCK, num_stages=1):
        rr = start + tl.arange(0, RANK_BLOCK)
        b = load_b_rows(pool_ptr, place, rn, N, rank, rr, ALIGN)
        low = load_s(s_ptr, pair, num_pairs, width, column + rr, rr < rank, SPLITS)
        total += tl.sum(b.to(tl.float32) * low.to(tl.float32)[None, :], axis=1)
    return total


@triton.jit
def load_b_rows(pool_ptr, place, rn, N, rank, rr, ALIGN: tl.constexpr):
    """B[rn, rr] of one pair, [BN, R]."""
    b_ptr = pool_ptr + place * ALIGN
    if rank % ALIGN == 0:
        mask = (rn < N)[:, None] & tl.max_constancy(rr // ALIGN < rank // ALIGN, ALIGN)[None, :]
        b = tl.load(b_ptr + rn.to(tl.int64)[:, None] * (rank // ALIGN * ALIGN) + rr[None, :], mask=mask, other=0.0)
    else:
        b = tl.load(b_ptr + rn.to(tl.int64)[:, None] * rank + rr[None, :], mask=(rn < N)[:, None] & (rr < rank)[None, :], other=0.0)
    return b
