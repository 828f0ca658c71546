"""LoRA functions of the triton backend (`lora.hooks.ExpertLoRAOps`).

`addend` is the fast way: the shrink is launched before a GEMM, whose kernel starts beside it (programmatic dependent
launch) and adds B s in its epilogue. The other three functions serve cores that take no addend.
"""

from __future__ import annotations

import torch

from sglang_lora_moe.lora.stacks import Stack
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import RunnerInput
from sglang_lora_moe.ops.fused_moe_lora import moe_expand, moe_shrink
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.moe_activation import moe_activation
from sglang_lora_moe.ops.moe_combine import moe_combine


def addend(inp: RunnerInput, rows: torch.Tensor, stack_a: Stack, stack_b: Stack, routing: Routing, rows_from: str) -> LowRank:
    """What a triton core adds to its GEMM. NOTE: the GEMM must be the very next launch; it waits for the shrink alone."""
    gather = rows_from == "tokens"
    return moe_shrink(rows, stack_a, stack_b, routing, inp.workspace, gather=gather, name="lora.13" if gather else "lora.2")


def shrink(inp: RunnerInput, rows: torch.Tensor, stack_a: Stack, stack_b: Stack, routing: Routing, rows_from: str) -> LowRank:
    """The same for cores that take no addend: the functions below complete it."""
    return addend(inp, rows, stack_a, stack_b, routing, rows_from)


def act_with_delta(inp: RunnerInput, gate_up: torch.Tensor, low: LowRank, stack_b: Stack, routing: Routing) -> torch.Tensor:
    """act(gate_up + B13 s): per pair in one kernel, grouped with an expand in place before it."""
    out = inp.workspace.get("moe.act", (routing.num_pairs, inp.spec.intermediate_size), gate_up.dtype)
    if routing.rows == "pair":
        return moe_activation(gate_up, inp.spec, routing, out, addend=low)
    return moe_activation(moe_expand(gate_up, low, routing), inp.spec, routing, out)


def combine_with_delta(inp: RunnerInput, down: torch.Tensor, low: LowRank, stack_b: Stack, routing: Routing) -> torch.Tensor:
    """`down` in pair order. Per pair B2 is added within the combine; grouped by an expand in place before it."""
    out = torch.empty_like(inp.x)
    if routing.rows == "pair":
        return moe_combine(down, inp.topk_ids, inp.topk_weights, inp.spec.num_experts, out, addend=low)
    return moe_combine(moe_expand(down, low, routing, pair_order=True), inp.topk_ids, inp.topk_weights, inp.spec.num_experts, out)
