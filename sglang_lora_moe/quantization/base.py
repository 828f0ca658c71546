"""What a quantization method must say about itself. It owns the parameters of a layer's experts and their forms.

Each backend reads the weights through its own info object. A method gives the infos it can; the base class raises for
the others with a sentence, so that a backend never runs on weights that did not describe themselves to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.quantization.wna16 import WNA16Weight


@dataclass(frozen=True)
class TorchQuantInfo:
    """By expert the matrices for `x @ matrix`: w13 [H, 2I], w2 [I, H] (transposed, maybe made when asked for), biases [2I] and [H] or None."""

    w13: Callable[[int], torch.Tensor]
    w2: Callable[[int], torch.Tensor]
    b13: tuple[torch.Tensor, ...] | None
    b2: tuple[torch.Tensor, ...] | None


@dataclass(frozen=True)
class TritonQuantInfo:
    """Weights as stored: w13 [E, 2I, H] (halves: gate rows, then up rows), w2 [E, H, I], biases [E, 2I] and [E, H] or None.

    Either both plain or both integer, in the canonical form with scales in the activation dtype.
    """

    w13: torch.Tensor | WNA16Weight
    w2: torch.Tensor | WNA16Weight
    b13: torch.Tensor | None
    b2: torch.Tensor | None


def register_empty(layer: nn.Module, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give `layer` an empty parameter, which the loader fills, or None under its name where there is no shape."""
    parameter = None if shape is None else nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
    layer.register_parameter(name, parameter)


class QuantMethod(ABC):
    """How the experts' weights of one checkpoint format are kept."""

    name: str
    backends: tuple[str, ...]  # moe runner backends that can read these weights, best first on a GPU

    @abstractmethod
    def create_weights(self, layer: nn.Module, spec: MoESpec, dtype: torch.dtype, device: torch.device | str) -> None:
        """Register the layer's empty parameters; the loader fills them."""

    def get_torch_quant_info(self, layer: nn.Module) -> TorchQuantInfo:
        self._refuse("torch_native")

    def get_triton_quant_info(self, layer: nn.Module) -> TritonQuantInfo:
        self._refuse("triton")

    def get_marlin_quant_info(self, layer: nn.Module) -> Any:  # TritonQuantInfo of integer weights, which the core converts once
        self._refuse("marlin")

    def release_weights(self, layer: nn.Module) -> None:
        """Drop the layer's own weights after a backend made its form of them; otherwise both would take memory."""
        raise ValueError(f"{self.name} weights are read in place by their backends and cannot be dropped")

    def _refuse(self, backend: str) -> NoReturn:
        raise ValueError(f"{self.name} weights cannot run on the {backend} MoE backend; use --moe-runner-backend {' or '.join(self.backends)}")
