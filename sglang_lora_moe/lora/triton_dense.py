"""Deltas of linears and embeddings by the kernels of `ops/lora_linear.py`: reads no device data on the host, so graphs can capture it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.stacks import EmbeddingStacks
from sglang_lora_moe.lora.torch_linear import Part
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops.lora_linear import LinearAddend, PartTables, embedding_delta, linear_expand, linear_shrink, shrink_splits

FUSED_MAX = 256  # tokens up to which the neighbours of a linear do the work of its adapters


class TritonDense:
    """Shared by all layers of a model; the rank-space vectors of a linear lie in scratch until its output is complete."""

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx
        self.workspace = Workspace(ctx.device)
        self._tables: dict[int, PartTables] = {}

    def prepare(self, parts: Sequence[Part]) -> None:
        """Make what a linear needs on the device, before any step."""
        self._tables[id(parts)] = PartTables(parts)

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], slot_source: str) -> None:
        linear_expand(y, self._shrink(x.contiguous(), parts, slot_source, "dense.s"))

    def add_embedding(self, y: torch.Tensor, ids: torch.Tensor, stacks: EmbeddingStacks) -> None:
        embedding_delta(y, ids, stacks, self.ctx.token_slots[: ids.shape[0]])

    def plan(self, parts: Sequence[Part], tokens: int, splits: int) -> LinearAddend | None:
        """For up to FUSED_MAX tokens: s [splits, tokens, parts, width], which the kernel before the linear fills."""
        return self._addend(parts, "tokens", tokens, splits, f"dense.plan{splits}") if tokens <= FUSED_MAX else None

    def begin(self, x: torch.Tensor, parts: Sequence[Part]) -> LinearAddend | None:
        """As `plan`, where no kernel before the linear can fill s: one launch does."""
        return self._shrink(x, parts, "tokens", "dense.begin") if x.shape[0] <= FUSED_MAX else None

    def _shrink(self, x: torch.Tensor, parts: Sequence[Part], slot_source: str, name: str) -> LinearAddend:
        low = self._addend(parts, slot_source, x.shape[0], shrink_splits(x.shape[0], x.shape[1]), name)
        linear_shrink(x, low.tables, low.slots, low.s)
        return low

    def _addend(self, parts: Sequence[Part], slot_source: str, tokens: int, splits: int, name: str) -> LinearAddend:
        tables = self._tables[id(parts)]
        slots = (self.ctx.logit_slots if slot_source == "logits" else self.ctx.token_slots)[:tokens]
        s = self.workspace.get(name, (splits, tokens, tables.num_parts, tables.a.shrink_width), torch.float32)
        return LinearAddend(s, tables, slots)
