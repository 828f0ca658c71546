"""Between the two GEMMs of experts with adapters, rows sorted (csrc/moe_lora_act.cu), so that neither GEMM knows the first projection's:

act[row] = f(gate_up[row] + B13 s13[row])       gate_up, the base GEMM's sums, and the addition in float32
s2[row]  = scaling2 * A2 act[row]               of the rounded act, where the row has an adapter
"""

from __future__ import annotations

import torch

from sglang_lora_moe.lora.stacks import Stack
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import define
from sglang_lora_moe.ops.low_rank import RECORD, LowRank
from sglang_lora_moe.ops.moe_activation import activation_code

COLUMNS, MOST_PARTS = 128, 8  # that a block computes at once; blocks of a cluster

define(
    "moe_lora_act(Tensor gate_up, Tensor s, Tensor b_pool, Tensor b_offset, Tensor b_stride, Tensor b_rank, Tensor b_split, Tensor a_pool, Tensor a_offset, "
    "Tensor a_stride, Tensor a_rank, Tensor scaling, Tensor next_offset, Tensor next_stride, Tensor slots, Tensor tiles, Tensor counts, Tensor sorted_pairs, "
    "Tensor(a!) act, Tensor(b!) next, Tensor(c!) records, int max_rank, int top_k, int lora_block, bool gated, int activation, float alpha, float limit, "
    "int parts, int multiprocessors, bool overlap) -> ()"
)


def moe_lora_activation(
    gate_up: torch.Tensor, s13: LowRank, a2: Stack, b2: Stack, routing: Routing, spec: MoESpec, workspace: Workspace, *,
    parts: int | None = None, multiprocessors: int | None = None,
) -> tuple[torch.Tensor, LowRank]:  # fmt: skip  # budget: the tensors of both projections, and a launch that tests force
    """(act [P, I], what down adds: s2 with its records) in sorted order; rows of pairs without an expert are not written.

    gate_up float32 [P, 2I], or [P, I] if not gated, biases added; `s13` of a grouped shrink, in act's dtype, 16-bit; a row with a slot has its columns there
    and in s2. I divides by 8. The kernel starts beside the end of the one before, which may have written gate_up alone: all kernels before that one are
    complete. It lets the one after begin at once, which must wait for it before it reads what any kernel after the alignment wrote.
    `parts`: blocks that share the columns of a row.
    """
    made, slots, b13 = routing.alignment, routing.token_slots, s13.b
    assert slots is not None and s13.s.shape[0] == 1, "the kernel needs the slots of the tokens and the s of a grouped shrink"
    pairs, inter, dtype, device = routing.num_pairs, spec.intermediate_size, s13.s.dtype, gate_up.device
    launch.expect("moe_lora_activation: gate_up", gate_up, (pairs, spec.w13_rows), torch.float32, s13.s.device)
    if gate_up.is_cuda:
        build.load()
    clusters = device.type != "cuda" or launch.has_wgmma(device)
    act = workspace.get("moe.act", (pairs, inter), dtype)
    s2 = workspace.get("lora.2.s", (1, pairs, a2.shrink_width), dtype)
    records = workspace.get("lora.2.records", (made.lora_tiles.shape[0], RECORD.value), torch.int64)
    torch.ops.sglang_lora_moe.moe_lora_act(
        gate_up, s13.s, b13.pool, b13.offset, b13.expert_stride, b13.rank, b13.split_a, a2.pool, a2.offset, a2.expert_stride, a2.rank, b2.scaling,
        b2.offset, b2.expert_stride, slots, made.lora_tiles, made.counts, made.sorted_pairs, act, s2, records, b13.max_rank, routing.top_k, routing.lora_block,
        spec.gated, activation_code(spec), spec.swiglu_alpha or 0.0, spec.swiglu_limit or 0.0,
        parts or (min(MOST_PARTS, -(-inter // COLUMNS)) if clusters else 1), multiprocessors or launch.multiprocessors(device), True,
    )  # fmt: skip
    return act, LowRank(s2, b2, slots, records, routing.lora_ranges)
