"""Continuous batching under three budgets: KV pages, prompt tokens per step, adapter slots. Host only, no tensors.

`schedule()` chooses the next step, `update()` takes in its result. Every running request that is decoding takes part in
every step; what is left of `prefill_budget` goes to prompts, oldest first, in chunks, so that a long prompt never stops
the others' decoding. Admission is first come, first served, but no request waits for what it does not need:

* A request that does not fit (pages, or no slot for its adapter) is passed over; younger ones that fit may go ahead.
* A request passed over for `patience` steps is overdue. If it waits for pages, nothing younger is admitted until it
  fits. If it waits for a slot, the resident adapter closest to finished takes no new requests ("drains") until its
  slot is free. So with more adapters than slots every adapter gets its turn.
* A request whose adapter is on its way, from a file or to a slot, waits for it; all others go on.
* A prompt whose pages another request is computing right now waits for them instead of computing them twice.

When a decoding request needs a page and there is none, the youngest running request is retracted: it waits again in its
place of arrival, and its tokens are computed anew later.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from sglang_lora_moe.core import FinishReason, RequestError, TokenOutput
from sglang_lora_moe.engine.kv_cache import PrefixCache
from sglang_lora_moe.engine.request import PENDING, Batch, Request, StepResult
from sglang_lora_moe.engine.validate import too_long
from sglang_lora_moe.lora.slots import SlotTable

RESCAN_STEPS = 16  # a queue in which nothing could be admitted is looked at again this often, or when something is released
MOST_PASSED_OVER = 32  # for pages or a prefix in one look at the queue: it takes time for each page that they share, of everybody's step


@dataclass(frozen=True)
class Limits:
    """The few numbers the scheduler needs."""

    max_running: int
    max_queued: int
    prefill_budget: int  # prompt tokens per step
    max_model_len: int
    patience: int = 64  # steps
    prompt_logit_rows: int = 256  # prompt rows per step whose logits are computed (each is a whole vocabulary)


class Scheduler:
    """Owns waiting and running requests; pages belong to `cache`, slots to `slots`."""

    def __init__(self, cache: PrefixCache, slots: SlotTable | None, limits: Limits) -> None:
        self.cache, self.slots, self.limits = cache, slots, limits
        self.capacity = min(limits.max_model_len, cache.pool.total * cache.page_size)  # most tokens that one request can ever have
        self.waiting: list[Request] = []  # by arrival
        self.running: list[Request] = []  # by arrival, so that the last one is the youngest
        self.requests: dict[str, Request] = {}
        self.totals: Counter[str] = Counter()
        self.on_release: Callable[[Request], None] = lambda request: None  # called when a request ends, in whatever way
        self._arrivals = 0
        self._pass = 0
        self._dirty = True  # something changed since the last admission scan that admitted nothing
        self._pending_keys: set[bytes] = set()  # page keys that running requests are about to compute

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    # ---- requests come and go ---------------------------------------------------------------------------------------
    def submit(self, request: Request) -> None:
        """Queue a request, or raise the RequestError that says why it can never be served, or not now."""
        self._refuse(request)
        request.max_len = min(request.max_len, self.capacity)
        request.order = self._arrivals
        self._arrivals += 1
        self.waiting.append(request)
        self.requests[request.rid] = request
        self._dirty = True

    def abort(self, rid: str, reason: FinishReason = "abort") -> TokenOutput | None:
        """End a request in whatever state it is; None if it is unknown or has ended already."""
        request = self.requests.get(rid)
        if request is None:
            return None
        self._end(request, reason)
        return TokenOutput(rid, [], request.prompt_len, request.num_cached, reason)

    def wake(self) -> None:
        """Something outside (a slot) became available."""
        self._dirty = True

    # ---- one step ---------------------------------------------------------------------------------------------------
    def schedule(self) -> Batch | None:
        """Choose the next step; None if there is nothing to do."""
        self._pass += 1
        self._grow_decoding()
        requests: list[Request] = []
        query_lens: list[int] = []
        budget = self.limits.prefill_budget
        logit_budget = self.limits.prompt_logit_rows

        def take(request: Request) -> bool:
            """Let the request take part with as many tokens as the budgets allow, maybe none; False once no prompt tokens are left."""
            nonlocal budget, logit_budget
            count = len(request.tokens) - request.num_computed
            if count > 1 or request.num_output == 0:  # not decoding
                count = min(count, budget)
                if (start := request.prompt_logit_start) is not None:
                    count = min(count, max(start - request.num_computed, 0) + logit_budget)
                    logit_budget -= max(request.num_computed + count - max(start, request.num_computed), 0)
                budget -= count
            if count:
                requests.append(request)
                query_lens.append(count)
            return budget > 0

        for request in self.running:
            if request.tokens[-1] != PENDING or len(request.tokens) < request.max_len:  # else it ends when its token is known
                take(request)
        if self.waiting and budget > 0:
            self._admit(take)
        return Batch(requests, query_lens, sum(query_lens), any(request.slot >= 0 for request in requests)) if requests else None

    def can_run_ahead(self) -> bool:
        """Whether the next step can be chosen before the tokens of the last one are known: whoever is retracted must know its tokens."""
        return self.cache.available >= len(self.running)

    def advance(self, batch: Batch, sampled: list[int]) -> None:
        """A step was launched: count it as computed, with PENDING for the tokens that it samples. `update` fills them in."""
        for request, count in zip(batch.requests, batch.query_lens, strict=True):
            request.num_computed += count
        batch.ends = [request.num_computed for request in batch.requests]
        for row, index in enumerate(sampled):
            request = batch.requests[index]
            if request.sampling.max_new_tokens > 0:
                request.tokens.append(PENDING)
                request.sampled_row = row

    def update(self, batch: Batch, result: StepResult) -> list[TokenOutput]:
        """Take in what the step computed; returns the new tokens of its requests."""
        if batch.ends is None:
            self.advance(batch, result.sampled)
        assert batch.ends is not None
        page_size = self.cache.page_size
        for request, end in zip(batch.requests, batch.ends, strict=True):
            if request.running and end // page_size > request.num_committed:
                self._commit_pages(request, end // page_size)
        for index, prompt_logprobs in result.prompt_logprobs.items():
            batch.requests[index].prompt_logprobs.extend(prompt_logprobs)
        outputs = []
        for index, token in zip(result.sampled, result.token_ids, strict=True):
            request = batch.requests[index]
            if request.finish_reason is not None:  # it ended while this step was running
                continue
            output = self._output(request, token, batch.ends[index])
            if index in result.logprobs and output.token_ids:
                output.logprobs = [result.logprobs[index]]
            outputs.append(output)
        return outputs

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _refuse(self, request: Request) -> None:
        assert request.rid not in self.requests, f"the front has used {request.rid} twice"
        if not request.prompt_len:
            raise RequestError("the prompt is empty", param="prompt")
        if request.prompt_len >= self.capacity:
            raise too_long(request.prompt_len, self.capacity, "prompt")
        if len(self.waiting) - (self.limits.max_running - len(self.running)) >= self.limits.max_queued:
            raise RequestError(f"the queue is full ({len(self.waiting)} requests wait, --max-queued-requests {self.limits.max_queued})", 503, retry_after=1)

    def _grow_decoding(self) -> None:
        """Give every running request a page for its next token, retracting the youngest ones if there are too few."""
        page_size = self.cache.page_size
        for request in self.running:  # which only ever loses its last one meanwhile
            if len(request.tokens) > len(request.pages) * page_size:
                while not self.cache.available and self.running[-1] is not request:
                    self._retract(self.running[-1])
                if not self.cache.available:
                    self._retract(request)
                    return
                request.pages.extend(self.cache.allocate(1))

    def _admit(self, take: Callable[[Request], bool]) -> None:
        """Admit waiting requests until a budget is used up."""
        if not (self._dirty or self._pass % RESCAN_STEPS == 0):
            return
        no_slot: dict[str, bool] = {}  # revision -> someone waiting for it is overdue
        loading: set[str | None] = set()
        self._dirty, looks = False, MOST_PASSED_OVER
        for request in self.waiting:
            if not looks or len(self.running) >= self.limits.max_running:
                break
            reason = "slot" if request.revision in no_slot else "loading" if request.revision in loading else self._try_start(request)
            looks -= reason in ("pages", "prefix")
            if reason is None:
                if not take(request):
                    break
            elif reason == "loading":
                loading.add(request.revision)
            elif reason != "prefix":
                if request.blocked_since < 0:
                    request.blocked_since = self._pass
                overdue = self._pass - request.blocked_since >= self.limits.patience
                if reason == "slot":
                    assert request.revision is not None
                    no_slot[request.revision] = no_slot.get(request.revision, False) or overdue
                elif overdue:
                    break
        if self._dirty:  # some are running now
            self.waiting = [request for request in self.waiting if not request.running]
        if self.slots is not None:
            self._drain(self.slots, [revision for revision, overdue in no_slot.items() if overdue])

    def _try_start(self, request: Request) -> str | None:
        """Make a waiting request running, or say what it has to wait for: "pages", "slot", "loading" (of its adapter) or "prefix"."""
        cache, page_size = self.cache, self.cache.page_size
        last = len(request.tokens) - 1  # must be computed, for its logits
        shareable = (last if request.prompt_logit_start is None else min(last, request.prompt_logit_start)) // page_size
        matched: list[int] = []
        if cache.enabled:
            keys = request.page_keys
            while len(keys) < shareable and (not keys or keys[-1] in self._pending_keys or cache.match(keys[-1:])):  # behind a new page all are new
                request.extend_keys(page_size, len(keys) + 1)
            matched = cache.match(keys[:shareable])
            pending = len(self._pending_keys.intersection(keys[len(matched) : shareable]))
            if 2 * pending * page_size > len(request.tokens) - len(matched) * page_size:
                return "prefix"
        fresh = -(-len(request.tokens) // page_size) - len(matched)
        # One page for each running request, so that admission does not cause retraction right away.
        if fresh + cache.idle_among(matched) + len(self.running) > cache.available:
            return "pages"
        if request.revision is not None:
            assert self.slots is not None
            slot = self.slots.acquire(request.revision)
            if slot is None:
                return "loading" if self.slots.is_coming(request.revision) else "slot"
            request.slot = slot
        cache.hold(matched)
        request.pages = matched + cache.allocate(fresh)
        request.num_computed = len(matched) * page_size
        request.num_committed = len(matched)
        if cache.enabled:
            request.extend_keys(page_size, shareable)
            self._pending_keys.update(request.page_keys[len(matched) :])
        if request.first_scheduled:
            request.first_scheduled, request.num_cached = False, request.num_computed
            self.totals["prompt_tokens"] += request.prompt_len
            self.totals["cached_tokens"] += request.num_cached
        request.running, request.blocked_since, self._dirty = True, -1, True
        insort(self.running, request, key=lambda r: r.order)
        return None

    def _drain(self, slots: SlotTable, overdue: list[str]) -> None:
        """Drain one slot for each overdue revision, that of the adapter closest to finished first; stop where nobody needs it, or the slot is kept by now."""
        if slots.draining:
            waiting = {request.revision for request in self.waiting if request.revision and slots.slot_of(request.revision) is None}
            for slot in [slot for slot, revision in slots.draining.items() if revision not in waiting or slots.is_kept(slot)]:
                del slots.draining[slot]
                self._dirty = True
        for revision in overdue if not slots.filling else ():  # while a copy is under way, an empty slot would wait for the next one
            if slots.slot_of(revision) is not None or revision in slots.draining.values():
                continue  # its own slot is being drained for another, which it may do in turn; or it has been served already
            left = dict.fromkeys(slots.drainable(), 0)
            if not left:
                return
            for request in self.running:
                if request.slot in left:
                    left[request.slot] = max(left[request.slot], request.max_len - request.num_computed)
            slots.draining[min(left, key=lambda slot: left[slot])] = revision

    def _commit_pages(self, request: Request, full: int) -> None:
        """Offer the first `full` pages of a request, which are computed, to the prefix cache."""
        if self.cache.enabled:
            request.extend_keys(self.cache.page_size, full)
            for index in range(request.num_committed, full):
                self.cache.insert(request.page_keys[index], request.pages[index])
                self._dirty |= request.page_keys[index] in self._pending_keys
                self._pending_keys.discard(request.page_keys[index])
        request.num_committed = full

    def _output(self, request: Request, token: int, position: int) -> TokenOutput:
        """Put a sampled token into its place and say whether it ends the request."""
        output = TokenOutput(request.rid, [], request.prompt_len, request.num_cached)
        if request.prompt_logprobs:
            output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
        if request.sampling.max_new_tokens > 0:
            request.tokens[position] = token
            output.token_ids.append(token)
            self.totals["generated_tokens"] += 1
        if token in request.stop_ids and output.token_ids:
            output.finish_reason, output.stop_token_id = "stop", token
            self._end(request, "stop")
        elif position + len(output.token_ids) >= request.max_len:
            output.finish_reason = "length"
            self._end(request, "length")
        return output

    def _retract(self, request: Request) -> None:
        """Let a running request wait again, in its place of arrival."""
        self._stop(request)
        request.prompt_logprobs = []
        insort(self.waiting, request, key=lambda r: r.order)
        self.totals["retractions"] += 1

    def _end(self, request: Request, reason: FinishReason) -> None:
        """Forget a request, running or waiting, and count its end."""
        if request.running:
            self._stop(request)
        else:
            self.waiting.remove(request)
            self._dirty = True
        request.finish_reason = reason
        del self.requests[request.rid]
        self.totals["finished_" + reason] += 1
        self.on_release(request)

    def _stop(self, request: Request) -> None:
        """Take a running request's pages and slot."""
        self._pending_keys.difference_update(request.page_keys[request.num_committed :])
        self.cache.release(request.pages)
        request.pages, request.num_computed, request.num_committed = [], 0, 0
        if request.slot >= 0:
            assert self.slots is not None
            self.slots.release(request.slot)
            request.slot = -1
        request.running = False
        self.running.remove(request)
        self._dirty = True
