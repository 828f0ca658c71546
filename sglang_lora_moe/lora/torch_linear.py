"""LoRA deltas of linears and embeddings in plain torch: one small matmul pair per slot and part, float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from sglang_lora_moe.lora.host_views import add_expand, slot_views
from sglang_lora_moe.lora.slot_runs import SlotRuns
from sglang_lora_moe.lora.stacks import EmbeddingStacks, LinearStacks

Part = tuple[LinearStacks, int, int]  # stacks, first row of the layer's output, rows


def add_linear_delta(y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], runs: SlotRuns) -> None:
    """y[m, part] += scaling * B (A x[m]) for each part and each row m with an adapter. In place; y [M, rows], x [M, in]."""

    def add(total: torch.Tensor, source: torch.Tensor) -> None:
        for slot, start, rows in runs.runs:
            inputs, outputs = source[start : start + rows], total[start : start + rows]
            for stacks, first, width in parts:
                a = slot_views(stacks.a, slot)
                if a.rank:
                    add_expand(outputs[:, first : first + width], torch.mm(inputs, a.a_t()), slot_views(stacks.b, slot))

    _accumulate(y, x if runs.order is None else x.index_select(0, runs.order), runs, add)


def add_embedding_delta(y: torch.Tensor, ids: torch.Tensor, stacks: EmbeddingStacks, runs: SlotRuns) -> None:
    """y[m] += scaling * B A[:, ids[m]] for each row m with an adapter. In place; y [M, H], ids int [M]."""

    def add(total: torch.Tensor, source: torch.Tensor) -> None:
        for slot, start, rows in runs.runs:
            a = slot_views(stacks.a, slot)
            if a.rank:
                low = F.embedding(source[start : start + rows], a.rows())
                add_expand(total[start : start + rows], low.float(), slot_views(stacks.b, slot))

    _accumulate(y, ids if runs.order is None else ids.index_select(0, runs.order), runs, add)


def _accumulate(y: torch.Tensor, source: torch.Tensor, runs: SlotRuns, add: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """Let `add` work in float32 on rows in the order of the runs, and put the sums back into y."""
    source = source.float() if source.is_floating_point() else source
    if runs.order is not None:
        total = y.index_select(0, runs.order).float()
        add(total, source)
        y.index_copy_(0, runs.order, total.to(y.dtype))
    elif y.dtype == torch.float32:
        add(y, source)
    else:
        total = y.float()
        add(total, source)
        y.copy_(total)
