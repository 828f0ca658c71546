"""The triton backend on int4 and int8 experts: against the float32 reference on the dequantized weights, with and without adapters."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_lora_moe.lora.hooks import build_lora_hooks
from sglang_lora_moe.moe.backends import triton_lora
from sglang_lora_moe.moe.runner import MoeRunner
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops.moe_grouped_gemm import GemmTile
from sglang_lora_moe.ops.moe_tiles import LayerTiles
from sglang_lora_moe.quantization.base import TritonQuantInfo
from sglang_lora_moe.quantization.wna16 import dequantize
from tests.moe.test_triton import Core, Poisoned
from tests.moe_cases import MoECase, make_case
from tests.quantize import quantize
from tests.references import assert_near, ref_moe

# The interpreter cuts float32 to bfloat16 where a GPU rounds.
GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
FORMATS = list(itertools.product((4, 8), (16, 32, 64, -1), (True, False)))
SMALL = {"experts": 4, "top_k": 2, "hidden": 128, "inter": 64}


def quantized(case: MoECase, bits: int, group: int, symmetric: bool) -> tuple[MoECase, TritonQuantInfo]:
    """The case with weights that are exactly what the integer ones mean."""
    w13, w2 = (quantize(w, bits, w.shape[-1] if group == -1 else group, symmetric, case.x.dtype) for w in (case.w13, case.w2))
    exact = replace(case, w13=dequantize(w13, case.x.dtype), w2=dequantize(w2, case.x.dtype))
    return exact, TritonQuantInfo(w13, w2, case.b13, case.b2)


def run(case: MoECase, info: TritonQuantInfo, lora: bool, tiles: LayerTiles | None = None, workspace: Workspace | None = None) -> torch.Tensor:
    core = Core(tiles)
    read: Any = core.quant_info(SimpleNamespace(get_triton_quant_info=lambda layer: info), SimpleNamespace())  # type: ignore[arg-type]
    hooks = build_lora_hooks(case.stacks, triton_lora) if lora else None
    return MoeRunner(core).run(case.runner_input(workspace or Poisoned(case.x.device), lora), read, hooks)


def check(case: MoECase, info: TritonQuantInfo, lora: bool, tiles: LayerTiles | None = None) -> None:
    found = run(case, info, lora, tiles)
    expected = ref_moe(case, lora, ("s", "act")) if lora else ref_moe(case, lora)  # as the kernels on 16-bit weights round
    assert_near(found, expected.out, "triton layer on integers", case.name)
    assert not GPU or torch.equal(found, run(case, info, lora, tiles)), f"two runs differ: {case.name}"


@pytest.mark.parametrize("index", range(len(FORMATS)), ids=lambda i: str(FORMATS[i]))
def test_formats(device: torch.device, index: int) -> None:
    """Groups shorter and longer than a tile's inputs, and one a row."""
    for dtype in DTYPES if GPU else DTYPES[index % 3 % 2 :][:1]:
        case, info = quantized(make_case(**SMALL, m=5, dtype=dtype, device=device, ranks=(4, 16), routing="partial"), *FORMATS[index])
        for lora in (False, True) if GPU else (index % 2 == 1,):
            check(case, info, lora)


@pytest.mark.parametrize(
    "spec",
    [
        MoESpec(4, 2, 40, 24, has_bias=True, swiglu_alpha=1.702, swiglu_limit=1.5),
        MoESpec(4, 2, 64, 48, activation="relu2", gated=False, has_bias=True),
        MoESpec(4, 1, 96, 40, activation="gelu_tanh"),
    ],
    ids=["clamped", "ungated", "gelu"],
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_formulas_and_widths(device: torch.device, spec: MoESpec, tokens: int) -> None:
    """Widths that fill no tile; every size runs grouped."""
    for bits, lora in ((4, False), (8, True)):
        case, info = quantized(make_case(spec=spec, m=tokens, device=device, ranks=(8, 4), active=2), bits, 8, False)
        check(case, info, lora)


def test_half_height_tails_and_groups_of_tiles(device: torch.device) -> None:
    tiles = LayerTiles(GemmTile(32, 16, 32, 4, 2, 1, 2, tail=True), GemmTile(32, 32, 64, 4, 2, 1, tail=True), lora_block=16)
    case, info = quantized(make_case(**SMALL, m=70, dtype=torch.float16, device=device, ranks=(8, 4), routing="few_experts"), 4, 32, True)
    check(case, info, True, tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 17, 64, 300, 1024, 4097])
def test_gpu_real_shape(tokens: int) -> None:
    """Qwen3-30B-A3B in bf16, eager and from a graph."""
    for (bits, group, symmetric), lora in itertools.product(((4, 128, True), (4, 32, False), (8, 128, True)), (False, True)):
        made = make_case(spec=MoESpec(128, 8, 2048, 768), m=tokens, dtype=torch.bfloat16, device="cuda", ranks=(16,), layouts=("split",), active=4)
        case, info = quantized(made, bits, group, symmetric)
        check(case, info, lora)
    workspace = Workspace("cuda")
    eager = run(case, info, True, workspace=workspace).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(case, info, True, workspace=workspace)
    found.fill_(float("nan"))
    graph.replay()
    assert torch.equal(found, eager)
