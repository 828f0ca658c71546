"""One layer's routed pairs in one step: who goes where, and in which order intermediates lie.

Built by a core's `make_routing`, computed lazily and at most once, shared by the base GEMMs and the adapters. `rows`
says what row i of a [P, ..] intermediate belongs to:

    "sorted"  pair sorted_pairs[i]; grouped kernels read contiguous rows, combine alone maps back
    "pair"    pair i = m * K + k; no sort is needed, each pair reads its own weights (decode)
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import moe_lora_align as align


@dataclass(eq=False)
class Routing:
    """What one layer's step is routed by, then what kernels of the layer note for those after them."""

    topk_ids: torch.Tensor  # int32 [M, K], -1 = none
    token_slots: torch.Tensor | None  # int32 [M], -1 = base
    num_experts: int
    num_slots: int = 0  # S; 0 without token_slots
    base_block: int = 16  # rows of a tile of the alignment
    lora_block: int = 16
    rows: str = "sorted"
    workspace: Workspace | None = None
    lora_ranges: torch.Tensor | None = None  # which LoRA tiles meet each base tile, made by the first shrink
    told: torch.Tensor | None = None  # int32 [1], 0 after the first shrink, 1 when gate_up is complete; down starts beside the second
    beside: bool = False  # gate_up, too, starts beside its shrink: the word is 0 when the alignment is complete
    aligned: torch.Tensor | None = None  # another such word, which the alignment sets to 0 itself, before it makes LoRA tiles
    wgmma: Any = None  # the tile of both GEMMs where they are wgmma's, of which the first can make s of the second
    following: Any = None  # what down adds, where gate_up makes it
    reports: int = 0  # how often the gate_up before reports each base tile, for a down that does not wait for its end
    _gathered: tuple[torch.Tensor, torch.Tensor] | None = None  # of `gather`: x, and its rows

    def __post_init__(self) -> None:
        assert self.rows in ("sorted", "pair"), self.rows
        if self.token_slots is None:
            self.num_slots = 0

    @property
    def num_pairs(self) -> int:
        return self.topk_ids.numel()

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @cached_property
    def alignment(self) -> align.Alignment:
        """The one launch of moe_lora_align_block_size; buffers lie in the workspace if there is one."""
        sizes = (self.num_experts, self.num_slots, self.base_block, self.lora_block)
        buffers = scratch = None
        if self.workspace is not None and self.topk_ids.is_cuda:
            get, shapes = self.workspace.get, align.buffer_shapes(self.num_pairs, *sizes)
            buffers = align.Alignment(**{name: get(f"align.{name}", shape, torch.int32) for name, shape in shapes.items()})
            scratch = get("align.scratch", (align.workspace_elements(self.num_pairs, self.num_experts),), torch.int32)
        return align.moe_lora_align_block_size(self.topk_ids, self.token_slots, *sizes, buffers=buffers, workspace=scratch, told=self.aligned)

    @property
    def sorted_pairs(self) -> torch.Tensor:  # int32 [P]
        return self.alignment.sorted_pairs

    @cached_property
    def _sorted(self) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
        """(order of the valid pairs int64, groups)."""
        result = align.sort_pairs(self.topk_ids, self.token_slots, self.num_experts, self.num_slots)
        keys, sizes, width = result.group_keys.tolist(), result.group_sizes.tolist(), self.num_slots + 1
        order = result.order
        if keys and keys[-1] == self.num_experts * width:  # the pairs without an expert come last
            order = order[: order.shape[0] - sizes[-1]]
            keys, sizes = keys[:-1], sizes[:-1]
        return order, [(key // width, key % width - 1, size) for key, size in zip(keys, sizes, strict=True)]

    @property
    def order(self) -> torch.Tensor:
        """int64 [valid pairs]: sorted_pairs without the pairs that have no expert."""
        return self._sorted[0]

    @property
    def groups(self) -> list[tuple[int, int, int]]:
        """(expert, slot or -1, rows) of every group; together they cover the sorted rows in order."""
        return self._sorted[1]

    @cached_property
    def base_runs(self) -> list[tuple[int, int]]:
        """(expert, rows) of every non-empty expert; together they cover the sorted rows in order."""
        runs: dict[int, int] = {}
        for expert, _, rows in self.groups:
            runs[expert] = runs.get(expert, 0) + rows
        return list(runs.items())

    @cached_property
    def tokens(self) -> torch.Tensor:
        """int64 [valid pairs]: the token of each sorted row."""
        return self.order if self.top_k == 1 else self.order // self.top_k

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, H] in sorted order [valid pairs, H]. Done once: base GEMM and shrink share it."""
        if self._gathered is None or self._gathered[0] is not x:
            self._gathered = (x, x.index_select(0, self.tokens))
        return self._gathered[1]
