"""The MoE forward, written once for every backend, quantization and adapter layout.

A `MoeRunnerCore` supplies the two expert GEMMs and the row order it needs; it knows no adapters and never restates
this pipeline. `LoRAHooks` are four callables around the GEMMs; with `hooks=None` the layer is the plain base layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.quantization.base import QuantMethod


@dataclass(frozen=True)
class RunnerInput:
    """One step of one layer. x [M, H]; topk_ids int32 [M, K] (-1 = none here); topk_weights float32 [M, K]."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    token_slots: torch.Tensor | None  # int32 [M], below num_slots, which kernels of single pairs do not check; -1 = base model; None = no adapter in this step
    workspace: Workspace
    spec: MoESpec
    num_slots: int = 0  # S; 0 without token_slots
    max_rank: int = 0  # of what lies in slots, at most; 0 without token_slots


@dataclass(frozen=True)
class LoRAHooks:
    """Built once per layer by `lora/hooks.py`, called with the layer's input and the intermediates of `MoeRunnerCore`.

    `pre_gate_up(inp, routing)` and `pre_down(inp, act, routing)` come before the GEMMs. What they return goes, as `s`, to the `post_*` hooks:
    `post_gate_up(inp, gate_up, s, routing)` returns the activation [P, I], `post_down(inp, down, s, routing)` the layer's output [M, H]. Without `post_*` hooks
    it is a low-rank addend in the backend's own form: the core then adds it before its store, and activates and combines as it does without adapters.
    """

    pre_gate_up: Callable[[RunnerInput, Routing], Any]
    pre_down: Callable[[RunnerInput, torch.Tensor, Routing], Any]
    post_gate_up: Callable[[RunnerInput, torch.Tensor, Any, Routing], torch.Tensor] | None = None
    post_down: Callable[[RunnerInput, torch.Tensor, Any, Routing], torch.Tensor] | None = None


class MoeRunnerCore(Protocol):
    """The two expert GEMMs of a backend. Intermediates have one row per pair, in the order `routing.rows` names.

    A core whose adapters come as addends needs the two halves whole (`gate_up_activation`, `down_combine`) alone, which it may
    fuse; the `post_*` hooks of others call the four parts.
    """

    name: str
    converts_weights: bool = False  # quant_info copies the weights into another form, so that the layer's own may be freed

    def quant_info(self, quant_method: QuantMethod, layer: torch.nn.Module) -> Any:
        """The form of a layer's weights that this core reads; raises where the quantization has none. Called once, after loading."""
        ...

    def make_routing(self, inp: RunnerInput) -> Routing: ...
    def gate_up(self, inp: RunnerInput, routing: Routing, quant_info: Any) -> torch.Tensor:  # [P, 2I]
        raise AssertionError(f"the {self.name} core activates within its GEMM")

    def activation(self, inp: RunnerInput, gate_up: torch.Tensor, routing: Routing) -> torch.Tensor:  # [P, I]
        raise AssertionError(f"the {self.name} core activates within its GEMM")

    def down(self, inp: RunnerInput, act: torch.Tensor, routing: Routing, quant_info: Any) -> torch.Tensor: ...  # [P, H]
    def combine(self, inp: RunnerInput, down: torch.Tensor, routing: Routing) -> torch.Tensor: ...  # [M, H]

    def gate_up_activation(self, inp: RunnerInput, routing: Routing, quant_info: Any, addend: Any = None) -> torch.Tensor:
        assert addend is None, f"the {self.name} core takes no addend"
        return self.activation(inp, self.gate_up(inp, routing, quant_info), routing)

    def down_combine(self, inp: RunnerInput, act: torch.Tensor, routing: Routing, quant_info: Any, addend: Any = None) -> torch.Tensor:
        assert addend is None, f"the {self.name} core takes no addend"
        return self.combine(inp, self.down(inp, act, routing, quant_info), routing)


class MoeRunner:
    """Runs experts through a core, with or without hooks. One runner serves all layers whose weights have one form."""

    def __init__(self, core: MoeRunnerCore) -> None:
        self.core = core

    def run(self, inp: RunnerInput, quant_info: Any, hooks: LoRAHooks | None = None) -> torch.Tensor:
        """The layer's output [M, H] (this rank's partial sum) in x's dtype; `quant_info` is what `core.quant_info` gave for the layer."""
        core = self.core
        if inp.spec.router_weight_on == "input":  # x is scaled by the one weight, so that nothing below knows of it
            inp = replace(inp, x=(inp.x * inp.topk_weights).to(inp.x.dtype), topk_weights=torch.ones_like(inp.topk_weights))
        routing = core.make_routing(inp)
        if hooks is None:
            return core.down_combine(inp, core.gate_up_activation(inp, routing, quant_info), routing, quant_info)
        s = hooks.pre_gate_up(inp, routing)  # for the hook after the GEMM, or, without one, an addend for the core
        if hooks.post_gate_up is not None:
            act = hooks.post_gate_up(inp, core.gate_up(inp, routing, quant_info), s, routing)
        else:
            act = core.gate_up_activation(inp, routing, quant_info, s)
        s = hooks.pre_down(inp, act, routing)
        if hooks.post_down is not None:
            return hooks.post_down(inp, core.down(inp, act, routing, quant_info), s, routing)
        return core.down_combine(inp, act, routing, quant_info, s)
