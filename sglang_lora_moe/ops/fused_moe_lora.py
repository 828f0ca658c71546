"""LoRA on routed pairs: y[row] += B(slot, e) (scaling * A(slot, e) x[row]), as two kernels that meet in rank space.

    shrink   s[split, row, :] = scaling * A(slot, e) x[row] over one split of x's columns; summed by whoever reads it
    expand   y[row] += B(slot, e) s[row], in place, float32 add, one rounding

`fused_moe_lora` is both. The MoE pipeline uses the shrink alone: its GEMMs, activation and combine add B s themselves. Weights are found through the tables of
`lora/stacks.py`, at each adapter's own rank. Rows of pairs without an adapter cost nothing: per pair their programs return at once, grouped they have no tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_lora_moe.lora.stacks import Stack
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import RECORD, Following, LowRank, load_records, pdl_early, pdl_wait, row_delta, tile_delta
from sglang_lora_moe.ops.moe_lora_shrink import can_shrink, group_shrink

AT_ONCE = 1024  # columns of A that a shrink has under way at once; beside down a shrink of more would starve: Mixtral at 4 tokens 13 us slower
LONG_ROWS = 64  # of an expert and slot at least, for LoRA tiles of 144 rows where s has more than 32 columns: measured
SHORT_ROWS, MANY_GROUPS = 36, 512  # at most and at least, for LoRA tiles of 48 rows in place of 64, of which a third more run at once: measured


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
def _write_ranges(tiles_ptr, base_tiles_ptr, ranges_ptr, num_base, num_lora, BLOCK: tl.constexpr):
    """Per base tile, the LoRA tiles that overlap it: both lists ascend by first row, so two counts give the range."""
    for i in tl.range(tl.program_id(0), num_base, tl.num_programs(0), num_stages=1):
        start = tl.load(base_tiles_ptr + 3 * i + 1)
        end = start + tl.load(base_tiles_ptr + 3 * i + 2)
        before = tl.zeros((BLOCK,), tl.int32)
        within = tl.zeros((BLOCK,), tl.int32)
        for t0 in tl.range(0, num_lora, BLOCK, num_stages=1):
            t = t0 + tl.arange(0, BLOCK)
            first = tl.load(tiles_ptr + 4 * t + 2, mask=t < num_lora, other=1 << 30)
            rows = tl.load(tiles_ptr + 4 * t + 3, mask=t < num_lora, other=0)
            before += (first + rows <= start).to(tl.int32)
            within += (first < end).to(tl.int32)
        tl.store(ranges_ptr + 2 * i, tl.sum(before))
        tl.store(ranges_ptr + 2 * i + 1, tl.sum(within))


@triton.jit
def _shrink_pair_kernel(
    x_ptr, s_ptr, topk_ids_ptr, slots_ptr, pool_ptr, offset_ptr, stride_ptr, rank_ptr, split_ptr, scaling_ptr,
    cols, width, num_pairs, num_experts, num_slots,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SPLIT_K: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (pairs, rank blocks, SPLIT_K)."""
    pdl_wait(PDL)
    r0 = tl.program_id(1) * BR
    split = tl.program_id(2)
    per_split = tl.cdiv(tl.cdiv(cols, BK), SPLIT_K) * BK
    k_begin = split * per_split
    k_end = tl.minimum(k_begin + per_split, cols)
    rm = tl.arange(0, BM)
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
                x_ptr, s_ptr, a_ptr, pair + rm, source + rm * 0, rm < 1, rank, rank_rows, scaling, r0, k_begin, k_end, cols, split * num_pairs,
                width, MAX_RANK, BM, BR, BK, EVEN_K, STAGES, PRECISION,
            )  # fmt: skip


@triton.jit
def _store_record(record_ptr, start, rows, rank, split, b_place):
    tl.store(record_ptr, tl.cast(start, tl.int64))
    tl.store(record_ptr + 1, tl.cast(rows, tl.int64))
    tl.store(record_ptr + 2, tl.cast(rank, tl.int64))
    tl.store(record_ptr + 3, tl.cast(split, tl.int64))
    tl.store(record_ptr + 4, tl.cast(b_place, tl.int64))


@triton.jit
def _shrink_group_kernel(
    x_ptr, s_ptr, tiles_ptr, base_tiles_ptr, counts_ptr, sorted_pairs_ptr, records_ptr, ranges_ptr,
    pool_ptr, offset_ptr, stride_ptr, rank_ptr, split_ptr, scaling_ptr, b_offset_ptr, b_stride_ptr, told_ptr,
    cols, width, rank_blocks,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, EARLY: tl.constexpr, RANGES: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles or persistent programs, rank blocks + RANGES). The word is 0 with GATHER, else 1, once all before is complete; EARLY: for who started."""
    if EARLY:
        pdl_early(PDL)
    pdl_wait(PDL)
    num_lora = tl.load(counts_ptr + 2)
    if told_ptr is not None and (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.atomic_xchg(told_ptr, 0 if GATHER else 1, sem="release")
    if RANGES and tl.program_id(1) == rank_blocks:
        _write_ranges(tiles_ptr, base_tiles_ptr, ranges_ptr, tl.load(counts_ptr + 1), num_lora, 512)
    else:
        r0 = tl.program_id(1) * BR
        rm = tl.arange(0, BM)
        t = tl.program_id(0)
        expert = tl.load(tiles_ptr + 4 * t).to(tl.int64)  # does not wait for the number of tiles: entries beyond it are undefined, but there
        slot = tl.load(tiles_ptr + 4 * t + 1)
        start = tl.load(tiles_ptr + 4 * t + 2)
        rows = tl.load(tiles_ptr + 4 * t + 3)
        while t < num_lora:
            place = start + rm
            live = rm < rows
            rank = tl.load(rank_ptr + slot)
            split = tl.load(split_ptr + slot)
            scaling = tl.load(scaling_ptr + slot)
            a_ptr = pool_ptr + tl.multiple_of(tl.load(offset_ptr + slot) + expert * tl.load(stride_ptr + slot), ALIGN)
            source = tl.load(sorted_pairs_ptr + place, mask=live, other=0) // TOP_K if GATHER else place
            target = place
            if records_ptr is None:  # s is for the combine, in pair order
                target = tl.load(sorted_pairs_ptr + place, mask=live, other=0)
            elif r0 == 0:
                b_place = (tl.load(b_offset_ptr + slot) + expert * tl.load(b_stride_ptr + slot)) // ALIGN
                _store_record(records_ptr + RECORD * t, start, rows, rank, split, b_place)
            if r0 < rank * (1 + split):
                _shrink_tile(
                    x_ptr, s_ptr, a_ptr, target, source, live, rank, rank * (1 + split), scaling, r0, 0, cols, cols, 0, width, MAX_RANK,
                    BM, BR, BK, EVEN_K, STAGES, PRECISION,
                )  # fmt: skip
            t += tl.num_programs(0)
            if t < num_lora:
                expert = tl.load(tiles_ptr + 4 * t).to(tl.int64)
                slot = tl.load(tiles_ptr + 4 * t + 1)
                start = tl.load(tiles_ptr + 4 * t + 2)
                rows = tl.load(tiles_ptr + 4 * t + 3)


@triton.jit
def _shrink_scatter_kernel(
    x_ptr, s_ptr, tiles_ptr, counts_ptr, sorted_pairs_ptr, told_ptr, pool_ptr, offset_ptr, stride_ptr, rank_ptr, scaling_ptr, cols, width,
    ALIGN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (LoRA tiles): s of one A in pair order. A is under way before the kernel before has ended; the one after may start with `told_ptr`, a word."""
    if told_ptr is not None:
        pdl_early(PDL)
    t = tl.program_id(0)
    rk = tl.arange(0, BK)
    rr = tl.arange(0, BR)
    there = t < tl.load(counts_ptr + 2)
    expert = tl.load(tiles_ptr + 4 * t, mask=there, other=0).to(tl.int64)
    slot = tl.load(tiles_ptr + 4 * t + 1, mask=there, other=0)
    place = tl.load(tiles_ptr + 4 * t + 2, mask=there, other=0) + tl.arange(0, BM)
    live = tl.arange(0, BM) < tl.load(tiles_ptr + 4 * t + 3, mask=there, other=0)
    rank = tl.load(rank_ptr + slot, mask=there, other=0)
    scaling = tl.load(scaling_ptr + slot)
    a_ptrs = pool_ptr + tl.multiple_of(tl.load(offset_ptr + slot) + expert * tl.load(stride_ptr + slot), ALIGN) + rr[None, :] * cols + rk[:, None]
    x_ptrs = x_ptr + place.to(tl.int64)[:, None] * cols + rk[None, :]
    a = tl.load(a_ptrs, mask=(rr < rank)[None, :] & (rk < cols)[:, None], other=0.0)
    pair = tl.load(sorted_pairs_ptr + place, mask=live, other=0)
    pdl_wait(PDL)
    if told_ptr is not None and t == 0:
        tl.atomic_xchg(told_ptr, 1, sem="release")
    if there:
        x = tl.load(x_ptrs, mask=live[:, None] & (rk < cols)[None, :], other=0.0)
        s = tl.dot(x, a, input_precision=PRECISION)
        s_ptrs = s_ptr + pair.to(tl.int64)[:, None] * width + rr[None, :]
        tl.store(s_ptrs, (s * scaling).to(s_ptr.dtype.element_ty), mask=live[:, None] & (rr < rank)[None, :])


@triton.jit
def _expand_kernel(
    y_ptr, s_ptr, pool_ptr, counts_ptr, records_ptr, N, width,
    HALVES: tl.constexpr, ADDEND: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr,
    SEVERAL: tl.constexpr, AHEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (LoRA tiles or persistent programs, blocks of N). y [P, HALVES * N] in the order of s."""
    pdl_wait(PDL)
    rm = tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    for t in tl.range(tl.program_id(0), tl.load(counts_ptr + 2), tl.num_programs(0), num_stages=1):
        start, rows, rank, split, b_place, whole = load_records(records_ptr, t, t + 1, RANK_BLOCK, 1, ALIGN)
        place = start + rm
        live = rm < rows
        y_ptrs = y_ptr + place.to(tl.int64)[:, None] * (HALVES * N) + rn[None, :]
        mask = live[:, None] & (rn < N)[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        y_up = y
        if HALVES == 2:
            y_up = tl.load(y_ptrs + N, mask=mask, other=0.0).to(tl.float32)
        y, y_up = tile_delta(
            y, y_up, t, t + 1, start, rows, rank, split, b_place, whole, 0, 0, 0, 0, place, rn, N, s_ptr, width, pool_ptr, records_ptr,
            HALVES == 2, RANK_BLOCK, MAX_RANK, ALIGN, 1, False, PRECISION,
        )  # fmt: skip
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
        if HALVES == 2:
            tl.store(y_ptrs + N, y_up.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expand_pair_kernel(
    y_ptr, topk_ids_ptr, slots_ptr, s_ptr, pool_ptr, offset_ptr, stride_ptr, rank_ptr, split_ptr, N, width, num_pairs, num_experts,
    TOP_K: tl.constexpr, HALVES: tl.constexpr,
    ADDEND: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (pairs, blocks of HALVES * N). y [P, HALVES * N] in pair order."""
    pdl_wait(PDL)
    pair = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
    slot = tl.load(slots_ptr + pair // TOP_K)
    if (slot >= 0) & (expert >= 0) & (expert < num_experts):
        place = (tl.load(offset_ptr + slot) + expert * tl.load(stride_ptr + slot)) // ALIGN
        rank = tl.load(rank_ptr + slot)
        column = tl.load(split_ptr + slot) * MAX_RANK
        total = tl.load(y_ptr + pair.to(tl.int64) * (HALVES * N) + rn, mask=rn < HALVES * N, other=0.0).to(tl.float32)
        if tl.program_id(1) * BN < N:  # a block lies in one half: BN divides N, or there is one half
            column = column * 0
        total += row_delta(s_ptr, num_pairs, width, pair, column, pool_ptr, place, rn, HALVES * N, rank, 0, SPLITS, RANK_BLOCK, ALIGN)
        tl.store(y_ptr + pair.to(tl.int64) * (HALVES * N) + rn, total.to(y_ptr.dtype.element_ty), mask=rn < HALVES * N)


@dataclass(frozen=True)
class ShrinkTile:
    """Launch shape of a shrink. `m` is the alignment's lora_block (16 per pair); `r` rows of A and `k` columns at a time."""

    m: int
    r: int
    k: int
    warps: int
    stages: int
    split: int = 1  # parts of the columns, per pair only


def shrink_tile(pairs: int, lora_block: int, by_pair: bool, width: int, cols: int, short: bool = False) -> ShrinkTile:
    """Per pair the columns are split where programs are too few to fill the GPU; grouped, groups alone fill it. `short`: few pairs, beside the GEMM."""
    rows = max(16, triton.next_power_of_2(width))
    if by_pair:
        wide = cols > 1024 and rows <= 32  # 0.4 us less; at rank 64 2.4 more
        return ShrinkTile(16, min(32, rows), 512 if wide else 256, 8 if wide else 4, 3, split=max(1, min(4, 256 // max(pairs, 1), cols // 512)))
    return ShrinkTile(lora_block, min(64, rows), 256 if short and rows <= 16 else 128, 4, 4 if rows <= 32 and lora_block <= 32 else 3)


def moe_shrink(
    rows: torch.Tensor, stack_a: Stack, stack_b: Stack, routing: Routing, workspace: Workspace, *,
    gather: bool, name: str, by_cuda: bool = False, following: tuple[Stack, Stack, int] | None = None, scatter: bool = False, tile: ShrinkTile | None = None,
) -> LowRank:  # fmt: skip  # budget: a shrink's inputs, and who makes them
    """scaling * A x of every pair with an adapter in `routing.rows` order, as the addend that B of the same adapters completes.

    rows [M, cols] by token with `gather`, else [P, cols] in routing order. `name` prefixes the workspace buffers. Grouped, the
    shrink of x leaves in the routing which LoRA tiles meet which base tile; the shrink of the activation uses it. `by_cuda`: by the
    kernel of ops/moe_lora_shrink.py where `can_shrink`; the caller knows beside which GEMM that is faster. `following`, with that kernel: A and B
    of the layer's second projection, whose shrink the GEMM does within itself, in so many blocks of columns. `scatter` (without `gather`): s of grouped rows
    goes to pair order, without records, as the combine adds it; the GEMM after must wait for `routing.told`, if it is there. `tile`: other than `shrink_tile`.
    """
    pairs, cols, slots = routing.num_pairs, stack_a.dim, routing.token_slots
    assert slots is not None, "a shrink needs the slots of the tokens"
    by_pair = routing.rows == "pair"
    launch.expect_float("moe_shrink: rows", rows.dtype)
    launch.expect("moe_shrink: rows", rows, (pairs // routing.top_k if gather else pairs, cols), stack_a.pool.dtype, stack_a.pool.device)
    short = routing.told is not None and not gather and pairs <= 3 * routing.num_experts
    tile = tile or shrink_tile(pairs, routing.lora_block, by_pair, stack_a.shrink_width, cols, short)
    s = workspace.get(f"{name}.s", (tile.split, pairs, stack_a.shrink_width), torch.float32 if by_pair else rows.dtype)
    if by_pair:
        _launch_pair_shrink(rows, s, stack_a, stack_b, routing, tile, gather)
        return LowRank(s, stack_b, slots)
    if scatter:
        _launch_scatter_shrink(rows, s, stack_a, stack_b, routing, tile)
        return LowRank(s, stack_b, slots)
    by_cuda = by_cuda and can_shrink(rows, routing.num_experts)
    groups = routing.num_experts * min(routing.num_slots, 4)
    cuda_alone = gather and by_cuda and (following is not None or stack_b.dim >= 1024)  # that of act, of half as many columns, is not by Triton either
    if cuda_alone and pairs >= LONG_ROWS * routing.num_experts * routing.num_slots and stack_a.shrink_width > 32:
        routing.lora_block = 144  # nothing is aligned yet
    elif cuda_alone and routing.lora_block == 64 and groups >= MANY_GROUPS and pairs <= SHORT_ROWS * groups:
        routing.lora_block = 48
    records = workspace.get(f"{name}.records", (routing.alignment.lora_tiles.shape[0], RECORD.value), torch.int64)
    made = routing.lora_ranges  # by a shrink before this one, and before that was the alignment
    ranges = routing.lora_ranges = workspace.get(f"{name}.ranges", (routing.alignment.base_tiles.shape[0], 2), torch.int32) if made is None else made
    to_fill = ranges if made is None else None
    then = None if following is None else _following(*following, routing, workspace, LowRank(s, stack_b, slots, records, ranges))
    if by_cuda:
        group_shrink(rows, stack_a, stack_b, routing, s, records, to_fill, gather=gather, early=made is not None, following=then)
    else:
        assert then is None, "the records of a following shrink are written by the CUDA kernel alone"
        _launch_group_shrink(rows, s, stack_a, stack_b, routing, tile, gather, records, to_fill)
    return LowRank(s, stack_b, slots, records, ranges, then)


def _following(a: Stack, b: Stack, blocks: int, routing: Routing, workspace: Workspace, first: LowRank) -> Following:
    pairs, tiles = routing.num_pairs, routing.alignment.lora_tiles.shape[0]
    s = workspace.get("lora.following.s", (1, pairs, a.shrink_width), first.s.dtype)
    records = workspace.get("lora.following.records", (tiles, RECORD.value), torch.int64)
    parts = workspace.get("lora.following.parts", (blocks, pairs, triton.cdiv(a.max_rank, 16) * 16), torch.float32)
    return Following(a, LowRank(s, b, first.token_slots, records, first.ranges), parts)


def _launch_pair_shrink(rows: torch.Tensor, s: torch.Tensor, a: Stack, b: Stack, routing: Routing, tile: ShrinkTile, gather: bool) -> None:
    _shrink_pair_kernel[(routing.num_pairs, triton.cdiv(a.shrink_width, tile.r), tile.split)](
        rows, s, routing.topk_ids, routing.token_slots, a.pool, a.offset, a.expert_stride, a.rank, a.split_a, b.scaling,
        a.dim, a.shrink_width, routing.num_pairs, routing.num_experts, a.num_slots,
        TOP_K=routing.top_k, GATHER=gather, SPLIT_K=tile.split, MAX_RANK=a.max_rank, ALIGN=16 // rows.element_size(),
        BM=tile.m, BR=tile.r, BK=tile.k, EVEN_K=a.dim % (tile.k * tile.split) == 0, STAGES=tile.stages,
        PRECISION=launch.dot_precision(rows.dtype), num_warps=tile.warps, **launch.options(rows.device),
    )  # fmt: skip


def _launch_scatter_shrink(rows: torch.Tensor, s: torch.Tensor, a: Stack, b: Stack, routing: Routing, tile: ShrinkTile) -> None:
    """s in pair order of rows [P, cols] in sorted order: by programs that hold all of A where that is small."""
    if a.dim > AT_ONCE or a.shrink_width > 16:
        return _launch_group_shrink(rows, s, a, b, routing, tile, False, None, None)
    align = routing.alignment
    _shrink_scatter_kernel[(align.lora_tiles.shape[0],)](
        rows, s, align.lora_tiles, align.counts, align.sorted_pairs, routing.told, a.pool, a.offset, a.expert_stride, a.rank, b.scaling,
        a.dim, a.shrink_width, ALIGN=16 // rows.element_size(), BM=tile.m, BR=16, BK=max(16, triton.next_power_of_2(a.dim)),
        PRECISION=launch.dot_precision(rows.dtype), num_warps=4, **launch.options(rows.device),
    )  # fmt: skip


def _launch_group_shrink(
    rows: torch.Tensor, s: torch.Tensor, a: Stack, b: Stack, routing: Routing, tile: ShrinkTile, gather: bool,
    records: torch.Tensor | None, ranges: torch.Tensor | None,
) -> None:  # fmt: skip  # budget: what the pair form takes, and the three buffers of grouped rows
    align = routing.alignment
    rank_blocks = triton.cdiv(a.shrink_width, tile.r)
    programs = max(1, min(align.lora_tiles.shape[0], launch.multiprocessors(rows.device) * 8))
    _shrink_group_kernel[(programs, rank_blocks + (ranges is not None))](
        rows, s, align.lora_tiles, align.base_tiles, align.counts, align.sorted_pairs, records, ranges,
        a.pool, a.offset, a.expert_stride, a.rank, a.split_a, b.scaling, b.offset, b.expert_stride, routing.told,
        a.dim, a.shrink_width, rank_blocks,
        TOP_K=routing.top_k, GATHER=gather, EARLY=routing.beside if gather else routing.told is not None, RANGES=ranges is not None,
        MAX_RANK=a.max_rank, ALIGN=16 // rows.element_size(),
        BM=tile.m, BR=tile.r, BK=tile.k, EVEN_K=a.dim % tile.k == 0, STAGES=tile.stages,
        PRECISION=launch.dot_precision(rows.dtype), num_warps=tile.warps, **launch.options(rows.device),
    )  # fmt: skip


def moe_expand(y: torch.Tensor, low: LowRank, routing: Routing) -> torch.Tensor:
    """y [P, out] += B s in place, both in routing order; returns y. Rows without an adapter are not touched."""
    stack, pairs = low.b, routing.num_pairs
    launch.expect("moe_expand: y", y, (pairs, stack.dim), stack.pool.dtype, stack.pool.device)
    halves = 2 if stack.may_split else 1
    n = stack.dim // halves
    if routing.rows == "pair":
        block = 64 if n % 64 == 0 or halves == 1 else n & -n
        _expand_pair_kernel[(pairs, triton.cdiv(stack.dim, block))](
            y, routing.topk_ids, *low.pair_args()[:-1], n, low.s.shape[2], pairs, routing.num_experts,
            TOP_K=routing.top_k, HALVES=halves, **low.pair_options(), BN=block, num_warps=2, **launch.options(y.device),
        )  # fmt: skip
        return y
    programs = max(1, min(routing.alignment.lora_tiles.shape[0], launch.multiprocessors(y.device) * 8))
    _expand_kernel[(programs, triton.cdiv(n, 64))](
        y, low.s, stack.pool, routing.alignment.counts, low.records, n, low.s.shape[2],
        HALVES=halves, **low.tile_options(routing.lora_block * 64 * halves // 128), BM=routing.lora_block, BN=64,
        PRECISION=launch.dot_precision(y.dtype), num_warps=4, **launch.options(y.device),
    )  # fmt: skip
    return y


def fused_moe_lora(
    y: torch.Tensor, rows: torch.Tensor, stack_a: Stack, stack_b: Stack, routing: Routing, workspace: Workspace, *, gather: bool
) -> torch.Tensor:
    """y [P, out] += scaling * B (A x) for every pair with an adapter, in place; y and the result lie in `routing.rows` order.

    rows [M, in] by token with `gather`, else [P, in] in routing order; y and rows are contiguous and of the stacks' dtype, on their device,
    else ValueError. One shrink and one expand launch, nothing zero-filled.
    """
    low = moe_shrink(rows, stack_a, stack_b, routing, workspace, gather=gather, name="fused_moe_lora")
    return moe_expand(y, low, routing)
