"""A linear with integer weights: the same parts as `layers.linear.Linear`, so that adapters attach to it unchanged."""

import logging
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.quantization.wna16 import WNA16Scheme, WNA16Weight, dequantize
from sglang_lora_moe.quantization.wna16_method import create_wna16, get_wna16, release_wna16

WIDE_FROM = 9  # tokens from which the kernel of ops/skinny_linear.py on a kept 16-bit weight is faster than Marlin's on the integers

logger = logging.getLogger(__name__)


class QuantizedLinear(Linear):
    """y = x W^T + b, W loaded in the canonical form of `wna16.py` (parameters packed, scales, zeros).

    On a GPU `finalize` turns it into what the kernels of `ops/marlin_linear.py` read; on a CPU each call dequantizes it.
    """

    def __init__(self, parts: tuple[tuple[str, int], ...], in_features: int, *, scheme: WNA16Scheme, **options: Any) -> None:
        self.scheme = scheme
        super().__init__(parts, in_features, **options)
        self._multiply: partial[torch.Tensor] | None = None  # the GPU's kernel over its form of the weight
        self.wide: torch.Tensor | None = None  # [rows, in] in 16 bit beside it

    def _create_weight(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> None:
        create_wna16(self, "", self._names, (rows, self.in_features), self.scheme, dtype, device)

    @property
    def _names(self) -> str:
        return " + ".join(name for name, _ in self.parts)

    def _rows(self, start: int, rows: int) -> WNA16Weight:
        return get_wna16(self, "", self.scheme)[start : start + rows]

    def finalize(self, keep_wide: bool = False) -> None:
        """On a GPU: keep the weight in the form that its kernels read, in place of the canonical one. Call once, after loading.

        `keep_wide`: in 16 bit too, for steps of many tokens, which else write it out each time.
        """
        weight = get_wna16(self, "", self.scheme)
        if weight.packed.device.type != "cuda":
            return
        from sglang_lora_moe.ops import marlin_linear  # needs triton

        reason = marlin_linear.why_unreadable(weight)
        if reason is None:
            packed = marlin_linear.repack_linear(weight, self.bias)
            self.wide = marlin_linear.dequantize_linear(packed) if keep_wide else None
            self._multiply = partial(marlin_linear.marlin_linear, weight=packed, wide=self.wide)
        else:
            self.weight = nn.Parameter(dequantize(weight, weight.scales.dtype), requires_grad=False)
            size = self.weight.numel() * self.weight.element_size() / 2**20
            logger.warning(
                "%s: dequantized at load, %.1f MiB in place of %.1f: the kernel cannot read it, %s", self._names, size, weight.nbytes / 2**20, reason
            )
        release_wna16(self, "")

    def weight_for(self, tokens: int) -> torch.Tensor | None:
        if self._multiply is not None:
            return self.wide if tokens >= WIDE_FROM else None
        return self.weight if self.packed is None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._multiply is not None:
            return self._multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
        if self.packed is None:
            return super().forward(x)
        return F.linear(x, dequantize(get_wna16(self, "", self.scheme), x.dtype), self.bias)

    def adding(self, x: torch.Tensor, low: Any) -> torch.Tensor | None:
        from sglang_lora_moe.ops import marlin_linear

        if self._multiply is not None and marlin_linear.adds(x, self._multiply.keywords["weight"], low):
            return self._multiply(x, addend=low)
        return super().adding(x, low)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"
