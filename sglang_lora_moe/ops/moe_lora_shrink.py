"""The grouped shrink of 16-bit rows on sm_90 (csrc/moe_lora_shrink.cu): what `_shrink_group_kernel` of ops/fused_moe_lora.py computes."""

import torch

from sglang_lora_moe.lora.stacks import Stack
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import define
from sglang_lora_moe.ops.low_rank import Following

define(
    "moe_lora_shrink(Tensor x, Tensor pool, Tensor offset, Tensor stride, Tensor rank, Tensor split, Tensor scaling, Tensor b_offset, Tensor b_stride, "
    "Tensor tiles, Tensor base_tiles, Tensor counts, Tensor sorted_pairs, Tensor(a!) s, Tensor(b!) records, Tensor(c!)? ranges, Tensor(d!)? next_records, "
    "Tensor? next_offset, Tensor? next_stride, Tensor? next_rank, Tensor? next_scaling, Tensor? next_b_offset, Tensor? next_b_stride, int max_rank, int top_k, "
    "int lora_block, bool gather, bool early, int multiprocessors, bool overlap) -> ()"
)


def can_shrink(rows: torch.Tensor, num_experts: int) -> bool:
    """Whether the kernel takes these rows [.., cols] and measured faster: with many experts, whose tiles fill the GPU."""
    return launch.has_wgmma(rows.device) and rows.dtype.itemsize == 2 and rows.shape[1] % 8 == 0 and rows.shape[1] >= 512 and num_experts >= 128


def group_shrink(
    rows: torch.Tensor, a: Stack, b: Stack, routing: Routing, s: torch.Tensor, records: torch.Tensor, ranges: torch.Tensor | None, *,
    gather: bool, early: bool, following: Following | None = None, multiprocessors: int | None = None,
) -> None:  # fmt: skip  # budget: a shrink's inputs, the three buffers that it fills, and its row order
    """s [.., P, width] = scaling * A x for the rows of every LoRA tile, their records, and where they are given the ranges of the base tiles.

    rows [M, cols] by token with `gather`, else [P, cols] in sorted order. `early`: the alignment is older than the kernel before this one.
    `following`: its records are written too. `multiprocessors`: so many blocks as that many hold, all by default.
    """
    made = routing.alignment
    if rows.is_cuda:
        build.load()
    tables = (None,) * 7 if following is None else following.tables()
    torch.ops.sglang_lora_moe.moe_lora_shrink(
        rows, a.pool, a.offset, a.expert_stride, a.rank, a.split_a, b.scaling, b.offset, b.expert_stride, made.lora_tiles, made.base_tiles, made.counts,
        made.sorted_pairs, s, records, ranges, *tables, a.max_rank, routing.top_k, routing.lora_block, gather, early,
        multiprocessors or launch.multiprocessors(rows.device), True,
    )  # fmt: skip
