"""A linear with integer weights: the same parts as `layers.linear.Linear`, so that adapters attach to it unchanged."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.quantization.wna16 import WNA16Scheme, WNA16Weight, dequantize
from sglang_lora_moe.quantization.wna16_method import create_wna16, get_wna16


class QuantizedLinear(Linear):
    """y = x W^T + b, W in the canonical form of `wna16.py` (parameters packed, scales, zeros), dequantized in each call."""

    def __init__(self, parts: tuple[tuple[str, int], ...], in_features: int, *, scheme: WNA16Scheme, **options: Any) -> None:
        self.scheme = scheme
        super().__init__(parts, in_features, **options)

    def _create_weight(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> None:
        create_wna16(self, "", " + ".join(name for name, _ in self.parts), (rows, self.in_features), self.scheme, dtype, device)

    def _rows(self, start: int, rows: int) -> WNA16Weight:
        w, part = get_wna16(self, "", self.scheme), slice(start, start + rows)
        return WNA16Weight(w.packed[part], w.scales[part], None if w.zeros is None else w.zeros[part], w.bits, w.group_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dequantize(get_wna16(self, "", self.scheme), x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"
