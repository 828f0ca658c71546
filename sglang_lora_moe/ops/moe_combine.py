"""The router-weighted sum over a token's experts, in float32 and in the order of k.

out[m] = sum over k of topk_weights[m, k] * (down[m * K + k])
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import pdl_wait


@triton.jit
def _combine_kernel(
    down_ptr, out_ptr, topk_ids_ptr, topk_weights_ptr,
    N, num_experts,
    TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks of N). One load for all K rows, so that all are under way before the first is used."""
    token = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, K_BLOCK)
    expert = tl.load(topk_ids_ptr + token * TOP_K + rk, mask=rk < TOP_K, other=-1)
    weight = tl.load(topk_weights_ptr + token * TOP_K + rk, mask=rk < TOP_K, other=0.0)
    valid = (expert >= 0) & (expert < num_experts)  # rows of pairs without an expert were never written
    rows = (token * TOP_K + rk).to(tl.int64)[:, None] * N + rn[None, :]
    pdl_wait(PDL)  # the router's output is older than what the kernel before this one wrote
    value = tl.load(down_ptr + rows, mask=valid[:, None] & (rn < N)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(value * tl.where(valid, weight, 0.0)[:, None], axis=0)
    tl.store(out_ptr + token.to(tl.int64) * N + rn, total.to(out_ptr.dtype.element_ty), mask=rn < N)


def moe_combine(down: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int, out: torch.Tensor) -> torch.Tensor:
    """down [P, N] in pair order -> out [M, N], which it returns. Ids and weights must be older than what the kernel just before wrote."""
    tokens, n = out.shape
    top_k = topk_ids.shape[1]
    launch.expect("moe_combine: down", down, (tokens * top_k, n), out.dtype, out.device)
    launch.expect("moe_combine: topk_weights", topk_weights, (tokens, top_k), torch.float32, out.device)
    # enough programs to fill the GPU for few tokens, long rows for many
    block = min(256 if tokens < 64 else 1024, launch.next_power_of_2(n))
    _combine_kernel[(tokens, triton.cdiv(n, block))](
        down, out, topk_ids, topk_weights, n, num_experts,
        TOP_K=top_k, K_BLOCK=launch.next_power_of_2(top_k), BN=block,
        num_warps=1 if block <= 256 else 4, **launch.options(out.device),
    )  # fmt: skip
    return out
