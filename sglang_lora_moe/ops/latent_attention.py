"""What lies between the linears of absorbed latent attention (`models/overrides/mla.py`), around `paged_attention` over the latents.

    latent_queries   queries[t, h] = [W_UK(h)^T qn[t, h], rope(qr[t, h])];   cache[kv_slots[t]] = [norm(c[t]), rope(kr[t])]
    latent_values    values[t, h] = W_UV(h) out[t, h];   on Hopper of what the splits of few tokens found, which are merged on the way

W_UK(h) [dn, r] and W_UV(h) [dv, r] are the rows of kv_b_proj of head h; q holds qn and qr of a head side by side, a latent c and kr.
Rotated columns are stored in halves, also where the model has them in pairs: queries and keys alike, so products do not change.
"""

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import define
from sglang_lora_moe.ops.low_rank import pdl_wait
from sglang_lora_moe.ops.paged_attention import Attended

define("latent_values(Tensor parts, Tensor lse, Tensor w, Tensor(a!) out, bool overlap) -> ()")


@triton.jit
def _rotated(x_ptr, position, cos_ptr, sin_ptr, half, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both halves of what is at x_ptr, turned."""
    cos = tl.load(cos_ptr + position * HALF + half, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + half, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + (half * 2 if INTERLEAVED else half), mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + (half * 2 + 1 if INTERLEAVED else half + HALF), mask=mask, other=0.0).to(tl.float32)
    return (a * cos - b * sin).to(x_ptr.dtype.element_ty), (b * cos + a * sin).to(x_ptr.dtype.element_ty)


@triton.jit
def _queries_kernel(
    q_ptr, c_ptr, w_ptr, weight_ptr, out_ptr, cache_ptr, kv_slots_ptr, positions_ptr, cos_ptr, sin_ptr, eps, M, q_stride, c_stride,
    HEADS: tl.constexpr, N: tl.constexpr, N_PAD: tl.constexpr, V: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, INTERLEAVED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, heads + BM, blocks of latent columns + 1): a head's last program turns; one beyond the heads makes one token's key."""
    WIDTH: tl.constexpr = R + 2 * HALF
    head, job = tl.program_id(1), tl.program_id(2)
    first, half = tl.program_id(0).to(tl.int64) * BM, tl.arange(0, HALF_PAD)
    if head >= HEADS:
        pdl_wait(PDL)
        token, r = first + head - HEADS, tl.arange(0, R_PAD)
        if (token < M) & (job == 0):
            target = cache_ptr + tl.load(kv_slots_ptr + token) * WIDTH
            c = tl.load(c_ptr + token * c_stride + r, mask=r < R, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + r, mask=r < R, other=0.0).to(tl.float32)
            normed = (c * tl.rsqrt(tl.sum(c * c, axis=0) / R + eps) * weight).to(c_ptr.dtype.element_ty)
            tl.store(target + r, normed.to(cache_ptr.dtype.element_ty), mask=r < R)
            low, high = _rotated(c_ptr + token * c_stride + R, tl.load(positions_ptr + token), cos_ptr, sin_ptr, half, half < HALF, HALF, INTERLEAVED)
            tl.store(target + R + half, low.to(cache_ptr.dtype.element_ty), mask=half < HALF)
            tl.store(target + R + HALF + half, high.to(cache_ptr.dtype.element_ty), mask=half < HALF)
    else:
        tokens = (first + tl.arange(0, BM))[:, None]
        inside = tokens < M
        q_ptrs, out_ptrs = q_ptr + tokens * q_stride + head * (N + 2 * HALF), out_ptr + (tokens * HEADS + head) * WIDTH
        if job < tl.num_programs(2) - 1:
            k, n = tl.arange(0, N_PAD), job * BN + tl.arange(0, BN)
            # No kernel of a step writes weights: they are read before the kernel before is complete.
            w = tl.load(w_ptr + (head * (N + V) + k)[:, None] * R + n[None, :], mask=(k < N)[:, None] & (n < R)[None, :], other=0.0)
            pdl_wait(PDL)
            q = tl.load(q_ptrs + k[None, :], mask=inside & (k < N)[None, :], other=0.0)
            tl.store(out_ptrs + n[None, :], tl.dot(q, w, input_precision=PRECISION).to(q.dtype), mask=inside & (n < R)[None, :])
        else:
            pdl_wait(PDL)
            mask = inside & (half < HALF)[None, :]
            positions = tl.load(positions_ptr + tokens, mask=inside, other=0)
            low, high = _rotated(q_ptrs + N, positions, cos_ptr, sin_ptr, half[None, :], mask, HALF, INTERLEAVED)
            tl.store(out_ptrs + R + half[None, :], low, mask=mask)
            tl.store(out_ptrs + R + HALF + half[None, :], high, mask=mask)


def latent_queries(
    q: torch.Tensor,  # [M, heads * (dn + dr) or more], rows may be strided
    latent: torch.Tensor,  # [M, r + dr], rows may be strided
    kv_b: torch.Tensor,  # [heads * (dn + dv), r]
    norm: tuple[torch.Tensor, float],  # weight [r] and epsilon
    cache: torch.Tensor,  # [rows, 1, r + dr]
    tokens: tuple[torch.Tensor, torch.Tensor],  # kv_slots and positions, int64 [M]
    tables: tuple[torch.Tensor, torch.Tensor],  # cos and sin [positions, dr / 2]
    *,
    heads: int,
    nope_dim: int,
    interleaved: bool,
) -> torch.Tensor:  # budget: one fused step of attention
    """Return queries [M, heads, r + dr]; writes a row of the cache for each token. Raises ValueError on shapes that do not fit."""
    m, rank, (cos, sin) = q.shape[0], kv_b.shape[1], tables
    rope = latent.shape[1] - rank
    if q.shape[1] < heads * (nope_dim + rope) or cos.shape[1] != rope // 2 or cache.shape[1:] != (1, rank + rope):
        raise ValueError(f"latent_queries: q {tuple(q.shape)}, latent {tuple(latent.shape)}, cache {tuple(cache.shape)}, cos {tuple(cos.shape)} do not fit")
    if q.stride(1) != 1 or latent.stride(1) != 1 or not all(tensor.is_contiguous() for tensor in (kv_b, cache, cos, sin)):
        raise ValueError("latent_queries: columns of q and latent must be packed, all else contiguous")
    out, bm, bn = q.new_empty(m, heads, rank + rope), _block(m), max(16, min(128, triton.next_power_of_2(rank)))
    _queries_kernel[(triton.cdiv(m, bm), heads + bm, triton.cdiv(rank, bn) + 1)](
        q, latent, kv_b, norm[0], out, cache, *tokens, cos, sin, norm[1], m, q.stride(0), latent.stride(0),
        HEADS=heads, N=nope_dim, N_PAD=max(16, triton.next_power_of_2(nope_dim)), V=kv_b.shape[0] // heads - nope_dim,
        R=rank, R_PAD=triton.next_power_of_2(rank), HALF=rope // 2, HALF_PAD=triton.next_power_of_2(rope // 2), INTERLEAVED=interleaved,
        BM=bm, BN=bn, PRECISION=launch.dot_precision(q.dtype), num_warps=4, **launch.options(q.device),
    )  # fmt: skip
    return out


@triton.jit
def _values_kernel(
    x_ptr, w_ptr, out_ptr, M, HEADS: tl.constexpr, N: tl.constexpr, V: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, heads, blocks of value columns)."""
    head, r, n = tl.program_id(1), tl.arange(0, R_PAD), tl.program_id(2) * BN + tl.arange(0, BN)
    tokens = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    w = tl.load(w_ptr + (head * (N + V) + N + n)[None, :] * R + r[:, None], mask=(n < V)[None, :] & (r < R)[:, None], other=0.0)
    pdl_wait(PDL)
    x = tl.load(x_ptr + (tokens * HEADS + head) * R + r[None, :], mask=(tokens < M) & (r < R)[None, :], other=0.0)
    out = tl.dot(x, w, input_precision=PRECISION).to(x.dtype)
    tl.store(out_ptr + (tokens * HEADS + head) * V + n[None, :], out, mask=(tokens < M) & (n < V)[None, :])


def values_merge(kv_b: torch.Tensor, v_dim: int, tokens: int) -> bool:
    """Whether `latent_values` merges splits itself (csrc/latent_values.cu): up to 16 tokens mostly faster than a merge before it, beyond slower."""
    fits = kv_b.dtype.itemsize == 2 and v_dim in (16, 32, 64, 128, 256) and kv_b.shape[1] in range(32, 513, 32)
    return tokens <= 16 and fits and launch.has_wgmma(kv_b.device)


def latent_values(x: Attended, kv_b: torch.Tensor, v_dim: int) -> torch.Tensor:
    """x [M, heads, r] or, where the kernel of `values_merge` takes them, its splits, kv_b [heads * (dn + dv), r] -> [M, heads * dv]."""
    if isinstance(x, tuple):
        if kv_b.is_cuda:
            build.load()
        out = kv_b.new_empty(x[1].shape[0], x[1].shape[1] * v_dim)
        torch.ops.sglang_lora_moe.latent_values(*x, kv_b, out, True)
        return out
    m, heads, rank = x.shape
    launch.expect("latent_values: x", x, (m, heads, kv_b.shape[1]), kv_b.dtype, kv_b.device)
    out, bm = x.new_empty(m, heads * v_dim), _block(m)
    narrow = triton.cdiv(m, bm) * heads <= 64 or launch.shared_memory(x.device) < 2 * (128 + bm) * rank  # where programs are few, or w does not fit
    bn = max(16, min(32 if narrow else 128, triton.next_power_of_2(v_dim)))
    _values_kernel[(triton.cdiv(m, bm), heads, triton.cdiv(v_dim, bn))](
        x, kv_b, out, m, HEADS=heads, N=kv_b.shape[0] // heads - v_dim, V=v_dim, R=rank, R_PAD=max(16, triton.next_power_of_2(rank)),
        BM=bm, BN=bn, PRECISION=launch.dot_precision(x.dtype), num_warps=4, **launch.options(x.device),
    )  # fmt: skip
    return out


def _block(tokens: int) -> int:
    """Tokens of a program."""
    return max(16, min(64, triton.next_power_of_2(tokens)))
