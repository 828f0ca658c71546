"""The small kernels of a decoder layer against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def close(out: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-6) -> None:
    error = (out.double() - want.double()).norm() / want.double().norm()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(residual: bool) -> None:
    from sglang_lora_moe.ops.rms_norm import rms_norm

    torch.manual_seed(0)
    x, w = torch.randn(5, 96, device=DEVICE), torch.randn(96, device=DEVICE)
    r = torch.randn(5, 96, device=DEVICE) if residual else None
    total = (x + r if residual else x).double()
    want = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * w.double()
    close(rms_norm(x, w, 1e-5, r), want)
    if residual:
        close(r, total)


@pytest.mark.parametrize(("norm", "d"), [(True, 32), (False, 24)])
def test_qk_norm_rope(norm: bool, d: int) -> None:
    from sglang_lora_moe.ops.qk_norm_rope import qk_norm_rope

    torch.manual_seed(1)
    m, hq, hkv = 3, 4, 2
    qkv = torch.randn(m, (hq + 2 * hkv) * d, device=DEVICE)
    k_cache, v_cache = (torch.full((9, hkv, d), 7.0, device=DEVICE) for _ in range(2))
    slots = torch.tensor([5, 0, 8], device=DEVICE)
    table = torch.randn(11, d // 2, device=DEVICE)
    positions = torch.tensor([3, 10, 0], device=DEVICE)
    angle = table[positions].repeat(1, 2)
    weights = [torch.rand(d, device=DEVICE) + 0.5 for _ in range(2)] if norm else [None, None]
    q = qk_norm_rope(qkv, k_cache, v_cache, slots, positions, (table.cos(), table.sin()), num_heads=hq, q_weight=weights[0], k_weight=weights[1])

    def want(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        x = x.double()
        if w is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w.double()
        rotated = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * angle.double().cos()[:, None] + rotated * angle.double().sin()[:, None]

    heads = qkv.view(m, hq + 2 * hkv, d)
    close(q, want(heads[:, :hq], weights[0]))
    close(k_cache[slots], want(heads[:, hq : hq + hkv], weights[1]))
    assert torch.equal(v_cache[slots], heads[:, hq + hkv :])
    untouched = torch.ones(9, dtype=torch.bool, device=DEVICE).index_fill(0, slots, False)
    assert (k_cache[untouched] == 7).all() and (v_cache[untouched] == 7).all()


@pytest.mark.parametrize(
    ("mode", "renormalize", "experts", "k"), [("softmax", True, 128, 8), ("softmax", False, 60, 4), ("choice", True, 32, 4), ("softmax", True, 8, 2)]
)
def test_router_topk(mode: str, renormalize: bool, experts: int, k: int) -> None:
    from sglang_lora_moe.ops.router_topk import router_topk

    torch.manual_seed(2)
    logits = torch.randn(7, experts, device=DEVICE)
    weights, ids = router_topk(logits, k, mode=mode, renormalize=renormalize)
    scores = logits.double() if mode == "choice" else logits.double().softmax(-1)
    want, index = scores.topk(k, -1)
    want = want.softmax(-1) if mode == "choice" else want / want.sum(-1, keepdim=True) if renormalize else want
    assert torch.equal(ids.long(), index) and ids.dtype == torch.int32
    close(weights, want)


def test_router_topk_breaks_ties_towards_the_smaller_id() -> None:
    from sglang_lora_moe.ops.router_topk import router_topk

    _, ids = router_topk(torch.zeros(2, 6, device=DEVICE), 3)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_router_topk_gives_padding_no_expert() -> None:
    from sglang_lora_moe.ops.router_topk import router_topk

    weights, ids = router_topk(torch.randn(3, 6, device=DEVICE), 2, kv_slots=torch.tensor([4, 3, 90], device=DEVICE), dump_rows=4)
    assert ids[1].tolist() == [-1, -1] and not weights[1].any()
    assert (ids[[0, 2]] >= 0).all() and (weights[[0, 2]] > 0).all()
