"""The engine behind its messages: `handle` takes what the front sends, `step` computes. It knows token ids, no text.

Both return messages for the front. Nothing here blocks: adapters are read in a thread of their own and registered between
steps, so that a load never stops the requests that run.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from sglang_lora_moe.core import Abort, EngineMessage, FlushCache, FrontMessage, GetStats, LoadAdapter, Reply, RequestError, Submit, UnloadAdapter
from sglang_lora_moe.engine.model_runner import Launched
from sglang_lora_moe.engine.request import Batch, Request, StepResult
from sglang_lora_moe.engine.scheduler import Scheduler
from sglang_lora_moe.lora.manager import LoRAManager
from sglang_lora_moe.lora.registry import LORA_DISABLED, AdapterEntry
from sglang_lora_moe.lora.weights import AdapterWeights

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What the core needs of `engine.model_runner.ModelRunner`."""

    def launch(self, batch: Batch) -> Launched: ...
    def collect(self, launched: Launched) -> StepResult: ...


class EngineCore:
    """Scheduler, runner and adapters of one model. `lora` None = a server without adapters.

    With `overlap` a decode step is launched before the tokens of the one before have come to the host; what ends by such a
    token has then taken part in one step too many, whose token is dropped.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, lora: LoRAManager | None, *, vocab_size: int, eos_ids: list[int], seed: int = 0, overlap: bool = False
    ) -> None:
        self.scheduler, self.runner, self.lora = scheduler, runner, lora
        self.overlap = overlap
        self._in_flight: tuple[Batch, Launched] | None = None
        self.vocab_size, self.eos_ids = vocab_size, frozenset(eos_ids)
        self.num_steps = 0
        self._seeds = random.Random(seed)
        self._entries: dict[Request, AdapterEntry] = {}
        self._reader = ThreadPoolExecutor(1, "adapter-reader") if lora is not None else None
        self._loads: list[tuple[LoadAdapter, Future[AdapterWeights], float]] = []
        self._outbox: list[EngineMessage] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            Submit: self._submit,
            Abort: self._abort,
            LoadAdapter: self._load,
            UnloadAdapter: self._unload,
            FlushCache: self._flush,
            GetStats: lambda message: self._reply(message.rid, self.stats()),
        }
        scheduler.on_release = self._release

    @property
    def has_work(self) -> bool:
        """`step` has something to compute."""
        return self.scheduler.has_work or self._in_flight is not None

    @property
    def is_loading(self) -> bool:
        """An adapter is being read; `step` will answer when it is there."""
        return bool(self._loads)

    def handle(self, message: FrontMessage) -> list[EngineMessage]:
        """Take in one message; returns what is to be said at once."""
        try:
            self._handlers[type(message)](message)
        except RequestError as error:
            assert not isinstance(message, Abort)
            self._outbox.append(Reply.refusal(message.rid, error))
        return self._flush_outbox()

    def step(self) -> list[EngineMessage]:
        """Register adapters that have been read, and compute one step if there is one."""
        if self._loads:
            self._finish_loads()
        if self._in_flight is not None and not self.scheduler.can_run_ahead():
            self._collect()
        batch, previous = self.scheduler.schedule(), self._in_flight
        if batch is not None:
            self.num_steps += 1
            if self.lora is not None:
                self.lora.flush_writes()
            launched = self.runner.launch(batch)
            self.scheduler.advance(batch, launched.result.sampled)
            self._in_flight = (batch, launched)
        if previous is not None:
            self._finish(*previous)
            self._in_flight = self._in_flight if batch is not None else None
        if self._in_flight is not None and not (self.overlap and self._in_flight[1].can_overlap):
            self._collect()
        return self._flush_outbox()

    def stats(self) -> dict[str, Any]:
        """The books of scheduler, KV cache and adapter slots."""
        scheduler, cache, slots = self.scheduler, self.scheduler.cache, self.scheduler.slots
        totals = scheduler.totals
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "steps": self.num_steps,
            "kv_pages_total": cache.pool.total,
            "kv_pages_used": cache.num_in_use,
            "kv_pages_cached": cache.num_cached,
            "kv_pages_free": len(cache.pool.free),
            "kv_page_size": cache.page_size,
            "slots_total": slots.num_slots if slots else 0,
            "slots_used": slots.num_resident if slots else 0,
            "slots_running": sum(users > 0 for users in slots.users) if slots else 0,
            "prefix_hit_tokens": totals["cached_tokens"],
            "prefix_query_tokens": totals["prompt_tokens"],
            "generated_tokens": totals["generated_tokens"],
            "retractions": totals["retractions"],
            "finished": {name.removeprefix("finished_"): n for name, n in totals.items() if name.startswith("finished_")},
            "adapters_unloading": [entry.name for entry in self.lora.registry.unloading] if self.lora else [],
            "adapters": self.lora.adapters() if self.lora else [],
        }

    def check(self) -> None:
        """Assert all books."""
        self.scheduler.check()
        assert set(self._entries) == {request for request in self.scheduler.requests.values() if request.revision is not None}
        if self.lora is not None:
            self.lora.check()
            for entry in self.lora.registry.entries():
                assert entry.users == sum(e is entry for e in self._entries.values()), f"{entry.name}: {entry.users} users"

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)

    # ---- the step in flight -----------------------------------------------------------------------------------------
    def _collect(self) -> None:
        """Wait for the step in flight."""
        assert self._in_flight is not None
        batch, launched = self._in_flight
        self._in_flight = None
        self._finish(batch, launched)

    def _finish(self, batch: Batch, launched: Launched) -> None:
        self._outbox.extend(self.scheduler.update(batch, self.runner.collect(launched)))

    # ---- messages ---------------------------------------------------------------------------------------------------
    def _submit(self, message: Submit) -> None:
        bad = next((token for token in message.input_ids if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise RequestError(f"input_ids: token id {bad} is outside the vocabulary of {self.vocab_size}", param="input_ids")
        seed = message.sampling.seed if message.sampling.seed is not None else self._seeds.getrandbits(63)
        request = Request(message.rid, message.input_ids, message.sampling, eos_ids=self.eos_ids, seed=seed)
        request.logprobs = message.logprobs
        if message.adapter is None:
            self.scheduler.submit(request)
            return
        lora = self._need_lora("model")
        entry = lora.registry.get(message.adapter)
        request.bind(entry.name, entry.revision)
        self.scheduler.submit(request)
        self._entries[request] = lora.bind(message.adapter)

    def _abort(self, message: Abort) -> None:
        for rid in [message.rid] if message.rid else list(self.scheduler.requests):
            output = self.scheduler.abort(rid)
            if output is not None:
                self._outbox.append(output)

    def _load(self, message: LoadAdapter) -> None:
        lora = self._need_lora("name")
        assert self._reader is not None
        self._loads.append((message, self._reader.submit(lora.read, message.path), time.monotonic()))

    def _finish_loads(self) -> None:
        """Register what has been read, in the order of asking."""
        assert self.lora is not None
        while self._loads and self._loads[0][1].done():
            message, future, begin = self._loads.pop(0)
            try:
                data = self.lora.load(message.name, message.path, _result(future, message.path), message.pinned)
                self._reply(message.rid, data | {"seconds": time.monotonic() - begin})
            except RequestError as error:
                logger.warning("adapter %s: %s", message.name, error)
                self._outbox.append(Reply.refusal(message.rid, error))

    def _unload(self, message: UnloadAdapter) -> None:
        for rid, data in self._need_lora("name").unload(message.name, message.rid):
            self._reply(rid, data)
        self.scheduler.wake()

    def _flush(self, message: FlushCache) -> None:
        self._reply(message.rid, {"flushed_pages": self.scheduler.cache.flush()})

    def _release(self, request: Request) -> None:
        """A request ended: its adapter may have been waiting for that."""
        entry = self._entries.pop(request, None)
        if entry is not None:
            assert self.lora is not None
            for rid, data in self.lora.release(entry):
                self._reply(rid, data)
                self.scheduler.wake()

    # ---- small parts ------------------------------------------------------------------------------------------------
    def _need_lora(self, param: str) -> LoRAManager:
        if self.lora is None:
            raise RequestError(LORA_DISABLED, 400, param, "lora_not_enabled")
        return self.lora

    def _reply(self, rid: str, data: dict[str, Any]) -> None:
        self._outbox.append(Reply(rid, data))

    def _flush_outbox(self) -> list[EngineMessage]:
        messages, self._outbox = self._outbox, []
        return messages


def _result(future: Future[AdapterWeights], path: str) -> AdapterWeights:
    """The weights that were read, or a RequestError: whatever is in a file, the server goes on."""
    try:
        return future.result()
    except (ValueError, OSError) as error:
        message = str(error) if path in str(error) else f"{path}: {error}"
        raise RequestError(f"adapter not loaded: {message}", 400, "path", "invalid_adapter") from error
    except Exception as error:
        logger.exception("reading the adapter %s failed unexpectedly", path)
        raise RequestError(f"adapter not loaded: {path}: {type(error).__name__}: {error}", 500, "path") from error
