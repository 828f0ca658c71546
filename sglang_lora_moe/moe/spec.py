"""The fixed facts of one MoE layer, and its activation. gate/up weights are always stored as halves (gate rows, then up rows)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
GATED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class MoESpec:
    """Sizes and formulas of one layer's experts, on this rank.

    y = sum over the token's K experts of  weight * (w2[e] act(w13[e] x + b13[e]) + b2[e])
    act (gated):    f(gate) * up, f = `activation` in {"silu", "gelu", "gelu_tanh", "relu"}
    act (clamped):  with swiglu_limit L and swiglu_alpha a (gpt-oss): g = min(gate, L), u = clamp(up, -L, L),
                    (u + 1) * g * sigmoid(a * g)
    act (not gated): f(w1 x), w13 has I rows ("relu2" = relu squared allowed)
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    gated: bool = True
    has_bias: bool = False
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None
    router_weight_on: str = "output"  # "input" (Llama 4, K = 1 only): x is scaled before gate_up, combine uses weight 1

    def __post_init__(self) -> None:
        known = GATED_ACTIVATIONS if self.gated else tuple(ACTIVATIONS)
        if self.activation not in known:
            raise ValueError(f"experts with the {'' if self.gated else 'un'}gated activation {self.activation!r} are not supported; known: {', '.join(known)}")
        if self.router_weight_on not in ("output", "input"):
            raise ValueError(f"router_weight_on must be 'output' or 'input', got {self.router_weight_on!r}")
        if self.router_weight_on == "input" and self.top_k != 1:
            raise ValueError(f"a router weight on the expert's input needs top_k 1, got top_k {self.top_k}: one x cannot carry several weights")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be in 1..num_experts ({self.num_experts}), got {self.top_k}")
        clamped = (self.swiglu_alpha is not None, self.swiglu_limit is not None)
        if any(clamped) and not (all(clamped) and self.gated and self.activation == "silu"):
            raise ValueError("swiglu_alpha and swiglu_limit come together and belong to the gated silu activation")

    @property
    def w13_rows(self) -> int:
        return self.intermediate_size * (2 if self.gated else 1)


class SharedExpert(NamedTuple):
    """An expert of every token that is the last `parts` of a layer's: each has a share of its rows of gate and up, and of its columns of down."""

    name: str
    gate: str  # the linear whose sigmoid is its weight; "" = weight 1
    parts: int


def apply_activation(gate_up: torch.Tensor, spec: MoESpec) -> torch.Tensor:
    """act(gate_up [.., 2I or I]) -> [.., I] in gate_up's dtype; give float32 to keep the sum of base and delta exact."""
    if not spec.gated:
        return ACTIVATIONS[spec.activation](gate_up)
    gate, up = gate_up.split(spec.intermediate_size, dim=-1)
    if spec.swiglu_limit is None or spec.swiglu_alpha is None:
        return ACTIVATIONS[spec.activation](gate).mul_(up)
    gate, up = gate.clamp(max=spec.swiglu_limit), up.clamp(-spec.swiglu_limit, spec.swiglu_limit)
    return torch.sigmoid(gate * spec.swiglu_alpha).mul_(gate).mul_(up + 1)
