"""What every kernel with a low-rank delta shares: the addend it is given, and the device functions that add it.

    acc[row, n] += sum over r of B(t, expert)[n, r] * s[row, r]        t = the row's slot; none if t < 0

s [splits, P, width] holds scaling * A x, as a sum over `splits`: float32 per pair, grouped in the activation dtype that the
tensor cores take (scaled in float32, rounded once). Columns [0, R); with split_a these are the gate half's, and the up half's
are [max_rank, max_rank + R). Columns beyond a row's own rank, and rows without an adapter, are never read.
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

NO_SLOT = tl.constexpr(1 << 30)
COLUMNS = 32  # rank columns that one product of a tile takes: two slots of rank 16, half a slot of rank 64; 64 spill registers


@dataclass(frozen=True)
class LowRank:
    """An addend of an expert GEMM: s [splits, P, width] in the GEMM's row order, and B by slot."""

    s: torch.Tensor
    b: Stack
    token_slots: torch.Tensor  # int32 [M]

    @property
    def splits(self) -> int:
        return self.s.shape[0]

    @property
    def rank_block(self) -> int:
        """Rank columns of one slot that a kernel takes at once; a tensor-core product needs at least 16."""
        return min(COLUMNS, max(16, triton.next_power_of_2(self.b.max_rank)))

    def kernel_args(self) -> tuple:
        b = self.b
        return (self.token_slots, self.s, b.pool, b.offset, b.expert_stride, b.rank, b.split_a, self.s.shape[2])

    def kernel_options(self) -> dict[str, int | bool]:
        align = 16 // self.b.pool.element_size()
        return {"ADDEND": True, "SPLITS": self.splits, "RANK_BLOCK": self.rank_block, "MAX_RANK": self.b.max_rank, "ALIGN": align}


NO_ADDEND = (None,) * 7 + (0,)
NO_OPTIONS = {"ADDEND": False, "SPLITS": 1, "RANK_BLOCK": 16, "MAX_RANK": 16, "ALIGN": 8}


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for the kernel before this one, then let the one after start. NOTE: every program must call it, exiting ones too;
    a dependent may then rely on all kernels before its predecessor being complete."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def slot_columns(slots, after, COLUMNS: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """The next distinct slots > `after` of a tile's rows, ascending, each over RANK_BLOCK of the COLUMNS; NO_SLOT where none is left."""
    column = tl.arange(0, COLUMNS)
    found = tl.full((COLUMNS,), NO_SLOT, tl.int32)
    for j in tl.static_range(COLUMNS // RANK_BLOCK):
        after = tl.min(tl.where(slots > after, slots, NO_SLOT), 0)
        found = tl.where(column // RANK_BLOCK == j, after, found)
    return found


@triton.jit
def slot_tables(slot_of, expert, offset_ptr, stride_ptr, rank_ptr, split_ptr, ALIGN: tl.constexpr):
    """(B's place in the pool in units of 16 bytes, rank, split) per column of `slot_columns`; rank 0 where there is no slot."""
    some = slot_of < NO_SLOT
    place = tl.load(offset_ptr + slot_of, mask=some, other=0) + expert * tl.load(stride_ptr + slot_of, mask=some, other=0)
    rank = tl.load(rank_ptr + slot_of, mask=some, other=0)
    return place // ALIGN, rank, tl.load(split_ptr + slot_of, mask=some, other=0)


@triton.jit
def load_s(s_ptr, row, num_pairs, width, column, mask, SPLITS: tl.constexpr):
    """The sum over the splits of s[row, column]; row and column are broadcast against each other."""
    low = tl.load(s_ptr + row.to(tl.int64) * width + column, mask=mask, other=0.0)
    for i in tl.static_range(1, SPLITS):
        low += tl.load(s_ptr + (row + i * num_pairs).to(tl.int64) * width + column, mask=mask, other=0.0)
    return low


@triton.jit
def _load_half(
    s_ptr, rows, slots, num_pairs, width, half, pool_ptr, place, brow, in_rows, slot, pieces, r,
    SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """(s of each row in its own slot's columns [BM, columns], B^T [columns, BN]) for one half of gate_up.

    The rank is `pieces` * PIECE. Slot, rank and place are constant over the RANK_BLOCK columns of a slot, and masks over PIECE
    columns; the hints say so to the compiler (which keeps them only on results of this function), and loads take 16 bytes.
    """
    rank = tl.multiple_of(tl.max_constancy(pieces * PIECE, RANK_BLOCK), PIECE)
    fits = tl.max_constancy(r // PIECE < pieces, PIECE)
    base = tl.multiple_of(tl.max_constancy(place * ALIGN, RANK_BLOCK), ALIGN)
    column = tl.max_constancy(half * MAX_RANK, RANK_BLOCK)
    s_mask = tl.max_constancy(slots[:, None] == slot[None, :], (1, PIECE)) & fits[None, :]
    low = load_s(s_ptr, rows[:, None], num_pairs, width, (column + r)[None, :], s_mask, SPLITS)
    mask = fits[:, None] & in_rows[None, :]
    b = tl.load(pool_ptr + base[:, None] + brow[None, :] * rank[:, None] + r[:, None], mask=mask, other=0.0)
    return low.to(b.dtype), b


@triton.jit
def tile_delta(
    acc_gate, acc_up, slots, slot_of, place, rank, split, rows, num_pairs, expert, rn, N, s_ptr, width,
    pool_ptr, offset_ptr, stride_ptr, rank_ptr, split_ptr,
    GATED: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the delta to a tile [BM, BN] of one expert whose rows may have any slots (-1 = none).

    `slot_of` and what follows are the first columns, which the caller fetched early; further slots follow here. One product
    takes COLUMNS // RANK_BLOCK slots at once: a row's s is zero in the columns of other slots.
    """
    r = tl.arange(0, COLUMNS) % RANK_BLOCK
    brow = rn.to(tl.int64)
    more = tl.min(slot_of) < NO_SLOT
    while more:
        aligned = tl.max(rank % ALIGN) == 0
        for r0 in tl.range(0, tl.max(rank), RANK_BLOCK, num_stages=1):
            if aligned:
                low, b = _load_half(
                    s_ptr, rows, slots, num_pairs, width, split * 0, pool_ptr, place, brow, rn < N, slot_of, rank // ALIGN, r0 + r,
                    SPLITS, RANK_BLOCK, MAX_RANK, ALIGN, ALIGN,
                )  # fmt: skip
            else:
                low, b = _load_half(
                    s_ptr, rows, slots, num_pairs, width, split * 0, pool_ptr, place, brow, rn < N, slot_of, rank, r0 + r,
                    SPLITS, RANK_BLOCK, MAX_RANK, ALIGN, 1,
                )  # fmt: skip
            acc_gate = tl.dot(low, b, acc_gate, input_precision=PRECISION)
            if GATED:
                if aligned:
                    low, b = _load_half(
                        s_ptr, rows, slots, num_pairs, width, split, pool_ptr, place, brow + N, rn < N, slot_of, rank // ALIGN, r0 + r,
                        SPLITS, RANK_BLOCK, MAX_RANK, ALIGN, ALIGN,
                    )  # fmt: skip
                else:
                    low, b = _load_half(
                        s_ptr, rows, slots, num_pairs, width, split, pool_ptr, place, brow + N, rn < N, slot_of, rank, r0 + r,
                        SPLITS, RANK_BLOCK, MAX_RANK, ALIGN, 1,
                    )  # fmt: skip
                acc_up = tl.dot(low, b, acc_up, input_precision=PRECISION)
        last = tl.max(slot_of)
        more = last < NO_SLOT  # no column was left empty: there may be more slots
        if more:
            slot_of = slot_columns(slots, last, COLUMNS, RANK_BLOCK)
            place, rank, split = slot_tables(slot_of, expert, offset_ptr, stride_ptr, rank_ptr, split_ptr, ALIGN)
            more = tl.min(slot_of) < NO_SLOT
    return acc_gate, acc_up


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
