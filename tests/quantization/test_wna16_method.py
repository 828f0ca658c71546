"""Experts and linears with integer weights: storage, what backends are given, and the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.moe.backends import get_moe_runner_backend, make_core
from sglang_lora_moe.moe.runner import MoeRunner
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.quantization.base import TritonQuantInfo
from sglang_lora_moe.quantization.linear import QuantizedLinear
from sglang_lora_moe.quantization.unquantized import UnquantizedMethod
from sglang_lora_moe.quantization.wna16 import QuantizationError, WNA16Scheme, WNA16Weight, dequantize, unpack
from sglang_lora_moe.quantization.wna16_method import WNA16Method
from tests.quantize import quantize

EXPERTS, TOP_K, HIDDEN, INTER = 4, 2, 128, 64
SCHEMES = [WNA16Scheme(bits, group, symmetric, "gptq") for bits in (4, 8) for group in (32, 64, -1) for symmetric in (True, False)]


def make_experts(method: Any, dtype: torch.dtype, **spec: Any) -> FusedMoE:
    moe_spec = MoESpec(EXPERTS, TOP_K, HIDDEN, INTER, **spec)
    return FusedMoE("mlp.experts", moe_spec, method, StepContext(8, 1, 1, 4), Workspace("cpu"), MoeRunner(make_core("torch_native")), dtype=dtype)


def fill(target: WNA16Weight, weight: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """Quantize `weight` into `target`; return the float32 formula w = (q - z) * s on the stored tensors."""
    q = quantize(weight, target.bits, target.group_size, symmetric, target.scales.dtype)
    target.packed.copy_(q.packed)
    target.scales.copy_(q.scales)
    zero = torch.full(q.scales.shape, float(1 << (target.bits - 1)))
    if target.zeros is not None and q.zeros is not None:
        target.zeros.copy_(q.zeros)
        zero = q.zeros.float()
    spread = [x.repeat_interleave(target.group_size, -1) for x in (zero, q.scales.float())]
    return (unpack(q.packed, target.bits).float() - spread[0]) * spread[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_experts_equal_the_same_experts_in_16_bit(scheme: WNA16Scheme, dtype: torch.dtype) -> None:
    """Bit for bit: the weight is rounded to the activation dtype once, and the same GEMMs follow."""
    torch.manual_seed(0)
    quantized, plain = make_experts(WNA16Method(scheme), dtype, has_bias=True), make_experts(UnquantizedMethod(), dtype, has_bias=True)
    for weight, target in zip(WNA16Method(scheme).weights(quantized), (plain.w13, plain.w2), strict=True):
        target.copy_(fill(weight, torch.randn(target.shape) * 0.1, scheme.symmetric))
        assert torch.equal(dequantize(weight, dtype), target)
    for bias, copy in ((plain.b13, quantized.b13), (plain.b2, quantized.b2)):
        copy.copy_(bias.normal_())
    ids = torch.tensor([[0, 3], [1, -1], [3, 0], [0, 1], [0, 3]], dtype=torch.int32)  # expert 2 has no tokens
    args = (torch.randn(5, HIDDEN).to(dtype), ids, torch.rand(5, TOP_K))
    assert torch.equal(quantized(*args), plain(*args))


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[3], SCHEMES[8]], ids=str)
def test_a_fused_linear_equals_its_parts_in_16_bit(scheme: WNA16Scheme) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        modules = {"q_proj": nn.Linear(HIDDEN, 64, bias=True), "k_proj": nn.Linear(HIDDEN, 32, bias=False)}
    plain, quantized = Linear.from_modules(modules, device="cpu"), QuantizedLinear.from_modules(modules, device="cpu", scheme=scheme)
    for name, (weight, bias) in quantized.part_views().items():
        view, view_bias = plain.part_views()[name]
        assert isinstance(weight, WNA16Weight) and isinstance(view, torch.Tensor) and weight.packed.shape[0] == view.shape[0]
        view.copy_(fill(weight, torch.randn(view.shape), scheme.symmetric))
        if bias is not None and view_bias is not None:
            bias.copy_(view_bias.normal_())
    x = torch.randn(3, 2, HIDDEN)
    assert torch.equal(quantized(x), plain(x))
    assert str(scheme) in repr(quantized) and not hasattr(quantized, "weight")
    small = sum(p.numel() * p.element_size() for p in quantized.parameters())
    assert small < sum(p.numel() * p.element_size() for p in plain.parameters()) * (0.3 if scheme.bits == 4 else 0.5)


def test_backends_are_given_the_canonical_tensors() -> None:
    method = WNA16Method(WNA16Scheme(4, 32, False, "awq"))
    layer = make_experts(method, torch.bfloat16)
    for info in (method.get_marlin_quant_info(layer), method.get_triton_quant_info(layer)):
        assert isinstance(info, TritonQuantInfo)
        assert info.w13.packed.shape == (EXPERTS, 2 * INTER, HIDDEN // 8) and info.w13.packed.dtype == torch.int32
        assert info.w13.scales.shape == (EXPERTS, 2 * INTER, HIDDEN // 32) and info.w13.scales.dtype == torch.bfloat16
        assert info.w2.zeros is not None and info.w2.zeros.shape == (EXPERTS, HIDDEN, INTER // 32) and info.w2.zeros.dtype == torch.uint8
        assert info.w13.packed.data_ptr() == layer.w13_packed.data_ptr(), "nothing is copied"
        assert info.b13 is None and (info.w2.bits, info.w2.group_size) == (4, 32)


def test_released_weights_leave_the_layer_and_not_the_form_made_of_them() -> None:
    method = WNA16Method(SCHEMES[0])
    layer = make_experts(method, torch.float32, has_bias=True)
    info = method.get_marlin_quant_info(layer)
    method.release_weights(layer)
    assert {name for name, _ in layer.named_parameters()} == {"b13", "b2"} and info.w13.packed.numel() > 0
    with pytest.raises(ValueError, match="unquantized weights are read in place"):
        UnquantizedMethod().release_weights(make_experts(UnquantizedMethod(), torch.float32))


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"mlp\.experts\.down_proj: 64 input features do not divide into groups of 128 .*; requantize with a group"):
        make_experts(WNA16Method(WNA16Scheme(4, 128, True, "gptq")), torch.float32)


def test_backend_of_the_checkpoint() -> None:
    quantized, plain = WNA16Method(SCHEMES[0]), UnquantizedMethod()
    assert get_moe_runner_backend("auto", "cpu", quantized) == "torch_native"
    with pytest.raises(ValueError, match="marlin MoE backend runs int4 and int8 weights .*, and these are unquantized; use --moe-runner-backend auto"):
        get_moe_runner_backend("marlin", "cuda", plain)
    with pytest.raises(ValueError, match="marlin MoE backend needs a CUDA device, and the model is on cpu; use --moe-runner-backend auto"):
        get_moe_runner_backend("marlin", "cpu", quantized)
