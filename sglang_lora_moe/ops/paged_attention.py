"""Attention over the paged KV cache: prefill, chunked prefill and decode in one kernel family.

    out[t, h] = sum over j <= pos(t) of softmax_j(scale * q[t, h] . k[j, g(h)]) v[j, g(h)]

with grouped heads (g(h) = h // (Hq / Hkv)), an optional sliding window (j > pos(t) - window), optional sinks (one more
logit per head that takes probability but has no value) and an optional logit cap c * tanh(s / c). Softmax is the
streaming form of Milakov & Gimelshein 2018; decode splits the keys of a request over programs and merges the partial
results by their log-sum-exp (flash decoding), always in the same order, so that two runs are bit-equal.

With MLA the cache holds one latent row per token: pass the same tensor as k_cache and v_cache; v is its first `Dv` columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DECODE_SPLITS = 16  # most programs that share one request's keys; each takes at least MIN_SPLIT_KEYS
MIN_SPLIT_KEYS = 256


@triton.jit
def _attention_kernel(
    # pointers
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, query_starts_ptr, seq_lens_ptr, sinks_ptr,
    # sizes
    num_requests, scale, window, softcap,
    # strides (elements)
    q_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride, page_table_stride,
    # meta
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, MIN_KEYS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q query tokens x all heads of one KV head x one share of the keys. Rows are (token, head)."""
    GROUP: tl.constexpr = HQ // HKV
    BLOCK_M: tl.constexpr = BLOCK_Q * GROUP_PAD
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)

    if DECODE:  # one token per request
        request, query_start, query_len, first_query = block, block, 1, 0
    else:  # request b owns the blocks from query_starts[b] // BLOCK_Q + b on; these ranges never overlap
        low, high = 0, num_requests
        for _ in range(SEARCH_STEPS):
            middle = (low + high) // 2
            first = tl.load(query_starts_ptr + middle, mask=middle < num_requests, other=0) // BLOCK_Q + middle
            go_up = (first <= block) & (low < high)
            high = tl.where((first > block) & (low < high), middle, high)
            low = tl.where(go_up, middle + 1, low)
        request = low - 1
        query_start = tl.load(query_starts_ptr + request)
        query_len = tl.load(query_starts_ptr + request + 1) - query_start
        first_query = (block - (query_start // BLOCK_Q + request)) * BLOCK_Q
        if first_query >= query_len:
            return
    seq_len = tl.load(seq_lens_ptr + request)
    context = seq_len - query_len  # tokens already in the cache before this step

    rows = tl.arange(0, BLOCK_M)
    query, head = first_query + rows // GROUP_PAD, kv_head * GROUP + rows % GROUP_PAD
    valid = (query < query_len) & (rows % GROUP_PAD < GROUP)
    token = (query_start + query).to(tl.int64)
    position = context + query
    dims, v_dims = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    q = tl.load(q_ptr + token[:, None] * q_stride + (head * D)[:, None] + dims[None, :], mask=valid[:, None] & (dims[None, :] < D), other=0.0)

    last_key = tl.minimum(context + first_query + BLOCK_Q, seq_len)  # keys beyond the last query of the block are masked for all
    first_key = 0
    if WINDOW:
        first_key = tl.maximum(context + first_query - window + 1, 0) // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        share = tl.maximum(tl.cdiv(tl.cdiv(last_key - first_key, SPLITS), BLOCK_N) * BLOCK_N, MIN_KEYS)
        first_key += split * share
        last_key = tl.minimum(last_key, first_key + share)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS and split == 0:
        maximum = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32)
        total += 1.0
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    for start in tl.range(first_key, last_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        in_range = key < last_key
        page = tl.load(page_table_ptr + request * page_table_stride + key // PAGE, mask=in_range, other=0)
        row = page.to(tl.int64) * PAGE + key % PAGE
        k = tl.load(k_ptr + row[None, :] * k_row_stride + kv_head * k_head_stride + dims[:, None], mask=in_range[None, :] & (dims[:, None] < D), other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        seen = in_range[None, :] & (key[None, :] <= position[:, None])
        if WINDOW:
            seen &= key[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        safe = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # rows that saw no key yet
        p = tl.exp(scores - safe[:, None])
        decay = tl.exp(maximum - safe)
        total = total * decay + tl.sum(p, axis=1)
        v = tl.load(v_ptr + row[:, None] * v_row_stride + kv_head * v_head_stride + v_dims[None, :], mask=in_range[:, None] & (v_dims[None, :] < DV), other=0.0)
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = (token * HQ + head) * SPLITS + split
    tl.store(out_ptr + out_row[:, None] * DV + v_dims[None, :], out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (v_dims[None, :] < DV))
    if SPLITS > 1:
        lse = tl.where(total > 0.0, maximum + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + out_row, lse, mask=valid)


@triton.jit
def _merge_kernel(partial_ptr, lse_ptr, out_ptr, num_rows, DV: tl.constexpr, DV_PAD: tl.constexpr, SPLITS: tl.constexpr):
    """out[row] = sum over splits of softmax(lse)[split] * partial[row, split], in split order."""
    row = tl.program_id(0).to(tl.int64)
    dims, splits = tl.arange(0, DV_PAD), tl.arange(0, SPLITS)
    lse = tl.load(lse_ptr + row * SPLITS + splits)
    top = tl.max(lse, axis=0)
    weight = tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, axis=0)
    parts = tl.load(partial_ptr + (row * SPLITS + splits)[:, None] * DV + dims[None, :], mask=(dims[None, :] < DV) & (lse[:, None] > float("-inf")), other=0.0)
    out = tl.sum(parts * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * DV + dims, out.to(out_ptr.dtype.element_ty), mask=dims < DV)


def paged_attention(
    q: torch.Tensor,  # [M, Hq, D]
    k_cache: torch.Tensor,  # [rows, Hkv, D]
    v_cache: torch.Tensor,  # [rows, Hkv, Dv]
    page_table: torch.Tensor,  # int32 [B, pages]
    query_starts: torch.Tensor,  # int32 [B + 1]
    seq_lens: torch.Tensor,  # int32 [B]
    *,
    page_size: int,
    scale: float,
    decode: bool,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:  # budget: the arguments of attention
    """Return out [M, Hq, Dv] in q's dtype. `decode` = every request has one query token (keys are then split over programs).

    `scratch` (float32, at least `scratch_elements(...)`) is needed for decode and is allocated if not given. Requests whose
    seq_len is 0 (padding) get undefined rows. Raises ValueError for shapes that do not fit together.
    """
    m, hq, d = q.shape
    hkv, dv = k_cache.shape[1], v_cache.shape[2]
    if hq % hkv or k_cache.shape[2] != d:
        raise ValueError(f"paged_attention: q is {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}: heads must divide and the last dims agree")
    if q.stride(2) != 1 or q.stride(1) != d or k_cache.stride(2) != 1 or v_cache.stride(2) != 1:
        raise ValueError("paged_attention: the last dimension of q, k_cache and v_cache must be contiguous, and q's heads packed")
    requests = seq_lens.shape[0]
    out = q.new_empty(m, hq, dv) if out is None else out
    group_pad = triton.next_power_of_2(hq // hkv)
    splits = DECODE_SPLITS if decode else 1
    wide = d > 256
    block_q = max(1, 16 // group_pad) if decode else max(1, (32 if wide else 64) // group_pad)
    if decode:
        scratch = q.new_empty(scratch_elements(m, hq, dv), dtype=torch.float32) if scratch is None else scratch
        partial, lse = scratch[: m * hq * splits * dv], scratch[m * hq * splits * dv :]
    else:
        partial = lse = out
    grid = (requests if decode else m // block_q + requests, hkv, splits)
    _attention_kernel[grid](
        q, k_cache, v_cache, partial, lse, page_table, query_starts, seq_lens, sinks if sinks is not None else q,
        requests, scale, window or 0, softcap or 0.0,
        q.stride(0), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1), page_table.stride(0),
        HQ=hq, HKV=hkv, D=d, D_PAD=triton.next_power_of_2(d), DV=dv, DV_PAD=triton.next_power_of_2(dv),
        PAGE=page_size, BLOCK_Q=block_q, GROUP_PAD=group_pad, BLOCK_N=32 if wide else 64,
        SPLITS=splits, MIN_KEYS=MIN_SPLIT_KEYS, SINKS=sinks is not None, WINDOW=window is not None, SOFTCAP=softcap is not None,
        SEARCH_STEPS=max(1, (requests + 1).bit_length()), DECODE=decode, num_warps=4, num_stages=1 if wide else 2,
    )  # fmt: skip
    if decode:
        _merge_kernel[(m * hq,)](partial, lse, out, m * hq, DV=dv, DV_PAD=triton.next_power_of_2(dv), SPLITS=splits, num_warps=2)
    return out


def scratch_elements(tokens: int, heads: int, v_dim: int) -> int:
    """float32 elements that decode attention needs for `tokens` requests."""
    return tokens * heads * DECODE_SPLITS * (v_dim + 1)
