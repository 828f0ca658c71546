"""The kernels around a linear that do the work of its adapters, against the linear with its adapters and the same kernels without."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora import triton_dense
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.targets import LinearTarget
from sglang_lora_moe.lora.triton_dense import TritonDense
from sglang_lora_moe.lora.weights import LinearLoRA
from sglang_lora_moe.ops import middle_linear, qk_norm_rope, rms_norm
from sglang_lora_moe.ops.paged_attention import paged_attention
from tests.references import order_slots, ref_linear, relative_error
from tests.slots import write_slot

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, HQ, HKV, D = 96, 4, 2, 32
QKV = (("q", HQ * D), ("k", HKV * D), ("v", HKV * D))
BOUNDS = {torch.float32: 2e-6} | ({torch.bfloat16: 8e-3} if DEVICE == "cuda" else {})  # the interpreter does not round bfloat16 to nearest
TOKENS = 37
FAMILIES = ["rows", "tiles", "grouped", "launches"]


class Case:
    """Adapters of three ranks over q, k, v (one on k and v alone) and o; tokens of all slots and of none."""

    def __init__(self, dtype: torch.dtype, family: str, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, int, int] = (16, 5, 24)) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        pool = LoRAMemoryPool([LinearTarget(name, H, rows) for name, rows in QKV] + [LinearTarget("o", HQ * D, H)], 4, max(32, *ranks), dtype, DEVICE)
        for slot, rank, names in zip((0, 1, 3), ranks, ("qkvo", "qkvo", "kvo"), strict=True):
            targets = [target for target in pool.layout.targets.values() if target.name in names]
            modules = {t.name: LinearLoRA(self.noise(rank, t.in_features), self.noise(t.out_features, rank), 0.5 + slot) for t in targets}
            write_slot(pool, slot, modules)
        slots = torch.randint(-1, 4, (TOKENS,))
        self.ctx = StepContext(TOKENS, 8, 4, 16, DEVICE)
        self.ctx.token_slots.copy_(slots)
        order_slots(self.ctx, TOKENS)
        self.slots, self.dense = slots.to(DEVICE), TritonDense(self.ctx, family == "grouped")
        self.qkv = [(pool.stacks_for(name), first, rows) for (name, rows), first in zip(QKV, (0, HQ * D, (HQ + HKV) * D), strict=True)]
        self.o = [(pool.stacks_for("o"), 0, H)]
        for parts in (self.qkv, self.o):
            self.dense.prepare(parts)
        for module, name in ((triton_dense, "ROWS_MAX"), (qk_norm_rope, "ROWS_MAX"), (rms_norm, "ADD_ROWS_MAX")):
            monkeypatch.setattr(module, name, 1000 if family in ("rows", "grouped") else 0)
        monkeypatch.setattr(qk_norm_rope, "FEW_TOKENS", 0 if family == "launches" else 512)
        monkeypatch.setattr(middle_linear, "TOKENS", range(1000 if family == "tiles" else 0))  # the launch that makes s adds up its splits

    def noise(self, *shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.3).to(DEVICE, self.dtype)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, parts: list) -> torch.Tensor:
        return ref_linear(x, weight, None, [stacks for stacks, _, _ in parts], self.slots).to(self.dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_before_and_after_qkv(dtype: torch.dtype, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(dtype, family, monkeypatch)
    x, residual, norm, weight = case.noise(TOKENS, H), case.noise(TOKENS, H), case.noise(H) + 1, case.noise((HQ + 2 * HKV) * D, H)
    total = x + residual
    normed = rms_norm.rms_norm(total, norm, 1e-5)
    low = case.dense.plan(case.qkv, TOKENS, None)
    assert (low is not None) == (family == "rows")
    if low is not None:
        out, found = rms_norm.rms_norm_shrink(x, norm, 1e-5, residual, low)
        assert torch.equal(found, total)
        assert relative_error(out, normed) < BOUNDS[dtype]
    else:
        low = case.dense.begin(normed, case.qkv)
    positions, kv_slots = torch.randperm(TOKENS, device=DEVICE), torch.randperm(TOKENS, device=DEVICE)
    angle = torch.randn(TOKENS, D // 2, device=DEVICE)
    weights = [case.noise(D) + 1 for _ in range(2)]

    def attend(qkv: torch.Tensor, addend: object) -> list[torch.Tensor]:
        caches = [torch.zeros(TOKENS, HKV, D, device=DEVICE, dtype=dtype) for _ in range(2)]
        tables = (angle.cos(), angle.sin())
        q = qk_norm_rope.qk_norm_rope(qkv, *caches, kv_slots, positions, tables, num_heads=HQ, q_weight=weights[0], k_weight=weights[1], addend=addend)
        return [q, *caches]

    want = attend(case.linear(normed, weight, case.qkv), None)
    got = attend((normed.float() @ weight.float().T).to(dtype), low)
    without = attend((normed.float() @ weight.float().T).to(dtype), None)
    for g, w, none in zip(got, want, without, strict=True):
        assert relative_error(g, w) < 2 * BOUNDS[dtype]
        assert relative_error(none, w) > 0.05, "the adapters do nothing"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("splits", [1, 5])
def test_after_o(dtype: torch.dtype, family: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(dtype, family, monkeypatch)
    monkeypatch.setattr(triton_dense, "shrink_splits", lambda tokens, inputs, width: splits)
    x, residual, norm, weight = case.noise(TOKENS, HQ * D), case.noise(TOKENS, H), case.noise(H) + 1, case.noise(H, HQ * D)
    want_total = residual.clone()
    want = rms_norm.rms_norm(case.linear(x, weight, case.o), norm, 1e-5, want_total)
    total = residual.clone()
    got = rms_norm.rms_norm((x.float() @ weight.float().T).to(dtype), norm, 1e-5, total, addend=case.dense.begin(x, case.o))
    assert relative_error(total, want_total) < BOUNDS[dtype] and relative_error(got, want) < BOUNDS[dtype]
    assert relative_error(residual + (x.float() @ weight.float().T).to(dtype), want_total) > 0.05, "the adapters do nothing"


@pytest.mark.parametrize("dtype", BOUNDS)
def test_before_o(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge of decode's splits leaves each head's share of A x, of more ranks than one program has."""
    case, page, pages = Case(dtype, "rows", monkeypatch, (16, 72, 40)), 8, 20
    q, residual, norm, weight = case.noise(TOKENS, HQ, D), case.noise(TOKENS, H), case.noise(H) + 1, case.noise(H, HQ * D)
    k, v = (case.noise(TOKENS * pages * page, HKV, D) for _ in range(2))
    table = torch.arange(TOKENS * pages, dtype=torch.int32, device=DEVICE).view(TOKENS, pages)
    starts, lens = torch.arange(TOKENS + 1, dtype=torch.int32, device=DEVICE), torch.arange(TOKENS, dtype=torch.int32, device=DEVICE) * 4 + 1
    low = case.dense.plan(case.o, TOKENS, HQ)
    assert low is not None and low.s.shape[3] > 2 * 32
    args = {"page_size": page, "scale": D**-0.5, "decode": True}
    x = paged_attention(q, k, v, table, starts, lens, **args, low=low).flatten(1)
    assert relative_error(x, paged_attention(q, k, v, table, starts, lens, **args).flatten(1)) < BOUNDS[dtype]
    want = rms_norm.rms_norm(case.linear(x, weight, case.o), norm, 1e-5, residual.clone())
    got = rms_norm.rms_norm((x.float() @ weight.float().T).to(dtype), norm, 1e-5, residual.clone(), addend=low)
    assert relative_error(got, want) < BOUNDS[dtype]
