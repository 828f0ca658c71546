"""Weights in the activation dtype: float32, bfloat16 or float16."""

from typing import Any

import torch
from torch import nn

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.quantization.base import QuantMethod, TorchQuantInfo, TritonQuantInfo


class UnquantizedMethod(QuantMethod):
    """Parameters w13 [E, 2I, H] and w2 [E, H, I], with `has_bias` also b13 [E, 2I] and b2 [E, H]."""

    name = "unquantized"
    backends = ("triton", "torch_native")

    def create_weights(self, layer: nn.Module, spec: MoESpec, dtype: torch.dtype, device: torch.device | str) -> None:
        e, h, i, rows = spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.w13_rows
        shapes: dict[str, tuple[int, ...]] = {"w13": (e, rows, h), "w2": (e, h, i)}
        if spec.has_bias:
            shapes |= {"b13": (e, rows), "b2": (e, h)}
        for name in ("w13", "w2", "b13", "b2"):
            shape = shapes.get(name)
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
            layer.register_parameter(name, parameter)

    def get_torch_quant_info(self, layer: Any) -> TorchQuantInfo:
        w13, w2, b13, b2 = layer.w13, layer.w2, layer.b13, layer.b2
        return TorchQuantInfo(
            w13.detach().transpose(1, 2).unbind(0),
            w2.detach().transpose(1, 2).unbind(0),
            None if b13 is None else b13.detach().unbind(0),
            None if b2 is None else b2.detach().unbind(0),
        )

    def get_triton_quant_info(self, layer: Any) -> TritonQuantInfo:
        return TritonQuantInfo(layer.w13, layer.w2, layer.b13, layer.b2)
