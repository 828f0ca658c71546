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
    TOP_K: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    token = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
        weight = tl.load(topk_weights_ptr + pair)
        valid = (expert >= 0) & (expert < num_experts)  # rows of pairs without an expert were never written
        value = tl.load(down_ptr + pair.to(tl.int64) * N + rn, mask=(rn < N) & valid, other=0.0).to(tl.float32)
        total += tl.where(valid, weight, 0.0) * value
    tl.store(out_ptr + token.to(tl.int64) * N + rn, total.to(out_ptr.dtype.element_ty), mask=rn < N)


def moe_combine(down: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int, out: torch.Tensor) -> torch.Tensor:
    """down [P, N] in pair order -> out [M, N], which it returns."""
    tokens, n = out.shape
    top_k = topk_ids.shape[1]
    launch.expect("moe_combine: down", down, (tokens * top_k, n), out.dtype, out.device)
    launch.expect("moe_combine: topk_weights", topk_weights, (tokens, top_k), torch.float32, out.device)
    # enough programs to fill the GPU for few tokens, long rows for many
    block = min(256 if tokens < 64 else 1024, launch.next_power_of_2(n))
    _combine_kernel[(tokens, triton.cdiv(n, block))](
        down, out, topk_ids, topk_weights, n, num_experts,
        TOP_K=top_k, BN=block,
        num_warps=2 if block <= 256 else 4, **launch.options(out.device),
    )  # fmt: skip
    return out
