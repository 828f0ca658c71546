"""What every kernel with a low-rank delta shares: the addend it is given, and the device functions that add it.

    acc[row, n] += sum over r of B(t, expert)[n, r] * s[row, r]        t = the row's slot; none if t < 0

s [splits, P, width] holds scaling * A x, as a sum over `splits`: float32 per pair, grouped in the activation dtype that the
tensor cores take (scaled in float32, rounded once). Columns [0, R); with split_a these are the gate half's, and the up half's
are [max_rank, max_rank + R). Columns beyond a row's own rank, and rows without an adapter, are never read.

Grouped, the shrink also leaves a record per LoRA tile, so that a GEMM needs no search: int64 (first row, rows, rank, split,
place of B in the pool in units of 16 bytes); and per base tile the range of records that overlap it. Where the ranks are small a
GEMM adds several LoRA tiles in one product: their columns stand side by side, and a row's s is zero in those of the others.

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
COLUMNS_AT_ONCE = 32  # rank columns of several adapters that one product adds; more cost the GEMM's registers more than they save
FEW_ACCUMULATORS = 8  # of a thread: of so small programs as many as fit run at once, which hides their loads


@dataclass(frozen=True)
class LowRank:
    """An addend of an expert GEMM: s [splits, P, width] in the GEMM's row order, and B by slot; records and ranges if grouped.

    `following`: the GEMM is a layer's first, and makes s of the second, too; or the second, which may have its parts left to add up."""

    s: torch.Tensor
    b: Stack
    token_slots: torch.Tensor  # int32 [M]
    records: torch.Tensor | None = None  # int64 [LoRA tiles, 5]
    ranges: torch.Tensor | None = None  # int32 [base tiles, 2]
    following: Following | None = None
    a: Stack | None = None  # for a GEMM that finds adapters by slot; without records it computes s itself
    summed: torch.Tensor | None = None  # float32 [M, out]: B s summed over a token's experts, which down leaves for the combine

    @property
    def of_combine(self) -> LowRank | None:
        """This, where the combine of grouped rows adds it: s in pair order, which no GEMM finds."""
        return self if self.records is self.a is None else None

    @property
    def _ranks(self) -> int:
        """Rank columns that the widest adapter needs, as a power of two; a tensor-core product takes at least 16."""
        return max(16, triton.next_power_of_2(self.b.max_rank))

    def _options(self, rank_block: int) -> dict[str, int | bool]:
        return {"ADDEND": True, "RANK_BLOCK": rank_block, "MAX_RANK": self.b.max_rank, "ALIGN": 16 // self.b.pool.element_size()}

    def pair_args(self) -> tuple:
        b = self.b
        return (self.token_slots, self.s, b.pool, b.offset, b.expert_stride, b.rank, b.split_a, self.s.shape[2])

    def token_args(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int) -> tuple:
        """For `moe_combine.token_delta`."""
        b = self.b
        return (topk_ids, topk_weights, num_experts, self.token_slots, b.offset, b.expert_stride, b.rank, b.num_slots, self.s, b.pool, b.shrink_width)

    def pair_options(self) -> dict[str, int | bool]:
        return {**self._options(min(64, self._ranks)), "SPLITS": self.s.shape[0]}

    def tile_args(self) -> tuple:
        assert self.records is not None and self.ranges is not None and self.s.shape[0] == 1, "a grouped kernel needs the addend of a grouped shrink"
        return (self.s, self.b.pool, self.records, self.ranges, self.s.shape[2])

    def tile_options(self, accumulators: int, *, several: bool = False, ahead: bool = False) -> dict[str, int | bool]:
        """For a kernel with so many accumulators a thread: what the registers beside them can hold of an adapter, or of `several` at once, `ahead` too."""
        block = min(64 if accumulators <= 64 else 32, self._ranks)
        at_once = max(1, COLUMNS_AT_ONCE // block) if several and FEW_ACCUMULATORS < accumulators <= 64 else 1
        return {**self._options(block), "SEVERAL": at_once, "AHEAD": block == 16 and accumulators > FEW_ACCUMULATORS and (ahead or at_once == 1)}


@dataclass(frozen=True)
class Following:
    """The shrink of a layer's second projection within the GEMM of its first. `low` is what the second adds; beside the rows of its records
    stands the scaling, and A's place for the split. parts float32 [blocks of columns, P, 16 or more]: s before its sum."""

    a: Stack
    low: LowRank
    parts: torch.Tensor

    def tables(self) -> tuple[torch.Tensor | None, ...]:
        """What the first shrink writes the records with."""
        a, b = self.a, self.low.b
        return (self.low.records, a.offset, a.expert_stride, a.rank, b.scaling, b.offset, b.expert_stride)


NO_PAIR_ARGS = (None,) * 7 + (0,)
NO_TILE_ARGS = (None,) * 4 + (0,)
NO_TILE_OPTIONS = {"ADDEND": False, "RANK_BLOCK": 16, "MAX_RANK": 16, "ALIGN": 8, "SEVERAL": 1, "AHEAD": False}
NO_PAIR_OPTIONS = {"ADDEND": False, "RANK_BLOCK": 16, "MAX_RANK": 16, "ALIGN": 8, "SPLITS": 1}


@triton.jit
def load_slot(slots_ptr, rank_ptr, split_ptr, offset_ptr, stride_ptr, token):
    """(rank, whether gate and up have their own A, offset, expert stride) of a token's adapter; zeros without one."""
    slot = tl.load(slots_ptr + token)
    some = slot >= 0
    rank = tl.load(rank_ptr + slot, mask=some, other=0)
    split = tl.load(split_ptr + slot, mask=some, other=0)
    offset = tl.load(offset_ptr + slot, mask=some, other=0)
    return rank, split, offset, tl.load(stride_ptr + slot, mask=some, other=0)


@triton.jit
def pdl_early(PDL: tl.constexpr):
    """Let the kernel after this one start at once. For kernels before a linear, a norm or an alignment alone: these read weights and adapters
    before their wait, nothing that a kernel of the step writes; and for down before the combine, which reads what is older than down's input."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for the kernel before this one, then let the one after start. NOTE: every program must call it, exiting ones too;
    a dependent may then rely on all kernels before its predecessor being complete."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def told(word_ptr, value):
    """Wait until another program has set the word so, and so for what that one has waited for. One thread looks, the copy engine may read after it."""
    look: tl.constexpr = "{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; @p bra D; L: ld.acquire.gpu.global.b32 t, [$1]; "
    then: tl.constexpr = "setp.ne.s32 p, t, $2; @p bra L; D: bar.sync 0;} fence.proxy.async.global; mov.u32 $0, 0;"
    word = word_ptr.to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(look + then, "=r,l,r,~{memory}", [word, value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_s(s_ptr, row, num_pairs, width, column, mask, SPLITS: tl.constexpr):
    """The sum over the splits of s[row, column]; row and column are broadcast against each other."""
    low = tl.load(s_ptr + row.to(tl.int64) * width + column, mask=mask, other=0.0)
    for i in tl.static_range(1, SPLITS):
        low += tl.load(s_ptr + (row + i * num_pairs).to(tl.int64) * width + column, mask=mask, other=0.0)
    return low


@triton.jit
def load_records(records_ptr, t, last, RANK_BLOCK: tl.constexpr, SEVERAL: tl.constexpr, ALIGN: tl.constexpr):
    """(first row, rows, rank, split, B's place, whether ranks are whole 16 bytes) of LoRA tiles t .. t + SEVERAL - 1; no rows from `last` on.

    Scalars, or with SEVERAL > 1 one value for each column of SEVERAL blocks of RANK_BLOCK columns.
    """
    if SEVERAL == 1:
        tile = t
    else:
        tile = t + tl.arange(0, SEVERAL * RANK_BLOCK) // RANK_BLOCK
    ptr = records_ptr + RECORD * tile
    start = tl.load(ptr, mask=tile < last, other=0).to(tl.int32)
    rows = tl.load(ptr + 1, mask=tile < last, other=0).to(tl.int32)
    rank = tl.load(ptr + 2, mask=tile < last, other=0).to(tl.int32)
    split = tl.load(ptr + 3, mask=tile < last, other=0).to(tl.int32)
    place = tl.load(ptr + 4, mask=tile < last, other=0)
    if SEVERAL == 1:
        whole = rank % ALIGN == 0
    else:
        whole = tl.load(records_ptr + RECORD * t + 2, mask=t < last, other=0) % ALIGN == 0
        for i in tl.static_range(1, SEVERAL):
            whole = whole & (tl.load(records_ptr + RECORD * (t + i) + 2, mask=t + i < last, other=0) % ALIGN == 0)
    return start, rows, rank, split, place, whole


@triton.jit
def load_block(
    s_ptr, width, start, rows, rank, split, b_place, whole, r0, place, rn, N, pool_ptr,
    GATED: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """Rank columns r0 .. of SEVERAL LoRA tiles side by side: (s [BM, columns], B^T [columns, BN]) of gate, then of up where GATED.

    s is zero in the columns of other tiles than the row's own, so that one product serves them all.
    """
    column = tl.arange(0, SEVERAL * RANK_BLOCK)
    r = r0 + column % RANK_BLOCK
    zero = column * 0
    start, rows, up = start + zero, rows + zero, split * MAX_RANK + zero
    rank = tl.max_constancy(rank + zero, RANK_BLOCK)
    b_ptr = pool_ptr + tl.max_constancy(b_place + zero, RANK_BLOCK) * ALIGN
    mine = (place[:, None] >= start[None, :]) & (place[:, None] < (start + rows)[None, :])
    s_ptrs = s_ptr + place.to(tl.int64)[:, None] * width + r[None, :]
    if whole:
        fits = tl.max_constancy(r // ALIGN < rank // ALIGN, ALIGN)  # the hints let loads take 16 bytes
        stride = rank // ALIGN * ALIGN
        b_ptrs = b_ptr[:, None] + rn.to(tl.int64)[None, :] * stride[:, None] + r[:, None]
        low = tl.load(s_ptrs, mask=mine & fits[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=fits[:, None] & (rn < N)[None, :], other=0.0)
        high = low
        b_up = b
        if GATED:
            high = tl.load(s_ptrs + up[None, :], mask=mine & fits[None, :], other=0.0)
            b_up = tl.load(b_ptrs + (N.to(tl.int64) * stride)[:, None], mask=fits[:, None] & (rn < N)[None, :], other=0.0)
    else:
        fits = r < rank
        b_ptrs = b_ptr[:, None] + rn.to(tl.int64)[None, :] * rank[:, None] + r[:, None]
        low = tl.load(s_ptrs, mask=mine & fits[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=fits[:, None] & (rn < N)[None, :], other=0.0)
        high = low
        b_up = b
        if GATED:
            high = tl.load(s_ptrs + up[None, :], mask=mine & fits[None, :], other=0.0)
            b_up = tl.load(b_ptrs + (N.to(tl.int64) * rank)[:, None], mask=fits[:, None] & (rn < N)[None, :], other=0.0)
    return low, b, high, b_up


@triton.jit
def tile_delta(
    acc, acc_up, first, last, start, rows, rank, split, b_place, whole, low, b, high, b_up, place, rn, N, s_ptr, width, pool_ptr, records_ptr,
    GATED: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr, SEVERAL: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the delta to a tile [BM, BN] whose sorted places are `place`, from records first .. last - 1, SEVERAL at a time.

    The first records' fields are given. AHEAD: so is the first block, and the next block is on its way during each product.
    """
    t = first
    r0 = 0
    while t < last:
        if AHEAD:
            low0, b0, high0, b_up0 = low, b, high, b_up
        else:
            low0, b0, high0, b_up0 = load_block(
                s_ptr, width, start, rows, rank, split, b_place, whole, r0, place, rn, N, pool_ptr, GATED, RANK_BLOCK, MAX_RANK, ALIGN, SEVERAL
            )  # fmt: skip
        if SEVERAL > 1:
            t += SEVERAL
            start, rows, rank, split, b_place, whole = load_records(records_ptr, t, last, RANK_BLOCK, SEVERAL, ALIGN)
        else:
            r0 += RANK_BLOCK
            if r0 >= rank:
                t += 1
                r0 = 0
                start, rows, rank, split, b_place, whole = load_records(records_ptr, t, last, RANK_BLOCK, SEVERAL, ALIGN)
        if AHEAD:
            low, b, high, b_up = load_block(
                s_ptr, width, start, rows, rank, split, b_place, whole, r0, place, rn, N, pool_ptr, GATED, RANK_BLOCK, MAX_RANK, ALIGN, SEVERAL
            )  # fmt: skip
        acc = tl.dot(low0, b0, acc, input_precision=PRECISION)
        if GATED:
            acc_up = tl.dot(high0, b_up0, acc_up, input_precision=PRECISION)
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


@triton.jit
def load_b_columns(pool_ptr, place, rn, N, rank, rr, routed, ALIGN: tl.constexpr):
    """B[rn, rr] of the matrices at `place` (one per column, constant over runs of rr), [BN, columns]."""
    if rank % ALIGN == 0:
        mask = (rn < N)[:, None] & tl.max_constancy(routed & (rr // ALIGN < rank // ALIGN), ALIGN)[None, :]
        b = tl.load(pool_ptr + (place * ALIGN)[None, :] + rn.to(tl.int64)[:, None] * (rank // ALIGN * ALIGN) + rr[None, :], mask=mask, other=0.0)
    else:
        mask = (rn < N)[:, None] & (routed & (rr < rank))[None, :]
        b = tl.load(pool_ptr + (place * ALIGN)[None, :] + rn.to(tl.int64)[:, None] * rank + rr[None, :], mask=mask, other=0.0)
    return b
