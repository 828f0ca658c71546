"""Decode steps as CUDA graphs, so that a step costs its kernels and not its launches.

A graph is captured for each padded batch size of a ladder and each of two families: "base", whose kernels are those of a
server without adapters, and "lora". Which one runs is decided on the host. Graphs read the static buffers of the
`StepContext`, the KV cache, the adapter pool and its tables: none of these moves, so adapters come and go between replays.
A step that is smaller than its graph is filled up with padding, which reads no expert and writes to the dump page.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from sglang_lora_moe.engine.model_runner import Model
from sglang_lora_moe.engine.request import Batch

logger = logging.getLogger(__name__)


def ladder(max_requests: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 up to 64, of 16 up to 256 and of 32 beyond; ends with `max_requests`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_requests, 32)]
    return [size for size in sizes if size < max_requests] + [max_requests]


class DecodeGraphs:
    """Captured decode steps of one model. `families`: (False,) without adapters, (False, True) with."""

    def __init__(self, model: Model, families: Sequence[bool], sizes: Sequence[int]) -> None:
        self.model, self.families = model, tuple(families)
        self.sizes = sorted(sizes)
        self._by_count = [0, *(next(size for size in self.sizes if size >= n) for n in range(1, self.sizes[-1] + 1))]
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._layouts: dict[int, int] = {}  # size -> ctx.lora_layout at the capture of its "lora" graph
        self.nbytes = 0  # device memory that they took
        self._pool: Any = None  # torch's handle of the memory that all graphs share

    @torch.inference_mode()
    def capture(self, show_progress: bool = True) -> None:
        """Capture every size and family, the largest first, so that smaller ones reuse its memory. Logs time and memory."""
        begin, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        self._pool = torch.cuda.graph_pool_handle()
        work = [(size, lora) for size in reversed(self.sizes) for lora in self.families]
        for size, lora in tqdm(work, desc="capturing decode graphs", disable=not show_progress, leave=False):
            self._capture_one(size, lora)
        torch.cuda.synchronize()
        self.nbytes = free - torch.cuda.mem_get_info()[0]
        logger.info(
            "captured %d decode graphs, up to %d requests, in %.1f s, %.0f MiB", len(work), self.sizes[-1], time.monotonic() - begin, self.nbytes / 2**20
        )

    def padded_size(self, batch: Batch) -> int:
        """The size of the graph for this batch; 0 if it is no decode step, is too large or wants other logits than each request's next.

        Comes before the step's inputs are set: a graph that misses layers which adapters touch by now is captured again here.
        """
        count = len(batch.requests)
        if count != batch.num_tokens or count >= len(self._by_count):
            return 0
        if any(request.num_computed + 1 != len(request.tokens) for request in batch.requests):  # a chunk of one token in the middle of a prompt
            return 0
        size = self._by_count[count]
        if batch.lora_active and self._layouts[size] != self.model.ctx.lora_layout:
            sampled = self.model.ctx.sampled.clone()
            self._capture_one(size, True)
            self.model.ctx.sampled.copy_(sampled)
        return size

    def replay(self, size: int, lora_active: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the step in the context's buffers; logits [size, V] in the model's dtype and their argmax int64 [size], valid until the next replay."""
        graph, logits = self._graphs[size, lora_active]
        graph.replay()
        return logits, self.model.ctx.sampled[:size]

    @torch.inference_mode()
    def _capture_one(self, size: int, lora: bool) -> None:
        self._set_padding(size, lora)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(size)  # compiles kernels and makes library handles
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits = self._step(size)
        self._graphs[size, lora] = graph, logits
        if lora:
            self._layouts[size] = self.model.ctx.lora_layout

    def _step(self, size: int) -> torch.Tensor:
        logits = self.model.forward_logits()
        torch.argmax(logits, dim=-1, out=self.model.ctx.sampled[:size])
        return logits

    def _set_padding(self, size: int, lora: bool) -> None:
        """A step of padding only."""
        ctx = self.model.ctx
        ctx.num_tokens = ctx.num_requests = ctx.num_logits = size
        ctx.query_lens, ctx.seq_lens_host, ctx.lora_active = [1] * size, [0] * size, lora
        ctx.inputs.copy_(ctx.make_inputs(ctx.device)[0])
