"""Writes a batch into the static buffers of the `StepContext`.

Values are made as Python lists and stored once through numpy views of host memory: on a CPU the views are the context's
own buffers; for another device they are pinned copies that are sent with one transfer each. The page table is kept
between steps, and only what changed of a row is written.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from sglang_lora_moe.engine.request import Batch, Request
from sglang_lora_moe.layers.step import StepContext

_BUFFERS = ("input_ids", "positions", "token_slots", "kv_slots", "page_table", "query_starts", "seq_lens", "logit_rows", "logit_slots")


class StepInputs:
    """The host side of one StepContext."""

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx
        self._on_device = ctx.device.type != "cpu"
        self._staging = {name: torch.zeros_like(getattr(ctx, name), device="cpu", pin_memory=True) for name in _BUFFERS} if self._on_device else {}
        self._host: dict[str, np.ndarray] = {name: self._staging.get(name, getattr(ctx, name)).numpy() for name in _BUFFERS}
        # Row b of the page table holds the first _row_counts[b] pages of the list _row_pages[b]; a request that is
        # retracted gets another list, so a list is the same only if its pages are.
        self._row_pages: list[list[int] | None] = [None] * ctx.max_requests
        self._row_counts = [0] * ctx.max_requests

    def fill(self, batch: Batch) -> list[list[int]]:
        """Describe `batch` in the context. Returns, per request, the packed rows whose logits are wanted, in the order of the logits."""
        ctx, page_size = self.ctx, self.ctx.page_size
        requests, query_lens = batch.requests, batch.query_lens
        ids: list[int] = []
        positions: list[int] = []
        kv_slots: list[int] = []
        ends: list[int] = []
        for request, count in zip(requests, query_lens, strict=True):
            start = request.num_computed
            ends.append(start + count)
            if count == 1:
                ids.append(request.tokens[start])
                positions.append(start)
                kv_slots.append(request.pages[start // page_size] * page_size + start % page_size)
            else:
                ids += request.tokens[start : start + count]
                positions += range(start, start + count)
                kv_slots += _rows(request.pages, page_size, start, start + count)
        starts = [0, *accumulate(query_lens)]
        wanted = [_wanted_rows(request, first, end) for request, first, end in zip(requests, starts, ends, strict=False)]
        rows = [row for rows in wanted for row in rows] or [0]  # at least one, so that every layer sees a normal shape
        self._write_page_table(requests)
        self._write("input_ids", ids)
        self._write("positions", positions)
        self._write("kv_slots", kv_slots)
        self._write("query_starts", starts)
        self._write("seq_lens", ends)
        self._write("logit_rows", rows)
        if batch.lora_active:
            slots: list[int] = []
            for request, count in zip(requests, query_lens, strict=True):
                slots += [request.slot] * count
            self._write("token_slots", slots)
            self._write("logit_slots", [slots[row] for row in rows])
        ctx.num_tokens, ctx.num_requests, ctx.num_logits = batch.num_tokens, len(requests), len(rows)
        ctx.lora_active, ctx.query_lens, ctx.seq_lens_host = batch.lora_active, query_lens, ends
        return wanted

    def _write(self, name: str, values: list[int]) -> None:
        count = len(values)
        self._host[name][:count] = values
        if self._on_device:
            # NOTE: the pinned copy is read asynchronously; the step's own wait for its tokens comes before the next fill.
            getattr(self.ctx, name)[:count].copy_(self._staging[name][:count], non_blocking=True)

    def _write_page_table(self, requests: list[Request]) -> None:
        table, changed = self._host["page_table"], False
        for b, request in enumerate(requests):
            pages, known = request.pages, self._row_counts[b]
            if self._row_pages[b] is not pages:
                self._row_pages[b], known = pages, 0
            if known < len(pages):
                table[b, known : len(pages)] = pages[known:]
                self._row_counts[b], changed = len(pages), True
            elif known > len(pages):
                raise AssertionError(f"{request.rid} has lost pages without getting another list")
        if changed and self._on_device:
            self.ctx.page_table[: len(requests)].copy_(self._staging["page_table"][: len(requests)], non_blocking=True)


def _rows(pages: list[int], page_size: int, start: int, end: int) -> list[int]:
    """Rows of the KV cache of positions start .. end - 1."""
    rows: list[int] = []
    for index in range(start // page_size, -(-end // page_size)):
        first = pages[index] * page_size
        rows += range(first + max(start - index * page_size, 0), first + min(end - index * page_size, page_size))
    return rows


def _wanted_rows(request: Request, first: int, end: int) -> list[int]:
    """Packed rows of a request whose logits are wanted; its row `first` is position `num_computed`."""
    offset = first - request.num_computed
    rows = [position + offset for position in request.prompt_logit_positions(end)]
    if end == len(request.tokens):
        rows.append(end - 1 + offset)
    return rows
