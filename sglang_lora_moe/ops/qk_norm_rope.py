"""q/k norm, rotary embedding and KV-cache write of one attention layer, in one kernel after the fused qkv GEMM.

q' = rope(norm(q)), k' = rope(norm(k)); k' and v go to cache row kv_slots[t]
rope (Su et al. 2021, the half-split form of GPT-NeoX that transformers uses), cos and sin of row positions[t]:
    y[:D/2] = x[:D/2] * cos - x[D/2:] * sin;  y[D/2:] = x[D/2:] * cos + x[:D/2] * sin

qkv may come with the adapters' part of it still to be added (`LinearAddend` of the qkv linear, whose parts are q, k and v).
"""

import math

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch, norm_rope
from sglang_lora_moe.ops.lora_linear import (
    NO_LINEAR_ADDEND,
    NO_SLOT,
    ROWS_MAX,
    LinearAddend,
    load_tile_b,
    load_tile_s,
    matrix_at,
    matrix_of,
    next_slot,
    tile_rows,
    whole_pieces,
)
from sglang_lora_moe.ops.low_rank import pdl_wait

FEW_TOKENS = 512  # up to which a tile's program owns one head; beyond, four share s, cos and sin


@triton.jit
def _load_halves(b_ptr, first, half, mask, rank, r0, HALF: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """Columns [r0, r0 + RANK_BLOCK) of B for both halves of each head, [HEADS, HALF_PAD, RANK_BLOCK] twice."""
    rr = r0 + tl.arange(0, RANK_BLOCK)
    b_mask = mask[:, :, None] & (rr[None, :] < rank[:, None])[:, None, :]
    ptrs = b_ptr[:, None, None] + ((first[:, None] + half[None, :]) * rank[:, None])[:, :, None] + rr[None, None, :]
    return tl.load(ptrs, mask=b_mask, other=0.0), tl.load(ptrs + (HALF * rank)[:, None, None], mask=b_mask, other=0.0)


@triton.jit
def _head_s(s_ptrs, r0, width, split_stride, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """s [HEADS, RANK_BLOCK] of each head's part, undefined beyond its rank."""
    rr, splits = r0 + tl.arange(0, RANK_BLOCK), tl.arange(0, triton.next_power_of_2(SPLITS))
    ptrs = s_ptrs[:, None, None] + (splits * split_stride)[None, :, None] + rr[None, None, :]
    return tl.sum(tl.load(ptrs, mask=((splits < SPLITS)[:, None] & (rr < width)[None, :])[None], other=0.0), axis=1)


@triton.jit
def _load_whole_halves(b_ptr, first, half, mask, rank, r0, HALF: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """As `_load_halves`, in 16-byte pieces where the ranks allow it."""
    if tl.max(rank % 8, axis=0) == 0:
        b_low, b_high = _load_halves(b_ptr, first, half, mask, whole_pieces(rank), r0, HALF, RANK_BLOCK)
    else:
        b_low, b_high = _load_halves(b_ptr, first, half, mask, rank, r0, HALF, RANK_BLOCK)
    return b_low, b_high


@triton.jit
def _head_delta(
    s, b_low, b_high, b_ptr, first_row, half, mask, rank, s_ptrs, width, split_stride, HALF: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr
):
    """B s for both halves of each head, float32 [HEADS, HALF_PAD] twice. `s`, `b_low`, `b_high`: the first `_head_s` and `_load_whole_halves`."""
    low, high = tl.zeros(mask.shape, dtype=tl.float32), tl.zeros(mask.shape, dtype=tl.float32)
    for r0 in tl.range(0, tl.max(rank, axis=0), RANK_BLOCK, num_stages=1):
        if r0 > 0:
            s = _head_s(s_ptrs, r0, width, split_stride, SPLITS, RANK_BLOCK)
            b_low, b_high = _load_whole_halves(b_ptr, first_row, half, mask, rank, r0, HALF, RANK_BLOCK)
        real = (r0 + tl.arange(0, RANK_BLOCK))[None, :] < rank[:, None]
        factor = tl.where(real, s, 0.0)[:, None, :]
        low += tl.sum(b_low.to(tl.float32) * factor, axis=2)
        high += tl.sum(b_high.to(tl.float32) * factor, axis=2)
    return low, high


@triton.jit
def _normed(a, b, head, half, inside, q_weight_ptr, k_weight_ptr, eps, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """Both halves [HEADS, HALF_PAD] of heads times the norm's scale and weight, float32; values get weight 0."""
    HALF: tl.constexpr = D // 2
    is_query, is_key, squares = head < HQ, (head >= HQ) & (head < HQ + HKV), (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D
    column = half[None, :]
    if WHOLE:
        squares = tl.where(is_query, tl.sum(tl.where(is_query, squares, 0.0)) / HQ, tl.sum(tl.where(is_key, squares, 0.0)) / HKV)
        column = tl.where(is_query, head, head - HQ)[:, None] * D + half[None, :]
    scale = tl.rsqrt(squares + eps)[:, None]
    q_mask, k_mask = is_query[:, None] & inside[None, :], is_key[:, None] & inside[None, :]
    for_low = tl.load(q_weight_ptr + column, mask=q_mask, other=0.0) + tl.load(k_weight_ptr + column, mask=k_mask, other=0.0)
    for_high = tl.load(q_weight_ptr + HALF + column, mask=q_mask, other=0.0) + tl.load(k_weight_ptr + HALF + column, mask=k_mask, other=0.0)
    return a * scale * for_low.to(tl.float32), b * scale * for_high.to(tl.float32)


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, kv_slots_ptr, positions_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    eps, qkv_stride, cache_stride, cos_stride,
    s_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, width, num_slots,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HALF_PAD: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr,
    ADDEND: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, SLOTS_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (token, HEADS heads): heads [0, HQ) are queries, then HKV keys, then HKV values. WHOLE: norms over all heads, which one program has."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, HALF_PAD)
    inside = half < HALF
    mask = (head < HQ + 2 * HKV)[:, None] & inside[None, :]
    if ADDEND:  # the kernel before is a library's, so that what follows starts late: as few loads as can be wait for each other
        slot = tl.load(slots_ptr + token)
        part = (head >= HQ).to(tl.int32) + (head >= HQ + HKV).to(tl.int32)
        first_row = (head - tl.where(part == 0, 0, tl.where(part == 1, HQ, HQ + HKV))) * D
        slots = tl.arange(0, SLOTS_PAD)
        table = part[:, None] * part_stride + slots[None, :]
        is_entry = (head < HQ + 2 * HKV)[:, None] & (slots < num_slots)[None, :]
        ranks, offsets = tl.load(rank_ptr + table, mask=is_entry, other=0), tl.load(offset_ptr + table, mask=is_entry, other=0)
        scalings = tl.load(scaling_ptr + table, mask=is_entry, other=0.0)
        mine = (slots == slot)[None, :]
        rank, b_ptr = tl.sum(tl.where(mine, ranks, 0), axis=1), matrix_at(pool_ptr, tl.sum(tl.where(mine, offsets, 0), axis=1))
        b_low, b_high = _load_whole_halves(b_ptr, first_row, half, mask, rank, 0, HALF, RANK_BLOCK)
    position = tl.load(positions_ptr + token)  # no kernel of a step writes what is read before the wait
    cos = tl.load(cos_ptr + position * cos_stride + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * cos_stride + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    cache_row = tl.load(kv_slots_ptr + token) * cache_stride
    pdl_wait(PDL)
    source = qkv_ptr + token * qkv_stride + head[:, None] * D + half[None, :]
    first, second = tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)
    if ADDEND:
        s_ptrs = s_ptr + token * s_stride + tl.where(head < HQ + 2 * HKV, part, 0) * width
        s = _head_s(s_ptrs, 0, width, split_stride, SPLITS, RANK_BLOCK)
        if tl.max(rank, axis=0) > 0:
            scaling = tl.sum(tl.where(mine, scalings, 0.0), axis=1)[:, None]
            low, high = _head_delta(s, b_low, b_high, b_ptr, first_row, half, mask, rank, s_ptrs, width, split_stride, HALF, SPLITS, RANK_BLOCK)
            first, second = (first.to(tl.float32) + low * scaling).to(first.dtype), (second.to(tl.float32) + high * scaling).to(first.dtype)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        a, b = _normed(a, b, head, half, inside, q_weight_ptr, k_weight_ptr, eps, HQ, HKV, D, WHOLE)
        a, b = a.to(first.dtype).to(tl.float32), b.to(first.dtype).to(tl.float32)  # transformers rounds between norm and rope
    low, high = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
    q_target = q_out_ptr + (token * HQ + head)[:, None] * D + half[None, :]
    tl.store(q_target, low, mask=mask & (head < HQ)[:, None])
    tl.store(q_target + HALF, high, mask=mask & (head < HQ)[:, None])
    is_key = ((head >= HQ) & (head < HQ + HKV))[:, None]
    k_target = k_cache_ptr + cache_row + (head - HQ)[:, None] * D + half[None, :]
    tl.store(k_target, low.to(k_cache_ptr.dtype.element_ty), mask=mask & is_key)
    tl.store(k_target + HALF, high.to(k_cache_ptr.dtype.element_ty), mask=mask & is_key)
    is_value = (head >= HQ + HKV)[:, None]
    v_target = v_cache_ptr + cache_row + (head - HQ - HKV)[:, None] * D + half[None, :]
    tl.store(v_target, first.to(v_cache_ptr.dtype.element_ty), mask=mask & is_value)
    tl.store(v_target + HALF, second.to(v_cache_ptr.dtype.element_ty), mask=mask & is_value)


@triton.jit
def _qk_norm_rope_tiles_kernel(
    qkv_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, kv_slots_ptr, positions_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    eps, qkv_stride, cache_stride, cos_stride, M,
    s_ptr, order_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, width,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HALF_PAD: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    SPLITS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_qk_norm_rope_kernel` with an addend, one program per (block of tokens in the order of their slots, HEADS heads of one part)."""
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    HALF: tl.constexpr = D // 2
    SHAPE: tl.constexpr = (BM, HEADS, HALF_PAD)
    head = tl.program_id(1) * HEADS
    part = (head >= HQ).to(tl.int32) + (head >= HQ + HKV).to(tl.int32)
    head_in_part = head - tl.where(part == 0, 0, tl.where(part == 1, HQ, HQ + HKV))
    half = tl.arange(0, HALF_PAD)
    inside = half < HALF
    place = tl.arange(0, HEADS)[:, None] * D + half[None, :]  # of a column, from the first of these heads on
    columns = tl.reshape(place, (HEADS * HALF_PAD,))
    wanted = columns % D < HALF
    rm, slots, real = tile_rows(order_ptr, slots_ptr, M, tl.program_id(0), BM)
    mask = real[:, None] & wanted[None, :]
    pdl_wait(PDL)
    source = qkv_ptr + rm[:, None] * qkv_stride + head * D + columns[None, :]
    first, second = tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)
    turn = (tl.load(positions_ptr + rm, mask=real, other=0) * cos_stride)[:, None] + half[None, :]
    cache_row = tl.load(kv_slots_ptr + rm, mask=real, other=0) * cache_stride + head_in_part * D
    a, b = _add_halves(
        first.to(tl.float32), second.to(tl.float32), s_ptr, rm, slots, head_in_part * D + columns, wanted, part,
        pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, width, HALF, SPLITS, BR, PRECISION, DTYPE,
    )  # fmt: skip
    first, second = tl.reshape(a.to(DTYPE), SHAPE), tl.reshape(b.to(DTYPE), SHAPE)
    a, b = first.to(tl.float32), second.to(tl.float32)
    mask = real[:, None, None] & inside[None, None, :]
    if part == 2:
        v_target = v_cache_ptr + cache_row[:, None, None] + place[None, :, :]
        tl.store(v_target, first.to(v_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(v_target + HALF, second.to(v_cache_ptr.dtype.element_ty), mask=mask)
    else:
        if NORM:
            scale = tl.rsqrt(tl.sum(a * a + b * b, axis=2) / D + eps)[:, :, None]
            weight_ptr = q_weight_ptr if part == 0 else k_weight_ptr
            a = a * scale * tl.load(weight_ptr + half, mask=inside, other=0.0).to(tl.float32)[None, None, :]
            b = b * scale * tl.load(weight_ptr + HALF + half, mask=inside, other=0.0).to(tl.float32)[None, None, :]
            a, b = a.to(DTYPE).to(tl.float32), b.to(DTYPE).to(tl.float32)  # transformers rounds between norm and rope
        table_mask = real[:, None] & inside[None, :]
        cos = tl.load(cos_ptr + turn, mask=table_mask, other=0.0).to(tl.float32)[:, None, :]
        sin = tl.load(sin_ptr + turn, mask=table_mask, other=0.0).to(tl.float32)[:, None, :]
        low, high = (a * cos - b * sin).to(DTYPE), (b * cos + a * sin).to(DTYPE)
        if part == 0:
            q_target = q_out_ptr + ((rm * HQ + head) * D)[:, None, None] + place[None, :, :]
            tl.store(q_target, low, mask=mask)
            tl.store(q_target + HALF, high, mask=mask)
        else:
            k_target = k_cache_ptr + cache_row[:, None, None] + place[None, :, :]
            tl.store(k_target, low.to(k_cache_ptr.dtype.element_ty), mask=mask)
            tl.store(k_target + HALF, high.to(k_cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_halves(
    a, b, s_ptr, rm, slots, row, inside, part, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, width,
    HALF: tl.constexpr, SPLITS: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """As `lora_linear._expand_kernel` adds B s, for both halves of heads, whose rows of B lie HALF apart."""
    slot = next_slot(slots, -1)
    while slot < NO_SLOT:
        entry = part * part_stride + slot
        rank, scaling = tl.load(rank_ptr + entry), tl.load(scaling_ptr + entry)
        b_ptr = matrix_of(pool_ptr, offset_ptr, entry)
        for r0 in tl.range(0, rank, BR, num_stages=1):
            low = load_tile_s(s_ptr, scaling, rm, slots == slot, part * width, rank, r0, s_stride, split_stride, SPLITS, BR, DTYPE)
            a = tl.dot(low, load_tile_b(b_ptr, row, inside, rank, r0, BR, DTYPE), a, input_precision=PRECISION)
            b = tl.dot(low, load_tile_b(b_ptr, row + HALF, inside, rank, r0, BR, DTYPE), b, input_precision=PRECISION)
        slot = next_slot(slots, slot)
    return a, b


def qk_norm_rope(
    qkv: torch.Tensor,  # [M, (Hq + 2 Hkv) * D]
    k_cache: torch.Tensor,  # [rows, Hkv, D]
    v_cache: torch.Tensor,  # [rows, Hkv, D]
    kv_slots: torch.Tensor,  # int64 [M]
    positions: torch.Tensor,  # int64 [M]
    tables: tuple[torch.Tensor, torch.Tensor],  # cos and sin [positions, >= D/2], the first half is read
    *,
    num_heads: int,
    q_weight: torch.Tensor | None = None,  # [D], or [Hq * D]: then q is normalised over all heads together, and k too; None: not at all
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    addend: LinearAddend | None = None,
) -> torch.Tensor:  # budget: one fused step of attention
    """Return q [M, Hq, D] after norm and rope; writes k and v to the cache. Raises ValueError on shapes that do not fit."""
    m, (hkv, d), (cos, sin) = qkv.shape[0], k_cache.shape[1:], tables
    if qkv.shape[1] != (num_heads + 2 * hkv) * d or qkv.stride(1) != 1:
        raise ValueError(f"qk_norm_rope: qkv is {tuple(qkv.shape)}, expected [M, {(num_heads + 2 * hkv) * d}] with packed rows")
    if not (k_cache.is_contiguous() and v_cache.shape == k_cache.shape and v_cache.is_contiguous()):
        raise ValueError("qk_norm_rope: k_cache and v_cache must be contiguous and of one shape")
    if cos.shape != sin.shape or cos.stride() != sin.stride() or cos.shape[1] < d // 2:
        raise ValueError(f"qk_norm_rope: cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}, expected [positions, at least {d // 2}]")
    whole = q_weight is not None and q_weight.shape[0] > d
    if whole and addend is not None:
        raise ValueError("qk_norm_rope: norms over all heads take qkv with its adapters' part")
    q = qkv.new_empty(m, num_heads, d)
    common = (qkv, q, k_cache, v_cache, kv_slots, positions, cos, sin, q_weight, k_weight, eps, qkv.stride(0), hkv * d, cos.stride(0))
    meta = {"HQ": num_heads, "HKV": hkv, "D": d, "HALF_PAD": triton.next_power_of_2(d // 2), "NORM": q_weight is not None, **launch.options(qkv.device)}
    if addend is not None and norm_rope.rotates(qkv, k_cache, cos, addend):
        norm_rope.rotate_rows(qkv, q, (k_cache, v_cache, kv_slots, positions, cos, sin), (q_weight, k_weight), eps, addend)
        return q
    if addend is not None and (addend.grouped or m > ROWS_MAX):
        heads = 1 if m <= FEW_TOKENS else math.gcd(4, num_heads, hkv)
        _qk_norm_rope_tiles_kernel[(triton.cdiv(m, 16), (num_heads + 2 * hkv) // heads)](
            *common, m, *addend.tile_args(), addend.s.shape[3], SPLITS=addend.s.shape[0], BM=16, BR=addend.tile_rank_block, HEADS=heads,
            PRECISION=launch.dot_precision(qkv.dtype), num_warps=2 if m <= FEW_TOKENS else 4, **meta,
        )  # fmt: skip
        return q
    heads = (1 if m <= 16 else 4) if addend is not None else 4 if m <= 64 else 8
    heads = triton.next_power_of_2(num_heads + 2 * hkv) if whole else heads
    extra = (*NO_LINEAR_ADDEND, 0, 1) if addend is None else (*addend.kernel_args(), addend.s.shape[3], addend.num_slots)
    _qk_norm_rope_kernel[(m, triton.cdiv(num_heads + 2 * hkv, heads))](
        *common, *extra, HEADS=heads, num_warps=min(8, heads // 2 if addend is None else max(2, heads)), WHOLE=whole, ADDEND=addend is not None,
        SPLITS=1 if addend is None else addend.s.shape[0], RANK_BLOCK=16 if addend is None else addend.rank_block,
        SLOTS_PAD=triton.next_power_of_2(extra[-1]), **meta,
    )  # fmt: skip
    return q
