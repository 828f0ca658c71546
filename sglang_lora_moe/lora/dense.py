"""Who computes the deltas of linears and embeddings: `--lora-backend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.stacks import EmbeddingStacks
from sglang_lora_moe.lora.torch_linear import Part, add_embedding_delta, add_linear_delta, slot_runs


class DenseDelta(Protocol):
    """Adds in place what a step's adapters add to a layer's output; the slots of the rows are the step context's."""

    def prepare(self, parts: Sequence[Part]) -> None:
        """Announce a linear's parts, once, when the linear is built."""
        ...

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], slot_source: str) -> None:
        """y [M, rows] += scaling * B (A x) for each part; x [M, in]; `slot_source` "tokens" or "logits"."""
        ...

    def add_embedding(self, y: torch.Tensor, ids: torch.Tensor, stacks: EmbeddingStacks) -> None:
        """y [M, H] += scaling * B A[:, ids]; ids int [M]."""
        ...

    def plan(self, parts: Sequence[Part], tokens: int, splits: int | None) -> Any:
        """What the kernels before and after a linear of so many tokens share to do all of this themselves; None where they cannot."""
        ...

    def begin(self, x: torch.Tensor, parts: Sequence[Part]) -> Any:
        """What the kernel after a linear over x [M, in] needs to add the rest; None where it cannot."""
        ...


class TorchDense:
    """Plain torch: one pair of matmuls per run of equal slots, which it finds on the host."""

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx

    def prepare(self, parts: Sequence[Part]) -> None:
        """Nothing to prepare."""

    def plan(self, parts: Sequence[Part], tokens: int, splits: int | None) -> None:
        return None

    def begin(self, x: torch.Tensor, parts: Sequence[Part]) -> None:
        return None

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], slot_source: str) -> None:
        add_linear_delta(y, x, parts, slot_runs(self.ctx, slot_source, x.shape[0]))

    def add_embedding(self, y: torch.Tensor, ids: torch.Tensor, stacks: EmbeddingStacks) -> None:
        add_embedding_delta(y, ids, stacks, slot_runs(self.ctx, "tokens", ids.shape[0]))


def make_dense_delta(backend: str, ctx: StepContext) -> DenseDelta:
    """The one of `backend` ("torch_native", "triton" or "csgmv"), shared by all layers of a model."""
    if backend == "torch_native":
        return TorchDense(ctx)
    from sglang_lora_moe.lora.triton_dense import TritonDense

    return TritonDense(ctx, grouped=backend == "csgmv")
