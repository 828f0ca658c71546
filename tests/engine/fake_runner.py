"""A model runner without a model: it keeps a KV cache of plain values and checks it on every step.

Row p of the cache holds (revision, position, token). A step reads the rows of all earlier tokens of each request, as
attention would, so a page that was shared wrongly, evicted too early or written by somebody else fails at once. The next
token is a hash of everything read, so outputs depend on the whole history and on the adapter, and on nothing else.
"""

from __future__ import annotations

import zlib

from sglang_lora_moe.core import SamplingParams, TokenLogprob
from sglang_lora_moe.engine.kv_cache import PagePool, PrefixCache
from sglang_lora_moe.engine.request import Batch, Request, StepResult
from sglang_lora_moe.engine.scheduler import Limits, Scheduler
from sglang_lora_moe.lora.slots import SlotTable
from tests.books import check_scheduler

VOCAB = 50
EOS = 0


def next_token(revision: str | None, tokens: list[int]) -> int:
    return zlib.crc32(repr((revision, tokens)).encode()) % VOCAB


def expected_output(prompt: list[int], revision: str | None, max_new: int, stop: frozenset[int] = frozenset({EOS})) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_new):
        tokens.append(next_token(revision, tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class FakeRunner:
    def __init__(self, num_pages: int, page_size: int, num_slots: int = 0) -> None:
        self.kv: list[tuple[str | None, int, int] | None] = [None] * (num_pages * page_size)
        self.page_size = page_size
        self.slots: list[str | None] = [None] * num_slots
        self.steps: list[int] = []

    def write_slots(self, writes: list[tuple[int, str]]) -> None:
        for slot, revision in writes:
            self.slots[slot] = revision

    def run(self, batch: Batch) -> StepResult:
        result = StepResult([], [])
        self.steps.append(batch.num_tokens)
        for index, (request, count) in enumerate(zip(batch.requests, batch.query_lens, strict=True)):
            assert count > 0
            revision = self.slots[request.slot] if request.slot >= 0 else None
            assert revision == request.revision, f"{request.rid} runs under {revision}, not {request.revision}"
            end = request.num_computed + count
            for position in range(request.num_computed, end):
                self.kv[self._row(request, position)] = (revision, position, request.tokens[position])
            seen = [self.kv[self._row(request, position)] for position in range(end)]
            assert seen == [(revision, position, token) for position, token in enumerate(request.tokens[:end])]
            start = request.prompt_logit_start
            if start is not None:
                rows = request.prompt_logit_positions(end)
                values = [TokenLogprob(request.tokens[row + 1], -float(row + 1)) for row in rows]
                first = request.num_computed <= 0 < end and request.logprobs is not None and request.logprobs.prompt_start == 0
                result.prompt_logprobs[index] = ([TokenLogprob(request.tokens[0], None)] if first else []) + values
            if end == len(request.tokens):
                result.sampled.append(index)
                result.token_ids.append(next_token(revision, request.tokens))
        return result

    def _row(self, request: Request, position: int) -> int:
        return request.pages[position // self.page_size] * self.page_size + position % self.page_size


class Harness:
    """Scheduler + fake runner; `step()` checks the books and collects outputs."""

    def __init__(self, num_pages: int = 65, page_size: int = 4, num_slots: int = 0, prefix_cache: bool = True, **limits: int) -> None:
        self.cache = PrefixCache(PagePool(num_pages), page_size, prefix_cache)
        self.slots = SlotTable(num_slots) if num_slots else None
        defaults = {"max_running": 8, "max_queued": 10_000, "prefill_budget": 16, "max_model_len": 10_000}
        self.scheduler = Scheduler(self.cache, self.slots, Limits(**(defaults | limits)))
        self.runner = FakeRunner(num_pages, page_size, num_slots)
        self.outputs: dict[str, list[int]] = {}
        self.prompt_logprobs: dict[str, list[list[TokenLogprob]]] = {}  # as often as they were given
        self.finished: dict[str, str] = {}
        self.finished_at: dict[str, int] = {}
        self.requests: dict[str, Request] = {}
        self.num_steps = 0

    def submit(self, rid: str, prompt: list[int], max_new: int = 8, revision: str | None = None, **sampling: object) -> Request:
        request = Request(rid, prompt, SamplingParams(max_new_tokens=max_new, **sampling), eos_ids=frozenset({EOS}))  # type: ignore[arg-type]
        if revision is not None:
            request.bind(revision, revision)
        self.scheduler.submit(request)
        self.requests[rid] = request
        self.outputs[rid] = []
        return request

    def step(self) -> Batch | None:
        batch = self.scheduler.schedule()
        self.num_steps += 1
        self.fill_slots()
        if batch is not None:
            assert batch.num_tokens <= self.scheduler.limits.prefill_budget + self.scheduler.limits.max_running
            for output in self.scheduler.update(batch, self.runner.run(batch)):
                self.outputs[output.rid].extend(output.token_ids)
                if output.prompt_logprobs is not None:
                    self.prompt_logprobs.setdefault(output.rid, []).append(output.prompt_logprobs)
                if output.finish_reason:
                    self.finished[output.rid] = output.finish_reason
                    self.finished_at[output.rid] = self.num_steps
        check_scheduler(self.scheduler)
        return batch

    def fill_slots(self) -> None:
        """Weights that were asked for in this step are there in the next."""
        writes = self.slots.take_writes() if self.slots is not None else []
        self.runner.write_slots(writes)
        for slot, _ in writes:
            assert self.slots is not None
            self.slots.filled(slot)
            self.scheduler.wake()

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            assert self.step() is not None or self.scheduler.has_work, "nothing scheduled"
        raise AssertionError(f"not finished after {max_steps} steps: {len(self.scheduler.waiting)} waiting, {len(self.scheduler.running)} running")

    def check_outputs(self) -> None:
        """Every finished request has exactly the tokens it would have had alone."""
        for rid, reason in self.finished.items():
            request = self.requests[rid]
            prompt = request.tokens[: request.prompt_len]
            stop = frozenset() if request.sampling.ignore_eos else frozenset({EOS})
            assert self.outputs[rid] == expected_output(prompt, request.revision, request.max_len - request.prompt_len, stop), (rid, reason)
