"""Which rows of a step belong to which adapter slot, for implementations that loop on the host.

Computed once per step and kept with the step context: a step is recognised by the content of its slots, so nobody has to
announce a new one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_lora_moe.layers.step import StepContext


@dataclass(frozen=True)
class SlotRuns:
    """Runs (slot, start, rows) over rows in `order`; `order` None = over the rows as they are. Base rows are in no run."""

    order: torch.Tensor | None  # int64 [rows with an adapter]
    runs: list[tuple[int, int, int]]


def compute_slot_runs(slots: torch.Tensor) -> SlotRuns:
    """slots int32 [M], -1 = base. Rows are gathered by slot only where that makes clearly fewer runs."""
    found, sizes = torch.unique_consecutive(slots, return_counts=True)
    runs, start = [], 0
    for slot, size in zip(found.tolist(), sizes.tolist(), strict=True):
        if slot >= 0:
            runs.append((slot, start, size))
        start += size
    if len(runs) <= 2 * len({slot for slot, _, _ in runs}):
        return SlotRuns(None, runs)
    key, order = torch.sort(slots, stable=True)
    found, sizes = torch.unique_consecutive(key, return_counts=True)
    base = int(sizes[0]) if found[0] < 0 else 0
    runs, start = [], 0
    for slot, size in zip(found.tolist(), sizes.tolist(), strict=True):
        if slot >= 0:
            runs.append((slot, start, size))
            start += size
    return SlotRuns(order[base:], runs)


def slot_runs(ctx: StepContext, slot_source: str, rows: int) -> SlotRuns:
    """The runs of the step's tokens ("tokens") or wanted logit rows ("logits")."""
    slots = (ctx.logit_slots if slot_source == "logits" else ctx.token_slots)[:rows]
    cached: tuple[torch.Tensor, SlotRuns] | None = ctx.host_cache.get(slot_source)
    if cached is not None and torch.equal(cached[0], slots):
        return cached[1]
    runs = compute_slot_runs(slots)
    ctx.host_cache[slot_source] = (slots.clone(), runs)
    return runs
