"""LoRA functions of the marlin backend (`lora.hooks.AddendOps`): grouped the triton backend's, per pair part of the GEMMs' own launches."""

import torch

from sglang_lora_moe.lora.stacks import ExpertStacks, Stack
from sglang_lora_moe.moe.backends.triton_lora import combine_adds
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import RunnerInput
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.fused_moe_lora import AT_ONCE, ShrinkTile, moe_shrink
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.marlin_moe import EVERYWHERE, SHAPES, fuses_activation
from sglang_lora_moe.ops.marlin_moe_pairs import PairAdapters
from sglang_lora_moe.ops.moe_lora_shrink import can_shrink

COMBINED_PAIRS = 96  # from which a launch for s before down and a combine that adds B s take less than down's own shrink: measured
MAX_FOLLOWING_RANK = 16  # up to which gate_up makes s of down
FOLLOWING_ROWS = 48  # of an expert on average, from which gate_up makes s of down: 2 to 4 us more than a shrink at 32, less at 64
MOST_FOLLOWING_SLOTS, FEW_SLOTS, MANY_ROWS = 16, 12, 128  # 16 fit gate_up's ring, though records may name some twice; beyond 12 from 128 rows on: measured
OWN_SHRINK_ROWS, BY_SLOT_ROWS = 16, 32  # of a base tile, up to which down computes s itself, and from there the GEMMs find adapters by slot: measured
LONG_TILE = ShrinkTile(16, 16, 512, 4, 4)  # of the first shrink where `_is_long`


def _is_long(a: Stack, routing: Routing, device: torch.device) -> bool:
    """Whether the first shrink, of few LoRA tiles, takes less with half the rows of A and four times the columns under way a program: measured."""
    few = 32 <= routing.num_pairs <= max(64, 16 * routing.top_k)
    return few and a.dim > 2048 and a.shrink_width <= 32 and routing.lora_block == LONG_TILE.m and launch.has_wgmma(device)


def addend(inp: RunnerInput, rows: torch.Tensor, stacks: ExpertStacks, routing: Routing, rows_from: str) -> LowRank | PairAdapters:
    """What the GEMM adds before its store. NOTE: it must be the very next launch."""
    gather = rows_from == "tokens"
    name, a, b = ("lora.13", stacks.a13, stacks.b13) if gather else ("lora.2", stacks.a2, stacks.b2)
    if routing.rows == "pair":
        if gather:
            assert inp.token_slots is not None, "a shrink needs the slots of the tokens"
            routing.following = PairAdapters.allocate(stacks, inp.token_slots, inp.spec, inp.workspace)
        return routing.following
    beside = stacks.a2.dim <= AT_ONCE  # the second shrink and down
    combined = (beside or routing.num_pairs >= COMBINED_PAIRS) and combine_adds(stacks, routing)
    if gather and combined and beside:
        routing.told = inp.workspace.get("lora.told", (1,), torch.int32)
    if not gather and combined:
        return moe_shrink(rows, a, b, routing, inp.workspace, gather=False, name=name, scatter=True)
    if max(routing.base_block, routing.lora_block) <= OWN_SHRINK_ROWS and not gather:
        assert inp.token_slots is not None, "a shrink needs the slots of the tokens"
        return LowRank(inp.workspace.get(f"{name}.s", (1, routing.num_pairs, a.shrink_width), rows.dtype), b, inp.token_slots, a=a)
    if not gather and routing.following is not None:
        return routing.following
    shape, following = SHAPES[EVERYWHERE], (stacks.a2, stacks.b2, -(-stacks.a2.dim * 2 // SHAPES[EVERYWHERE].block_rows))
    makes_next = gather and routing.base_block == shape.block_tokens and a.dim > shape.stages * shape.block_k and fuses_activation(inp.spec)
    least = routing.num_experts * (FOLLOWING_ROWS if inp.num_slots <= FEW_SLOTS else MANY_ROWS)
    makes_next = makes_next and routing.num_pairs >= least and can_shrink(rows, routing.num_experts)
    makes_next = makes_next and stacks.a2.max_rank <= MAX_FOLLOWING_RANK and inp.num_slots <= MOST_FOLLOWING_SLOTS
    then = following if makes_next else None
    tile = LONG_TILE if gather and _is_long(a, routing, rows.device) else None
    low = moe_shrink(rows, a, b, routing, inp.workspace, gather=gather, name=name, by_cuda=routing.num_pairs >= 2048, following=then, tile=tile)
    if low.following is not None:
        routing.following = low.following.low
        return low
    return LowRank(low.s, b, low.token_slots, low.records, low.ranges, a=a if OWN_SHRINK_ROWS < routing.base_block <= BY_SLOT_ROWS else None)
