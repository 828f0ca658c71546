"""The fixed facts of one MoE layer. gate/up weights are always stored as halves (gate rows, then up rows)."""

from __future__ import annotations

from dataclasses import dataclass


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

    @property
    def w13_rows(self) -> int:
        return self.intermediate_size * (2 if self.gated else 1)
