"""Who computes the deltas of linears and embeddings: `--lora-backend`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.host_views import add_expand, slot_views
from sglang_lora_moe.lora.stacks import EmbeddingStacks, LinearStacks

Part = tuple[LinearStacks, int, int]  # stacks, first row of the layer's output, rows


class DenseDelta(ABC):
    """Adds in place what a step's adapters add to a layer's output; the slots of the rows are the step context's."""

    @abstractmethod
    def add_linear(self, y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], slot_source: str) -> None:
        """y [M, rows] += scaling * B (A x) for each part; x [M, in]; `slot_source` "tokens" or "logits"."""

    @abstractmethod
    def add_embedding(self, y: torch.Tensor, ids: torch.Tensor, stacks: EmbeddingStacks) -> None:
        """y [M, H] += scaling * B A[:, ids]; ids int [M]."""

    # What only some can do
    def prepare(self, parts: Sequence[Part]) -> None:  # noqa: B027
        """Announce a linear's parts, once, when the linear is built."""

    def plan(self, parts: Sequence[Part], tokens: int, splits: int | None) -> Any:
        """What the kernels before and after a linear of so many tokens share to do all of this themselves; None where they cannot."""
        return None

    def within(self, parts: Sequence[Part], tokens: int) -> Any:
        """What a kernel needs that does a linear of so many tokens and all of this; None where it cannot."""
        return None

    def begin(self, x: torch.Tensor, parts: Sequence[Part]) -> Any:
        """What the kernel after a linear over x [M, in] needs to add the rest; None where it cannot."""
        return None


class TorchDense(DenseDelta):
    """Plain torch in float32: one pair of matmuls per part and run of equal slots, which it finds on the host."""

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], slot_source: str) -> None:
        for slot, rows, outputs in self._by_slot(slot_source, x, y):
            inputs = rows.float()
            for stacks, first, width in parts:
                a = slot_views(stacks.a, slot)
                if a.rank:
                    add_expand(outputs[:, first : first + width], torch.mm(inputs, a.a_t()), slot_views(stacks.b, slot))

    def add_embedding(self, y: torch.Tensor, ids: torch.Tensor, stacks: EmbeddingStacks) -> None:
        for slot, rows, outputs in self._by_slot("tokens", ids, y):
            a = slot_views(stacks.a, slot)
            if a.rank:
                add_expand(outputs, F.embedding(rows, a.rows()).float(), slot_views(stacks.b, slot))

    def _by_slot(self, slot_source: str, source: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(slot, its rows of `source`, those of y in float32) of each run; what the caller adds to these is put into y after the last."""
        order, runs = slot_runs(self.ctx, slot_source, source.shape[0])
        total = (y if order is None else y.index_select(0, order)).float()
        source = source if order is None else source.index_select(0, order)
        for slot, start, rows in runs:
            yield slot, source[start : start + rows], total[start : start + rows]
        if order is not None:
            y.index_copy_(0, order, total.to(y.dtype))
        elif total is not y:
            y.copy_(total)


def make_dense_delta(backend: str, ctx: StepContext) -> DenseDelta:
    """The one of `backend` ("torch_native", "triton" or "csgmv"), shared by all layers of a model."""
    if backend == "torch_native":
        return TorchDense(ctx)
    from sglang_lora_moe.lora.triton_dense import TritonDense

    return TritonDense(ctx, grouped=backend == "csgmv")


# ---- plain torch: which rows of a step belong to which slot -----------------------------------------------------------
class SlotRuns(NamedTuple):
    """Runs (slot, start, rows) over rows in `order`; `order` None = over the rows as they are. Base rows are in no run."""

    order: torch.Tensor | None  # int64 [rows with an adapter]
    runs: list[tuple[int, int, int]]


def compute_slot_runs(slots: torch.Tensor) -> SlotRuns:
    """slots int32 [M], -1 = base. Rows are gathered by slot only where that makes clearly fewer runs."""
    runs = _runs(slots)
    if len(runs) <= 2 * len({slot for slot, _, _ in runs}):
        return SlotRuns(None, runs)
    order = slots.argsort(stable=True)
    order = order[slots.shape[0] - int((slots >= 0).sum()) :]  # base rows come first
    return SlotRuns(order, _runs(slots[order]))


def _runs(slots: torch.Tensor) -> list[tuple[int, int, int]]:
    found, sizes = torch.unique_consecutive(slots, return_counts=True)
    runs, start = [], 0
    for slot, size in zip(found.tolist(), sizes.tolist(), strict=True):
        if slot >= 0:
            runs.append((slot, start, size))
        start += size
    return runs


def slot_runs(ctx: StepContext, slot_source: str, rows: int) -> SlotRuns:
    """The runs of the step's tokens ("tokens") or wanted logit rows ("logits").

    Computed once per step and kept with the step context: a step is recognised by the content of its slots, so nobody has to announce a new one.
    """
    slots = (ctx.logit_slots if slot_source == "logits" else ctx.token_slots)[:rows]
    cached: tuple[torch.Tensor, SlotRuns] | None = ctx.host_cache.get(slot_source)
    if cached is not None and torch.equal(cached[0], slots):
        return cached[1]
    runs = compute_slot_runs(slots)
    ctx.host_cache[slot_source] = (slots.clone(), runs)
    return runs
