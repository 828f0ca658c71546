"""Deltas of linears and embeddings by the kernels of `ops/lora_linear.py`: reads no device data on the host, so graphs can capture it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.stacks import EmbeddingStacks
from sglang_lora_moe.lora.torch_linear import Part
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops.lora_linear import ROWS_MAX, LinearAddend, PartTables, embedding_delta, linear_expand, linear_shrink, shrink_shape


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

    def begin(self, x: torch.Tensor, parts: Sequence[Part]) -> LinearAddend | None:
        """Start A x beside the linear's own GEMM, for a next kernel that adds B; `join` before that. None if x has too many rows."""
        if x.shape[0] > ROWS_MAX:
            return None
        with self.workspace.side():
            return self._shrink(x, parts, "tokens", "dense.side", pdl=False)

    def join(self) -> None:
        self.workspace.join()

    def _shrink(self, x: torch.Tensor, parts: Sequence[Part], slot_source: str, name: str, *, pdl: bool = True) -> LinearAddend:
        tables, m = self._tables[id(parts)], x.shape[0]
        slots = (self.ctx.logit_slots if slot_source == "logits" else self.ctx.token_slots)[:m]
        splits, width = shrink_shape(m, tables.a.dim, tables.a.shrink_width)
        s = self.workspace.get(name, (splits, m, tables.num_parts, width), torch.float32)
        return LinearAddend(linear_shrink(x, tables, slots, s, pdl=pdl), tables, slots)
