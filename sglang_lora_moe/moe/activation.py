"""The activation between the two expert GEMMs, for every formula of `MoESpec`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sglang_lora_moe.moe.spec import MoESpec

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def apply_activation(gate_up: torch.Tensor, spec: MoESpec) -> torch.Tensor:
    """act(gate_up [.., 2I or I]) -> [.., I] in gate_up's dtype; give float32 to keep the sum of base and delta exact."""
    if not spec.gated:
        return ACTIVATIONS[spec.activation](gate_up)
    gate, up = gate_up.split(spec.intermediate_size, dim=-1)
    if spec.swiglu_limit is None and spec.swiglu_alpha is None:
        return ACTIVATIONS[spec.activation](gate).mul_(up)
    if spec.swiglu_limit is not None:
        gate, up = gate.clamp(max=spec.swiglu_limit), up.clamp(-spec.swiglu_limit, spec.swiglu_limit)
    alpha = 1.0 if spec.swiglu_alpha is None else spec.swiglu_alpha
    return torch.sigmoid(gate * alpha).mul_(gate).mul_(up + 1)
