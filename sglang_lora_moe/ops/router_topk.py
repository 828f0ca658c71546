"""The router's logits for few tokens, and its scores, choice and weights in one kernel.

    softmax:  p = softmax(logits) in float32; the K largest; divided by their sum if `renormalize`
    choice:   the K largest logits; softmax over those K  (gpt-oss)

Ties go to the smaller expert id. Shared experts follow the chosen ones, as in `RouterSpec`. Rows of padding, which write to the
dump page of the KV cache, get ids -1, so that they read no expert. Larger routers (groups, correction bias) stay with layers/topk.py.
"""

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import pdl_wait

FEW_TOKENS = 256  # up to which logits are sums of products by `router_logits`; beyond, a library's GEMM is as fast
SPLIT = 256  # columns of x in a product


@triton.jit
def _router_logits_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, M, E, H, BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr
):
    """Grid (blocks of tokens, blocks of experts, splits of the columns of x)."""
    split = tl.program_id(2)
    rm, re, rk = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BE + tl.arange(0, BE), split * BK + tl.arange(0, BK)
    w = tl.load(w_ptr + re[:, None] * H + rk[None, :], mask=(re < E)[:, None] & (rk < H)[None, :], other=0.0)  # no kernel of a step writes it
    pdl_wait(PDL)
    x = tl.load(x_ptr + rm.to(tl.int64)[:, None] * H + rk[None, :], mask=(rm < M)[:, None] & (rk < H)[None, :], other=0.0)
    acc = tl.dot(x, tl.trans(w), input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + re, mask=(re < E) & (split == 0), other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + (split * M + rm)[:, None] * E + re[None, :], acc, mask=(rm < M)[:, None] & (re < E)[None, :])


def router_logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, H], weight [E, H], bias [E] -> float32 [splits, M, E], whose sum over splits is x W^T + b, not rounded to x's dtype."""
    (m, h), experts = x.shape, weight.shape[0]
    launch.expect("router_logits: x", x, (m, h), weight.dtype, weight.device)
    launch.expect("router_logits: weight", weight, (experts, h), weight.dtype, weight.device)
    splits = triton.cdiv(h, SPLIT)
    out = x.new_empty(splits, m, experts, dtype=torch.float32)
    _router_logits_kernel[(triton.cdiv(m, 16), triton.cdiv(experts, 32), splits)](
        x, weight, bias, out, m, experts, h, BM=16, BE=32, BK=SPLIT, PRECISION=launch.dot_precision(x.dtype), num_warps=4, **launch.options(x.device)
    )
    return out


@triton.jit
def _router_topk_kernel(
    logits_ptr, weights_ptr, ids_ptr, kv_slots_ptr, stride, split_stride, E, K, scale, dump_rows,
    CHOICE: tl.constexpr, RENORM: tl.constexpr, SHARED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    experts, places = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    left = tl.load(logits_ptr + token * stride + experts, mask=experts < E, other=float("-inf")).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        left += tl.load(logits_ptr + split * split_stride + token * stride + experts, mask=experts < E, other=0.0)
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
    if SHARED:
        gate = tl.load(logits_ptr + token * stride + E).to(tl.float32)
        for split in tl.static_range(1, SPLITS):
            gate += tl.load(logits_ptr + split * split_stride + token * stride + E)
        weights = tl.where(places < K, weights, tl.sigmoid(gate))
        chosen = tl.where(places < K, chosen, E + places - K)
        K += SHARED
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
    shared: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (topk_weights float32 [M, K], topk_ids int32 [M, K]) for logits [M, E], or the sum of logits [splits, M, E]. `mode`: "softmax" or "choice".

    kv_slots int64 [M], if given: rows below `dump_rows` are padding. With `shared` results are [M, K + shared], logits [M, E + 1].
    """
    if mode not in ("softmax", "choice") or logits.dim() not in (2, 3) or logits.stride(-1) != 1 or top_k > logits.shape[-1]:
        raise ValueError(f"router_topk: mode {mode!r}, logits {tuple(logits.shape)}, top_k {top_k}: expected [M, E] rows and K <= E")
    m, columns = logits.shape[-2:]
    splits, experts = logits.shape[0] if logits.dim() == 3 else 1, columns - bool(shared)
    weights = logits.new_empty(m, top_k + shared, dtype=torch.float32)
    ids = logits.new_empty(m, top_k + shared, dtype=torch.int32)
    _router_topk_kernel[(m,)](
        logits, weights, ids, kv_slots, logits.stride(-2), m * columns, experts, top_k, scale, dump_rows, CHOICE=mode == "choice", RENORM=renormalize,
        SHARED=shared, SPLITS=splits, BLOCK_E=triton.next_power_of_2(experts), BLOCK_K=triton.next_power_of_2(top_k + shared),
        num_warps=1 if experts <= 128 else 4, **launch.options(logits.device),
    )  # fmt: skip
    return weights, ids
