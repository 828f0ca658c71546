"""The expert GEMMs of a few tokens: no sort, every pair reads its own expert, a program owns a few output columns.

    gate_up   out[p] = f(w13[e] x[m] + b13[e] + addend)                     p = m * K + k, e = topk_ids[m, k]
    down      out[m] = sum over k of weight[m, k] * (w2[e] act[p] + b2[e] + addend)      the combine is inside

All arithmetic is float32. Pairs of one column block run side by side, so that two pairs of one expert share it in L2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import NO_PAIR_ARGS, NO_PAIR_OPTIONS, LowRank, load_b_columns, load_b_rows, load_s, load_slot, pdl_early, pdl_wait, row_delta
from sglang_lora_moe.ops.moe_activation import activate, activation_code

MOST_OF_B = 4096  # values that a program of down holds; beyond, fewer registers let more programs run at once


@dataclass(frozen=True)
class GemvTile:
    """Launch shape: `n` output columns and `k` inputs at a time; `stages` of loads in flight."""

    n: int
    k: int
    warps: int
    stages: int
    m = 16  # rows of a tile of the alignment, which nothing reads here


@triton.jit
def _load_pair_s(s_ptr, row, num_pairs, width, column, rr, rank, SPLITS: tl.constexpr, MAX_RANK: tl.constexpr):
    """s[row, column + rr], zeros from `rank` on; read in fours where columns begin at such places."""
    mask = rr // 4 < (rank + 3) // 4 if MAX_RANK % 4 == 0 else rr < rank
    return tl.where(rr < rank, load_s(s_ptr, row, num_pairs, width, column + rr, mask, SPLITS), 0.0)


@triton.jit
def _pair_gate_up_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, topk_ids_ptr,  # [M, K], [E, HALVES * N, K], [E, HALVES * N], [P, N]
    slots_ptr, s_ptr, pool_ptr, offset_ptr, stride_ptr, rank_ptr, split_ptr, s_width,
    N, K, num_pairs, num_experts,
    TOP_K: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    ADDEND: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr,
    EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = 2 if GATED else 1
    if not ADDEND:
        pdl_wait(PDL)
    pair = tl.program_id(0)
    token = pair // TOP_K
    if ADDEND:  # asked for beside the expert, so that one round of loads stands before the weights
        rank, split, offset, stride = load_slot(slots_ptr, rank_ptr, split_ptr, offset_ptr, stride_ptr, token)
        column = split * MAX_RANK
    expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    valid = (expert >= 0) & (expert < num_experts)
    if valid:
        if ADDEND:  # B does not depend on the kernel before: its loads are in flight during the main loop
            place = (offset + expert * stride) // ALIGN
            rr = tl.arange(0, RANK_BLOCK)
            b = load_b_rows(pool_ptr, place, rn, N, rank, rr, ALIGN)
            if GATED:
                b_up = load_b_rows(pool_ptr, place, N + rn, 2 * N, rank, rr, ALIGN)
        w_ptrs = w_ptr + expert * HALVES * N * K + rn.to(tl.int64)[:, None] * K + rk[None, :]
        x_row = x_ptr + token.to(tl.int64) * K
        acc = tl.zeros((BN, BK), dtype=tl.float32)
        acc_up = tl.zeros((BN, BK), dtype=tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            w = tl.load(w_ptrs + k) if EVEN else tl.load(w_ptrs + k, mask=(rn < N)[:, None] & (k + rk < K)[None, :], other=0.0)
            x = tl.load(x_row + k + rk) if EVEN else tl.load(x_row + k + rk, mask=k + rk < K, other=0.0)
            acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
            if GATED:
                up_ptrs = w_ptrs + (k + N.to(tl.int64) * K)
                w_up = tl.load(up_ptrs) if EVEN else tl.load(up_ptrs, mask=(rn < N)[:, None] & (k + rk < K)[None, :], other=0.0)
                acc_up += w_up.to(tl.float32) * x.to(tl.float32)[None, :]
        gate = tl.sum(acc, axis=1)
        up = tl.sum(acc_up, axis=1)
        if bias_ptr is not None:
            gate += tl.load(bias_ptr + expert * HALVES * N + rn, mask=rn < N, other=0.0).to(tl.float32)
            if GATED:
                up += tl.load(bias_ptr + expert * HALVES * N + N + rn, mask=rn < N, other=0.0).to(tl.float32)
        if ADDEND:
            pdl_wait(PDL)
            low = _load_pair_s(s_ptr, pair, num_pairs, s_width, 0, rr, rank, SPLITS, MAX_RANK)
            if GATED:  # both on their way before the first is used
                high = _load_pair_s(s_ptr, pair, num_pairs, s_width, column, rr, rank, SPLITS, MAX_RANK)
                up += tl.sum(b_up.to(tl.float32) * high[None, :], axis=1)
            gate += tl.sum(b.to(tl.float32) * low[None, :], axis=1)
            if rank > RANK_BLOCK:
                gate += row_delta(s_ptr, num_pairs, s_width, pair, 0, pool_ptr, place, rn, N, rank, RANK_BLOCK, SPLITS, RANK_BLOCK, ALIGN)
                if GATED:
                    up += row_delta(s_ptr, num_pairs, s_width, pair, column, pool_ptr, place, N + rn, 2 * N, rank, RANK_BLOCK, SPLITS, RANK_BLOCK, ALIGN)
        act = activate(gate, up, ACT, GATED, ALPHA, LIMIT)
        tl.store(out_ptr + pair.to(tl.int64) * N + rn, act.to(out_ptr.dtype.element_ty), mask=rn < N)
    if ADDEND:
        pdl_wait(PDL)  # pairs without an expert


@triton.jit
def _pair_down_kernel(
    a_ptr, w_ptr, bias_ptr, out_ptr, topk_ids_ptr, topk_weights_ptr,  # [P, K], [E, N, K], [E, N], [M, N]
    slots_ptr, s_ptr, pool_ptr, offset_ptr, stride_ptr, rank_ptr, split_ptr, s_width,
    N, K, num_pairs, num_experts,
    TOP_K: tl.constexpr, K_BLOCK: tl.constexpr,
    ADDEND: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, MAX_RANK: tl.constexpr, ALIGN: tl.constexpr,
    EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if ADDEND:
        pdl_early(PDL)  # a norm follows, which may find its adapters while the products run here
    else:
        pdl_wait(PDL)
    token = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    if ADDEND:  # rank columns of all K experts side by side; B does not depend on the kernel before: its loads run beside the main loop
        column = tl.arange(0, K_BLOCK * RANK_BLOCK)
        of_k = column // RANK_BLOCK
        rr = column % RANK_BLOCK
        rank, _split, offset, stride = load_slot(slots_ptr, rank_ptr, split_ptr, offset_ptr, stride_ptr, token)
        chosen = tl.load(topk_ids_ptr + token * TOP_K + of_k, mask=of_k < TOP_K, other=-1).to(tl.int64)
        routed = (chosen >= 0) & (chosen < num_experts)
        gain = tl.load(topk_weights_ptr + token * TOP_K + of_k, mask=of_k < TOP_K, other=0.0)
        place = tl.max_constancy((offset + tl.where(routed, chosen, 0) * stride) // ALIGN, RANK_BLOCK)  # the hints let loads take 16 bytes
        b = load_b_columns(pool_ptr, place, rn, N, rank, rr, routed, ALIGN)
    k_blocks = tl.cdiv(K, BK)
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    for j in tl.range(0, TOP_K * k_blocks, num_stages=STAGES):  # the K experts of the token, end to end
        pair = token * TOP_K + j // k_blocks
        k = (j % k_blocks) * BK
        expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
        weight = tl.load(topk_weights_ptr + pair)
        valid = (expert >= 0) & (expert < num_experts)
        if EVEN:
            a = tl.load(a_ptr + pair.to(tl.int64) * K + k + rk, mask=(rk >= 0) & valid, other=0.0)
            w = tl.load(w_ptr + expert * N * K + rn.to(tl.int64)[:, None] * K + (k + rk)[None, :], mask=(rk >= 0)[None, :] & valid, other=0.0)
        else:
            a = tl.load(a_ptr + pair.to(tl.int64) * K + k + rk, mask=(k + rk < K) & valid, other=0.0)
            mask = (rn < N)[:, None] & (k + rk < K)[None, :] & valid
            w = tl.load(w_ptr + expert * N * K + rn.to(tl.int64)[:, None] * K + (k + rk)[None, :], mask=mask, other=0.0)
        acc += w.to(tl.float32) * (a.to(tl.float32) * weight)[None, :]
    total = tl.sum(acc, axis=1)
    if ADDEND:
        pdl_wait(PDL)
        r0 = 0
        while r0 < rank:
            mask = tl.max_constancy(routed & ((r0 + rr) // 4 < (rank + 3) // 4), 4) if MAX_RANK % 4 == 0 else routed & (r0 + rr < rank)
            low = load_s(s_ptr, token * TOP_K + of_k, num_pairs, s_width, r0 + rr, mask, SPLITS) * gain
            total += tl.sum(b.to(tl.float32) * tl.where(routed & (r0 + rr < rank), low, 0.0)[None, :], axis=1)
            r0 += RANK_BLOCK
            if r0 < rank:
                b = load_b_columns(pool_ptr, place, rn, N, rank, r0 + rr, routed, ALIGN)
    if bias_ptr is not None:
        for j in range(TOP_K):
            expert = tl.load(topk_ids_ptr + token * TOP_K + j).to(tl.int64)
            weight = tl.load(topk_weights_ptr + token * TOP_K + j)
            if (expert >= 0) & (expert < num_experts):
                total += weight * tl.load(bias_ptr + expert * N + rn, mask=rn < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * N + rn, total.to(out_ptr.dtype.element_ty), mask=rn < N)


def pair_gate_up(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    tile: GemvTile,
    *,
    activation: MoESpec,
    addend: LowRank | None = None,
) -> torch.Tensor:
    """out [P, N] = f(w[e] x + ..) per pair; x [M, K]; w [E, N or 2N, K]. Rows of pairs without an expert stay as they are."""
    num_pairs, n = out.shape
    k, gated = x.shape[1], activation.gated
    launch.expect("pair_gate_up: w", w, (w.shape[0], 2 * n if gated else n, k), x.dtype, x.device)
    launch.expect("pair_gate_up: out", out, (topk_ids.numel(), n), x.dtype, x.device)
    _pair_gate_up_kernel[(num_pairs, triton.cdiv(n, tile.n))](
        x, w, bias, out, topk_ids, *(NO_PAIR_ARGS if addend is None else addend.pair_args()), n, k, num_pairs, w.shape[0],
        TOP_K=topk_ids.shape[1], GATED=gated, ACT=activation_code(activation), ALPHA=activation.swiglu_alpha or 0.0, LIMIT=activation.swiglu_limit or 0.0,
        **(NO_PAIR_OPTIONS if addend is None else addend.pair_options()),
        EVEN=n % tile.n == 0 and k % tile.k == 0, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps, **launch.options(x.device),
    )  # fmt: skip
    return out


def pair_down(
    act: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
    tile: GemvTile,
    *,
    addend: LowRank | None = None,
) -> torch.Tensor:
    """out [M, N] = the router-weighted sum over k of w[e] act[p] + ..; act [P, K] in pair order, w [E, N, K]."""
    tokens, n = out.shape
    num_pairs, k = act.shape
    launch.expect("pair_down: w", w, (w.shape[0], n, k), act.dtype, act.device)
    launch.expect("pair_down: act", act, (topk_ids.numel(), k), act.dtype, act.device)
    options: dict[str, int] = dict(launch.options(act.device))
    if addend is not None and addend.pair_options()["RANK_BLOCK"] * triton.next_power_of_2(topk_ids.shape[1]) * tile.n > MOST_OF_B:
        options["maxnreg"] = 128
    _pair_down_kernel[(tokens, triton.cdiv(n, tile.n))](
        act, w, bias, out, topk_ids, topk_weights, *(NO_PAIR_ARGS if addend is None else addend.pair_args()), n, k, num_pairs, w.shape[0],
        TOP_K=topk_ids.shape[1], K_BLOCK=triton.next_power_of_2(topk_ids.shape[1]), **(NO_PAIR_OPTIONS if addend is None else addend.pair_options()),
        EVEN=n % tile.n == 0 and k % tile.k == 0,
        BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps, **options,
    )  # fmt: skip
    return out
