"""Linears on the Marlin kernels: dequantization through the interpreter here and natively on a GPU, products and graphs on a GPU (`gpu`)."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from sglang_lora_moe.moe.backends.marlin import choose_plan
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops import marlin_linear as op
from sglang_lora_moe.ops.marlin_moe import DTYPES, EVERYWHERE, SHAPES, MarlinWeight
from sglang_lora_moe.quantization.linear import QuantizedLinear
from sglang_lora_moe.quantization.wna16 import WNA16Scheme, WNA16Weight, dequantize
from tests.ops.test_marlin_moe import HOPPER, random_weight

FORMATS = list(itertools.product((4, 8), (32, 64, 128, -1), (False, True), DTYPES))


def make_weight(rows: int, k: int, bits: int, group: int, zeros: bool, dtype: torch.dtype, device: torch.device | str) -> WNA16Weight:
    w = random_weight(1, rows, k, bits, k if group == -1 else group, zeros, dtype)
    return WNA16Weight(w.packed[0].to(device), w.scales[0].to(device), None if w.zeros is None else w.zeros[0].to(device), bits, w.group_size)


# The interpreter cuts float32 to bfloat16 where a GPU rounds.
CASES = [("cpu", *f) for f in FORMATS if f[3] == torch.float16] + [pytest.param("cuda", *f, marks=pytest.mark.gpu) for f in FORMATS]


@pytest.mark.parametrize(("device", "bits", "group", "zeros", "dtype"), CASES, ids=str)
def test_dequantized_weights_are_exact(device: str, bits: int, group: int, zeros: bool, dtype: torch.dtype) -> None:
    """Whatever the layout's order: the same values, bit for bit, as the canonical form means."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU, Triton does not interpret")
    for rows, k in ((40, 128), (64, 384), (16, 128 if group == 128 else 64)):
        weight = make_weight(rows, k, bits, group, zeros, dtype, device)
        found = op.dequantize_linear(op.repack_linear(weight))
        assert torch.equal(found.view(torch.int16), dequantize(weight, dtype).view(torch.int16)), f"{rows} x {k}"


def test_gpus_of_less_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have 99 KB for a block: no kernels of single pairs, and of 8-bit weights no tiles of 32 rows."""
    weights = {bits: MarlinWeight(torch.empty(0), torch.empty(0), None, None, 64, 64, bits, 128, 1) for bits in (4, 8)}
    assert all(op._as_pairs(1, weight) and SHAPES[op.choose_config(2, weight)].block_rows == 32 for weight in weights.values())
    monkeypatch.setattr(launch, "shared_memory", lambda device: 99 * 1024)
    assert not any(op._as_pairs(1, weight) for weight in weights.values())
    assert [SHAPES[op.choose_config(2, weights[bits])].block_rows for bits in (4, 8)] == [32, 128]
    spec = MoESpec(128, 8, 2048, 768)
    assert choose_plan(spec, 1, False).by_pair and not choose_plan(spec, 1, False, pairs=False).by_pair


def test_shapes_of_tiles() -> None:
    for rows, k in ((64, 64), (5120, 2048), (152064, 4096)):
        weight = MarlinWeight(torch.empty(0), torch.empty(0), None, None, rows, k, 4, 128, 1)
        for tokens in (1, 8, 9, 16, 17, op.DEQUANTIZE_FROM - 1):
            config = op.choose_config(tokens, weight)
            assert 0 <= config < EVERYWHERE and 2 * SHAPES[config].block_tokens >= tokens, "a weight is read at most twice"
        assert op.choose_config(op.DEQUANTIZE_FROM, weight) == -1


def test_tiles_cover_the_tokens_in_order() -> None:
    for tokens, block in ((1, 8), (8, 8), (9, 8), (300, 128), (5000, 128)):
        alignment = op._tiles(torch.device("cpu"), tokens, block)
        covered = [place for expert, start, rows in alignment.base_tiles.tolist() for place in range(start, start + rows) if expert == 0]
        assert covered == alignment.sorted_pairs.tolist() == list(range(tokens))
        assert int(alignment.counts[1]) == alignment.base_tiles.shape[0] and int(alignment.base_tiles[:, 2].max()) <= block


# ---- the GPU -------------------------------------------------------------------------------------------------------
def relative_error(found: torch.Tensor, x: torch.Tensor, weight: WNA16Weight, bias: torch.Tensor | None = None) -> float:
    expected = x.double() @ dequantize(weight, x.dtype).double().T + (0 if bias is None else bias.double())
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 17, 33, 65, 129, 300, 1000, 4097])
def test_gpu_products(tokens: int) -> None:
    for i, (bits, group, zeros, dtype) in enumerate(FORMATS):
        torch.manual_seed(i)
        weight = make_weight(*((384, 512), (5120, 256), (72, 1024))[i % 3], bits, group, zeros, dtype, "cuda")
        bias = torch.randn(weight.out_features, device="cuda").to(dtype) if i % 2 else None
        form = op.repack_linear(weight, bias)
        x = torch.randn(tokens, weight.in_features, device="cuda").to(dtype)
        for config in (None, -1):
            found = op.marlin_linear(x, form, config)
            assert relative_error(found, x, weight, bias) <= 2e-3, (config, bits, group, zeros, dtype)
            assert torch.equal(found, op.marlin_linear(x, form, config)), "two runs differ"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [pytest.param(i, marks=[] if i < EVERYWHERE else pytest.mark.skipif(not HOPPER, reason="sm_90's")) for i in range(len(SHAPES))]
)
def test_gpu_every_shape_of_tiles(config: int) -> None:
    weight = make_weight(640, 2048, 4, 128, False, torch.bfloat16, "cuda")
    form = op.repack_linear(weight)
    for tokens in (1, 5, 64, 257):
        x = torch.randn(tokens, 2048, device="cuda").bfloat16()
        assert relative_error(op.marlin_linear(x, form, config), x, weight) <= 2e-3, tokens


@pytest.mark.gpu
@pytest.mark.parametrize("keep_wide", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 200, 600])
def test_gpu_linear_in_a_graph(tokens: int, keep_wide: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A fused linear with a bias on one part, its canonical weight gone, replayed."""
    with torch.device("meta"):
        modules = {"q": nn.Linear(256, 128, bias=True, dtype=torch.bfloat16), "k": nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)}
    linear = QuantizedLinear.from_modules(modules, device="cuda", scheme=WNA16Scheme(4, 64, False, "awq"))
    weight = make_weight(192, 256, 4, 64, True, torch.bfloat16, "cuda")
    for name, value in (("packed", weight.packed), ("scales", weight.scales), ("zeros", weight.zeros)):
        getattr(linear, name).copy_(value)
    linear.bias[:128].normal_()
    linear.finalize(keep_wide)
    assert linear.packed is None and not hasattr(linear, "weight") and not caplog.records
    x = torch.randn(tokens, 256, device="cuda").bfloat16()
    eager = linear(x)
    assert relative_error(eager, x, weight, linear.bias) <= 2e-3
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear(x)
    for scale in (1.0, -2.0):
        x.mul_(scale)
        graph.replay()
        assert torch.equal(found, linear(x))


@pytest.mark.gpu
def test_gpu_what_the_kernel_cannot_read_is_dequantized_and_said(caplog: pytest.LogCaptureFixture) -> None:
    linear = QuantizedLinear((("mlp.up_proj", 64),), 128, scheme=WNA16Scheme(4, 16, True, "gptq"), dtype=torch.bfloat16, device="cuda")
    weight = make_weight(64, 128, 4, 16, False, torch.bfloat16, "cuda")
    linear.packed.copy_(weight.packed)
    linear.scales.copy_(weight.scales)
    with caplog.at_level(logging.WARNING):
        linear.finalize()
    assert "mlp.up_proj: dequantized at load" in caplog.text and "groups have 16 inputs" in caplog.text
    x = torch.randn(3, 128, device="cuda").bfloat16()
    assert torch.equal(linear(x), x @ dequantize(weight, torch.bfloat16).T) and linear.packed is None
