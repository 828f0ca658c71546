"""Writes a batch into the static buffers of the `StepContext`.

Values are made as Python lists and stored through numpy views of host memory: on a CPU the views are the context's own
buffers; for another device they are one of two pinned copies, sent with one transfer, so that the host can prepare a step
while the device still reads the one before. The page table is kept between steps, and only what changed of a row is written.
"""

from itertools import accumulate

import numpy as np
import torch

from sglang_lora_moe.engine.request import Batch, Request
from sglang_lora_moe.layers.step import PAGE_WRITES, StepContext


class _Staging:
    """Host memory for the inputs of one step: the context's own on a CPU, else pinned, with the event of its last transfer."""

    def __init__(self, ctx: StepContext) -> None:
        if ctx.device.type != "cpu":
            self.flat, views = ctx.make_inputs("cpu", pin_memory=True)
            self.sent = torch.cuda.Event()
        else:
            names = ctx.make_inputs("meta")[1]
            self.flat, views = ctx.inputs, {name: getattr(ctx, name) for name in names}
        self.arrays: dict[str, np.ndarray] = {name: view.numpy() for name, view in views.items()}


class StepInputs:
    """The host side of one StepContext."""

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx
        self._on_device = ctx.device.type != "cpu"
        self._ring = [_Staging(ctx) for _ in range(2 if self._on_device else 1)]
        self._turn = 0
        # Row b of the page table holds the first _row_counts[b] pages of the list _row_pages[b]; a request that is
        # retracted gets another list, so a list is the same only if its pages are.
        self._row_pages: list[list[int] | None] = [None] * ctx.max_requests
        self._row_counts = [0] * ctx.max_requests

    def fill(self, batch: Batch, padded: int = 0, padded_requests: int = 0) -> list[list[int]]:
        """Describe `batch` in the context. Returns, per request, the packed rows whose logits are wanted, in the order of the logits.

        `padded`, `padded_requests`: the step is filled up to so many tokens and requests with padding; in a decode batch, which has as
        many of both, with requests of one token and so many more rows of logits, in others with requests of none.
        """
        ctx, page_size = self.ctx, self.ctx.page_size
        requests, query_lens = batch.requests, batch.query_lens
        ids: list[int] = []
        positions: list[int] = []
        kv_slots: list[int] = []
        ends: list[int] = []
        sources: dict[int, int] = {}  # token -> row of ctx.sampled
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
            if ids[-1] < 0:  # sampled by the step that still runs
                sources[len(ids) - 1] = request.sampled_row
                ids[-1] = 0
        starts = [0, *accumulate(query_lens)]
        wanted = [_wanted_rows(request, first, end) for request, first, end in zip(requests, starts, ends, strict=False)]
        rows = [row for rows in wanted for row in rows] or [0]  # at least one, so that every layer sees a normal shape
        decode = padded == padded_requests
        padded_logits = padded if decode else 0
        if batch.lora_active:
            slots = np.full(padded or batch.num_tokens, -1, dtype=np.int32)
            slots[: batch.num_tokens] = np.repeat([request.slot for request in requests], query_lens)
            order = np.argsort(slots, kind="stable")
            self._write(token_slots=slots, slot_order=order, ordered_slots=slots[order])
            self._write(logit_slots=_pad(slots[rows].tolist(), padded_logits, -1))
        ctx.num_tokens, ctx.num_requests, ctx.num_logits = padded or batch.num_tokens, padded_requests or len(requests), padded_logits or len(rows)
        ctx.lora_active, ctx.query_lens, ctx.seq_lens_host = batch.lora_active, query_lens, ends
        self._write(input_ids=_pad(ids, padded, 0), positions=_pad(positions, padded, 0), kv_slots=_pad(kv_slots, padded, 0))  # KV row 0: dump page
        if not decode:
            starts = _pad(starts, padded_requests + 1, starts[-1])
        token_source = np.full(ctx.num_tokens, -1, dtype=np.int32)
        token_source[list(sources)] = list(sources.values())
        self._write(query_starts=starts, seq_lens=_pad(ends, padded_requests, 0), logit_rows=_pad(rows, padded_logits, 0), token_source=token_source)
        self._send(self._changed_pages(requests))
        return wanted

    def _write(self, **values: list[int] | np.ndarray) -> None:
        arrays = self._ring[self._turn].arrays
        for name, entries in values.items():
            arrays[name][: len(entries)] = entries

    def _changed_pages(self, requests: list[Request]) -> tuple[list[int], list[int]]:
        """(places in the flattened page table, pages) that differ from what it holds."""
        places: list[int] = []
        pages: list[int] = []
        width = self.ctx.page_table.shape[1]
        for b, request in enumerate(requests):
            known = self._row_counts[b]
            if self._row_pages[b] is not request.pages:
                self._row_pages[b], known = request.pages, 0
            count = len(request.pages)
            if known < count:
                places += range(b * width + known, b * width + count)
                pages += request.pages[known:]
                self._row_counts[b] = count
            elif known > count:
                raise AssertionError(f"{request.rid} has lost pages without getting another list")
        return places, pages

    def _send(self, changes: tuple[list[int], list[int]]) -> None:
        """Bring the inputs and the changes of the page table to the device, in stream order."""
        ctx, (places, pages), table = self.ctx, changes, self.ctx.page_table.view(-1)
        if not self._on_device:
            table.numpy()[places] = pages
            return
        staging = self._ring[self._turn]
        few = len(places) <= PAGE_WRITES
        if few:
            self._write(page_at=places, page_values=pages)
        ctx.inputs.copy_(staging.flat, non_blocking=True)
        staging.sent.record()
        if few and places:
            table.index_copy_(0, ctx.page_at[: len(places)], ctx.page_values[: len(places)])
        elif places:  # this transfer waits for the device
            table.index_copy_(0, torch.tensor(places, device=ctx.device), torch.tensor(pages, dtype=torch.int32, device=ctx.device))
        self._turn = 1 - self._turn
        self._ring[self._turn].sent.synchronize()  # the transfer before last; it is done long since


def _pad(values: list[int], padded: int, value: int) -> list[int]:
    return values + [value] * (padded - len(values))


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
