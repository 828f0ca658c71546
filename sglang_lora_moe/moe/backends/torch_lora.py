"""LoRA functions of the torch_native backend (`lora.hooks.SeparateOps`): one small matmul per group and projection.

Rows are gathered once into sorted order, which the base GEMM shares; each group multiplies its own rows with matrices at
their true rank, in float32. The rank-space vectors are a list with one entry per group, None where there is no delta.
"""

import torch

from sglang_lora_moe.lora.host_views import add_expand, slot_views
from sglang_lora_moe.lora.stacks import Stack
from sglang_lora_moe.moe.backends.torch_native import combine
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import RunnerInput
from sglang_lora_moe.moe.spec import apply_activation

RankSpace = list[torch.Tensor | None]  # per group of routing.groups: float32 [rows, c * rank]


def shrink(inp: RunnerInput, rows: torch.Tensor, stack_a: Stack, routing: Routing, rows_from: str) -> RankSpace:
    """A x per group."""
    source = (routing.gather(rows) if rows_from == "tokens" else rows).float()
    sizes = [size for _, _, size in routing.groups]
    result: RankSpace = []
    for (expert, slot, _), x in zip(routing.groups, source.split_with_sizes(sizes), strict=True):
        views = slot_views(stack_a, slot) if slot >= 0 else None
        result.append(None if views is None or views.rank == 0 else torch.mm(x, views.a_t(expert)))
    return result


def act_with_delta(inp: RunnerInput, gate_up: torch.Tensor, s: RankSpace, stack_b: Stack, routing: Routing) -> torch.Tensor:
    """act(gate_up + scaling * B13 s)."""
    return apply_activation(_add_delta(gate_up, s, stack_b, routing), inp.spec).to(gate_up.dtype)


def combine_with_delta(inp: RunnerInput, down: torch.Tensor, s: RankSpace, stack_b: Stack, routing: Routing) -> torch.Tensor:
    """sum over k of weight_k * (down + scaling * B2 s)."""
    return combine(inp, _add_delta(down, s, stack_b, routing), routing)


def _add_delta(base: torch.Tensor, s: RankSpace, stack_b: Stack, routing: Routing) -> torch.Tensor:
    """base + scaling * B s in float32; in place where base is float32 already."""
    total = base.float()
    sizes = [size for _, _, size in routing.groups]
    for (expert, slot, _), low, y in zip(routing.groups, s, total.split_with_sizes(sizes), strict=True):
        if low is not None:
            add_expand(y, low, slot_views(stack_b, slot), expert)
    return total
