"""The expert GEMMs over sorted pairs, one kernel source for every size.

    out[row] = f(a[row] @ w[e]^T + bias[e] + low-rank addend)      e = the expert of the row's tile, accumulated in float32

a is either gathered (row of x = token of the pair) or read in sorted order; out lies in sorted order, or scattered to pair order for the combine. f is the
activation over (gate, up) halves of w, or nothing. w has 16 (or 32) bits, or 4 or 8 and is dequantized on its way into the product. A persistent grid walks the
tiles of `moe_lora_align_block_size`; nothing is sized by experts times slots, and no row outside a tile is written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import launch, low_rank
from sglang_lora_moe.ops.low_rank import FEW_ACCUMULATORS, NO_TILE_ARGS, NO_TILE_OPTIONS, LowRank, load_block, load_records, pdl_wait, tile_delta, told
from sglang_lora_moe.ops.moe_activation import activate, activation_code
from sglang_lora_moe.ops.moe_combine import token_delta
from sglang_lora_moe.ops.moe_lora_align import Alignment
from sglang_lora_moe.ops.wna16_tile import load_wna16
from sglang_lora_moe.quantization.wna16 import WNA16Weight

FIRST_ROUND = 6  # programs of a multiprocessor that run at once, at most
SUM_COLUMNS = tl.constexpr(32)  # of a program that sums B s of a token


@dataclass(frozen=True)
class GemmTile:
    """Launch shape of one grouped GEMM. `n` counts output columns: a gated tile reads 2 n rows of w."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    ctas: int = 1  # programs per multiprocessor of the persistent grid; 0 = a program per tile, which the hardware balances
    group: int = 1  # row tiles that walk the columns together, so that they share w in L2
    tail: bool = False  # run tiles of at most m / 2 rows at half height
    tma: bool = True  # read w through a tensor descriptor (sm_90 and newer)


@triton.jit
def _find_tile(t, total, num_tiles, max_tiles, n_blocks, tiles_ptr, GROUP: tl.constexpr, BN: tl.constexpr):
    """(tile, its expert, start, rows, first column) of the t-th step of the walk; rows 0 beyond the last."""
    if GROUP == 1:  # does not wait for the number of tiles: beyond the last the entry is undefined, but there
        tile = tl.minimum(t // n_blocks, max_tiles - 1)
        column = t % n_blocks
    else:
        group = t // (GROUP * n_blocks)
        size = tl.maximum(tl.minimum(num_tiles - group * GROUP, GROUP), 1)
        local = t - group * GROUP * n_blocks
        tile = tl.where(t < total, group * GROUP + local % size, 0)
        column = local // size
    expert = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    start = tl.load(tiles_ptr + 3 * tile + 1)
    rows = tl.load(tiles_ptr + 3 * tile + 2)
    return tile, tl.where(t < total, expert, 0), tl.where(t < total, start, 0), tl.where(t < total, rows, 0), column * BN


@triton.jit
def _main_loop(
    a_ptr, a_desc, w_ptr, w_desc, w_scales, w_zeros, source, live, expert, start, n0, N, K,
    BITS: tl.constexpr, W_GROUP: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(a @ gate^T, a @ up^T) of one tile, or (a @ w^T, zeros)."""
    HALVES: tl.constexpr = 2 if GATED else 1
    rn = n0 + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    w_row = (expert * HALVES * N + n0).to(tl.int32)
    a_ptrs = a_ptr + source.to(tl.int64)[:, None] * K + rk[None, :]
    w_ptrs = w_ptr + expert * HALVES * N * K + rn.to(tl.int64)[None, :] * K + rk[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc_up = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        if BITS > 0:
            w = load_wna16(w_ptr, w_scales, w_zeros, expert * HALVES * N + rn, rn < N, k, K, BITS, W_GROUP, BN, BK, a_ptr.dtype.element_ty)
        elif w_desc is not None:
            w = w_desc.load([w_row, k]).T
        else:
            w = tl.load(w_ptrs + k, mask=(rn < N)[None, :] & (k + rk < K)[:, None], other=0.0)
        if a_desc is not None:
            a = a_desc.load([start, k])  # rows beyond this tile belong to others: computed, not stored
        elif EVEN_K:
            a = tl.load(a_ptrs + k, mask=live[:, None], other=0.0)
        else:
            a = tl.load(a_ptrs + k, mask=live[:, None] & (k + rk < K)[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        if GATED:
            if BITS > 0:
                w_up = load_wna16(w_ptr, w_scales, w_zeros, (expert * HALVES + 1) * N + rn, rn < N, k, K, BITS, W_GROUP, BN, BK, a_ptr.dtype.element_ty)
            elif w_desc is not None:
                w_up = w_desc.load([w_row + N, k]).T
            else:
                w_up = tl.load(w_ptrs + (k + N.to(tl.int64) * K), mask=(rn < N)[None, :] & (k + rk < K)[:, None], other=0.0)
            acc_up = tl.dot(a, w_up, acc_up, input_precision=PRECISION)
    return acc, acc_up


@triton.jit
def _records_of(ranges_ptr, tile, known, ADDEND: tl.constexpr):
    """First and last record of the adapters of a tile; none (0, 0) where they are not `known` yet."""
    first, last = 0, 0
    if ADDEND:
        first = tl.load(ranges_ptr + 2 * tile, mask=known, other=0)
        last = tl.load(ranges_ptr + 2 * tile + 1, mask=known, other=0)
    return first, last


@triton.jit
def _one_tile(
    a_ptr, a_desc, w_ptr, w_desc, w_scales, w_zeros, bias_ptr, out_ptr, pair, tile, first, last, s_ptr, pool_ptr, records_ptr, ranges_ptr, s_width,
    expert, start, rows, n0, N, K, BITS: tl.constexpr, W_GROUP: tl.constexpr,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    ADDEND: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr, SEVERAL: tl.constexpr,
    AHEAD: tl.constexpr, early,
    EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Main loop, addend, bias, activation and store of one tile of at most BM rows."""
    HALVES: tl.constexpr = 2 if GATED else 1
    rm = tl.arange(0, BM)
    live = rm < rows
    place = start + rm
    rn = n0 + tl.arange(0, BN)
    source = pair // TOP_K if GATHER else place
    low, b, high, b_up = 0, 0, 0, 0
    if ADDEND:  # of no record where the shrink may not be over yet
        l_start, l_rows, l_rank, l_split, b_place, whole = load_records(records_ptr, first, last, RANK_BLOCK, SEVERAL, ALIGN)
        if AHEAD:  # in flight during the main loop
            low, b, high, b_up = load_block(
                s_ptr, s_width, l_start, l_rows, l_rank, l_split, b_place, whole, 0, place, rn, N, pool_ptr, GATED, RANK_BLOCK, MAX_RANK, ALIGN, SEVERAL
            )  # fmt: skip
    acc, acc_up = _main_loop(
        a_ptr, a_desc, w_ptr, w_desc, w_scales, w_zeros, source, live, expert, start, n0, N, K, BITS, W_GROUP, GATED, EVEN_K, BM, BN, BK, STAGES, PRECISION
    )  # fmt: skip
    if ADDEND:
        if not early:
            pdl_wait(PDL)  # the shrink is the kernel before this one; everything else was there before it
            first, last = _records_of(ranges_ptr, tile, True, ADDEND)
            l_start, l_rows, l_rank, l_split, b_place, whole = load_records(records_ptr, first, last, RANK_BLOCK, SEVERAL, ALIGN)
            if AHEAD:
                low, b, high, b_up = load_block(
                    s_ptr, s_width, l_start, l_rows, l_rank, l_split, b_place, whole, 0, place, rn, N, pool_ptr, GATED, RANK_BLOCK, MAX_RANK, ALIGN, SEVERAL
                )  # fmt: skip
        acc, acc_up = tile_delta(
            acc, acc_up, first, last, l_start, l_rows, l_rank, l_split, b_place, whole, low, b, high, b_up, place, rn, N,
            s_ptr, s_width, pool_ptr, records_ptr, GATED, RANK_BLOCK, MAX_RANK, ALIGN, SEVERAL, AHEAD, PRECISION,
        )  # fmt: skip
    if bias_ptr is not None:
        b_ptrs = bias_ptr + expert * HALVES * N + rn
        acc += tl.load(b_ptrs, mask=rn < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up += tl.load(b_ptrs + N, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    if ACT > 0:
        acc = activate(acc, acc_up, ACT, GATED, ALPHA, LIMIT)
    row = pair if SCATTER else place
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (rn < N)[None, :])


@triton.jit
def _tile_or_sum(sums, N, LATE: tl.constexpr, TOP_K: tl.constexpr, ALIGN: tl.constexpr):
    """This program's tile. With `sums` every other program from LATE on sums B s of some columns of a token, until that is done, and gets one beyond all."""
    tile = tl.program_id(0)
    if sums is not None:
        summed_ptr, tokens, token_args = sums
        blocks = tl.cdiv(N, SUM_COLUMNS)
        later = tl.maximum(tile - LATE, 0)
        i = later // 2
        tile -= tl.minimum((later + 1) // 2, tokens * blocks)
        if (later % 2 == 1) & (i < tokens * blocks):
            tile = 1 << 30
            token = i // blocks
            rn = i % blocks * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)
            tl.store(summed_ptr + token.to(tl.int64) * N + rn, token_delta(token_args, token, rn, N, TOP_K, 16, ALIGN), mask=rn < N)
    return tile


@triton.jit
def _grouped_gemm_kernel(
    a_ptr, a_desc, tail_desc, w_ptr, w_desc, bias_ptr, out_ptr,  # [rows, K] (three forms), [E, HALVES * N, K], [E, HALVES * N], [P, N]
    w_scales, w_zeros,  # of integer weights, None without
    tiles_ptr, counts_ptr, sorted_pairs_ptr,  # the alignment
    s_ptr, pool_ptr, records_ptr, ranges_ptr, s_width,  # the addend, None without
    sums, told_ptr, N, K, max_tiles, BITS: tl.constexpr, W_GROUP: tl.constexpr,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    ADDEND: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr, SEVERAL: tl.constexpr,
    AHEAD: tl.constexpr, LATE: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A walk over (tile, block of columns). What a tile needs before its main loop is fetched during the one before: a chain of
    dependent loads (tile, pairs, records) would otherwise stand between any two. With TAIL, tiles of few rows run at half height.
    LATE (a program per tile): the main loop runs beside the kernel before, which made the addend, and waits for it at its end. Programs from
    number LATE on, if not 1, begin when that is over: they wait first, have the addend under way during the main loop, and the kernel after may start."""
    early = (tl.program_id(0) >= LATE) & (LATE > 1) if LATE else True
    if early:
        pdl_wait(PDL)
    elif PDL and GATHER and told_ptr is not None:
        told(told_ptr, 0)  # the alignment is complete
    num_tiles = tl.load(counts_ptr + 1)
    n_blocks = tl.cdiv(N, BN)
    total = num_tiles * n_blocks
    step = tl.num_programs(0)
    rm = tl.arange(0, BM)
    begin = _tile_or_sum(sums, N, LATE, TOP_K, 128 // a_ptr.dtype.element_ty.primitive_bitwidth)
    tile, expert, start, rows, n0 = _find_tile(begin, total, num_tiles, max_tiles, n_blocks, tiles_ptr, GROUP, BN)
    tile1, expert1, start1, rows1, n1 = tile, expert, start, rows, n0
    pair = tl.load(sorted_pairs_ptr + start + rm, mask=rm < rows, other=0)
    if not LATE:
        tile1, expert1, start1, rows1, n1 = _find_tile(begin + step, total, num_tiles, max_tiles, n_blocks, tiles_ptr, GROUP, BN)
    first, last = _records_of(ranges_ptr, tile, early, ADDEND)
    if PDL and not GATHER and told_ptr is not None and not early:
        told(told_ptr, 1)  # a is
    low_rank.pdl_early(PDL and LATE == 1 and not GATHER)  # the combine; its ids and weights are older than a
    for t in tl.range(begin, total, step, num_stages=1):
        pair1, first1, last1 = pair, first, last
        tile2, expert2, start2, rows2, n2 = tile1, expert1, start1, rows1, n1
        if not LATE:
            pair1 = tl.load(sorted_pairs_ptr + start1 + rm, mask=rm < rows1, other=0)
            tile2, expert2, start2, rows2, n2 = _find_tile(t + 2 * step, total, num_tiles, max_tiles, n_blocks, tiles_ptr, GROUP, BN)
            first1, last1 = _records_of(ranges_ptr, tile1, True, ADDEND)
        if TAIL and rows <= BM // 2:
            few = tl.load(sorted_pairs_ptr + start + tl.arange(0, BM // 2), mask=tl.arange(0, BM // 2) < rows, other=0)
            _one_tile(
                a_ptr, tail_desc, w_ptr, w_desc, w_scales, w_zeros, bias_ptr, out_ptr, few, tile, first, last, s_ptr, pool_ptr, records_ptr, ranges_ptr,
                s_width, expert, start, rows, n0, N, K, BITS, W_GROUP, TOP_K, GATHER, SCATTER, GATED, ACT, ALPHA, LIMIT, ADDEND, RANK_BLOCK, MAX_RANK,
                ALIGN, SEVERAL, AHEAD, early, EVEN_K, BM // 2, BN, BK, STAGES, PRECISION, PDL,
            )  # fmt: skip
        else:
            _one_tile(
                a_ptr, a_desc, w_ptr, w_desc, w_scales, w_zeros, bias_ptr, out_ptr, pair, tile, first, last, s_ptr, pool_ptr, records_ptr, ranges_ptr,
                s_width, expert, start, rows, n0, N, K, BITS, W_GROUP, TOP_K, GATHER, SCATTER, GATED, ACT, ALPHA, LIMIT, ADDEND, RANK_BLOCK, MAX_RANK,
                ALIGN, SEVERAL, AHEAD, early, EVEN_K, BM, BN, BK, STAGES, PRECISION, PDL,
            )  # fmt: skip
        tile, expert, start, rows, n0, pair, first, last = tile1, expert1, start1, rows1, n1, pair1, first1, last1
        tile1, expert1, start1, rows1, n1 = tile2, expert2, start2, rows2, n2
    if LATE:
        pdl_wait(PDL)  # programs without a tile


def grouped_gemm(
    a: torch.Tensor, w: torch.Tensor | WNA16Weight, bias: torch.Tensor | None, alignment: Alignment, out: torch.Tensor, tile: GemmTile, *,
    top_k: int, gather: bool, scatter: bool, activation: MoESpec | None = None, addend: LowRank | None = None, beside: bool = False,
    sums: tuple | None = None, told_ptr: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip  # budget: the tensors of one grouped product, its row orders and its addend
    """One expert GEMM into `out` [P, N], which it returns; rows of pairs without an expert stay as they are.

    a [M, K] with `gather`, else [P, K] in sorted order; w [E, N or 2N, K], plain or with 4 or 8 bits and scales in a's dtype;
    bias [E, N or 2N]. `activation` = the layer's spec where the epilogue activates (gate_up), None for a plain product.
    `tile.m` must be the alignment's base_block. `beside`: without an addend, too, the kernel before wrote nothing that this one reads, but for
    `sums` = (float32 [M, N], M, `LowRank.token_args`): B s of that addend, summed over a token's experts for the combine by programs of their own.
    With `told_ptr` it lets this one start at once, and sets this word, int32 [1], when all before it is complete: to 0 with `gather`, else to 1.
    """
    matrix, scales, zeros, bits, group = _storage(w)
    (num_experts, w_rows), k = matrix.shape[:2], a.shape[1]
    (num_pairs, n), gated = out.shape, activation is not None and activation.gated
    _check(a, w, bias, out, gated, num_pairs, gather)
    use_tma = tile.tma and launch.has_tma(a.device) and (k * a.element_size()) % 16 == 0
    w_desc = TensorDescriptor(matrix, [num_experts * w_rows, k], [k, 1], [tile.n, tile.k]) if use_tma and not bits else None
    a_desc, tail_desc = (TensorDescriptor(a, [num_pairs, k], [k, 1], [m, tile.k]) if use_tma and not gather else None for m in (tile.m, tile.m // 2))
    sms, max_tiles = launch.multiprocessors(a.device), alignment.base_tiles.shape[0]
    ctas, late = 0 if sums else tile.ctas, FIRST_ROUND * sms
    programs = max(1, max_tiles * triton.cdiv(n, tile.n))
    if ctas:
        programs = min(programs, sms * ctas)
    if sums is not None:
        more = sums[1] * triton.cdiv(n, SUM_COLUMNS.value)
        programs = max(programs, late + more) + more
    added, early = NO_TILE_OPTIONS, beside
    if addend is not None:
        added, early = _addend_options(addend, tile, w_rows // n, w_desc is not None)
    _grouped_gemm_kernel[(programs,)](
        a, a_desc, tail_desc if tile.tail else None, matrix, w_desc, bias, out, scales, zeros,
        alignment.base_tiles, alignment.counts, alignment.sorted_pairs,
        *(NO_TILE_ARGS if addend is None else addend.tile_args()),
        sums, told_ptr, n, k, max_tiles, BITS=bits, W_GROUP=group,
        TOP_K=top_k, GATHER=gather, SCATTER=scatter, GATED=gated, ACT=0 if activation is None else activation_code(activation),
        ALPHA=(activation.swiglu_alpha or 0.0) if activation else 0.0, LIMIT=(activation.swiglu_limit or 0.0) if activation else 0.0,
        **added, LATE=0 if ctas else late if early else int(addend is not None),
        EVEN_K=k % tile.k == 0, GROUP=tile.group, TAIL=tile.tail, BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages,
        PRECISION=launch.dot_precision(a.dtype), num_warps=tile.warps, **launch.options(a.device),
    )  # fmt: skip
    return out


def _addend_options(addend: LowRank, tile: GemmTile, halves: int, tma: bool) -> tuple[dict[str, int | bool], bool]:
    """How the kernel adds, and whether programs after the first round have the addend under way early: where that measured faster."""
    accumulators, small = tile.m * halves * tile.n // (32 * tile.warps), tile.m <= 32 and tma  # else the main loop's addresses take the registers
    early = small and (halves == 2 or (accumulators > FEW_ACCUMULATORS and tile.n * tile.k <= 8192))
    added = addend.tile_options(accumulators, several=small, ahead=early)
    return added, early and bool(added["AHEAD"] or accumulators <= FEW_ACCUMULATORS)


def _storage(w: torch.Tensor | WNA16Weight) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int]:
    """(weights as stored, scales, zeros, bits, group) for the kernel; bits 0 = plain, group 0 = one a row."""
    if isinstance(w, torch.Tensor):
        return w, None, None, 0, 0
    return w.packed.view(torch.uint8), w.scales, w.zeros, w.bits, 0 if w.scales.shape[-1] == 1 else w.group_size


def _check(a: torch.Tensor, w: torch.Tensor | WNA16Weight, bias: torch.Tensor | None, out: torch.Tensor, gated: bool, pairs: int, gather: bool) -> None:
    n, k, rows = out.shape[1], a.shape[1], out.shape[1] * (2 if gated else 1)
    if isinstance(w, WNA16Weight):
        experts = w.packed.shape[0]
        launch.expect("grouped_gemm: packed w", w.packed, (experts, rows, k * w.bits // 32), torch.int32, a.device)
        launch.expect("grouped_gemm: scales of w", w.scales, (experts, rows, k // w.group_size), a.dtype, a.device)
        if w.zeros is not None:
            launch.expect("grouped_gemm: zeros of w", w.zeros, w.scales.shape, torch.uint8, a.device)
    else:
        experts = w.shape[0]
        launch.expect("grouped_gemm: w", w, (experts, rows, k), a.dtype, a.device)
    launch.expect("grouped_gemm: a", a, (a.shape[0] if gather else pairs, k), a.dtype, a.device)
    launch.expect("grouped_gemm: out", out, (pairs, n), a.dtype, a.device)
    if bias is not None:
        launch.expect("grouped_gemm: bias", bias, (experts, rows), a.dtype, a.device)
