"""The router's logits for few tokens, and its scores, choice and weights in one kernel.

Scores, groups of experts and shared experts, which follow the chosen ones, are those of `RouterSpec`; of softmax scores only a group's best counts.
Ties go to the smaller expert id. Rows of padding, which write to the dump page of the KV cache, get ids -1, so that they read no expert. Any other
row gets K different experts, whatever its logits are: NaN comes first, as in torch.topk, and makes the weights no numbers; -inf comes last.
"""

import torch
import triton
import triton.language as tl

from sglang_lora_moe.layers.topk import RouterSpec
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import pdl_wait
from sglang_lora_moe.ops.rms_norm import norm_row

FEW_TOKENS = 256  # up to which logits are sums of products by `router_logits`; beyond, a library's GEMM is as fast
Logits = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
BLOCK_M, BLOCK_E, SPLIT = 16, 32, 256  # tokens, experts and columns of x in a product
MOST_PROGRAMS = 264  # two on each multiprocessor of an H200
LOWEST = tl.constexpr(-3e38)  # an expert's score that is -inf: chosen last, but before what is no expert


@triton.jit
def _router_logits_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, residual_ptr, norm_ptr, normed_ptr, sum_ptr, scale_ptr, eps, M, E, H,
    BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, of experts, splits of x's columns). With a norm logits are of the sum, unscaled, and programs of further splits norm a token."""
    split = tl.program_id(2)
    if norm_ptr is not None:  # noqa: SIM102 - decided when compiling
        if split * BK >= H:
            token = tl.program_id(0) * BM + (split - tl.cdiv(H, BK)) * tl.num_programs(1) + tl.program_id(1)
            norm_row(x_ptr, residual_ptr, norm_ptr, normed_ptr, sum_ptr, scale_ptr, eps, M, H, token, BLOCK_H, PDL)
            return
    rm, re, rk = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BE + tl.arange(0, BE), split * BK + tl.arange(0, BK)
    w = tl.load(w_ptr + re[:, None] * H + rk[None, :], mask=(re < E)[:, None] & (rk < H)[None, :], other=0.0)  # no kernel of a step writes it
    WIDE: tl.constexpr = w_ptr.dtype.element_ty != x_ptr.dtype.element_ty
    high = w.to(x_ptr.dtype.element_ty)
    if WIDE:  # float32 as a sum of three numbers of x's type
        rest = w - high.to(tl.float32)
        middle = rest.to(high.dtype)
        low = (rest - middle.to(tl.float32)).to(high.dtype)
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + rk, mask=rk < H, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    place, inside = rm.to(tl.int64)[:, None] * H + rk[None, :], (rm < M)[:, None] & (rk < H)[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    if norm_ptr is not None:
        total = x.to(tl.float32) + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x = (total.to(x.dtype).to(tl.float32) * gain[None, :]).to(x.dtype)
    acc = tl.dot(x, tl.trans(high), input_precision=PRECISION)
    if WIDE:
        acc = tl.dot(x, tl.trans(low), tl.dot(x, tl.trans(middle), acc))
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + re, mask=(re < E) & (split == 0), other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + (split * M + rm)[:, None] * E + re[None, :], acc, mask=(rm < M)[:, None] & (re < E)[None, :])


def router_logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: tuple = (None, None, None, None, None, 0.0)) -> torch.Tensor:
    """x [M, H], weight [E, H] of x's dtype or float32 -> float32 [splits, M, E], whose sum is x W^T + b, not rounded to x's dtype. norm: of `normed_logits`."""
    (m, h), experts = x.shape, weight.shape[0]
    launch.expect("router_logits: x", x, (m, h), x.dtype, weight.device)
    launch.expect("router_logits: weight", weight, (experts, h), weight.dtype, weight.device)
    splits, blocks = triton.cdiv(h, SPLIT), triton.cdiv(experts, BLOCK_E)
    norms = 0 if norm[0] is None else triton.cdiv(min(m, BLOCK_M), blocks)
    out = x.new_empty(splits, m, experts, dtype=torch.float32)
    _router_logits_kernel[(triton.cdiv(m, BLOCK_M), blocks, splits + norms)](
        x, weight, bias, out, *norm, m, experts, h,
        BM=BLOCK_M, BE=BLOCK_E, BK=SPLIT, BLOCK_H=triton.next_power_of_2(h), PRECISION=launch.dot_precision(x.dtype), num_warps=4, **launch.options(x.device),
    )  # fmt: skip
    return out


def normed_logits(x: torch.Tensor, gain: torch.Tensor, eps: float, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Logits]:
    """(norm of residual + x [M, H], their sum, `router_logits` of that norm, still to be scaled, and float32 [M] by what): nothing waits for the norm."""
    launch.expect("normed_logits: residual", residual, tuple(x.shape), x.dtype, x.device)
    normed, total, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    return normed, total, (router_logits(x, weight, None, (residual, gain, normed, total, scale, eps)), scale)


def beside_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `normed_logits` takes these, which float16 has not the range for, and its programs run at once: then it is no slower than both apart."""
    programs = triton.cdiv(x.shape[0], BLOCK_M) * triton.cdiv(weight.shape[0], BLOCK_E) * triton.cdiv(x.shape[1], SPLIT)
    few = x.shape[0] <= (FEW_TOKENS if weight.dtype == x.dtype else BLOCK_M)  # with float32 weights a block of tokens takes three products
    return bias is None and few and programs <= MOST_PROGRAMS and x.dtype != torch.float16


@triton.jit
def _of_best_groups(left, BLOCK_E: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BEST: tl.constexpr, GROUP_BEST: tl.constexpr):
    """left [BLOCK_E] in BLOCK_G rows, -inf outside the BEST groups of the largest sums of GROUP_BEST."""
    grouped, group = tl.reshape(left, (BLOCK_G, BLOCK_E // BLOCK_G)), tl.arange(0, BLOCK_G)
    place = tl.arange(0, BLOCK_E // BLOCK_G)[None, :]
    rest, score = grouped, tl.zeros([BLOCK_G], tl.float32)
    for _ in tl.static_range(GROUP_BEST):
        top, first = tl.max(rest, axis=1, return_indices=True)
        score += top
        rest = tl.where(place == first[:, None], float("-inf"), rest)
    score = tl.where(group < GROUPS, score, float("-inf"))
    mine, other = score[:, None], score[None, :]
    better = (other > mine) | ((other == mine) & (group[None, :] < group[:, None]))
    kept = tl.sum(better.to(tl.int32), axis=1) < BEST
    return tl.reshape(tl.where(kept[:, None], grouped, float("-inf")), (BLOCK_E,))


@triton.jit
def _router_topk_kernel(
    logits_ptr, unit_ptr, bias_ptr, weights_ptr, ids_ptr, kv_slots_ptr, stride, split_stride, E, K, scale, epsilon, dump_rows,
    CHOICE: tl.constexpr, SIGMOID: tl.constexpr, RENORM: tl.constexpr, SHARED: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BEST: tl.constexpr, GROUP_BEST: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token; each group of experts has a power of two of places, in the order of ids."""
    PLACES: tl.constexpr = BLOCK_E // BLOCK_G
    place, places, in_group = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K), E // GROUPS
    experts = place // PLACES * in_group + place % PLACES
    real = (place % PLACES < in_group) & (experts < E)
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    left = tl.load(logits_ptr + token * stride + experts, mask=real, other=float("-inf")).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        left += tl.load(logits_ptr + split * split_stride + token * stride + experts, mask=real, other=0.0)
    unit = 1.0 if unit_ptr is None else tl.load(unit_ptr + token)
    left *= unit
    top = tl.max(left, axis=0)
    total = tl.sum(tl.exp(left - top), axis=0)
    scores = left
    if SIGMOID:
        scores = tl.sigmoid(left)  # 0 beyond the experts
        left = tl.where(real, scores, float("-inf"))
        if bias_ptr is not None:
            left += tl.load(bias_ptr + experts, mask=real, other=0.0).to(tl.float32)
    left = tl.where(left != left, float("inf"), tl.where(real, tl.maximum(left, LOWEST), float("-inf")))
    if GROUPS > 1:
        left = _of_best_groups(left, BLOCK_E, GROUPS, BLOCK_G, BEST, GROUP_BEST)
    best, chosen = tl.full([BLOCK_K], 0.0 if SIGMOID else float("-inf"), tl.float32), tl.zeros([BLOCK_K], tl.int32)
    for k in range(K):
        if GROUPS > 1:
            value, found = tl.max(left, axis=0, return_indices=True)
        else:  # one warp, whose smallest integer is one instruction
            value = tl.max(left, axis=0)
            found = tl.min(tl.where(left == value, place, BLOCK_E), axis=0)
        left = tl.where(place == found, float("-inf"), left)
        best, chosen = tl.where(places == k, value, best), tl.where(places == k, found, chosen)
    p = best
    if SIGMOID:
        total = 1.0
        if bias_ptr is not None:
            p = tl.where(places < K, tl.gather(scores, chosen, 0), 0.0)
    else:
        p = tl.exp(best - top)
    chosen = chosen // PLACES * in_group + chosen % PLACES
    weights = p / (tl.sum(p, axis=0) + epsilon if CHOICE or RENORM else total) * scale
    if SHARED:
        own = 1.0
        if GATED:
            gate = tl.load(logits_ptr + token * stride + E).to(tl.float32)
            for split in tl.static_range(1, SPLITS):
                gate += tl.load(logits_ptr + split * split_stride + token * stride + E)
            own = tl.sigmoid(gate * unit)
        weights, chosen = tl.where(places < K, weights, own), tl.where(places < K, chosen, E + places - K)
        K += SHARED
    if kv_slots_ptr is not None:  # noqa: SIM102 - decided when compiling
        if tl.load(kv_slots_ptr + token) < dump_rows:
            chosen, weights = tl.full([BLOCK_K], -1, tl.int32), tl.zeros([BLOCK_K], tl.float32)
    tl.store(weights_ptr + token * K + places, weights, mask=places < K)
    tl.store(ids_ptr + token * K + places, chosen, mask=places < K)


def router_topk(
    logits: Logits, spec: RouterSpec, bias: torch.Tensor | None = None, kv_slots: torch.Tensor | None = None, dump_rows: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights float32 [M, K], topk_ids int32 [M, K]) for logits [M, E], or the sum of logits [splits, M, E]; shared experts count in K, their gate in E.

    With float32 [M] they are in units of it. bias float32 [E] corrects the choice. kv_slots int64 [M]: rows below `dump_rows` are padding. Raises ValueError.
    """
    logits, unit = logits if isinstance(logits, tuple) else (logits, None)
    (m, columns), experts, top_k = logits.shape[-2:], spec.num_experts, spec.top_k + spec.shared
    softmax_by = bias is not None or (spec.num_groups > 1 and spec.group_best > 1)  # what softmax scores would have to be computed for
    fits = logits.stride(-1) == 1 and 0 <= columns - experts <= spec.shared and spec.top_k <= experts and (spec.score == "sigmoid" or not softmax_by)
    if logits.dim() not in (2, 3) or not fits:
        raise ValueError(f"router_topk: logits {tuple(logits.shape)} do not fit {spec}")
    weights, ids = logits.new_empty(m, top_k, dtype=torch.float32), logits.new_empty(m, top_k, dtype=torch.int32)
    block_g = triton.next_power_of_2(spec.num_groups)
    _router_topk_kernel[(m,)](
        logits, unit, bias, weights, ids, kv_slots, logits.stride(-2), m * columns, experts, spec.top_k, spec.scale, spec.epsilon, dump_rows,
        CHOICE=spec.score == "topk_softmax", SIGMOID=spec.score == "sigmoid", RENORM=spec.renormalise, SHARED=spec.shared, GATED=columns > experts,
        SPLITS=logits.shape[0] if logits.dim() == 3 else 1, GROUPS=spec.num_groups, BLOCK_G=block_g, BEST=spec.topk_groups, GROUP_BEST=spec.group_best,
        BLOCK_E=block_g * triton.next_power_of_2(experts // spec.num_groups), BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=1 if experts <= 128 else 4, **launch.options(logits.device),
    )  # fmt: skip
    return weights, ids
