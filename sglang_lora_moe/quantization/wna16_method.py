"""Experts with integer weights (int4 and int8): storage, and the forms in which backends read them."""

from functools import partial
from typing import Any

import torch
from torch import nn

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.quantization.base import QuantMethod, TorchQuantInfo, TritonQuantInfo, register_empty
from sglang_lora_moe.quantization.wna16 import WNA16Scheme, WNA16Weight, dequantize, split_row

MARLIN_GROUPS = frozenset({32, 64, 128, -1})  # what the marlin backend reads, as `ops/marlin_moe.py` checks
MARLIN_DTYPES = (torch.bfloat16, torch.float16)


class WNA16Method(QuantMethod):
    """Parameters w13_packed int32 [E, 2I, H * bits / 32], w13_scales [E, 2I, H / g] in the activation dtype, w13_zeros uint8
    [E, 2I, H / g] or None; w2_* likewise over [E, H, I], maybe with other bits and groups; with `has_bias` also b13 [E, 2I] and b2 [E, H]."""

    def __init__(self, scheme: WNA16Scheme, down: WNA16Scheme | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        """`down`: the scheme of w2 where it is another one than w13's. `dtype`: of the activations."""
        self.scheme, self.down = scheme, down or scheme
        self.name = f"{scheme if self.down == scheme else f'{scheme}, down {self.down}'}, {str(dtype).removeprefix('torch.')} activations"
        marlin = dtype in MARLIN_DTYPES and {self.scheme.group_size, self.down.group_size} <= MARLIN_GROUPS
        self.backends = ("marlin", "triton", "torch_native") if marlin else ("triton", "torch_native")

    def create_weights(self, layer: nn.Module, spec: MoESpec, dtype: torch.dtype, device: torch.device | str) -> None:
        e, h, i, rows = spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.w13_rows
        create_wna16(layer, "w13_", f"{layer.name}.gate_up_proj", (e, rows, h), self.scheme, dtype, device)
        create_wna16(layer, "w2_", f"{layer.name}.down_proj", (e, h, i), self.down, dtype, device)
        register_empty(layer, "b13", (e, rows) if spec.has_bias else None, dtype, device)
        register_empty(layer, "b2", (e, h) if spec.has_bias else None, dtype, device)

    def weights(self, layer: Any) -> tuple[WNA16Weight, WNA16Weight]:
        """w13 and w2 of the layer, without copying."""
        return get_wna16(layer, "w13_", self.scheme), get_wna16(layer, "w2_", self.down)

    def get_torch_quant_info(self, layer: Any) -> TorchQuantInfo:
        w13, w2 = (partial(_dequantized, weight) for weight in self.weights(layer))
        b13, b2 = (None if bias is None else bias.detach().unbind(0) for bias in (layer.b13, layer.b2))
        return TorchQuantInfo(w13, w2, b13, b2)

    def get_triton_quant_info(self, layer: Any) -> TritonQuantInfo:
        return TritonQuantInfo(*self.weights(layer), layer.b13, layer.b2)

    get_marlin_quant_info = get_triton_quant_info

    def release_weights(self, layer: nn.Module) -> None:
        for prefix in ("w13_", "w2_"):
            release_wna16(layer, prefix)


def _dequantized(weight: WNA16Weight, expert: int) -> torch.Tensor:
    """The expert's matrix [in, out] in the activation dtype, made anew each time: one expert's memory, not E."""
    return dequantize(weight[expert], weight.scales.dtype).t()


def create_wna16(layer: nn.Module, prefix: str, name: str, shape: tuple[int, ...], scheme: WNA16Scheme, dtype: torch.dtype, device: torch.device | str) -> None:
    """Register `{prefix}packed`, `{prefix}scales` and `{prefix}zeros` of a weight [.., O, I]; refuses widths that do not divide."""
    *outer, inputs = shape
    groups, _ = split_row(name, inputs, scheme)
    register_empty(layer, f"{prefix}packed", (*outer, inputs * scheme.bits // 32), torch.int32, device)
    register_empty(layer, f"{prefix}scales", (*outer, groups), dtype, device)
    register_empty(layer, f"{prefix}zeros", None if scheme.symmetric else (*outer, groups), torch.uint8, device)


def get_wna16(layer: nn.Module, prefix: str, scheme: WNA16Scheme) -> WNA16Weight:
    """The weight that `create_wna16` registered."""
    packed, scales, zeros = (getattr(layer, f"{prefix}{leaf}") for leaf in ("packed", "scales", "zeros"))
    group_size = packed.shape[-1] * 32 // scheme.bits // scales.shape[-1]
    return WNA16Weight(packed.detach(), scales.detach(), None if zeros is None else zeros.detach(), scheme.bits, group_size)


def release_wna16(layer: nn.Module, prefix: str) -> None:
    """Drop the parameters that `create_wna16` registered."""
    for leaf in ("packed", "scales", "zeros"):
        setattr(layer, f"{prefix}{leaf}", None)
