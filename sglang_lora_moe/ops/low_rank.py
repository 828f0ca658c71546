"""What every kernel with a low-rank delta shares: the addend it is given, and the device functions that add it.

    acc[row, n] += scaling[t] * sum over r of B(t, expert)[n, r] * s[row, r]        t = the row's slot; none if t < 0

s is float32 [splits, P, width]: the sum over `splits` is A x, in the layout of `lora/stacks.py` (columns [0, R) for one A;
with split_a gate in [0, R), up in [R, 2R)). Columns beyond a row's own rank, and rows without an adapter, are never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_lora_moe.lora.stacks import Stack

NO_SLOT = tl.constexpr(1 << 30)


@dataclass(frozen=True)
class LowRank:
    """An addend of an expert GEMM: s float32 [splits, P, width] in the GEMM's row order, and B by slot."""

    s: torch.Tensor
    b: Stack
    token_slots: torch.Tensor  # int32 [M]

    @property
    def splits(self) -> int:
        return self.s.shape[0]

    @property
    def rank_block(self) -> int:
        """Rank columns a kernel takes at once; a tensor-core product needs at least 16."""
        return min(32, max(16, triton.next_power_of_2(self.b.max_rank)))  # 64 spills in wide tiles

    def kernel_args(self) -> tuple:
        b = self.b
        return (self.token_slots, self.s, b.pool, b.offset, b.expert_stride, b.rank, b.scaling, b.split_a, self.s.shape[2])


NO_ADDEND = (None,) * 8 + (0,)


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for the kernel before this one, then let the one after start. NOTE: every program must call it, exiting ones too;
    a dependent may then rely on all kernels before its predecessor being complete."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def tile_delta(
    acc_gate, acc_up, slots, place, num_pairs, expert, rn, N, s_ptr, pool_ptr, offset_ptr, stride_ptr, rank_ptr, scaling_ptr, split_ptr, width,
    GATED: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, DOT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the delta to a tile [BM, BN] of one expert whose rows may have any slots (-1 = none): one pass per distinct slot."""
    slot = tl.min(tl.where(slots >= 0, slots, NO_SLOT), 0)
    while slot < NO_SLOT:
        rank = tl.load(rank_ptr + slot)
        scaling = tl.load(scaling_ptr + slot)
        up_column = tl.load(split_ptr + slot) * rank
        b_ptr = pool_ptr + tl.load(offset_ptr + slot) + expert * tl.load(stride_ptr + slot)
        mine = slots == slot
        for r0 in tl.range(0, rank, RANK_BLOCK, num_stages=1):
            rr = r0 + tl.arange(0, RANK_BLOCK)
            s_mask = mine[:, None] & (rr < rank)[None, :]
            b_mask = (rr < rank)[:, None] & (rn < N)[None, :]
            s_ptrs = s_ptr + place.to(tl.int64)[:, None] * width + rr[None, :]
            b_ptrs = b_ptr + rn.to(tl.int64)[None, :] * rank + rr[:, None]
            low = tl.load(s_ptrs, mask=s_mask, other=0.0)
            for i in tl.static_range(1, SPLITS):
                low += tl.load(s_ptrs + i * num_pairs * width, mask=s_mask, other=0.0)
            b = tl.load(b_ptrs, mask=b_mask, other=0.0)
            acc_gate = tl.dot((low * scaling).to(b.dtype), b, acc_gate, input_precision=DOT_PRECISION)
            if GATED:
                low = tl.load(s_ptrs + up_column, mask=s_mask, other=0.0)
                for i in tl.static_range(1, SPLITS):
                    low += tl.load(s_ptrs + up_column + i * num_pairs * width, mask=s_mask, other=0.0)
                b = tl.load(b_ptrs + N.to(tl.int64) * rank, mask=b_mask, other=0.0)
                acc_up = tl.dot((low * scaling).to(b.dtype), b, acc_up, input_precision=DOT_PRECISION)
        slot = tl.min(tl.where(slots > slot, slots, NO_SLOT), 0)
    return acc_gate, acc_up


@triton.jit
def row_delta(s_ptr, num_pairs, width, place, column, b_ptr, row0, rn, N, rank, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """B[row0 + rn] . s[place, column : column + rank] of one pair, [BN] float32. b_ptr: the matrix of the pair's slot and expert."""
    total = tl.zeros(rn.shape, dtype=tl.float32)
    for r0 in tl.range(0, rank, RANK_BLOCK, num_stages=1):
        rr = r0 + tl.arange(0, RANK_BLOCK)
        b = tl.load(b_ptr + (row0 + rn).to(tl.int64)[:, None] * rank + rr[None, :], mask=(rn < N)[:, None] & (rr < rank)[None, :], other=0.0)
        s_ptrs = s_ptr + place.to(tl.int64) * width + column + rr
        low = tl.load(s_ptrs, mask=rr < rank, other=0.0)
        for i in tl.static_range(1, SPLITS):
            low += tl.load(s_ptrs + i * num_pairs * width, mask=rr < rank, other=0.0)
        total += tl.sum(b.to(tl.float32) * low[None, :], axis=1)
    return total
