"""q/k norm, rotary embedding and KV-cache write of one attention layer, in one kernel after the fused qkv GEMM.

q' = rope(norm(q)), k' = rope(norm(k)); k' and v go to cache row kv_slots[t]
rope (Su et al. 2021, the half-split form of GPT-NeoX that transformers uses), cos and sin of row positions[t]:
    y[:D/2] = x[:D/2] * cos - x[D/2:] * sin;  y[D/2:] = x[D/2:] * cos + x[:D/2] * sin
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import pdl_wait


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, kv_slots_ptr, positions_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    eps, qkv_stride, cache_stride, cos_stride,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HALF_PAD: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
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
    heads = 4 if m <= 64 else 8
    _qk_norm_rope_kernel[(m, triton.cdiv(num_heads + 2 * hkv, heads))](
        qkv, q, k_cache, v_cache, kv_slots, positions, cos, sin, q_weight, k_weight, eps, qkv.stride(0), hkv * d, cos.stride(0),
        HQ=num_heads, HKV=hkv, D=d, HALF_PAD=triton.next_power_of_2(d // 2), HEADS=heads, NORM=q_weight is not None, num_warps=heads // 2,
        **launch.options(qkv.device),
    )  # fmt: skip
    return q
