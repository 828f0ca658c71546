"""Weights in the activation dtype: float32, bfloat16 or float16."""

from typing import Any

import torch
from torch import nn

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.quantization.base import QuantMethod, TorchQuantInfo, TritonQuantInfo, register_empty


class UnquantizedMethod(QuantMethod):
    """Parameters w13 [E, 2I, H] and w2 [E, H, I], with `has_bias` also b13 [E, 2I] and b2 [E, H]."""

    name = "unquantized"
    backends = ("triton", "torch_native")

    def create_weights(self, layer: nn.Module, spec: MoESpec, dtype: torch.dtype, device: torch.device | str) -> None:
        e, h, i, rows = spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.w13_rows
        register_empty(layer, "w13", (e, rows, h), dtype, device)
        register_empty(layer, "w2", (e, h, i), dtype, device)
        register_empty(layer, "b13", (e, rows) if spec.has_bias else None, dtype, device)
        register_empty(layer, "b2", (e, h) if spec.has_bias else None, dtype, device)

    def get_torch_quant_info(self, layer: Any) -> TorchQuantInfo:
        w13, w2 = (weight.detach().transpose(1, 2).unbind(0).__getitem__ for weight in (layer.w13, layer.w2))
        b13, b2 = (None if bias is None else bias.detach().unbind(0) for bias in (layer.b13, layer.b2))
        return TorchQuantInfo(w13, w2, b13, b2)

    def get_triton_quant_info(self, layer: Any) -> TritonQuantInfo:
        return TritonQuantInfo(layer.w13, layer.w2, layer.b13, layer.b2)
