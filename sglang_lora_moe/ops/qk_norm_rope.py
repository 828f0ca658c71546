"""q/k norm, rotary embedding and KV-cache write of one attention layer, in one kernel after the fused qkv GEMM.

q' = rope(norm(q)), k' = rope(norm(k)); k' and v go to cache row kv_slots[t]
rope (Su et al. 2021, the half-split form of GPT-NeoX that transformers uses):
    y[:D/2] = x[:D/2] * cos - x[D/2:] * sin;  y[D/2:] = x[D/2:] * cos + x[:D/2] * sin
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, kv_slots_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    eps, qkv_stride, cache_stride, cos_stride,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HALF_PAD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program per (token, head): heads [0, HQ) are queries, then HKV keys, then HKV values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, HALF_PAD)
    mask = half < HALF
    source = qkv_ptr + token * qkv_stride + head * D
    first, second = tl.load(source + half, mask=mask, other=0.0), tl.load(source + HALF + half, mask=mask, other=0.0)
    if head >= HQ + HKV:
        target = v_cache_ptr + tl.load(kv_slots_ptr + token) * cache_stride + (head - HQ - HKV) * D
        tl.store(target + half, first, mask=mask)
        tl.store(target + HALF + half, second, mask=mask)
        return
    a, b = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / D + eps)
        weight_ptr = k_weight_ptr
        if head < HQ:
            weight_ptr = q_weight_ptr
        a = a * scale * tl.load(weight_ptr + half, mask=mask, other=0.0).to(tl.float32)
        b = b * scale * tl.load(weight_ptr + HALF + half, mask=mask, other=0.0).to(tl.float32)
        a, b = a.to(first.dtype).to(tl.float32), b.to(first.dtype).to(tl.float32)  # transformers rounds between norm and rope
    cos = tl.load(cos_ptr + token * cos_stride + half, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * cos_stride + half, mask=mask, other=0.0).to(tl.float32)
    y, z = a * cos - b * sin, b * cos + a * sin
    if head < HQ:
        target = q_out_ptr + (token * HQ + head) * D
    else:
        target = k_cache_ptr + tl.load(kv_slots_ptr + token) * cache_stride + (head - HQ) * D
    tl.store(target + half, y.to(first.dtype), mask=mask)
    tl.store(target + HALF + half, z.to(first.dtype), mask=mask)


def qk_norm_rope(
    qkv: torch.Tensor,  # [M, (Hq + 2 Hkv) * D]
    k_cache: torch.Tensor,  # [rows, Hkv, D]
    v_cache: torch.Tensor,  # [rows, Hkv, D]
    kv_slots: torch.Tensor,  # int64 [M]
    cos: torch.Tensor,  # [M, >= D/2], first half is read
    sin: torch.Tensor,
    *,
    num_heads: int,
    q_weight: torch.Tensor | None = None,  # [D]; norm is skipped without
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:  # budget: one fused step of attention
    """Return q [M, Hq, D] after norm and rope; writes k and v to the cache. Raises ValueError on shapes that do not fit."""
    m, (hkv, d) = qkv.shape[0], k_cache.shape[1:]
    if qkv.shape[1] != (num_heads + 2 * hkv) * d or qkv.stride(1) != 1:
        raise ValueError(f"qk_norm_rope: qkv is {tuple(qkv.shape)}, expected [M, {(num_heads + 2 * hkv) * d}] with packed rows")
    if not (k_cache.is_contiguous() and v_cache.shape == k_cache.shape and v_cache.is_contiguous()):
        raise ValueError("qk_norm_rope: k_cache and v_cache must be contiguous and of one shape")
    q = qkv.new_empty(m, num_heads, d)
    _qk_norm_rope_kernel[(m, num_heads + 2 * hkv)](
        qkv, q, k_cache, v_cache, kv_slots, cos, sin, q_weight, k_weight, eps, qkv.stride(0), hkv * d, cos.stride(0),
        HQ=num_heads, HKV=hkv, D=d, HALF_PAD=triton.next_power_of_2(d // 2), NORM=q_weight is not None, num_warps=1,
    )  # fmt: skip
    return q
