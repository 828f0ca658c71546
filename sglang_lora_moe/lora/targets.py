"""What of a model an adapter may touch: names, shapes and source layouts, without the weights.

Adapter files are read against these (`lora/adapter.py`) and the memory pool is laid out from them. Sizes are those of
the whole model as adapter files know it. Names are transformers' module paths, also where several are fused into one layer here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LinearTarget:
    """One linear of the checkpoint (a part of a fused linear counts alone): weight [out_features, in_features]."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class EmbeddingTarget:
    """Token embedding, weight [vocab, hidden]."""

    name: str
    vocab: int
    hidden: int


@dataclass(frozen=True)
class ExpertTarget:
    """The experts of one layer: w13 [num_experts, w13_rows, hidden], w2 [num_experts, hidden, intermediate].

    `interleaved_gate_up` and `is_transposed` describe transformers' parameters, which adapter files follow: rows of
    gate_up alternate gate, up (gpt-oss), and weights are stored [in, out] (gpt-oss, Llama 4).
    """

    name: str
    num_experts: int
    hidden: int
    intermediate: int
    gated: bool = True
    interleaved_gate_up: bool = False
    is_transposed: bool = False

    @property
    def w13_rows(self) -> int:
        return self.intermediate * (2 if self.gated else 1)


Target = LinearTarget | EmbeddingTarget | ExpertTarget


def collect_targets(model: nn.Module) -> dict[str, Target]:
    """All targets of a built model by name. Layers are recognised by their attributes, so that this file needs none of them."""
    targets: dict[str, Target] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, "parts") and hasattr(module, "slot_source"):  # layers.linear.Linear
            for name, rows in module.parts:
                targets[name] = LinearTarget(name, in_features=module.in_features, out_features=rows)
        elif hasattr(module, "spec") and hasattr(module, "interleaved_gate_up"):  # layers.fused_moe.FusedMoE
            spec = module.spec
            targets[module.name] = ExpertTarget(
                module.name, spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.gated, module.interleaved_gate_up, module.is_transposed
            )
        elif type(module).__name__ == "Embedding" and hasattr(module, "name"):  # layers.embedding.Embedding
            vocab, hidden = module.weight.shape
            targets[module.name] = EmbeddingTarget(module.name, vocab, hidden)
    return targets
