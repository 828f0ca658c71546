"""The router-weighted sum over a token's experts, in float32 and in the order of k.

out[m] = sum over k of topk_weights[m, k] * (down[m * K + k] + low-rank addend)
"""

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import LowRank, load_b_columns, pdl_early, pdl_wait


@triton.jit
def token_delta(args, token, rn, N, TOP_K: tl.constexpr, RANK_BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """sum over k of topk_weights * B s of one token, [BN] float32: rank columns of all K experts side by side. `args` = `LowRank.token_args`."""
    topk_ids_ptr, topk_weights_ptr, num_experts, slots_ptr, offset_ptr, stride_ptr, rank_ptr, num_slots, s_ptr, pool_ptr, width = args
    slot = tl.load(slots_ptr + token)
    some = (slot >= 0) & (slot < num_slots)
    rank = tl.load(rank_ptr + slot, mask=some, other=0)
    column = tl.arange(0, triton.next_power_of_2(TOP_K) * RANK_BLOCK)
    of_k = column // RANK_BLOCK
    chosen = tl.load(topk_ids_ptr + token * TOP_K + of_k, mask=of_k < TOP_K, other=-1).to(tl.int64)
    routed = some & (chosen >= 0) & (chosen < num_experts)
    gain = tl.load(topk_weights_ptr + token * TOP_K + of_k, mask=routed, other=0.0)
    place = tl.load(offset_ptr + slot, mask=some, other=0) + tl.where(routed, chosen, 0) * tl.load(stride_ptr + slot, mask=some, other=0)
    place = tl.max_constancy(place // ALIGN, RANK_BLOCK)  # the hints let loads take 16 bytes
    delta = tl.zeros(rn.shape, dtype=tl.float32)
    for r0 in tl.range(0, rank, RANK_BLOCK, num_stages=1):
        r = r0 + column % RANK_BLOCK
        b = load_b_columns(pool_ptr, place, rn, N, rank, r, routed, ALIGN)
        s = tl.load(s_ptr + (token * TOP_K + of_k).to(tl.int64) * width + r, mask=routed & (r < rank), other=0.0)
        delta += tl.sum(b.to(tl.float32) * (s.to(tl.float32) * gain)[None, :], axis=1)
    return delta


@triton.jit
def _combine_kernel(
    down_ptr, out_ptr, topk_ids_ptr, topk_weights_ptr, summed_ptr, added, N, num_experts,  # the addend, or its sum: None without
    TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, RANK_BLOCK: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks of N). One load for all K rows, so that all are under way before the first is used."""
    pdl_early(PDL)  # a norm follows, and behind it a linear, whose weights come while the experts end
    token = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, K_BLOCK)
    expert = tl.load(topk_ids_ptr + token * TOP_K + rk, mask=rk < TOP_K, other=-1)
    weight = tl.load(topk_weights_ptr + token * TOP_K + rk, mask=rk < TOP_K, other=0.0)
    valid = (expert >= 0) & (expert < num_experts)  # rows of pairs without an expert were never written
    rows = (token * TOP_K + rk).to(tl.int64)[:, None] * N + rn[None, :]
    if added is not None:  # before the wait
        delta = token_delta(added, token, rn, N, TOP_K, RANK_BLOCK, ALIGN)
    pdl_wait(PDL)  # the router's output, and s, are older than what the kernel before this one wrote
    value = tl.load(down_ptr + rows, mask=valid[:, None] & (rn < N)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(value * tl.where(valid, weight, 0.0)[:, None], axis=0)
    if added is not None:
        total += delta
    place = token.to(tl.int64) * N + rn
    if summed_ptr is not None:
        total += tl.load(summed_ptr + place, mask=rn < N, other=0.0)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=rn < N)


def moe_combine(
    down: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int, out: torch.Tensor, addend: LowRank | None = None
) -> torch.Tensor:
    """down [P, N] in pair order -> out [M, N], which it returns. Ids and weights must be older than what the kernel just before wrote.

    `addend`: s [1, P, width] in pair order and out's dtype, as old as these: B s is done while the kernel before still runs, which must have let
    this one start after its own wait alone; or summed already, by that kernel.
    """
    tokens, n = out.shape
    top_k = topk_ids.shape[1]
    k_block = triton.next_power_of_2(top_k)
    launch.expect("moe_combine: down", down, (tokens * top_k, n), out.dtype, out.device)
    launch.expect("moe_combine: topk_weights", topk_weights, (tokens, top_k), torch.float32, out.device)
    most = 256 if tokens <= 128 else 1024  # enough programs to fill the GPU for few tokens, long rows for many
    summed, added = None if addend is None else addend.summed, None
    if addend is not None and summed is None:
        launch.expect("moe_combine: s", addend.s, (1, tokens * top_k, addend.b.shrink_width), out.dtype, out.device)
        most, added = 32 if k_block <= 8 else 16, addend.token_args(topk_ids, topk_weights, num_experts)
    block = min(most, triton.next_power_of_2(n))
    _combine_kernel[(tokens, triton.cdiv(n, block))](
        down, out, topk_ids, topk_weights, summed, added, n, num_experts,
        TOP_K=top_k, K_BLOCK=k_block, RANK_BLOCK=16, ALIGN=16 // out.element_size(), BN=block,
        num_warps=1 if block <= 256 else 4, **launch.options(out.device),
    )  # fmt: skip
    return out
