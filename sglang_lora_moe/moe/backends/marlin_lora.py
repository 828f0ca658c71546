"""LoRA functions of the marlin backend (`lora.hooks.AddendOps`): grouped the triton backend's, per pair part of the GEMMs' own launches."""

from dataclasses import replace

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
CUDA_PAIRS = 2048  # from which shrinks of grouped rows are csrc/moe_lora_shrink.cu's where it can
OWN_SHRINK_ROWS, BY_SLOT_ROWS = 16, 32  # of a base tile, up to which down computes s itself, and from there the GEMMs find adapters by slot: measured
# The first shrink's tile by least pairs, of x of up to 2,048 columns and of more: the fewer programs, beside gate_up's, the more each has under way. Measured
LONG_TILE, DEEP_TILE, TALL_TILE = ShrinkTile(16, 16, 512, 4, 4), ShrinkTile(16, 16, 256, 2, 5), ShrinkTile(16, 32, 256, 4, 4)
SMALL_TILE = ShrinkTile(16, 16, 128, 4, 4)
NARROW_TILES = ((129, TALL_TILE), (128, DEEP_TILE), (65, SMALL_TILE), (48, LONG_TILE))
WIDE_TILES = ((448, TALL_TILE), (256, None), (129, TALL_TILE), (128, DEEP_TILE), (112, SMALL_TILE), (32, LONG_TILE))


def _first_tile(a: Stack, routing: Routing, device: torch.device) -> ShrinkTile | None:
    """In place of `shrink_tile`'s; of few experts, each with many LoRA tiles, only up to 64 pairs."""
    pairs, narrow = routing.num_pairs, a.dim <= 2048
    if a.shrink_width > 32 or routing.lora_block > 16 or pairs > max(64, (4 if narrow else 2) * routing.num_experts) or not launch.has_wgmma(device):
        return None
    return next((tile for least, tile in (NARROW_TILES if narrow else WIDE_TILES) if pairs >= least), None)


def addend(inp: RunnerInput, rows: torch.Tensor, stacks: ExpertStacks, routing: Routing, rows_from: str) -> LowRank | PairAdapters:
    """What the GEMM adds before its store. NOTE: it must be the very next launch."""
    first = rows_from == "tokens"
    if routing.rows == "pair":
        if first:
            assert inp.token_slots is not None, "a shrink needs the slots of the tokens"
            routing.following = PairAdapters.allocate(stacks, inp.token_slots, inp.spec, inp.workspace)
        return routing.following
    return _of_gate_up(inp, rows, stacks, routing) if first else _of_down(inp, rows, stacks, routing)


def _combined(stacks: ExpertStacks, routing: Routing) -> bool:
    """Whether the combine adds B s of down."""
    return (stacks.a2.dim <= AT_ONCE or routing.num_pairs >= COMBINED_PAIRS) and combine_adds(stacks, routing)


def _of_gate_up(inp: RunnerInput, x: torch.Tensor, stacks: ExpertStacks, routing: Routing) -> LowRank:
    if stacks.a2.dim <= AT_ONCE and _combined(stacks, routing):  # down may begin beside its shrink
        routing.told = inp.workspace.get("lora.told", (1,), torch.int32)
    following = (stacks.a2, stacks.b2, -(-stacks.a2.dim * 2 // SHAPES[EVERYWHERE].block_rows)) if _makes_s_of_down(inp, x, stacks, routing) else None
    tile = _first_tile(stacks.a13, routing, x.device)
    by_cuda = routing.num_pairs >= CUDA_PAIRS
    low = moe_shrink(x, stacks.a13, stacks.b13, routing, inp.workspace, gather=True, name="lora.13", by_cuda=by_cuda, following=following, tile=tile)
    routing.following = None if low.following is None else low.following.low
    return _found_by_slot(low, stacks.a13, routing)


def _makes_s_of_down(inp: RunnerInput, x: torch.Tensor, stacks: ExpertStacks, routing: Routing) -> bool:
    """Whether gate_up by wgmma makes s of down: with enough rows for each expert, and few and narrow adapters."""
    shape = SHAPES[EVERYWHERE]
    able = routing.base_block == shape.block_tokens and stacks.a13.dim > shape.stages * shape.block_k and fuses_activation(inp.spec)
    small = stacks.a2.max_rank <= MAX_FOLLOWING_RANK and inp.num_slots <= MOST_FOLLOWING_SLOTS
    least_rows = FOLLOWING_ROWS if inp.num_slots <= FEW_SLOTS else MANY_ROWS
    return able and small and routing.num_pairs >= least_rows * routing.num_experts and can_shrink(x, routing.num_experts)


def _of_down(inp: RunnerInput, act: torch.Tensor, stacks: ExpertStacks, routing: Routing) -> LowRank:
    a, b = stacks.a2, stacks.b2
    if _combined(stacks, routing):
        return moe_shrink(act, a, b, routing, inp.workspace, gather=False, name="lora.2", scatter=True)
    if max(routing.base_block, routing.lora_block) <= OWN_SHRINK_ROWS:  # down computes s itself
        assert inp.token_slots is not None, "a shrink needs the slots of the tokens"
        return LowRank(inp.workspace.get("lora.2.s", (1, routing.num_pairs, a.shrink_width), act.dtype), b, inp.token_slots, a=a)
    if routing.following is not None:  # gate_up has made it
        return routing.following
    low = moe_shrink(act, a, b, routing, inp.workspace, gather=False, name="lora.2", by_cuda=routing.num_pairs >= CUDA_PAIRS)
    return _found_by_slot(low, a, routing)


def _found_by_slot(low: LowRank, a: Stack, routing: Routing) -> LowRank:
    """`low`, whose adapters the GEMM finds by slot rather than by records where base tiles have few rows."""
    return replace(low, a=a) if OWN_SHRINK_ROWS < routing.base_block <= BY_SLOT_ROWS else low
