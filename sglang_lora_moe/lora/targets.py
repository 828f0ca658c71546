"""What of a model an adapter may touch: names, shapes and source layouts, without the weights.

Adapter files are read against these (`lora/adapter.py`) and the memory pool is laid out from them. Sizes are those of
the whole model as adapter files know it. Names are transformers' module paths, also where several are fused into one layer here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sglang_lora_moe.moe.spec import SharedExpert


@dataclass(frozen=True)
class PairTarget:
    """What takes one A [R, in_features] and one B [out_features, R]."""

    name: str
    in_features: int
    out_features: int


class LinearTarget(PairTarget):
    """One linear of the checkpoint (a part of a fused linear counts alone): weight [out_features, in_features]."""


class EmbeddingTarget(PairTarget):
    """Token embedding, weight [in_features, out_features]: its inputs are the vocabulary."""


@dataclass(frozen=True)
class ExpertTarget:
    """The experts of one layer: w13 [num_experts, w13_rows, hidden], w2 [num_experts, hidden, intermediate].

    `interleaved_gate_up` and `is_transposed` describe transformers' parameters, which adapter files follow: rows of
    gate_up alternate gate, up (gpt-oss), and weights are stored [in, out] (gpt-oss, Llama 4). The last experts may be `shared`.
    """

    name: str
    num_experts: int
    hidden: int
    intermediate: int
    gated: bool = True
    interleaved_gate_up: bool = False
    is_transposed: bool = False
    shared: SharedExpert | None = None

    def of_files(self) -> "list[ExpertTarget]":
        """As files have adapters of it: the routed experts, and the shared one as an experts module of its own."""
        if self.shared is None:
            return [self]
        name, _, parts = self.shared
        routed = replace(self, num_experts=self.num_experts - parts, shared=None)
        return [routed, replace(routed, name=name, num_experts=1, intermediate=parts * self.intermediate)]

    @property
    def w13_rows(self) -> int:
        return self.intermediate * (2 if self.gated else 1)


Target = PairTarget | ExpertTarget


_ALIASES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EXPERT_LEAVES = {"experts", "gate_proj", "up_proj", "down_proj"}


def choose_targets(model: nn.Module, names: Sequence[str] = ()) -> tuple[dict[str, Target], frozenset[str]]:
    """The targets that --lora-target-modules `names` leave, by name, and the names of the others. Without names, or with "all": all.

    A name is the last part of a module's path; expert weights go by "experts" or by a projection. A layer that is computed as one
    (q, k and v) is kept whole. ValueError for a name that nothing in the model has.
    """
    layers = _layers(model)
    if not names or {"all", "all-linear"} & set(names):
        return {target.name: target for layer in layers for target in layer}, frozenset()
    wanted = {leaf for name in names for leaf in _ALIASES.get(name, (name,))}
    found: set[str] = set()
    kept: dict[str, Target] = {}
    for layer in layers:
        leaves = {leaf for target in layer for leaf in (_EXPERT_LEAVES if isinstance(target, ExpertTarget) else {target.name.rpartition(".")[2]})}
        found |= leaves
        if leaves & wanted:
            kept |= {target.name: target for target in layer}
    unknown = sorted(wanted - found)
    if unknown:
        raise ValueError(f"--lora-target-modules {unknown[0]}: this model has no such module; it has {', '.join(sorted(found))}, or all")
    return kept, frozenset(target.name for layer in layers for target in layer) - kept.keys()


def _layers(model: nn.Module) -> list[list[Target]]:
    """The targets of each layer. Layers are recognised by their attributes, so that this file needs none of them."""
    layers: list[list[Target]] = []
    module: Any
    for module in model.modules():
        if hasattr(module, "parts") and hasattr(module, "slot_source"):  # layers.linear.Linear
            layers.append([LinearTarget(name, in_features=module.in_features, out_features=rows) for name, rows in module.parts])
        elif hasattr(module, "spec") and hasattr(module, "interleaved_gate_up"):  # layers.fused_moe.FusedMoE
            spec = module.spec
            sizes = spec.num_experts, spec.hidden_size, spec.intermediate_size
            layers.append([ExpertTarget(module.name, *sizes, spec.gated, module.interleaved_gate_up, module.is_transposed, module.shared)])
        elif type(module).__name__ == "Embedding" and hasattr(module, "name"):  # layers.embedding.Embedding
            layers.append([EmbeddingTarget(module.name, *module.weight.shape)])
    return layers
