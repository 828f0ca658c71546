"""moe_lora_align_block_size: one sort of a layer's routed pairs by (expert, slot), and tile lists over it.

    sorted_pairs[i] = the pair (m * K + k) at place i; pairs are ordered by (expert, slot, pair), slot -1 first in each
    expert, nothing is padded; pairs with an id < 0 or >= E come last, after `counts[0]` valid ones, in a fixed order.
    base_tiles: (expert, start, rows) with rows <= base_block, covering each expert's run, experts ascending.
    lora_tiles: (expert, slot, start, rows) with rows <= lora_block, covering each (expert, slot >= 0) run.
    counts = (valid pairs, base tiles, lora tiles, lora groups). A slot < 0 or >= S counts as -1.

Worked example, E = 3, base_block 2: topk_ids [[0, 2], [2, 0], [2, -1]], token_slots [1, -1, -1]
    expert 0: pair 3 (slot -1), pair 0 (slot 1);  expert 2: pairs 2, 4 (slot -1), pair 1 (slot 1);  pair 5 has no expert
    sorted_pairs [3, 0, 2, 4, 1, 5], base_tiles [(0, 0, 2), (2, 2, 2), (2, 4, 1)], lora_tiles [(0, 1, 1, 1), (2, 1, 4, 1)],
    counts [5, 3, 2, 2]
"""

from dataclasses import dataclass

import torch

from sglang_lora_moe.ops import build
from sglang_lora_moe.ops.library import LIBRARY, define

MAX_EXPERTS, MAX_SLOTS = 1024, 256
MAX_TOLD_PAIRS = 256  # measured; one block sorts 512

define(
    "moe_lora_align_block_size(Tensor topk_ids, Tensor? token_slots, int num_experts, int num_slots, int base_block, int lora_block, "
    "Tensor(a!) sorted_pairs, Tensor(b!) base_tiles, Tensor(c!) lora_tiles, Tensor(d!) counts, Tensor(e!) workspace, Tensor(f!)? told=None) -> ()"
)


@dataclass(frozen=True)
class Alignment:
    """Buffers of one alignment, owned by the caller. All int32. Entries beyond the counts are undefined."""

    sorted_pairs: torch.Tensor  # [P]
    base_tiles: torch.Tensor  # [max base tiles, 3]
    lora_tiles: torch.Tensor  # [max lora tiles, 4]
    counts: torch.Tensor  # [4]


@dataclass(frozen=True)
class SortedPairs:
    """The sort alone, before tiles. `group_keys` = expert * (S + 1) + slot + 1, ascending; E * (S + 1) = no expert."""

    order: torch.Tensor  # int64 [P]
    group_keys: torch.Tensor  # int [G]
    group_sizes: torch.Tensor  # int64 [G]


def max_tiles(pairs: int, runs: int, block: int) -> int:
    """Most tiles that `pairs` pairs can need: every run, of an expert or of one with a slot, may end in one partial tile."""
    return min(pairs, pairs // block + min(runs, pairs))


def workspace_elements(pairs: int, experts: int) -> int:
    """int32 elements of scratch of the CUDA implementation, as moe_lora_align_workspace() in csrc/; the CPU one needs none."""
    return 2 * pairs + (128 + pairs // 8192) * (experts + 1) + 2 * experts + 1


def moe_lora_align_block_size(
    topk_ids: torch.Tensor, token_slots: torch.Tensor | None, num_experts: int, num_slots: int, base_block: int, lora_block: int, *,
    buffers: Alignment | None = None, workspace: torch.Tensor | None = None, told: torch.Tensor | None = None,
) -> Alignment:  # fmt: skip  # budget: what is sorted, how it is tiled, and scratch
    """Sort and tile one layer's pairs, as the module's first lines say.

    topk_ids int32 or int64 [M, K]; token_slots int32 [M], or None for a step without adapters (then S is taken as 0).
    `buffers` and `workspace` (int32, at least `workspace_elements`) are allocated where they are not given. Returns the buffers, filled,
    without a look at them on the host. `told`, of up to MAX_TOLD_PAIRS pairs: a word, int32 [1], that becomes 0 when all but the LoRA tiles is there.
    ValueError for what does not fit, such as more than 1,024 experts or 256 slots.
    """
    name, num_slots = "moe_lora_align_block_size", 0 if token_slots is None else num_slots
    if topk_ids.dim() != 2 or topk_ids.dtype not in (torch.int32, torch.int64) or not topk_ids.is_contiguous():
        found = f"{topk_ids.dtype} {tuple(topk_ids.shape)} with strides {topk_ids.stride()}"
        raise ValueError(f"{name}: expected topk_ids to be contiguous int32 or int64 [M, K], got {found}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{name}: expected num_experts in 1..{MAX_EXPERTS}, got {num_experts}")
    if not 0 <= num_slots <= MAX_SLOTS:
        raise ValueError(f"{name}: expected num_slots in 0..{MAX_SLOTS}, got {num_slots}")
    if base_block < 1 or lora_block < 1:
        raise ValueError(f"{name}: expected blocks of at least 1, got base_block {base_block}, lora_block {lora_block}")
    if token_slots is not None:
        _expect(f"{name}: token_slots", token_slots, (topk_ids.shape[0],), topk_ids.device)
    pairs = topk_ids.numel()
    if buffers is None:
        buffers = empty_alignment(pairs, num_experts, num_slots, base_block, lora_block, topk_ids.device)
    for part, shape in buffer_shapes(pairs, num_experts, num_slots, base_block, lora_block).items():
        _expect(f"{name}: {part}", getattr(buffers, part), shape, topk_ids.device, at_least=part.endswith("tiles"))
    if workspace is None:
        workspace = topk_ids.new_empty(workspace_elements(pairs, num_experts) if topk_ids.is_cuda else 0, dtype=torch.int32)
    if topk_ids.is_cuda:
        build.load()
    sizes = (num_experts, num_slots, base_block, lora_block)
    torch.ops.sglang_lora_moe.moe_lora_align_block_size(topk_ids, token_slots, *sizes, *vars(buffers).values(), workspace, told)
    return buffers


def buffer_shapes(pairs: int, experts: int, slots: int, base_block: int, lora_block: int) -> dict[str, tuple[int, ...]]:
    """Of the buffers of an `Alignment`, by name, large enough for any routing of `pairs` pairs."""
    base, lora = max_tiles(pairs, experts, base_block), max_tiles(pairs, experts * slots, lora_block)
    return {"sorted_pairs": (pairs,), "base_tiles": (base, 3), "lora_tiles": (lora, 4), "counts": (4,)}


def empty_alignment(pairs: int, experts: int, slots: int, base_block: int, lora_block: int, device: torch.device) -> Alignment:
    shapes = buffer_shapes(pairs, experts, slots, base_block, lora_block)
    return Alignment(**{name: torch.empty(shape, dtype=torch.int32, device=device) for name, shape in shapes.items()})


def sort_pairs(topk_ids: torch.Tensor, token_slots: torch.Tensor | None, num_experts: int, num_slots: int) -> SortedPairs:
    """The sort in plain torch, on any device. Reading its result on the host synchronises."""
    experts = topk_ids.clamp(-1, num_experts).remainder(num_experts + 1)  # no expert -> E
    if token_slots is not None and num_slots > 0:
        slot_key = (token_slots.clamp(-1, num_slots) + 1).remainder(num_slots + 1)  # -1 and beyond the last -> 0
        experts = (experts * (num_slots + 1) + slot_key[:, None]).clamp_(max=num_experts * (num_slots + 1))
    key, order = torch.sort(experts.view(-1), stable=True)
    group_keys, group_sizes = torch.unique_consecutive(key, return_counts=True)
    return SortedPairs(order, group_keys, group_sizes)


def _align_cpu(
    topk_ids: torch.Tensor, token_slots: torch.Tensor | None, num_experts: int, num_slots: int, base_block: int, lora_block: int, sorted_pairs: torch.Tensor,
    base_tiles: torch.Tensor, lora_tiles: torch.Tensor, counts: torch.Tensor, workspace: torch.Tensor, told: torch.Tensor | None = None,
) -> None:  # fmt: skip  # budget: the op's schema
    num_slots = 0 if token_slots is None else num_slots
    result = sort_pairs(topk_ids, token_slots, num_experts, num_slots)
    keys, sizes = result.group_keys.long(), result.group_sizes
    experts, slots = keys // (num_slots + 1), keys % (num_slots + 1) - 1
    starts = sizes.cumsum(0) - sizes
    valid = experts < num_experts
    sorted_pairs.copy_(result.order)
    runs, inverse = torch.unique_consecutive(experts[valid], return_inverse=True)
    run_sizes = torch.zeros_like(runs).index_add_(0, inverse, sizes[valid])
    num_base = _write_tiles(base_tiles, (runs,), run_sizes.cumsum(0) - run_sizes, run_sizes, base_block)
    active = valid & (slots >= 0)
    num_lora = _write_tiles(lora_tiles, (experts[active], slots[active]), starts[active], sizes[active], lora_block)
    counts.copy_(torch.tensor([int(run_sizes.sum()), num_base, num_lora, int(active.sum())], dtype=torch.int32))
    if told is not None:
        told.zero_()


def _write_tiles(out: torch.Tensor, labels: tuple[torch.Tensor, ...], starts: torch.Tensor, sizes: torch.Tensor, block: int) -> int:
    """Cut each run [start, start + size) into tiles (labels.., start, rows <= block); return how many were written."""
    tiles = (sizes + block - 1) // block
    run = torch.repeat_interleave(torch.arange(len(tiles)), tiles)
    offset = (torch.arange(len(run)) - (tiles.cumsum(0) - tiles)[run]) * block  # place of the tile within its run
    columns = [label[run] for label in labels] + [starts[run] + offset, (sizes[run] - offset).clamp(max=block)]
    out[: len(run)] = torch.stack(columns, dim=1)
    return len(run)


LIBRARY.impl("moe_lora_align_block_size", _align_cpu, "CPU")


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device, at_least: bool = False) -> None:
    found = tuple(tensor.shape)
    fits = found[1:] == shape[1:] and (found[0] >= shape[0] if at_least else found == shape) if len(found) == len(shape) else False
    if not fits or tensor.dtype != torch.int32 or tensor.device != device or not tensor.is_contiguous():
        more = "at least " if at_least else ""
        raise ValueError(f"{name}: expected contiguous int32 {more}{shape} on {device}, got {tensor.dtype} {found} on {tensor.device}")
