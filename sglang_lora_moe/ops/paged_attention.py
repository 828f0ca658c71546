"""Attention over the paged KV cache: prefill, chunked prefill and decode in one kernel family.

    out[t, h] = sum over j <= pos(t) of softmax_j(scale * q[t, h] . k[j, g(h)]) v[j, g(h)]

with grouped heads (g(h) = h // (Hq / Hkv)), an optional sliding window (j > pos(t) - window), optional sinks (one more logit per head that takes probability
but has no value) and an optional logit cap c * tanh(s / c). Softmax is the streaming form of Milakov & Gimelshein 2018; decode splits the keys of a request
over programs and merges the partial results by their log-sum-exp (flash decoding), always in the same order, so that two runs are bit-equal.

The cache may be narrower than q (float8 e4m3): keys and values are widened as they are read.

With MLA the cache holds one latent row per token: pass its first `Dv` columns as v_cache; they are then read once for keys and values.

On Hopper several query tokens of 16-bit heads of 128, without window, sinks or cap, are csrc/prefill_attention.cu's: `in_cuda` is the rule.
"""

import functools

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import define
from sglang_lora_moe.ops.lora_linear import NO_LINEAR_ADDEND, LinearAddend, matrix_of
from sglang_lora_moe.ops.low_rank import pdl_early, pdl_wait

Attended = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # [M, Hq, Dv], or float32 [M, Hq, splits, Dv] and their log-sum-exps [M, Hq, splits]
LOG2E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = 32  # most programs that share one request's keys; each takes at least MIN_SPLIT_KEYS
MIN_SPLIT_KEYS, MIN_LATENT_KEYS = 128, 64
DECODE_PROGRAMS = 264  # as many as fill a GPU of 132 multiprocessors twice; fixed, so that results do not depend on the machine
ONE_TOKEN = (8, 4)  # ranks and warps of a program of the merge that makes s of one token, of which there are few (measured)

define(
    "prefill_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor query_starts, Tensor seq_lens, Tensor(a!) tickets, Tensor(b!) out, "
    "int page_size, float scale, int blocks, bool overlap) -> ()"
)


@triton.jit
def _block_owner(query_starts_ptr, block, num_requests, BLOCK_Q: tl.constexpr, REQUESTS_PAD: tl.constexpr):
    """(request, its first token, its tokens, first query of the block). Request b owns the blocks from
    query_starts[b] // BLOCK_Q + b on; these ranges never overlap, and a block beyond its request's has first query >= tokens."""
    b = tl.arange(0, REQUESTS_PAD)
    starts = tl.load(query_starts_ptr + b, mask=b < num_requests, other=0)
    ends = tl.load(query_starts_ptr + b + 1, mask=b < num_requests, other=0)
    request = tl.sum(((b < num_requests) & (starts // BLOCK_Q + b <= block)).to(tl.int32), axis=0) - 1
    query_start = tl.sum(tl.where(b == request, starts, 0), axis=0)
    query_len = tl.sum(tl.where(b == request, ends, 0), axis=0) - query_start
    return request, query_start, query_len, (block - (query_start // BLOCK_Q + request)) * BLOCK_Q


@triton.jit
def _rows_of(first_query, query_start, query_len, share, nought, GROUP: tl.constexpr, SHARES: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """(query, whether there is one, token, head) of each row. `share`: of the heads of a KV head. `nought`: 0."""
    rows = tl.arange(0, BLOCK_M) + nought
    query, of_group = first_query + rows // GROUP_PAD, share % SHARES * GROUP_PAD + rows % GROUP_PAD
    return query, (query < query_len) & (of_group < GROUP), (query_start + query).to(tl.int64), share // SHARES * GROUP + of_group


@triton.jit
def _page_of(pages_ptr, first_key, last_key, part: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of a quarter of a block of keys, or of each of its keys: these take a register for each key whose columns a thread loads."""
    key = first_key + part * (BLOCK_N // 4)
    if PAGE % (BLOCK_N // 4):
        key = first_key + tl.arange(0, BLOCK_N)
    return tl.load(pages_ptr + key // PAGE, mask=key < last_key, other=0)


@triton.jit
def _attend_keys(
    q, q_c, maximum, total, position, first_position, first_key, last_key, kv_head, k_ptr, v_ptr, pages_ptr, scale, window, softcap,
    k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """The streaming softmax of q [rows, D_PAD] over keys [first_key, last_key) of one request, in powers of two: (values, maximum, total).

    Whole blocks that all rows see come first, then what needs a mask. LATENT: `q_c` [rows, DV_PAD] belongs to the columns that are values, too,
    q to the D others.
    """
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    dims, v_dims, keys = tl.arange(0, D_PAD), tl.arange(0, DV_PAD), tl.arange(0, BLOCK_N)
    APART: tl.constexpr = not WINDOW and not LATENT  # a second loop over latents would need registers that are spilled
    masked_from = first_key
    if APART:
        masked_from = tl.maximum(tl.minimum(first_position + 1, last_key) // BLOCK_N * BLOCK_N, first_key)
    for MASKED in tl.static_range(0 if APART else 1, 2):
        begin, end = (masked_from, last_key) if MASKED else (first_key, masked_from)
        page_0, page_1 = _page_of(pages_ptr, begin, end, 0, PAGE, BLOCK_N), _page_of(pages_ptr, begin, end, 1, PAGE, BLOCK_N)
        page_2, page_3 = _page_of(pages_ptr, begin, end, 2, PAGE, BLOCK_N), _page_of(pages_ptr, begin, end, 3, PAGE, BLOCK_N)
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            key = start + keys
            in_range = key < end
            page = tl.where(keys < BLOCK_N // 4, page_0, tl.where(keys < BLOCK_N // 2, page_1, tl.where(keys < BLOCK_N * 3 // 4, page_2, page_3)))
            row = page.to(tl.int64) * PAGE + (key if BLOCK_N % PAGE else keys) % PAGE  # blocks begin at multiples of BLOCK_N
            ahead = start + BLOCK_N  # so keys and values need not wait for pages
            page_0, page_1 = _page_of(pages_ptr, ahead, end, 0, PAGE, BLOCK_N), _page_of(pages_ptr, ahead, end, 1, PAGE, BLOCK_N)
            page_2, page_3 = _page_of(pages_ptr, ahead, end, 2, PAGE, BLOCK_N), _page_of(pages_ptr, ahead, end, 3, PAGE, BLOCK_N)
            k_ptrs = k_ptr + row[None, :] * k_row_stride + kv_head * k_head_stride + dims[:, None]
            v_ptrs = v_ptr + row[:, None] * v_row_stride + kv_head * v_head_stride + v_dims[None, :]
            if MASKED or D != D_PAD or DV != DV_PAD:
                k = tl.load(k_ptrs, mask=in_range[None, :] & (dims[:, None] < D), other=0.0)
                v = tl.load(v_ptrs, mask=in_range[:, None] & (v_dims[None, :] < DV), other=0.0)
            else:
                k, v = tl.load(k_ptrs), tl.load(v_ptrs)
            k, v = k.to(q.dtype), v.to(q.dtype)  # the cache may be narrower
            scores = tl.dot(q, k, input_precision="ieee")  # times `scale`, which becomes part of the subtraction below
            if LATENT:
                scores = tl.dot(q_c, tl.trans(v), scores, input_precision="ieee")
            if SOFTCAP:
                scores = (2 * tl.sigmoid(2 * (scores * scale) / (softcap * LOG2E)) - 1) * (softcap * LOG2E) / scale
            if MASKED:
                seen = in_range[None, :] & (key[None, :] <= position[:, None])
                if WINDOW:
                    seen &= key[None, :] > position[:, None] - window
                scores = tl.where(seen, scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
            safe = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if MASKED else new_maximum  # rows that saw no key yet
            p = tl.exp2(scores * scale - safe[:, None])
            decay = tl.exp2(maximum - safe)
            total = total * decay + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            maximum = new_maximum
    return acc, maximum, total


@triton.jit
def _load_queries(q_ptrs, head, valid, dims, v_dims, D: tl.constexpr, DV: tl.constexpr, LATENT: tl.constexpr):
    """(q [rows, D_PAD] of the columns of keys that are no values, q_c [rows, DV_PAD] of the others); q twice where no columns are both."""
    q_ptrs = q_ptrs[:, None] + (head * (D + DV if LATENT else D))[:, None]
    q = tl.load(q_ptrs + (DV if LATENT else 0) + dims[None, :], mask=valid[:, None] & (dims[None, :] < D), other=0.0)
    q_c = q
    if LATENT:
        q_c = tl.load(q_ptrs + v_dims[None, :], mask=valid[:, None] & (v_dims[None, :] < DV), other=0.0)
    return q, q_c


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, query_starts_ptr, seq_lens_ptr, sinks_ptr,
    # sizes
    num_requests, scale, window, softcap,
    # strides (elements)
    q_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride, page_table_stride,
    # meta
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, MIN_KEYS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    REQUESTS_PAD: tl.constexpr, DECODE: tl.constexpr, STAGES: tl.constexpr, LATENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q query tokens x GROUP_PAD heads of one KV head, or all it has, x one share of the keys. Rows are (token, head)."""
    pdl_wait(PDL)
    GROUP: tl.constexpr = HQ // HKV
    SHARES: tl.constexpr = (GROUP + GROUP_PAD - 1) // GROUP_PAD
    BLOCK_M: tl.constexpr = BLOCK_Q * GROUP_PAD
    block, kv_head, split = tl.program_id(0), tl.program_id(1) // SHARES, tl.program_id(2)
    if DECODE:  # one token per request
        request, query_start, query_len, first_query = block, block, 1, 0
    else:  # blocks with most keys first
        block = tl.num_programs(0) - 1 - block
        request, query_start, query_len, first_query = _block_owner(query_starts_ptr, block, num_requests, BLOCK_Q, REQUESTS_PAD)
        if first_query >= query_len:
            return
    seq_len = tl.load(seq_lens_ptr + request)
    context = seq_len - query_len  # tokens already in the cache before this step

    query, valid, token, head = _rows_of(first_query, query_start, query_len, tl.program_id(1), 0, GROUP, SHARES, GROUP_PAD, BLOCK_M)
    dims, v_dims = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    last_key = tl.minimum(context + first_query + BLOCK_Q, seq_len)  # keys beyond the last query of the block are masked for all
    first_key = 0
    if WINDOW:
        first_key = tl.maximum(context + first_query - window + 1, 0) // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        share = tl.maximum(tl.cdiv(tl.cdiv(last_key - first_key, SPLITS), BLOCK_N) * BLOCK_N, MIN_KEYS)
        first_key += split * share
        last_key = tl.minimum(last_key, first_key + share)
        if (first_key >= last_key) & (split > 0):  # nothing left for this program; the merge reads no more than this
            tl.store(lse_ptr + (token * HQ + head) * SPLITS + split, float("-inf"), mask=valid)
            return
    q, q_c = _load_queries(q_ptr + token * q_stride, head, valid, dims, v_dims, D, DV, LATENT)
    maximum, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if SINKS and split == 0:
        maximum = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    acc, maximum, total = _attend_keys(
        q, q_c, maximum, total, context + query, context + first_query, first_key, last_key, kv_head, k_ptr, v_ptr,
        page_table_ptr + request * page_table_stride, scale * LOG2E, window, softcap, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
        D, D_PAD, DV, DV_PAD, PAGE, BLOCK_M, BLOCK_N, WINDOW, SOFTCAP, STAGES, LATENT,
    )  # fmt: skip
    # The rows once more, by a 0 that is not known before the loops: kept over these, which take all registers, they would be spilled.
    nought = tl.minimum(tl.min(total, axis=0), 0.0).to(tl.int32)
    query, valid, token, head = _rows_of(first_query, query_start, query_len, tl.program_id(1), nought, GROUP, SHARES, GROUP_PAD, BLOCK_M)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = (token * HQ + head) * SPLITS + split
    tl.store(out_ptr + out_row[:, None] * DV + v_dims[None, :], out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (v_dims[None, :] < DV))
    if SPLITS > 1:
        lse = tl.where(total > 0.0, maximum + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + out_row, lse, mask=valid)


@triton.jit
def _merge_kernel(
    partial_ptr, lse_ptr, out_ptr,
    s_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride,
    HQ: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, SPLITS: tl.constexpr, SHRINK: tl.constexpr, RANK_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = sum over splits of softmax(lse)[split] * partial[row, split], in split order. Row = (token, head).

    With SHRINK also s[head, token] = A[:, columns of the head] out[row], one head's share of A x of the linear that reads out next: program (row, j)
    has the j-th block of ranks, so that all of A is asked for at once.
    """
    pdl_early(PDL)
    row = tl.program_id(0).to(tl.int64)
    dims, splits = tl.arange(0, DV_PAD), tl.arange(0, SPLITS)
    if SHRINK:  # what no kernel of a step writes is read before attention is complete
        token, head = row // HQ, row % HQ
        slot = tl.load(slots_ptr + token)
        rank = tl.load(rank_ptr + slot, mask=slot >= 0, other=0)
        a_ptr = matrix_of(pool_ptr, offset_ptr, tl.maximum(slot, 0)) + head * DV + dims[None, :]
        rr = tl.program_id(1) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
        a = tl.load(a_ptr + rr.to(tl.int64)[:, None] * (HQ * DV), mask=(rr < rank)[:, None] & (dims < DV)[None, :], other=0.0)
    pdl_wait(PDL)
    lse = tl.load(lse_ptr + row * SPLITS + splits)
    top = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, axis=0)
    parts = tl.load(partial_ptr + (row * SPLITS + splits)[:, None] * DV + dims[None, :], mask=(dims[None, :] < DV) & (lse[:, None] > float("-inf")), other=0.0)
    out = (tl.sum(parts * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * DV + dims, out, mask=(dims < DV) & (tl.program_id(1) == 0) if SHRINK else dims < DV)
    if SHRINK:
        low = tl.sum(a.to(tl.float32) * out.to(tl.float32)[None, :], axis=1)
        tl.store(s_ptr + head * split_stride + token * s_stride + rr, low, mask=rr < rank)


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
    scratch: torch.Tensor | None = None,
    low: LinearAddend | None = None,
    tickets: torch.Tensor | None = None,
    apart: bool = False,
) -> Attended:  # budget: the arguments of attention
    """Return out [M, Hq, Dv] in q's dtype. `decode` = every request has one query token (keys are then split over programs).

    `scratch` (float32, at least `scratch_elements(...)`) is for decode and is allocated if needed and not given. Requests whose
    seq_len is 0 (padding) get zeros or, with sinks, undefined rows. `low` (decode with several splits): its s float32 [Hq, M, 1, width]
    is filled with each head's share of A out. `tickets` (int32 [2], zeros, of one stream): without them `in_cuda`'s kernel is not
    taken. `apart`: several splits are not merged, log-sum-exps are in powers of two. Raises ValueError for shapes that do not fit together.
    """
    (m, hq, d), (hkv, dv), requests = q.shape, (k_cache.shape[1], v_cache.shape[2]), seq_lens.shape[0]
    if hq % hkv or k_cache.shape[2] != d:
        raise ValueError(f"paged_attention: q is {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}: heads must divide and the last dims agree")
    if q.stride(2) != 1 or q.stride(1) != d or k_cache.stride(2) != 1 or v_cache.stride(2) != 1:
        raise ValueError("paged_attention: the last dimension of q, k_cache and v_cache must be contiguous, and q's heads packed")
    out = q.new_empty(m, hq, dv)
    if not decode and (window, sinks, softcap) == (None, None, None) and tickets is not None and in_cuda(q, k_cache, v_cache, page_size):
        build.load()
        blocks = launch.multiprocessors(q.device)
        torch.ops.sglang_lora_moe.prefill_attention(q, k_cache, v_cache, page_table, query_starts, seq_lens, tickets, out, page_size, scale, blocks, True)
        return out
    block_q, group_pad, block_n, warps, stages = _block_shape(hq // hkv, d, decode * requests, q.element_size(), launch.has_wgmma(q.device))
    programs = hkv * triton.cdiv(hq // hkv, group_pad)
    splits = num_splits(requests, programs * warps // 4) if decode else 1  # of eight warps one program fills a multiprocessor
    partial = lse = out
    if splits > 1:
        scratch = q.new_empty(m * hq * splits * (dv + 1), dtype=torch.float32) if scratch is None else scratch
        partial, lse = scratch[: m * hq * splits * (dv + 1)].split([m * hq * splits * dv, m * hq * splits])
    latent = dv < d and v_cache.data_ptr() == k_cache.data_ptr() and v_cache.stride() == k_cache.stride()
    own = d - dv if latent else d  # columns of a key that are no value
    _attention_kernel[(requests if decode else m // block_q + requests, programs, splits)](
        q, k_cache[..., dv:] if latent else k_cache, v_cache, partial, lse, page_table, query_starts, seq_lens, sinks if sinks is not None else q,
        requests, scale, window or 0, softcap or 0.0,
        q.stride(0), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1), page_table.stride(0),
        HQ=hq, HKV=hkv, D=own, D_PAD=max(16, triton.next_power_of_2(own)), DV=dv, DV_PAD=triton.next_power_of_2(dv),
        PAGE=page_size, BLOCK_Q=block_q, GROUP_PAD=group_pad, BLOCK_N=block_n,
        SPLITS=splits, MIN_KEYS=MIN_LATENT_KEYS if latent else MIN_SPLIT_KEYS, SINKS=sinks is not None, WINDOW=window is not None, SOFTCAP=softcap is not None,
        REQUESTS_PAD=1 if decode else max(256 * latent, triton.next_power_of_2(requests)),  # what one warp finds alone costs latents up to 700 bytes of stack
        DECODE=decode, STAGES=stages, LATENT=latent, num_warps=warps, **launch.options(q.device),
    )  # fmt: skip
    assert low is None or (splits > 1 and not apart), "only the merge of splits fills s"
    if splits > 1:
        return (partial.view(m, hq, splits, dv), lse.view(m, hq, splits)) if apart else _merge(partial, lse, out, splits, low)
    return out


def _merge(partial: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, splits: int, low: LinearAddend | None) -> torch.Tensor:
    """out = what the programs of one request and KV head found, weighed by `lse` and added up."""
    (m, hq, dv), (width, extra) = out.shape, (1, NO_LINEAR_ADDEND) if low is None else (low.s.shape[3], low.shrink_args())
    rank_block, warps = ONE_TOKEN if m == 1 and low is not None else (16, 2) if width <= 16 else (32, 4)
    _merge_kernel[(m * hq, triton.cdiv(width, rank_block))](
        partial, lse, out, *extra, HQ=hq, DV=dv, DV_PAD=triton.next_power_of_2(dv), SPLITS=splits, SHRINK=low is not None,
        RANK_BLOCK=rank_block, num_warps=warps, **launch.options(out.device),
    )  # fmt: skip
    return out


def in_cuda(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_size: int) -> bool:
    """Whether csrc/prefill_attention.cu can read these: groups of heads and pages in powers of two, keys and values 16-bit as q and each contiguous."""
    group = q.shape[1] // k_cache.shape[1]
    same = q.dtype == k_cache.dtype == v_cache.dtype and q.dtype.itemsize == 2 and q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()
    fits = q.shape[2] == v_cache.shape[2] == 128 and group <= 128 and group & (group - 1) == 0 and page_size >= 8 and page_size & (page_size - 1) == 0
    return same and fits and launch.has_wgmma(q.device)


def num_splits(requests: int, kv_heads: int) -> int:
    """Programs that share the keys of one request and KV head at decode: a power of two, fewer the more requests there are."""
    wanted = max(1, min(MAX_SPLITS, DECODE_PROGRAMS // (requests * kv_heads)))
    return 1 << (wanted.bit_length() - 1)


@functools.lru_cache(maxsize=64)  # asked for by each layer of a step
def scratch_elements(max_requests: int, heads: int, kv_heads: int, v_dim: int) -> int:
    """float32 elements that decode of up to `max_requests` requests needs."""
    return max(requests * num_splits(requests, kv_heads) for requests in range(1, max_requests + 1)) * heads * (v_dim + 1)


def _block_shape(group: int, d: int, decode: int, itemsize: int, hopper: bool) -> tuple[int, int, int, int, int]:
    """(queries, padded heads of a group, keys, warps, stages) of one program; a tensor-core tile has at least 16 rows. `decode`: requests, if it is."""
    group_pad = triton.next_power_of_2(group)
    if d > 256:  # latent rows of MLA
        rows, keys, warps, stages = (16, 32, 4, 1) if itemsize > 2 else (16, 32, 4, 3) if decode else (32, 32, 4, 2)
        if hopper and itemsize == 2 and (not decode or (group >= 64 and decode >= 4)):  # takes nearly all of its shared memory
            rows, keys, warps, stages = 64, 64, 8, 2
        group_pad = min(group_pad, rows)  # heads of a program
        return rows // group_pad, group_pad, keys, warps, stages
    if decode:
        return max(1, 16 // group_pad), group_pad, 64 if d <= 128 else 32, 4, 2 if itemsize > 2 else 3
    if itemsize > 2 or d > 128:
        return max(1, 64 // group_pad), group_pad, 32, 4, 2
    return max(1, 128 // group_pad), group_pad, 64, 8, 3
