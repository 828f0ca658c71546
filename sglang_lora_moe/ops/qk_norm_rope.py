"""q/k norm, rotary embedding and KV-cache write of one attention layer, in one kernel after the fused qkv GEMM.

q' = rope(norm(q)), k' = rope(norm(k)); k' and v go to cache row kv_slots[t]
rope (Su et al. 2021, the half-split form of GPT-NeoX that transformers uses), cos and sin of row positions[t]:
    y[:D/2] = x[:D/2] * cos - x[D/2:] * sin;  y[D/2:] = x[D/2:] * cos + x[:D/2] * sin

qkv may come with the adapters' part of it still to be added (`LinearAddend` of the qkv linear, whose parts are q, k and v).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.lora_linear import NO_LINEAR_ADDEND, LinearAddend, matrix_of
from sglang_lora_moe.ops.low_rank import pdl_wait


@triton.jit
def _head_rows(s_ptrs, b_ptrs, high_rows, mask, rank, split_stride, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """B s for the rows at b_ptrs [HEADS, HALF_PAD] and those `high_rows` elements behind them."""
    low, high = tl.zeros(mask.shape, dtype=tl.float32), tl.zeros(mask.shape, dtype=tl.float32)
    for r0 in tl.range(0, tl.max(rank, axis=0), RANK_BLOCK, num_stages=1):
        rr = r0 + tl.arange(0, RANK_BLOCK)
        real = rr[None, :] < rank[:, None]
        s = tl.load(s_ptrs[:, None] + rr[None, :], mask=real, other=0.0)
        for i in tl.static_range(1, SPLITS):
            s += tl.load(s_ptrs[:, None] + i * split_stride + rr[None, :], mask=real, other=0.0)
        b_mask = mask[:, :, None] & real[:, None, :]
        b = b_ptrs[:, :, None] + rr[None, None, :]
        low += tl.sum(tl.load(b, mask=b_mask, other=0.0).to(tl.float32) * s[:, None, :], axis=2)
        high += tl.sum(tl.load(b + high_rows[:, None, None], mask=b_mask, other=0.0).to(tl.float32) * s[:, None, :], axis=2)
    return low, high


@triton.jit
def _head_delta(
    token, head, half, mask, s_ptr, slot, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, width,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """scaling * B s for rows [D/2] and the D/2 after them of each head, float32 [HEADS, HALF_PAD] twice."""
    HALF: tl.constexpr = D // 2
    part = (head >= HQ).to(tl.int32) + (head >= HQ + HKV).to(tl.int32)
    part = tl.where(head < HQ + 2 * HKV, part, 0)
    entry = part * part_stride + slot
    rank = tl.load(rank_ptr + entry)
    first = (head - tl.where(part == 0, 0, tl.where(part == 1, HQ, HQ + HKV))) * D
    b_ptr = matrix_of(pool_ptr, offset_ptr, entry)[:, None]
    rows = first[:, None] + half[None, :]
    s_ptrs = s_ptr + token * s_stride + part * width
    if tl.max(rank % 8, axis=0) == 0:
        even = rank // 8 * 8
        low, high = _head_rows(s_ptrs, b_ptr + rows * even[:, None], HALF * even, mask, even, split_stride, SPLITS, RANK_BLOCK)
    else:
        low, high = _head_rows(s_ptrs, b_ptr + rows * rank[:, None], HALF * rank, mask, rank, split_stride, SPLITS, RANK_BLOCK)
    scaling = tl.load(scaling_ptr + entry)[:, None]
    return low * scaling, high * scaling


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, kv_slots_ptr, positions_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    eps, qkv_stride, cache_stride, cos_stride,
    s_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, width,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HALF_PAD: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    ADDEND: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (token, HEADS heads): heads [0, HQ) are queries, then HKV keys, then HKV values."""
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, HALF_PAD)
    inside = half < HALF
    mask = (head < HQ + 2 * HKV)[:, None] & inside[None, :]
    source = qkv_ptr + token * qkv_stride + head[:, None] * D + half[None, :]
    first, second = tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)
    if ADDEND:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            low, high = _head_delta(
                token, head, half, mask, s_ptr, slot, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, width,
                HQ, HKV, D, SPLITS, RANK_BLOCK,
            )  # fmt: skip
            first, second = (first.to(tl.float32) + low).to(first.dtype), (second.to(tl.float32) + high).to(first.dtype)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        q_low, q_high = tl.load(q_weight_ptr + half, mask=inside, other=0.0), tl.load(q_weight_ptr + HALF + half, mask=inside, other=0.0)
        k_low, k_high = tl.load(k_weight_ptr + half, mask=inside, other=0.0), tl.load(k_weight_ptr + HALF + half, mask=inside, other=0.0)
        is_query = (head < HQ)[:, None]
        a = a * scale * tl.where(is_query, q_low[None, :].to(tl.float32), k_low[None, :].to(tl.float32))
        b = b * scale * tl.where(is_query, q_high[None, :].to(tl.float32), k_high[None, :].to(tl.float32))
        a, b = a.to(first.dtype).to(tl.float32), b.to(first.dtype).to(tl.float32)  # transformers rounds between norm and rope
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * cos_stride + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * cos_stride + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    low, high = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
    cache_row = tl.load(kv_slots_ptr + token) * cache_stride
    q_target = q_out_ptr + (token * HQ + head)[:, None] * D + half[None, :]
    tl.store(q_target, low, mask=mask & (head < HQ)[:, None])
    tl.store(q_target + HALF, high, mask=mask & (head < HQ)[:, None])
    is_key = ((head >= HQ) & (head < HQ + HKV))[:, None]
    k_target = k_cache_ptr + cache_row + (head - HQ)[:, None] * D + half[None, :]
    tl.store(k_target, low, mask=mask & is_key)
    tl.store(k_target + HALF, high, mask=mask & is_key)
    is_value = (head >= HQ + HKV)[:, None]
    v_target = v_cache_ptr + cache_row + (head - HQ - HKV)[:, None] * D + half[None, :]
    tl.store(v_target, first, mask=mask & is_value)
    tl.store(v_target + HALF, second, mask=mask & is_value)


def qk_norm_rope(
    qkv: torch.Tensor,  # [M, (Hq + 2 Hkv) * D]
    k_cache: torch.Tensor,  # [rows, Hkv, D]
    v_cache: torch.Tensor,  # [rows, Hkv, D]
    kv_slots: torch.Tensor,  # int64 [M]
    positions: torch.Tensor,  # int64 [M]
    tables: tuple[torch.Tensor, torch.Tensor],  # cos and sin [positions, >= D/2], the first half is read
    *,
    num_heads: int,
    q_weight: torch.Tensor | None = None,  # [D]; norm is skipped without
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
    q = qkv.new_empty(m, num_heads, d)
    heads = 4 if m <= 64 or addend is not None else 8
    extra = (*NO_LINEAR_ADDEND, 0) if addend is None else (*addend.kernel_args(), addend.s.shape[3])
    _qk_norm_rope_kernel[(m, triton.cdiv(num_heads + 2 * hkv, heads))](
        qkv, q, k_cache, v_cache, kv_slots, positions, cos, sin, q_weight, k_weight, eps, qkv.stride(0), hkv * d, cos.stride(0), *extra,
        HQ=num_heads, HKV=hkv, D=d, HALF_PAD=triton.next_power_of_2(d // 2), HEADS=heads, NORM=q_weight is not None,
        num_warps=heads // 2 if addend is None else heads, ADDEND=addend is not None,
        SPLITS=1 if addend is None else addend.s.shape[0], RANK_BLOCK=16 if addend is None else addend.rank_block,
        **launch.options(qkv.device),
    )  # fmt: skip
    return q
