"""Scores, choice and weights of the router, after its logits GEMM, in one kernel.

    softmax:  p = softmax(logits) in float32; the K largest; divided by their sum if `renormalize`
    choice:   the K largest logits; softmax over those K  (gpt-oss)

Ties go to the smaller expert id. Larger routers (groups, correction bias) stay with layers/topk.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _router_topk_kernel(
    logits_ptr, weights_ptr, ids_ptr, stride, E, K, scale, CHOICE: tl.constexpr, RENORM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    experts, places = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    left = tl.load(logits_ptr + token * stride + experts, mask=experts < E, other=float("-inf")).to(tl.float32)
    top = tl.max(left, axis=0)
    total = tl.sum(tl.exp(left - top), axis=0)
    best, chosen = tl.full([BLOCK_K], float("-inf"), tl.float32), tl.zeros([BLOCK_K], tl.int32)
    for k in range(K):
        value = tl.max(left, axis=0)
        expert = tl.min(tl.where(left == value, experts, BLOCK_E), axis=0)
        best, chosen = tl.where(places == k, value, best), tl.where(places == k, expert, chosen)
        left = tl.where(experts == expert, float("-inf"), left)
    p = tl.exp(best - top)
    weights = p / (tl.sum(p, axis=0) if CHOICE or RENORM else total) * scale
    tl.store(weights_ptr + token * K + places, weights, mask=places < K)
    tl.store(ids_ptr + token * K + places, chosen, mask=places < K)


def router_topk(logits: torch.Tensor, top_k: int, *, mode: str = "softmax", renormalize: bool = True, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (topk_weights float32 [M, K], topk_ids int32 [M, K]) for logits [M, E]. `mode` is "softmax" or "choice"."""
    if mode not in ("softmax", "choice") or logits.dim() != 2 or logits.stride(1) != 1 or top_k > logits.shape[1]:
        raise ValueError(f"router_topk: mode {mode!r}, logits {tuple(logits.shape)}, top_k {top_k}: expected [M, E] rows and K <= E")
    m, experts = logits.shape
    weights = logits.new_empty(m, top_k, dtype=torch.float32)
    ids = logits.new_empty(m, top_k, dtype=torch.int32)
    _router_topk_kernel[(m,)](
        logits, weights, ids, logits.stride(0), experts, top_k, scale, CHOICE=mode == "choice", RENORM=renormalize,
        BLOCK_E=triton.next_power_of_2(experts), BLOCK_K=triton.next_power_of_2(top_k), num_warps=1 if experts <= 128 else 4,
    )  # fmt: skip
    return weights, ids
