"""Deltas of linears and embeddings by the kernels of `ops/lora_linear.py`: reads no device data on the host, so graphs can capture it."""

from collections.abc import Sequence

import torch

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.dense import DenseDelta, Part
from sglang_lora_moe.lora.stacks import EmbeddingStacks
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import middle_linear
from sglang_lora_moe.ops.lora_linear import COUNTS, ROWS_MAX, LinearAddend, PartTables, embedding_delta, linear_expand, linear_shrink, shrink_splits
from sglang_lora_moe.ops.skinny_linear import MOST_TOKENS, empty_halves, half_for


class TritonDense(DenseDelta):
    """Shared by all layers of a model; the rank-space vectors of a linear lie in scratch until its output is complete.

    `grouped`: kernels own tiles of tokens of one slot even where there are few tokens.
    """

    def __init__(self, ctx: StepContext, grouped: bool = False) -> None:
        self.ctx, self.grouped = ctx, grouped
        self.workspace = Workspace(ctx.device)
        self._tables: dict[int, PartTables] = {}
        self._counts = torch.zeros(COUNTS, dtype=torch.int32, device=ctx.device)
        self._halves = empty_halves(0, ctx.device)  # for kernels that do all of a linear

    def prepare(self, parts: Sequence[Part]) -> None:
        """Make what a linear needs on the device, before any step."""
        tables = self._tables[id(parts)] = PartTables(parts)
        if 2 * half_for(tables) > self._halves.numel():
            self._halves = empty_halves(half_for(tables), self.ctx.device)

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], slot_source: str) -> None:
        linear_expand(y, self._shrink(x.contiguous(), parts, slot_source, "dense.s"))

    def add_embedding(self, y: torch.Tensor, ids: torch.Tensor, stacks: EmbeddingStacks) -> None:
        embedding_delta(y, ids, stacks, self.ctx.token_slots[: ids.shape[0]])

    def plan(self, parts: Sequence[Part], tokens: int, splits: int | None) -> LinearAddend | None:
        """s [splits, tokens, parts, width], which the kernel before the linear fills. `splits` None: a norm, which does for few tokens."""
        if self.grouped or (splits is None and tokens > ROWS_MAX):
            return None
        return self._addend(parts, "tokens", tokens, splits or 1, f"dense.plan{splits or 1}")

    def within(self, parts: Sequence[Part], tokens: int) -> LinearAddend | None:
        """s is how the kernel's blocks hand A x to each other, in every linear of a model."""
        if self.grouped or tokens > MOST_TOKENS:
            return None
        tables, ctx = self._tables[id(parts)], self.ctx
        return LinearAddend(self._halves, tables, ctx.token_slots[:tokens], ctx.slot_order[:tokens], ctx.ordered_slots[:tokens])

    def begin(self, x: torch.Tensor, parts: Sequence[Part]) -> LinearAddend:
        """As `plan`, where no kernel before the linear can fill s: one launch does."""
        return self._shrink(x, parts, "tokens", "dense.begin")

    def _shrink(self, x: torch.Tensor, parts: Sequence[Part], slot_source: str, name: str) -> LinearAddend:
        m, width = x.shape[0], self._tables[id(parts)].a.shrink_width
        splits = shrink_splits(m, x.shape[1], width)
        if not middle_linear.takes(m, width):
            low = self._addend(parts, slot_source, m, splits, name)
            linear_shrink(x, low)
        else:
            low = self._addend(parts, slot_source, m, 1, name)
            linear_shrink(x, low, self.workspace.get("dense.splits", (splits, *low.s.shape[1:]), torch.float32), self._counts)
        return low

    def _addend(self, parts: Sequence[Part], slot_source: str, tokens: int, splits: int, name: str) -> LinearAddend:
        tables, ctx = self._tables[id(parts)], self.ctx
        s = self.workspace.get(name, (splits, tokens, tables.num_parts, tables.a.shrink_width), torch.float32)
        if slot_source == "logits":
            return LinearAddend(s, tables, ctx.logit_slots[:tokens])
        return LinearAddend(s, tables, ctx.token_slots[:tokens], ctx.slot_order[:tokens], ctx.ordered_slots[:tokens], self.grouped)
