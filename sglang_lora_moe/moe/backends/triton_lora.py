"""LoRA functions of the triton backend (`lora.hooks.AddendOps`).

The shrink is launched before a GEMM, whose kernel starts beside it (programmatic dependent launch) and adds B s at its end.
Where both GEMMs are wgmma's the shrink of act is gate_up's own, so that down need not wait for its end.
"""

from dataclasses import replace

import torch

from sglang_lora_moe.lora.stacks import ExpertStacks
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import RunnerInput
from sglang_lora_moe.ops.fused_moe_lora import AT_ONCE, moe_shrink
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.moe_lora_shrink import can_shrink

MAX_FOLLOWING_RANK = 64  # what parts of s are for at most (csrc/moe_wgmma_gemm.h)
LONG_DOWN = 4096  # columns of act beyond which the combine adds B s itself: down has few programs, and Mixtral takes 5 to 8 us less at 4 tokens
PAIRS_BESIDE = 12  # of an expert, up to which GEMMs start beside their shrinks where ranks are low: up to 3.5 us less (measured so far)
SHORT_DOWN = 512  # columns of act up to which down adds B s, which then takes less: 19 us for 24 in DeepSeek's layer of 16 tokens


def combine_adds(stacks: ExpertStacks, routing: Routing, max_rank: int = 16, pairs: int = 1) -> bool:
    """Whether the combine adds B s of the second projection: it reads B once a pair, which pays while few `pairs` share one (measured)."""
    return routing.rows == "sorted" and routing.base_block <= 16 and stacks.b2.max_rank <= max_rank and routing.num_pairs <= pairs * routing.num_experts


def down_sums(stacks: ExpertStacks, routing: Routing) -> bool:
    """Whether programs of down sum B s for the combine: among enough others (measured; at half the pairs it takes 0.6 us more)."""
    return 4 * routing.num_pairs >= 3 * routing.num_experts and SHORT_DOWN < stacks.a2.dim <= LONG_DOWN and combine_adds(stacks, routing, max_rank=32)


def addend(inp: RunnerInput, rows: torch.Tensor, stacks: ExpertStacks, routing: Routing, rows_from: str) -> LowRank:
    """What a triton core adds to its GEMM. NOTE: the GEMM must be the very next launch; it waits for the shrink alone."""
    tile = routing.wgmma  # beside Triton's GEMMs the layer ends 1 % later with the CUDA shrink
    summed, adds = down_sums(stacks, routing), stacks.a2.dim > SHORT_DOWN and combine_adds(stacks, routing)
    if rows_from == "pairs":
        if routing.following is not None:
            return routing.following
        low = moe_shrink(rows, stacks.a2, stacks.b2, routing, inp.workspace, gather=False, name="lora.2", by_cuda=tile is not None, scatter=summed or adds)
        return replace(low, summed=inp.workspace.get("lora.summed", inp.x.shape, torch.float32)) if summed else low
    if stacks.a2.dim <= AT_ONCE and (summed or combine_adds(stacks, routing, pairs=PAIRS_BESIDE)):
        routing.told = inp.workspace.get("lora.told", (1,), torch.int32)
        routing.beside = summed or not adds
    makes_s_of_down = tile is not None and tile.cluster == 1 and can_shrink(rows, routing.num_experts) and stacks.a2.max_rank <= MAX_FOLLOWING_RANK
    following = (stacks.a2, stacks.b2, tile.blocks(inp.spec.intermediate_size)) if makes_s_of_down else None
    low = moe_shrink(rows, stacks.a13, stacks.b13, routing, inp.workspace, gather=True, name="lora.13", by_cuda=tile is not None, following=following)
    routing.following = None if low.following is None else replace(low.following.low, following=low.following)
    return low
