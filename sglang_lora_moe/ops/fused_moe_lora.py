"""LoRA on routed pairs: y[row] += B(slot, e) (scaling * A(slot, e) x[row]), as two kernels that meet in rank space.

    shrink   s[split, row, :] = scaling * A(slot, e) x[row] over one split of x's columns; summed by whoever reads it
    expand   y[row] += B(slot, e) s[row], in place, float32 add, one rounding

`fused_moe_lora` is both. The MoE pipeline uses the shrink alone: its GEMMs, activation and combine add B s themselves.
Weights are found through the tables of `lora/stacks.py`, at each adapter's own rank. Rows of pairs without an adapter
cost nothing: per pair their programs return at once, grouped they have no tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_lora_moe.lora.stacks import Stack
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import COLUMNS, LowRank, pdl_wait, slot_columns, slot_tables, tile_delta


@triton.jit
def _shrink_tile(
    x_ptr, s_ptr, a_ptr, place, source, live, rank, rank_rows, scaling, r0, k_begin, k_end, cols, s_row0, width, MAX_RANK: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s[place, r0 : r0 + BR] = x[source, k_begin : k_end] @ A[r0 : r0 + BR, same]^T for one tile of rows of one group."""
    rr = r0 + tl.arange(0, BR)
    rk = tl.arange(0, BK)
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * cols + rk[None, :]
    a_ptrs = a_ptr + rr.to(tl.int64)[None, :] * cols + rk[:, None]
    acc = tl.zeros((BM, BR), dtype=tl.float32)
    for k in tl.range(k_begin, k_end, BK, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_ptrs + k, mask=live[:, None], other=0.0)
            a = tl.load(a_ptrs + k, mask=(rr < rank_rows)[None, :], other=0.0)
        else:
            x = tl.load(x_ptrs + k, mask=live[:, None] & (k + rk < k_end)[None, :], other=0.0)
            a = tl.load(a_ptrs + k, mask=(rr < rank_rows)[None, :] & (k + rk < k_end)[:, None], other=0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    column = tl.where(rr < rank, rr, rr + MAX_RANK - rank)  # the up half has its fixed place
    s_ptrs = s_ptr + (s_row0 + place).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(s_ptrs, (acc * scaling).to(s_ptr.dtype.element_ty), mask=live[:, None] & (rr < rank_rows)[None, :])


@triton.jit
def _shrink_kernel(
    x_ptr, s_ptr, topk_ids_ptr, slots_ptr, tiles_ptr, counts_ptr, sorted_pairs_ptr,
    pool_ptr, offset_ptr, stride_ptr, rank_ptr, split_ptr, scaling_ptr,
    cols, width, num_pairs, num_experts, num_slots,
    TOP_K: tl.constexpr, BY_PAIR: tl.constexpr, GATHER: tl.constexpr, SPLIT_K: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (pairs or persistent programs, rank blocks, SPLIT_K)."""
    pdl_wait(PDL)
    r0 = tl.program_id(1) * BR
    split = tl.program_id(2)
    per_split = tl.cdiv(tl.cdiv(cols, BK), SPLIT_K) * BK
    k_begin = split * per_split
    k_end = tl.minimum(k_begin + per_split, cols)
    rm = tl.arange(0, BM)
    if BY_PAIR:
        pair = tl.program_id(0)
        slot = tl.load(slots_ptr + pair // TOP_K)
        expert = tl.load(topk_ids_ptr + pair)
        if (slot >= 0) & (slot < num_slots) & (expert >= 0) & (expert < num_experts):
            rank = tl.load(rank_ptr + slot)
            rank_rows = rank * (1 + tl.load(split_ptr + slot))
            scaling = tl.load(scaling_ptr + slot)
            a_ptr = pool_ptr + tl.multiple_of(tl.load(offset_ptr + slot) + expert * tl.load(stride_ptr + slot), ALIGN)
            if r0 < rank_rows:
                source = pair // TOP_K if GATHER else pair
                _shrink_tile(
                    x_ptr, s_ptr, a_ptr, pair + rm, source + rm * 0, rm < 1, rank, rank_rows, scaling, r0, k_begin, k_end, cols, split * num_pairs, width, MAX_RANK,
                    BM, BR, BK, EVEN_K, STAGES, PRECISION,
                )  # fmt: skip
    else:
        for t in tl.range(tl.program_id(0), tl.load(counts_ptr + 2), tl.num_programs(0), num_stages=1):
            expert = tl.load(tiles_ptr + 4 * t).to(tl.int64)
            slot = tl.load(tiles_ptr + 4 * t + 1)
            place = tl.load(tiles_ptr + 4 * t + 2) + rm
            live = rm < tl.load(tiles_ptr + 4 * t + 3)
            rank = tl.load(rank_ptr + slot)
            rank_rows = rank * (1 + tl.load(split_ptr + slot))
            scaling = tl.load(scaling_ptr + slot)
            a_ptr = pool_ptr + tl.multiple_of(tl.load(offset_ptr + slot) + expert * tl.load(stride_ptr + slot), ALIGN)
            if r0 < rank_rows:
                source = tl.load(sorted_pairs_ptr + place, mask=live, other=0) // TOP_K if GATHER else place
                _shrink_tile(
                    x_ptr, s_ptr, a_ptr, place, source, live, rank, rank_rows, scaling, r0, k_begin, k_end, cols, split * num_pairs, width, MAX_RANK,
                    BM, BR, BK, EVEN_K, STAGES, PRECISION,
                )  # fmt: skip


@triton.jit
def _expand_kernel(
    y_ptr, topk_ids_ptr, slots_ptr, tiles_ptr, counts_ptr, sorted_pairs_ptr, s_ptr,
    pool_ptr, offset_ptr, stride_ptr, rank_ptr, split_ptr,
    N, width, num_pairs, num_experts, num_slots,
    TOP_K: tl.constexpr, BY_PAIR: tl.constexpr, SCATTER: tl.constexpr, HALVES: tl.constexpr,
    ADDEND: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (pairs or persistent programs, blocks of N). y [P, HALVES * N] in the order of s, or with SCATTER in pair order."""
    pdl_wait(PDL)
    rm = tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(0)
    if BY_PAIR:
        last = first + 1
    else:
        last = tl.load(counts_ptr + 2)
    for t in tl.range(first, last, tl.num_programs(0), num_stages=1):
        if BY_PAIR:
            expert = tl.load(topk_ids_ptr + t).to(tl.int64)
            slot = tl.load(slots_ptr + t // TOP_K)
            slot = tl.where((slot < num_slots) & (expert >= 0) & (expert < num_experts), slot, -1)
            place = t + rm
            live = rm < 1
        else:
            expert = tl.load(tiles_ptr + 4 * t).to(tl.int64)
            slot = tl.load(tiles_ptr + 4 * t + 1)
            place = tl.load(tiles_ptr + 4 * t + 2) + rm
            live = rm < tl.load(tiles_ptr + 4 * t + 3)
        slots = tl.where(live, slot, -1)
        row = tl.load(sorted_pairs_ptr + place, mask=live, other=0) if SCATTER else place
        y_ptrs = y_ptr + row.to(tl.int64)[:, None] * (HALVES * N) + rn[None, :]
        mask = (slots >= 0)[:, None] & (rn < N)[None, :]
        low = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        high = low
        if HALVES == 2:
            high = tl.load(y_ptrs + N, mask=mask, other=0.0).to(tl.float32)
        slot_of = slot_columns(slots, -1, COLUMNS, RANK_BLOCK)
        b_place, rank, split = slot_tables(slot_of, expert, offset_ptr, stride_ptr, rank_ptr, split_ptr, ALIGN)
        low, high = tile_delta(
            low, high, slots, slot_of, b_place, rank, split, place, num_pairs, expert, rn, N, s_ptr, width,
            pool_ptr, offset_ptr, stride_ptr, rank_ptr, split_ptr,
            HALVES == 2, SPLITS, RANK_BLOCK, MAX_RANK, ALIGN, COLUMNS, PRECISION,
        )  # fmt: skip
        tl.store(y_ptrs, low.to(y_ptr.dtype.element_ty), mask=mask)
        if HALVES == 2:
            tl.store(y_ptrs + N, high.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class ShrinkTile:
    """Launch shape of a shrink. `m` is the alignment's lora_block (16 per pair); `r` rows of A and `k` columns at a time."""

    m: int
    r: int
    k: int
    warps: int
    stages: int
    split: int = 1  # parts of the columns, per pair only
    ctas: int = 8  # programs per multiprocessor of the persistent grid


def shrink_tile(pairs: int, lora_block: int, by_pair: bool, width: int, cols: int) -> ShrinkTile:
    """Per pair the columns are split where programs are too few to fill the GPU; grouped, groups alone fill it."""
    rows = max(16, launch.next_power_of_2(width))
    if by_pair:
        return ShrinkTile(16, min(32, rows), 256, 4, 3, split=max(1, min(4, 256 // max(pairs, 1), cols // 512)))
    return ShrinkTile(lora_block, min(64, rows), 128 if lora_block <= 32 else 64, 4, 4)


def moe_shrink(
    rows: torch.Tensor, stack: Stack, routing: Routing, workspace: Workspace, *, gather: bool, name: str, scaling: torch.Tensor | None = None
) -> torch.Tensor:
    """s [splits, P, stack.shrink_width] in `routing.rows` order, see `LowRank`; entries of rows without an adapter are undefined.

    rows [M, cols] by token with `gather`, else [P, cols] in routing order. `name` is the workspace buffer of s; `scaling`
    float32 [S], the stack's own by default.
    """
    pairs, cols = routing.num_pairs, stack.dim
    by_pair = routing.rows == "pair"
    launch.expect_float("moe_shrink: rows", rows.dtype)
    launch.expect("moe_shrink: rows", rows, (pairs // routing.top_k if gather else pairs, cols), stack.pool.dtype, stack.pool.device)
    width = stack.shrink_width
    tile = shrink_tile(pairs, routing.lora_block, by_pair, width, cols)
    s = workspace.get(name, (tile.split, pairs, width), torch.float32 if by_pair else rows.dtype)
    align = None if by_pair else routing.alignment
    tiles = pairs if by_pair else min(align.lora_tiles.shape[0], launch.multiprocessors(rows.device) * tile.ctas)
    _shrink_kernel[(max(tiles, 1), triton.cdiv(width, tile.r), tile.split)](
        rows, s, routing.topk_ids, routing.token_slots,
        *((None, None, None) if align is None else (align.lora_tiles, align.counts, align.sorted_pairs)),
        stack.pool, stack.offset, stack.expert_stride, stack.rank, stack.split_a, stack.scaling if scaling is None else scaling,
        cols, width, pairs, routing.num_experts, stack.num_slots,
        TOP_K=routing.top_k, BY_PAIR=by_pair, GATHER=gather, SPLIT_K=tile.split, MAX_RANK=stack.max_rank, ALIGN=16 // rows.element_size(),
        BM=tile.m, BR=tile.r, BK=tile.k, EVEN_K=cols % (tile.k * tile.split) == 0, STAGES=tile.stages,
        PRECISION=launch.dot_precision(rows.dtype), num_warps=tile.warps, **launch.options(rows.device),
    )  # fmt: skip
    return s


def moe_expand(y: torch.Tensor, low: LowRank, routing: Routing, *, pair_order: bool = False) -> torch.Tensor:
    """y [P, out] += B s in place; returns y, in routing order or with `pair_order` row m * K + k.

    s lies in routing order. Rows without an adapter are not touched.
    """
    stack, pairs, by_pair = low.b, routing.num_pairs, routing.rows == "pair"
    launch.expect("moe_expand: y", y, (pairs, stack.dim), stack.pool.dtype, stack.pool.device)
    halves = 2 if stack.may_split else 1
    n = stack.dim // halves
    bn = 64
    align = None if by_pair else routing.alignment
    bm = 16 if by_pair else routing.lora_block
    tiles = pairs if by_pair else min(align.lora_tiles.shape[0], launch.multiprocessors(y.device) * 8)
    _expand_kernel[(max(tiles, 1), triton.cdiv(n, bn))](
        y, routing.topk_ids, routing.token_slots, *((None, None, None) if align is None else (align.lora_tiles, align.counts, align.sorted_pairs)), low.s,
        stack.pool, stack.offset, stack.expert_stride, stack.rank, stack.split_a,
        n, low.s.shape[2], pairs, routing.num_experts, stack.num_slots,
        TOP_K=routing.top_k, BY_PAIR=by_pair, SCATTER=pair_order and not by_pair, HALVES=halves, **low.kernel_options(), COLUMNS=COLUMNS, BM=bm, BN=bn,
        PRECISION=launch.dot_precision(y.dtype), num_warps=4, **launch.options(y.device),
    )  # fmt: skip
    return y


def fused_moe_lora(
    y: torch.Tensor, rows: torch.Tensor, stack_a: Stack, stack_b: Stack, routing: Routing, workspace: Workspace, *, gather: bool
) -> torch.Tensor:
    """y [P, out] += scaling * B (A x) for every pair with an adapter, in place; y and the result lie in `routing.rows` order.

    rows [M, in] by token with `gather`, else [P, in] in routing order. One shrink and one expand launch, nothing zero-filled.
    """
    s = moe_shrink(rows, stack_a, routing, workspace, gather=gather, name="fused_moe_lora.s", scaling=stack_b.scaling)
    return moe_expand(y, LowRank(s, stack_b, routing.token_slots), routing)
