"""Scores, choice and weights of the router, after its logits GEMM, in one kernel.

    softmax:  p = softmax(logits) in float32; the K largest; divided by their sum if `renormalize`
    choice:   the K largest logits; softmax over those K  (gpt-oss)

Ties go to the smaller expert id. Rows of padding, which write to the dump page of the KV cache, get ids -1, so that they
read no expert. Larger routers (groups, correction bias) stay with layers/topk.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import pdl_wait


@triton.jit
def _router_topk_kernel(
    logits_ptr, weights_ptr, ids_ptr, kv_slots_ptr, stride, E, K, scale, dump_rows,
    CHOICE: tl.constexpr, RENORM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    pdl_wait(PDL)
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
    if kv_slots_ptr is not None:  # noqa: SIM102 - decided when compiling
        if tl.load(kv_slots_ptr + token) < dump_rows:
            chosen = tl.full([BLOCK_K], -1, tl.int32)
            weights = tl.zeros([BLOCK_K], tl.float32)
    tl.store(weights_ptr + token * K + places, weights, mask=places < K)
    tl.store(ids_ptr + token * K + places, chosen, mask=places < K)


def router_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    mode: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    kv_slots: torch.Tensor | None = None,
    dump_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (topk_weights float32 [M, K], topk_ids int32 [M, K]) for logits [M, E]. `mode` is "softmax" or "choice".

    kv_slots int64 [M], if given: rows below `dump_rows` are padding.
    """
    if mode not in ("softmax", "choice") or logits.dim() != 2 or logits.stride(1) != 1 or top_k > logits.shape[1]:
        raise ValueError(f"router_topk: mode {mode!r}, logits {tuple(logits.shape)}, top_k {top_k}: expected [M, E] rows and K <= E")
    m, experts = logits.shape
    weights = logits.new_empty(m, top_k, dtype=torch.float32)
    ids = logits.new_empty(m, top_k, dtype=torch.int32)
    _router_topk_kernel[(m,)](
        logits, weights, ids, kv_slots, logits.stride(0), experts, top_k, scale, dump_rows, CHOICE=mode == "choice", RENORM=renormalize,
        BLOCK_E=triton.next_power_of_2(experts), BLOCK_K=triton.next_power_of_2(top_k), num_warps=1 if experts <= 128 else 4,
        **launch.options(logits.device),
    )  # fmt: skip
    return weights, ids
