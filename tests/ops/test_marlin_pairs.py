"""The Marlin GEMMs of a few tokens as a whole layer: on the emulator under AddressSanitizer and UBSan. On a GPU tests/moe/test_marlin.py runs them."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.lora.hooks import build_lora_hooks
from sglang_lora_moe.moe.backends import marlin_lora
from sglang_lora_moe.moe.backends.marlin import MarlinPlan, MarlinQuantInfo, MarlinRunnerCore
from sglang_lora_moe.moe.runner import MoeRunner
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.marlin_moe import marlin_moe_repack
from sglang_lora_moe.ops.marlin_moe_pairs import _exchange
from sglang_lora_moe.quantization.wna16 import dequantize
from tests.moe.test_triton import Poisoned
from tests.moe_cases import LAYOUTS, MoECase, make_case
from tests.ops import ahead, emulator
from tests.quantize import quantize
from tests.references import assert_near, ref_moe

DRIVER = Path(__file__).parent / "marlin_pairs_driver.cpp"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the operator itself runs in tests/moe/test_marlin.py")
SPEC = MoESpec(8, 2, 128, 96)
BIASED = MoESpec(8, 3, 160, 96, has_bias=True, swiglu_alpha=1.702, swiglu_limit=1.5)
LONG = MoESpec(4, 2, 2304, 320)  # several pieces of k for a warp, and of A


def waits_for(item: pytest.Item) -> ahead.Command | None:
    return ahead.emulated(DRIVER)


def emulate(driver: Path) -> emulator.Operators:
    """The operator on CPU tensors is the emulated kernel."""
    order = 0

    def run(
        x, packed, scales, zeros, bias, topk_ids, topk_weights, slots, a_pool, a_offset, a_stride, b_pool, b_offset, b_stride, rank, split, scaling,
        next_pool, next_offset, next_stride, next_rank, next_scaling, then_pool, then_offset, then_stride, s, other_s, out, rows, group_size, alpha, cubic,
        limit, shift, units, shrinks, alone, overlap,
    ) -> None:  # fmt: skip
        nonlocal order
        order += 1
        first, second = (other_s, s) if topk_weights is not None else (s, other_s)
        low = (0,) * 3 if slots is None else (first.shape[2], second.shape[2], second.shape[1])
        fields = (
            order % 4, packed.shape[0], *topk_ids.shape, rows, x.shape[1], *packed.shape[1:3], scales.shape[2], group_size, packed.shape[3] // 32,
            x.dtype == torch.bfloat16, zeros is not None, bias is not None, topk_weights is not None, slots is not None, 0 if rank is None else rank.numel(),
            *low, units, shrinks, 0, 0, 0, alone,
        )  # fmt: skip
        pools = [0 if pool is None else pool.numel() for pool in (a_pool, b_pool, next_pool, then_pool)]
        inputs = (
            x, packed, scales, zeros, bias, topk_ids, topk_weights, slots, a_pool, a_offset, a_stride, b_pool, b_offset, b_stride, rank, split, scaling,
            next_pool, next_offset, next_stride, next_rank, next_scaling, then_pool, then_offset, then_stride, s, other_s,
        )  # fmt: skip
        written = emulator.answer(driver, struct.pack("26i4f4q", *map(int, fields), alpha, cubic, limit, shift, *pools), *inputs)
        where = 0
        for tensor in (out, s, other_s):
            if tensor is not None:
                new = torch.frombuffer(written, dtype=tensor.dtype, offset=where, count=tensor.numel()).view(tensor.shape)
                where += tensor.numel() * tensor.element_size()
                tensor.copy_(torch.where(new.view(torch.int16) == emulator.POISON, out, new) if tensor is out else new)

    return {"marlin_moe_pairs": run}


def check(bits: int = 4, group: int = 32, symmetric: bool = True, lora: bool = True, **arguments: Any) -> None:
    """A layer against the reference on the weights as they are quantized."""
    case: MoECase = make_case(**({"dtype": torch.bfloat16} | arguments))
    w13, w2 = (quantize(w, bits, group, symmetric, case.x.dtype) for w in (case.w13, case.w2))
    exact = replace(case, w13=dequantize(w13, case.x.dtype), w2=dequantize(w2, case.x.dtype))
    info = MarlinQuantInfo(marlin_moe_repack(w13, 2, case.b13), marlin_moe_repack(w2, 1, case.b2))
    hooks = build_lora_hooks(case.stacks, marlin_lora) if lora else None
    core = MarlinRunnerCore(MarlinPlan(1, 1, by_pair=True))
    found = MoeRunner(core).run(case.runner_input(Poisoned("cpu"), lora), info, hooks)
    assert_near(found, ref_moe(exact, lora, ("act",)).out, "marlin pairs", case.name)
    assert all(bool((_exchange(1 << i, torch.device("cpu")).view(torch.int32) == -1).all()) for i in range(12, 15))
    assert torch.equal(found, MoeRunner(core).run(case.runner_input(Workspace("cpu"), lora), info, hooks)), "the order of threads matters"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_formats(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    for i, group in enumerate((32, 64, 128)):
        check(bits, group, symmetric, lora=i == 0, spec=MoESpec(4, 2, 256, 128), m=1 + i, dtype=dtype)


@pytest.mark.parametrize("spec", [SPEC, BIASED, LONG], ids=["silu", "clamped with bias", "long"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_layer_equals_reference(spec: MoESpec, tokens: int) -> None:
    """Pairs without experts and tokens without adapters, ranks that do and do not divide by 8, shared and split A."""
    for bits, lora in ((4, False), (4, True), (8, True)):
        check(bits, 32, lora=lora, spec=spec, m=tokens, layouts=LAYOUTS, ranks=(16, 7, 40), active=5, routing="partial")


@pytest.mark.parametrize(("top_k", "rank"), [(2, 16), (5, 40)])
def test_blocks_of_few_rows(top_k: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of many multiprocessors: down by halves of a row unit, and several eights of the parts that gate_up leaves, shared by both helpers."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 40)
    check(spec=MoESpec(8, top_k, 160, 320), m=1, ranks=(rank,), active=1, slots=1, base_share=0.0)


@pytest.mark.parametrize(("spec", "tokens", "sms"), [(SPEC, 4, 12), (BIASED, 2, 132), (LONG, 1, 7)], ids=["silu", "clamped with bias", "long"])
def test_many_ranks(spec: MoESpec, tokens: int, sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper: blocks of gate_up that are alone on a multiprocessor, whose helpers share all that adapters add."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: sms)
    monkeypatch.setattr(launch, "has_wgmma", lambda device: True)
    for bits, ranks in ((4, (16, 3)), (4, (16, 7, 40)), (8, (64, 9)), (4, (100, 150))):
        check(bits, 32, spec=spec, m=tokens, layouts=LAYOUTS, ranks=ranks, active=5, routing="partial")
