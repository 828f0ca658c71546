"""Experts with adapters: the wrapped layer, and the four LoRA hooks around its GEMMs, built once.

    post_gate_up   act(gate_up + scaling * B13 (A13 x))
    post_down      sum over k of weight_k * (down + scaling * B2 (A2 act))

The products A x (`shrink`) start before each base GEMM, which adds B s itself where the backend can (`AddendOps`). The functions
belong to the backend; this file knows no kernel.
"""

from typing import Any, Protocol

import torch
from torch import nn

from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.stacks import ExpertStacks, Stack, check_dims
from sglang_lora_moe.moe.backends import make_lora_ops
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import LoRAHooks, RunnerInput


class AddendOps(Protocol):
    """LoRA functions of a backend whose GEMMs add B s themselves. Pairs of slot -1 and slots of rank 0 get no delta."""

    def addend(self, inp: RunnerInput, rows: torch.Tensor, stacks: ExpertStacks, routing: Routing, rows_from: str) -> Any:
        """What the backend's core adds before its store. rows_from "tokens" (first projection): [M, in] by token; "pairs" (second) [P, in] in routing order."""
        ...


class SeparateOps(Protocol):
    """LoRA functions of a backend whose GEMMs know no adapters."""

    def shrink(self, inp: RunnerInput, rows: torch.Tensor, stack_a: Stack, routing: Routing, rows_from: str) -> Any:
        """s = A x of every pair with an adapter, float32, in the backend's own form; rows as above."""
        ...

    def act_with_delta(self, inp: RunnerInput, gate_up: torch.Tensor, s: Any, stack_b: Stack, routing: Routing) -> torch.Tensor:
        """act(gate_up + scaling * B s) [P, I]; the sum is in float32. `gate_up` may be overwritten."""
        ...

    def combine_with_delta(self, inp: RunnerInput, down: torch.Tensor, s: Any, stack_b: Stack, routing: Routing) -> torch.Tensor:
        """The layer's output [M, H]: router-weighted sum of down + scaling * B s, in float32. `down` may be overwritten."""
        ...


ExpertLoRAOps = AddendOps | SeparateOps


def build_lora_hooks(stacks: ExpertStacks, ops: ExpertLoRAOps) -> LoRAHooks:
    """Hooks for one layer; `ops` from `moe.backends.make_lora_ops`, which refuses backends that cannot serve adapters."""
    if hasattr(ops, "addend"):
        addend = ops.addend
        return LoRAHooks(
            lambda inp, routing: addend(inp, inp.x, stacks, routing, "tokens"), lambda inp, act, routing: addend(inp, act, stacks, routing, "pairs")
        )
    separate: SeparateOps = ops
    return LoRAHooks(
        lambda inp, routing: separate.shrink(inp, inp.x, stacks.a13, routing, "tokens"),
        lambda inp, act, routing: separate.shrink(inp, act, stacks.a2, routing, "pairs"),
        lambda inp, gate_up, s, routing: separate.act_with_delta(inp, gate_up, s, stacks.b13, routing),
        lambda inp, down, s, routing: separate.combine_with_delta(inp, down, s, stacks.b2, routing),
    )


class FusedMoEWithLoRA(nn.Module):
    """The experts of `base` with the adapters in `stacks`, for the slots of the step that `ctx` describes.

    ValueError, when built, for stacks of another layer, and for a backend that cannot apply adapters.
    """

    def __init__(self, base: FusedMoE, stacks: ExpertStacks, ctx: StepContext) -> None:
        super().__init__()
        check_dims(base.name, stacks, base.spec.hidden_size, base.spec.w13_rows, base.spec.intermediate_size, base.spec.hidden_size)
        self.base, self.ctx, self.slots = base, ctx, (stacks.a13.num_slots, stacks.a13.max_rank)
        self.hooks = build_lora_hooks(stacks, make_lora_ops(base.runner.core.name))

    def forward(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """As FusedMoE: x [M, H], topk_ids int [M, K], topk_weights float [M, K] -> [M, H]."""
        if not self.ctx.lora_active:
            return self.base.forward(x, topk_ids, topk_weights)
        return self.base.forward(x, topk_ids, topk_weights, self.hooks, self.ctx.token_slots[: x.shape[0]], *self.slots)
