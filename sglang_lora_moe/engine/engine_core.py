"""The engine behind its messages: `handle` takes what the front sends, `step` computes. It knows token ids, no text.

Both return messages for the front. Nothing here waits for an adapter: the manager moves them beside the steps, and what has
arrived is taken in between two of them, so that a load never stops the requests that run.
"""

import logging
import random
from collections.abc import Callable
from typing import Any

from sglang_lora_moe.core import Abort, EngineMessage, FlushCache, FrontMessage, GetStats, LoadAdapter, Reply, RequestError, Submit, UnloadAdapter
from sglang_lora_moe.engine.model_runner import Launched, ModelRunner
from sglang_lora_moe.engine.request import Batch, Request
from sglang_lora_moe.engine.scheduler import Scheduler
from sglang_lora_moe.lora.manager import LoRAManager
from sglang_lora_moe.lora.registry import LORA_DISABLED, AdapterEntry

logger = logging.getLogger(__name__)


class EngineCore:
    """Scheduler, runner and adapters of one model. `lora` None = a server without adapters.

    With `overlap` a step is launched before the tokens of the one before have come to the host; what ends by such a
    token has then taken part in one step too many, whose token is dropped.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, lora: LoRAManager | None, *, vocab_size: int, eos_ids: list[int], seed: int = 0, overlap: bool = False
    ) -> None:
        self.scheduler, self.runner, self.lora = scheduler, runner, lora
        self.overlap = overlap
        self._in_flight: tuple[Batch, Launched] | None = None
        self.vocab_size, self.eos_ids = vocab_size, frozenset(eos_ids)
        self.num_steps = 0
        self._seeds = random.Random(seed)
        self._entries: dict[Request, AdapterEntry] = {}  # of requests with an adapter that have not ended
        self.is_stalled = False  # the last step had nothing to compute: whoever waits, waits for an adapter
        self._outbox: list[EngineMessage] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            Submit: self._submit,
            Abort: self._abort,
            LoadAdapter: lambda message: self.need_lora("name").load(message),
            UnloadAdapter: self._unload,
            FlushCache: lambda message: self._outbox.append(Reply(message.rid, {"flushed_pages": self.scheduler.cache.flush()})),
            GetStats: lambda message: self._outbox.append(Reply(message.rid, self.stats())),
        }
        scheduler.on_release = self._release

    @property
    def has_work(self) -> bool:
        """`step` has something to compute."""
        return self.scheduler.has_work or self._in_flight is not None

    @property
    def is_loading(self) -> bool:
        """An adapter is on its way; `step` will take it in."""
        return self.lora is not None and self.lora.is_loading

    def handle(self, message: FrontMessage) -> list[EngineMessage]:
        """Take in one message; returns what is to be said at once."""
        try:
            self._handlers[type(message)](message)
        except RequestError as error:
            assert not isinstance(message, Abort)
            self._outbox.append(Reply.refusal(message.rid, error))
        return self._flush_outbox()

    def step(self) -> list[EngineMessage]:
        """Take in adapters that have arrived, and compute one step if there is one."""
        if self.lora is not None:
            self._poll_adapters(self.lora)
        if not self.scheduler.can_run_ahead():
            self._collect()
        batch, previous = self.scheduler.schedule(), self._in_flight  # `previous` still runs: its tokens are not known yet
        self.is_stalled = batch is None and previous is None
        if self.lora is not None:
            self.lora.start_fills()
        if batch is not None:
            self.num_steps += 1
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
            "slots_used": slots.num_slots - len(slots.free) if slots else 0,
            "slots_running": sum(users > 0 for users in slots.users) if slots else 0,
            "prefix_hit_tokens": totals["cached_tokens"],
            "prefix_query_tokens": totals["prompt_tokens"],
            "generated_tokens": totals["generated_tokens"],
            "retractions": totals["retractions"],
            "finished": {name.removeprefix("finished_"): n for name, n in totals.items() if name.startswith("finished_")},
            "adapters_unloading": [entry.name for entry in self.lora.registry.leaving] if self.lora else [],
            "adapters": self.lora.adapters() if self.lora else [],
        }

    def close(self) -> None:
        if self.lora is not None:
            self.lora.close()

    # ---- the step in flight -----------------------------------------------------------------------------------------
    def _collect(self) -> None:
        """Wait for the step in flight, if there is one."""
        if self._in_flight is not None:
            (batch, launched), self._in_flight = self._in_flight, None
            self._finish(batch, launched)

    def _finish(self, batch: Batch, launched: Launched) -> None:
        self._outbox.extend(self.scheduler.update(batch, self.runner.collect(launched)))

    # ---- messages ---------------------------------------------------------------------------------------------------
    def _submit(self, message: Submit) -> None:
        seed = message.sampling.seed if message.sampling.seed is not None else self._seeds.getrandbits(63)
        request = Request(message.rid, message.input_ids, message.sampling, eos_ids=self.eos_ids, seed=seed)
        request.logprobs = message.logprobs
        entry = None if message.adapter is None else self.need_lora("model").registry.get(message.adapter)
        if entry is not None:
            request.bind(entry.name, entry.revision)
        self.scheduler.submit(request)
        if entry is not None:
            self._entries[request] = entry
            entry.users += 1  # until `_release`

    def _abort(self, message: Abort) -> None:
        for rid in [message.rid] if message.rid else list(self.scheduler.requests):
            output = self.scheduler.abort(rid, message.reason)
            if output is not None:
                self._outbox.append(output)

    def _unload(self, message: UnloadAdapter) -> None:
        self.need_lora("name").unload(message)
        self.scheduler.wake()

    def _poll_adapters(self, lora: LoRAManager) -> None:
        """Let those go on whose adapter has arrived, and refuse those whose adapter cannot be read any more."""
        changed, failed = lora.poll()
        for revision, error in failed:
            for request in [request for request in self._entries if request.revision == revision and not request.running]:
                self._outbox.append(Reply.refusal(request.rid, error))
                self.scheduler.abort(request.rid)
        if changed:
            self.scheduler.wake()

    def _release(self, request: Request) -> None:
        """A request ended: its adapter may have been waiting for that."""
        entry = self._entries.pop(request, None)
        if entry is not None:
            assert self.lora is not None
            self.lora.release(entry)

    # ---- small parts ------------------------------------------------------------------------------------------------
    def need_lora(self, param: str) -> LoRAManager:
        """The manager of adapters; RequestError about the field `param` in a server without."""
        if self.lora is None:
            raise RequestError(LORA_DISABLED, 400, param, "lora_not_enabled")
        return self.lora

    def _flush_outbox(self) -> list[EngineMessage]:
        messages, self._outbox = self._outbox, []
        return messages + (self.lora.take_replies() if self.lora is not None else [])
