"""The small kernels of a decoder layer against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from sglang_lora_moe.layers.topk import RouterSpec
from tests.references import assert_near, relative_error

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU  # the interpreter computes bfloat16 wrongly


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("m", "width"), [(5, 96), pytest.param(700, 2048, marks=pytest.mark.gpu)])
def test_rms_norm(m: int, width: int, residual: bool, dtype: torch.dtype) -> None:
    from sglang_lora_moe.ops.rms_norm import rms_norm

    torch.manual_seed(0)
    x, w = torch.randn(m, width, device=DEVICE).to(dtype), torch.randn(width, device=DEVICE).to(dtype)
    r = torch.randn(m, width, device=DEVICE).to(dtype) if residual else None
    total = x.double() if r is None else x.double() + r.double()
    want = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * w.double()
    assert_near(rms_norm(x, w, 1e-5, r), want.float(), "rms_norm")
    if r is not None:
        assert_near(r, total.float(), "rms_norm, the sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("norm", "d"), [("head", 32), ("whole", 24), ("", 24), pytest.param("head", 128, marks=pytest.mark.gpu), pytest.param("whole", 128, marks=pytest.mark.gpu)]
)
def test_qk_norm_rope(norm: str, d: int, dtype: torch.dtype) -> None:
    from sglang_lora_moe.ops.qk_norm_rope import qk_norm_rope

    torch.manual_seed(1)
    m, hq, hkv = 3, 4, 2
    qkv = torch.randn(m, (hq + 2 * hkv) * d, device=DEVICE).to(dtype)
    k_cache, v_cache = (torch.full((9, hkv, d), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    slots = torch.tensor([5, 0, 8], device=DEVICE)
    table = torch.randn(11, d // 2, device=DEVICE)
    positions = torch.tensor([3, 10, 0], device=DEVICE)
    angle = table[positions].repeat(1, 2)
    sizes = (hq * d, hkv * d) if norm == "whole" else (d, d)
    weights = [(torch.rand(size, device=DEVICE) + 0.5).to(dtype) for size in sizes] if norm else [None, None]
    q = qk_norm_rope(qkv, k_cache, v_cache, slots, positions, (table.cos(), table.sin()), num_heads=hq, q_weight=weights[0], k_weight=weights[1])

    def want(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        x = x.double()
        if w is not None:
            dims = (-1, -2) if norm == "whole" else -1
            x = x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + 1e-6) * (w.double().view(-1, d) if norm == "whole" else w.double())
        rotated = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * angle.double().cos()[:, None] + rotated * angle.double().sin()[:, None]

    heads = qkv.view(m, hq + 2 * hkv, d)
    assert_near(q, want(heads[:, :hq], weights[0]).float(), "qk_norm_rope")
    assert_near(k_cache[slots], want(heads[:, hq : hq + hkv], weights[1]).float(), "qk_norm_rope")
    assert torch.equal(v_cache[slots], heads[:, hq + hkv :])
    untouched = torch.ones(9, dtype=torch.bool, device=DEVICE).index_fill(0, slots, False)
    assert (k_cache[untouched] == 7).all() and (v_cache[untouched] == 7).all()


@pytest.mark.gpu
def test_qk_norm_rope_writes_float8() -> None:  # the interpreter loses the carry where rounding reaches the next power of two
    from sglang_lora_moe.ops.qk_norm_rope import qk_norm_rope

    torch.manual_seed(2)
    qkv, slots, positions = torch.randn(3, 8 * 32, device=DEVICE), torch.tensor([5, 0, 8], device=DEVICE), torch.arange(3, device=DEVICE)
    table = torch.randn(3, 16, device=DEVICE)
    caches = {dtype: [torch.zeros(9, 2, 32, device=DEVICE, dtype=dtype) for _ in range(2)] for dtype in (torch.float32, torch.float8_e4m3fn)}
    for pair in caches.values():
        qk_norm_rope(qkv, *pair, slots, positions, (table.cos(), table.sin()), num_heads=4)
    for wide, narrow in zip(*caches.values(), strict=True):
        assert ((narrow.float() - wide).abs() <= wide.abs() / 16 + 2**-10).all() and (narrow.float() != wide).any()


@pytest.mark.parametrize(
    ("mode", "renormalize", "experts", "k"), [("softmax", True, 128, 8), ("softmax", False, 60, 4), ("choice", True, 32, 4), ("softmax", True, 8, 2)]
)
def test_router_topk(mode: str, renormalize: bool, experts: int, k: int) -> None:
    from sglang_lora_moe.ops.router_topk import router_topk

    torch.manual_seed(2)
    logits = torch.randn(7, experts, device=DEVICE)
    weights, ids = router_topk(logits, RouterSpec(experts, k, "topk_softmax" if mode == "choice" else mode, renormalise=renormalize))
    scores = logits.double() if mode == "choice" else logits.double().softmax(-1)
    want, index = scores.topk(k, -1)
    want = want.softmax(-1) if mode == "choice" else want / want.sum(-1, keepdim=True) if renormalize else want
    assert torch.equal(ids.long(), index) and ids.dtype == torch.int32
    assert_near(weights, want.float(), "router_topk")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["", "weights in float32"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "h", "experts"), [(3, 300, 6), (17, 520, 60), pytest.param(250, 2048, 128, marks=pytest.mark.gpu)])
def test_router_logits(m: int, h: int, experts: int, bias: bool, wide: bool, dtype: torch.dtype) -> None:
    """Their sum over splits, and the same choice from them as from the sum."""
    from sglang_lora_moe.ops.router_topk import router_logits, router_topk

    torch.manual_seed(3)
    x, w = torch.randn(m, h, device=DEVICE).to(dtype), torch.randn(experts, h, device=DEVICE).to(torch.float32 if wide else dtype)
    b = torch.randn(experts, device=DEVICE).to(dtype) if bias else None
    found = router_logits(x, w, b)
    assert found.shape[0] > 1
    want = x.double() @ w.double().T + (b.double() if b is not None else 0.0)
    assert_near(found.sum(0), want.float(), "router_logits")
    assert not wide or relative_error(found.sum(0), want.float()) < 1e-5
    for one, other in zip(router_topk(found, RouterSpec(experts, 4)), router_topk(found.sum(0), RouterSpec(experts, 4)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("splits", [1, 3])
def test_router_topk_appends_shared_experts(splits: int) -> None:
    """As layers/topk.py does, whose weights without a logit of theirs are 1."""
    from sglang_lora_moe.layers.topk import select_experts
    from sglang_lora_moe.ops.router_topk import router_topk

    torch.manual_seed(4)
    logits, spec = torch.randn(splits, 9, 13, device=DEVICE), RouterSpec(12, 3, renormalise=True, scale=2.5, shared=2)
    weights, ids = router_topk(logits if splits > 1 else logits[0], spec)
    want, index = select_experts(logits.sum(0), spec)
    assert torch.equal(ids, index) and ids[:, 3:].tolist() == [[12, 13]] * 9
    assert_near(weights, want, "router_topk")
    torch.testing.assert_close(want[:, 3], logits.sum(0)[:, 12].sigmoid())
    assert (select_experts(logits.sum(0)[:, :12], spec)[0][:, 3:] == 1).all()
    _, ids = router_topk(logits, spec, None, torch.tensor([4, 3] + [9] * 7, device=DEVICE), 4)
    assert ids[1].tolist() == [-1] * 5 and (ids[0] >= 0).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 12, "num_groups": 4, "topk_groups": 2, "correction_bias": True, "renormalise": True, "epsilon": 1e-20, "scale": 1.5, "shared": 1},
        {"num_experts": 256, "num_groups": 8, "topk_groups": 4, "correction_bias": True, "renormalise": False, "scale": 2.5, "shared": 2},
        {"num_experts": 9, "correction_bias": True, "renormalise": True},
        {"num_experts": 160, "score": "softmax", "num_groups": 8, "topk_groups": 3, "group_best": 1, "scale": 16.0},
    ],
    ids=["groups of three", "deepseek_v3", "one group", "deepseek_v2"],
)
def test_router_topk_of_deepseek(fields: dict) -> None:
    """As layers/topk.py does: sigmoid scores, a correction of the choice, groups of experts, shared ones without a gate."""
    from sglang_lora_moe.layers.topk import select_experts
    from sglang_lora_moe.ops.router_topk import router_topk

    torch.manual_seed(5)
    spec = RouterSpec(top_k=4, **{"score": "sigmoid"} | fields)
    logits = torch.randn(2, 11, spec.num_experts, device=DEVICE)
    bias = torch.randn(spec.num_experts, device=DEVICE) * 0.3 if spec.correction_bias else None
    weights, ids = router_topk(logits, spec, bias)
    want, index = select_experts(logits.sum(0), spec, bias)
    assert torch.equal(ids, index)
    assert_near(weights, want, "router_topk")


@pytest.mark.parametrize("wide", [False, True], ids=["", "weights in float32"])
@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(256, 8, "sigmoid", True, True, 8, 4, 2, True, 1e-20, 2.5, 1),
        RouterSpec(60, 4, renormalise=True, shared=1),
        RouterSpec(160, 6, num_groups=8, topk_groups=3, group_best=1, scale=16.0),
        RouterSpec(8, 2, "topk_softmax"),
    ],
    ids=["deepseek_v3", "qwen2_moe", "deepseek_v2", "eight"],
)
def test_router_beside_its_norm(spec: RouterSpec, wide: bool) -> None:
    """The norm bit for bit, and a choice and weights that differ from those after it by roundings alone."""
    from sglang_lora_moe.ops.rms_norm import rms_norm
    from sglang_lora_moe.ops.router_topk import normed_logits, router_logits, router_topk

    torch.manual_seed(6)
    dtype, columns = torch.bfloat16 if GPU else torch.float32, spec.num_experts + (spec.num_experts == 60)
    bias = torch.randn(spec.num_experts, device=DEVICE) * 0.3 if spec.correction_bias else None
    for m, h in ((1, 2048), (12, 2048), (64, 7168), (250, 2048)) if GPU else ((1, 300), (17, 600)):
        x, before, gain = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((m, h), (m, h), (h,)))
        w, slots, total = torch.randn(columns, h, device=DEVICE) / h**0.5, torch.randint(0, 40, (m,), device=DEVICE), before.clone()
        w = w.to(torch.float32 if wide else dtype)
        want = rms_norm(x, gain, 1e-6, total)
        found, found_total, (parts, scale) = normed_logits(x, gain, 1e-6, before, w)
        assert relative_error(found, want) < (1e-4 if GPU else 1e-6) and torch.equal(found_total, total)
        assert_near((parts.sum(0) * scale[:, None]).to(dtype), router_logits(want, w, None).sum(0), "normed_logits")
        weights, ids = router_topk((parts, scale), spec, bias, slots, 4)
        as_one = router_topk(parts * scale[:, None], spec, bias, slots, 4)
        assert torch.equal(ids, as_one[1])
        torch.testing.assert_close(weights, as_one[0])
        again = normed_logits(x, gain, 1e-6, before, w)
        assert torch.equal(found, again[0]) and torch.equal(parts, again[2][0])


@pytest.mark.gpu
def test_logits_of_many_tokens_from_narrow_weights() -> None:
    """A 16-bit product whose sums stay float32, where the model's own is in float32."""
    from sglang_lora_moe.layers.linear import Linear
    from sglang_lora_moe.layers.topk import Router
    from sglang_lora_moe.models.decoder import _logits

    torch.manual_seed(7)
    linear, x = Linear((("gate", 256),), 2048, dtype=torch.float32, device=DEVICE), torch.randn(300, 2048, device=DEVICE).bfloat16()
    linear.weight.copy_(torch.randn(256, 2048, device=DEVICE).bfloat16())
    linear.narrow(torch.bfloat16)
    logits = _logits(Router(linear, RouterSpec(256, 8, float32_logits=True)), x)
    assert logits.dtype == torch.float32 and relative_error(logits, x.double() @ linear.weight.double().T) < 5e-5


def test_router_topk_breaks_ties_towards_the_smaller_id() -> None:
    from sglang_lora_moe.ops.router_topk import router_topk

    _, ids = router_topk(torch.zeros(2, 6, device=DEVICE), RouterSpec(6, 3))
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(12, 3),
        RouterSpec(128, 8, renormalise=True, shared=2),
        RouterSpec(8, 4, "topk_softmax"),
        RouterSpec(12, 4, "sigmoid", renormalise=True),
        RouterSpec(9, 2, "sigmoid", True, scale=2.5),
        RouterSpec(12, 4, "sigmoid", True, True, 4, 2, 2, shared=1),
        RouterSpec(160, 6, num_groups=8, topk_groups=3, group_best=1),
    ],
    ids=["softmax", "shared", "choice", "sigmoid", "corrected", "groups", "deepseek_v2"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_router_topk_of_logits_that_are_no_numbers(spec: RouterSpec) -> None:
    """They choose different experts that exist, whose weights show it: another id would be read as an expert."""
    from sglang_lora_moe.ops.router_topk import router_topk

    torch.manual_seed(8)
    nan, inf, last = float("nan"), float("inf"), spec.num_experts - 1
    logits = torch.randn(7, spec.num_experts, device=DEVICE)
    logits[1], logits[2, 3], logits[3], logits[4, 1:], logits[5], logits[5, last] = nan, nan, -inf, -inf, inf, nan
    bias = torch.randn(spec.num_experts, device=DEVICE) if spec.correction_bias else None
    weights, ids = router_topk(logits, spec, bias)
    weights, ids = weights[:, : spec.top_k], ids[:, : spec.top_k]
    assert (ids >= 0).all() and (ids < spec.num_experts).all()
    assert all(len(set(row)) == spec.top_k for row in ids.tolist())
    assert not weights[[1, 2, 5]].isfinite().all(dim=1).any()
    assert all(3 in row for row in ids[2:3].tolist()) and weights[[0, 6]].isfinite().all()
    _, alone = router_topk(logits[[0, 6]], spec, bias)
    assert torch.equal(ids[[0, 6]], alone[:, : spec.top_k])


def test_router_topk_gives_padding_no_expert() -> None:
    from sglang_lora_moe.ops.router_topk import router_topk

    weights, ids = router_topk(torch.randn(3, 6, device=DEVICE), RouterSpec(6, 2), None, torch.tensor([4, 3, 90], device=DEVICE), 4)
    assert ids[1].tolist() == [-1, -1] and not weights[1].any()
    assert (ids[[0, 2]] >= 0).all() and (weights[[0, 2]] > 0).all()
