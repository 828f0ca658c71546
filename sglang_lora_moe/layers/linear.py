"""A linear layer that may hold several of the checkpoint's linears stacked by rows (q, k and v, for example)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sglang_lora_moe.quantization.wna16 import WNA16Weight


class Linear(nn.Module):
    """y = x W^T + b, where W stacks the rows of its parts.

    `parts` lists (name, rows) in order; names are transformers' module paths, which is what adapters address.
    `biased_parts` names those that have a bias; the others keep zeros in its rows. `slot_source` says which of the step's slots belong to the
    rows of x: "tokens" (one per token) or "logits" (one per wanted logit row).
    """

    def __init__(
        self,
        parts: tuple[tuple[str, int], ...],
        in_features: int,
        *,
        biased_parts: tuple[str, ...] = (),
        dtype: torch.dtype,
        device: torch.device | str,
        slot_source: str = "tokens",
    ) -> None:
        super().__init__()
        if slot_source not in ("tokens", "logits"):
            raise ValueError(f"slot_source must be 'tokens' or 'logits', got {slot_source!r}")
        self.parts, self.in_features, self.slot_source, self.biased_parts = parts, in_features, slot_source, biased_parts
        rows = sum(count for _, count in parts)
        self._create_weight(rows, dtype, device)
        self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype, device=device), requires_grad=False) if biased_parts else None

    def _create_weight(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.weight = nn.Parameter(torch.empty(rows, self.in_features, dtype=dtype, device=device), requires_grad=False)  # [sum(rows), in]

    def weight_for(self, tokens: int) -> torch.Tensor | None:
        """The weight [sum(rows), in] in the activations' dtype, where a step of so many tokens may multiply by it; None: by another form."""
        return self.weight

    def _rows(self, start: int, rows: int) -> torch.Tensor | WNA16Weight:
        return self.weight[start : start + rows]

    @classmethod
    def from_modules(cls, modules: dict[str, nn.Linear], *, device: torch.device | str, slot_source: str = "tokens", **options: Any) -> "Linear":
        """An empty layer with the sizes of `modules` (name -> nn.Linear, also on meta), stacked in their order."""
        first = next(iter(modules.values()))
        parts = tuple((name, module.out_features) for name, module in modules.items())
        biased_parts = tuple(name for name, module in modules.items() if module.bias is not None)
        return cls(parts, first.in_features, biased_parts=biased_parts, dtype=first.weight.dtype, device=device, slot_source=slot_source, **options)

    def part_views(self) -> dict[str, tuple[torch.Tensor | WNA16Weight, torch.Tensor | None]]:
        """The rows of weight [rows, in] and bias [rows] (None where the part has no bias) that belong to each part."""
        views: dict[str, tuple[torch.Tensor | WNA16Weight, torch.Tensor | None]] = {}
        start = 0
        for name, rows in self.parts:
            bias = self.bias[start : start + rows] if self.bias is not None and name in self.biased_parts else None
            views[name] = (self._rows(start, rows), bias)
            start += rows
        return views

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., sum(rows)]."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def narrow(self, dtype: torch.dtype) -> None:
        """Hold the weight in `dtype` if its numbers are of it, as those of float32 routers are in most checkpoints: no product changes."""
        weight = self.weight.to(dtype)
        if torch.equal(weight.to(self.weight.dtype), self.weight):
            self.weight = nn.Parameter(weight, requires_grad=False)

    def adding(self, x: torch.Tensor, low: Any) -> torch.Tensor | None:
        """As `forward` for x [M, in], and what adapters add beyond `low`, which was begun; None where no kernel does both."""
        from sglang_lora_moe.ops import middle_linear, skinny_linear  # need triton

        weight = self.weight_for(x.shape[0])
        if weight is None:
            return None
        if few := skinny_linear.shape_for(x, weight, low):
            return skinny_linear.skinny_linear(x, weight, self.bias, low, few)
        shape = middle_linear.shape_for(x, weight, low)
        return None if shape is None else middle_linear.middle_linear(x, weight, self.bias, low, shape)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {dict(self.parts)}, bias={self.bias is not None}"
