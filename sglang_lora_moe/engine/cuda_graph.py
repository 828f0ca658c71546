"""Steps as CUDA graphs, so that a step costs its kernels and not its launches.

A graph is captured for each padded size of a ladder and each of two families: "base", whose kernels are those of a server without adapters, and "lora". Which
one runs is decided on the host. Graphs read the static buffers of the `StepContext`, the KV cache, the adapter pool and its tables: none of these moves, so
adapters come and go between replays. A step that is smaller than its graph is filled up with padding, which reads no expert and writes to the dump page.

Decode steps (one token of each request) are graphs from tokens to samples. Other steps of up to some 2,500 tokens, whose
launches take longer than their kernels, are graphs up to the last norm: which rows need logits, and how many, varies.
"""

import gc
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from sglang_lora_moe.engine.request import Batch
from sglang_lora_moe.models.served import ServedModel

logger = logging.getLogger(__name__)
FEW_REQUESTS = 16
Size = tuple[int, int]  # tokens and requests of a step, with padding


def ladder(max_requests: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 up to 64, of 16 up to 256 and of 32 beyond; ends with `max_requests`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_requests, 32)]
    return [size for size in sizes if size < max_requests] + [max_requests]


def prefill_ladder(max_tokens: int, max_requests: int) -> list[Size]:
    """(tokens, requests): up to 16 requests, 128 tokens and then steps of 256 up to 2,560, as far as steps may be; larger ones keep the
    GPU busy without graphs. For more requests, of which padding costs attention some programs, a few sizes. Never as many requests as
    tokens, which would be a decode step."""
    few = [(size, min(max_requests, FEW_REQUESTS)) for size in (128, *range(256, 2561, 256))]
    many = [(size, min(max_requests, size - 1)) for size in (256, *range(512, 2561, 512))] if max_requests > FEW_REQUESTS else []
    return [(tokens, requests) for tokens, requests in few + many if tokens <= max_tokens]


class _Graphs:
    """Captured steps of one model by size and family. `families`: (False,) without adapters, (False, True) with."""

    what = "steps"

    def __init__(self, model: ServedModel, families: Sequence[bool], sizes: Sequence[Size]) -> None:
        self.model, self.families = model, tuple(families)
        self.sizes = sorted(sizes)
        self._graphs: dict[tuple[Size, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._layouts: dict[Size, int] = {}  # size -> ctx.lora_layout at the capture of its "lora" graph
        self.nbytes = 0  # device memory that they took
        self._pool: Any = None  # torch's handle of the memory that all graphs share

    @torch.inference_mode()
    def capture(self, show_progress: bool = True) -> None:
        """Capture every size and family, the largest first, so that smaller ones reuse its memory. Logs time and memory."""
        if not self.sizes:
            return
        begin, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        self._pool = torch.cuda.graph_pool_handle()
        work = [(size, lora) for size in reversed(self.sizes) for lora in self.families]
        for size, lora in tqdm(work, desc=f"capturing graphs of {self.what}", disable=not show_progress, leave=False):
            self._capture_one(size, lora)
        torch.cuda.synchronize()
        self.nbytes = free - torch.cuda.mem_get_info()[0]
        seconds, mib = time.monotonic() - begin, self.nbytes / 2**20
        logger.info("captured %d graphs of %s, up to %d tokens, in %.1f s, %.0f MiB", len(work), self.what, self.sizes[-1][0], seconds, mib)

    @torch.inference_mode()
    def _capture_one(self, size: Size, lora: bool) -> None:
        self._set_padding(size, lora)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(size)  # compiles kernels and makes library handles
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # what a collection frees may call CUDA, which would end the capture
        try:  # the mode is of this thread: adapters are copied by another one meanwhile, with pinned memory and events
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                out = self._step(size)
        finally:
            if collects:
                gc.enable()
        self._graphs[size, lora] = graph, out
        if lora:
            self._layouts[size] = self.model.ctx.lora_layout

    def _renew(self, size: Size, lora: bool) -> None:
        """Capture a graph again that misses layers which adapters touch by now. Comes before the step's inputs are set."""
        if lora and self._layouts[size] != self.model.ctx.lora_layout:
            sampled = self.model.ctx.sampled.clone()
            self._capture_one(size, True)
            self.model.ctx.sampled.copy_(sampled)

    def _step(self, size: Size) -> torch.Tensor:
        raise NotImplementedError

    def _set_padding(self, size: Size, lora: bool) -> None:
        """A step of padding only."""
        ctx = self.model.ctx
        ctx.num_tokens, ctx.num_requests = size
        ctx.num_logits, ctx.lora_active = ctx.num_requests, lora
        ctx.query_lens, ctx.seq_lens_host = [1] * ctx.num_requests, [0] * ctx.num_requests
        ctx.inputs.copy_(ctx.make_inputs(ctx.device)[0])


class DecodeGraphs(_Graphs):
    """Decode steps: every request has one token. `sizes` are those of batches."""

    what = "decode steps"

    def __init__(self, model: ServedModel, families: Sequence[bool], sizes: Sequence[int]) -> None:
        super().__init__(model, families, [(size, size) for size in sizes])
        self._by_count = [0, *(next(size for size, _ in self.sizes if size >= n) for n in range(1, max(sizes) + 1))]

    def padded_size(self, batch: Batch) -> int:
        """The size of the graph for this batch; 0 if it is no decode step, is too large or wants other logits than each request's next."""
        count = len(batch.requests)
        if count != batch.num_tokens or count >= len(self._by_count):
            return 0
        if any(request.num_computed + 1 != len(request.tokens) for request in batch.requests):  # a chunk of one token in the middle of a prompt
            return 0
        size = self._by_count[count]
        self._renew((size, size), batch.lora_active)
        return size

    def replay(self, size: int, lora_active: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the step in the context's buffers; logits [size, V] in the model's dtype and their argmax int64 [size], valid until the next replay."""
        graph, logits = self._graphs[(size, size), lora_active]
        graph.replay()
        return logits, self.model.ctx.sampled[:size]

    def _step(self, size: Size) -> torch.Tensor:
        logits = self.model.forward_logits()
        torch.argmax(logits, dim=-1, out=self.model.ctx.sampled[: size[0]])
        return logits


class PrefillGraphs(_Graphs):
    """Steps with prompt tokens, up to the last norm."""

    what = "prefill steps"

    def padded_size(self, batch: Batch) -> Size:
        """(tokens, requests) of the graph for this batch; (0, 0) if there is none."""
        tokens, requests = batch.num_tokens, len(batch.requests)
        fitting = [size for size in self.sizes if size[0] >= tokens and size[1] >= requests]
        if not fitting:
            return 0, 0
        size = min(fitting, key=lambda size: (size[1], size[0]))
        self._renew(size, batch.lora_active)
        return size

    def logits(self, size: Size, lora_active: bool) -> torch.Tensor:
        """Run the step in the context's buffers; logits [num_logits, V] in the model's dtype."""
        graph, hidden = self._graphs[size, lora_active]
        graph.replay()
        return self.model.logits_of(hidden)

    def _step(self, size: Size) -> torch.Tensor:
        return self.model.forward_hidden()
