"""`Engine`: the same engine in one's own process, for offline use. No server library is imported.

    engine = Engine(model_path="...", lora_paths=["upper=..."])
    engine.generate("hello>", {"temperature": 0, "max_new_tokens": 8}, lora_path="upper")
    -> {"text": "HELLO", "output_ids": [...], "meta_info": {"finish_reason": {...}, "prompt_tokens": 7, ...}}

Calls and results have the shape of SGLang's offline engine. One thread at a time.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from sglang_lora_moe.config import Config
from sglang_lora_moe.core import Abort, EngineMessage, FlushCache, GetStats, LoadAdapter, LogprobOptions, Reply, RequestError, SamplingParams, UnloadAdapter
from sglang_lora_moe.engine.build import build_engine
from sglang_lora_moe.engine.front import Chunk, Failure, Front, GenerateRequest, native_result
from sglang_lora_moe.engine.tokenizer import load_tokenizer
from sglang_lora_moe.engine.validate import refuse, same_value, spread

_SAMPLING_FIELDS = {f.name for f in dataclasses.fields(SamplingParams)}
_TEXT_FIELDS = ("n", "skip_special_tokens", "no_stop_trim")


class Engine:
    """Built from a `Config`, or from its fields as keywords. ValueError for what of them, the model or the adapters cannot be served.

    What is asked of it later and cannot be done is a `RequestError`, whose `param` names what is at fault.
    """

    def __init__(self, config: Config | None = None, **fields: Any) -> None:
        if (config is None) == (not fields):
            raise TypeError("give either a Config or its fields as keywords")
        self.core, self.config, self.model_info = build_engine(config if config is not None else Config(**fields))
        self.tokenizer = load_tokenizer(self.config)
        self.front = Front(self.tokenizer, self.core.vocab_size, self.model_info["eos_token_ids"], self.model_info["max_model_len"])
        self._events: dict[str, list[Chunk | Failure]] = {}  # by request: the list of the call that runs it
        self._replies: dict[str, Reply] = {}
        self._calls = 0

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # ---- generation -------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        lora_path: str | list[str | None] | None = None,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        stream: bool = False,
    ) -> Any:
        """Continue one prompt or a list; texts or token ids.

        One prompt with n = 1 gives a dict, otherwise a list in the order of prompts, samples of a prompt together. With
        `stream` an iterator of such dicts with all text so far ("index" says whose). `lora_path` names loaded adapters.
        """
        if (prompt is None) == (input_ids is None):
            raise RequestError("prompt: exactly one of prompt and input_ids must be given", param="prompt")
        is_batch = isinstance(prompt, list) or (input_ids is not None and bool(input_ids) and isinstance(input_ids[0], list))
        prompts: list[Any] = list(prompt if prompt is not None else input_ids) if is_batch else [prompt if prompt is not None else input_ids]  # type: ignore[arg-type]
        if top_logprobs_num and not return_logprob:
            raise refuse("top_logprobs_num", "0 without return_logprob=True", top_logprobs_num)
        options = LogprobOptions(top_logprobs_num, logprob_start_len if logprob_start_len >= 0 else None) if return_logprob else None
        params = spread(sampling_params or {}, len(prompts), "sampling_params")
        adapters = spread(lora_path, len(prompts), "lora_path")
        requests = [
            _make_request(one, prompt is not None, params[i], GenerateRequest(adapter=adapters[i], logprobs=options, stream=stream))
            for i, one in enumerate(prompts)
        ]
        for request in requests:
            self.front.check(request)
        return self._stream(requests) if stream else self._collect(requests, is_batch)

    def _collect(self, requests: list[GenerateRequest], is_batch: bool) -> Any:
        found = {result.pop("index"): result for result in self._stream(requests)}  # one of each sample, at its end
        results = [found[i] for i in range(len(found))]
        return results if is_batch or requests[0].n > 1 else results[0]

    def _stream(self, requests: list[GenerateRequest]) -> Iterator[dict[str, Any]]:
        begin = time.perf_counter()
        samples = [[Chunk(request.rid, k) for k in range(request.n)] for request in requests]
        first = list(itertools.accumulate((request.n for request in requests), initial=0))
        for place, chunk in self.run(requests):
            sample = samples[place][chunk.index]
            sample.add(chunk)
            yield native_result(requests[place], sample, time.perf_counter() - begin) | {"index": first[place] + chunk.index}

    def run(self, requests: list[GenerateRequest]) -> Iterator[tuple[int, Chunk]]:
        """Run requests together; (place of the request, chunk) as they come. The first refusal ends all of them.

        Closing the iterator aborts what has not finished.
        """
        events: list[Chunk | Failure] = []
        places: dict[str, int] = {}
        unsent = list(enumerate(requests))[::-1]
        left = sum(request.n for request in requests)
        try:
            while left:
                while unsent and self._has_room(unsent[-1][1].n):
                    place, request = unsent.pop()
                    messages = self.front.submit(request)
                    places[request.rid], self._events[request.rid] = place, events
                    # All samples first: if one is refused, the front aborts all of them.
                    self._receive([answer for message in messages for answer in self.core.handle(message)])
                if not events:
                    self._step()
                ready, events[:] = list(events), []
                for event in ready:
                    if isinstance(event, Failure):
                        raise event.error
                    left -= event.finish_reason is not None
                    yield places[event.rid], event
        finally:
            for rid in places:
                del self._events[rid]
                for abort in self.front.forget(rid):
                    self._receive(self.core.handle(abort))

    def _has_room(self, count: int) -> bool:
        """The queue takes `count` more, or is empty, so that it may say itself that they are too many."""
        waiting = len(self.core.scheduler.waiting)
        return not waiting or waiting + count <= self.config.max_queued_requests

    # ---- control ----------------------------------------------------------------------------------------------------
    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False, load_inplace: bool = False) -> dict[str, Any]:
        """Load an adapter under a name; loading equal content again only says so.

        Other content under a loaded name is refused, or with `load_inplace` takes its place: requests that run finish on the weights
        they began with, later ones get the new ones, and the prefix cache mixes neither.
        """
        return self._control(LoadAdapter(self._next_rid(), lora_name, lora_path, pinned, load_inplace))

    def load_lora_adapter_from_tensors(
        self,
        lora_name: str,
        tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        config_dict: Mapping[str, Any],
        pinned: bool = False,
        load_inplace: bool = False,
    ) -> dict[str, Any]:
        """As `load_lora_adapter`, without files: `tensors` under the names that PEFT saves, `config_dict` as in adapter_config.json.

        The tensors may be on any device; they are read once, here, and not kept. What is made of them stays in host memory.
        """
        message = LoadAdapter(self._next_rid(), lora_name, "", pinned, load_inplace)
        self.core.need_lora("name").load_tensors(message, dict(tensors), config_dict)
        return self._answer(message.rid)

    def unload_lora_adapter(self, lora_name: str) -> dict[str, Any]:
        """Unload a name, after its running requests; says how many bytes were freed."""
        return self._control(UnloadAdapter(self._next_rid(), lora_name))

    def flush_cache(self) -> dict[str, Any]:
        """Forget all cached prefixes."""
        return self._control(FlushCache(self._next_rid()))

    def get_server_info(self) -> dict[str, Any]:
        """Facts of the model, and the books of scheduler, KV cache and adapters."""
        return self.model_info | self._control(GetStats(self._next_rid()))

    def abort_request(self, rid: str = "") -> None:
        """Abort a request that an open stream runs; "" = all."""
        for message in self.front.aborts(rid):
            self._receive(self.core.handle(message))

    def shutdown(self) -> None:
        """Give back everything. The engine cannot be used afterwards."""
        self.core.handle(Abort(""))
        self.core.close()

    # ---- the loop ---------------------------------------------------------------------------------------------------
    def _receive(self, messages: list[EngineMessage]) -> None:
        """Hand what the engine says to those who wait for it; what the front wants aborted is aborted at once."""
        for message in messages:
            for event in self.front.on_message(message):
                if isinstance(event, Abort):
                    self._receive(self.core.handle(event))
                elif isinstance(event, Reply):
                    self._replies[event.rid] = event
                elif event.rid in self._events:
                    self._events[event.rid].append(event)

    def _step(self) -> None:
        self._receive(self.core.step())
        if self.core.is_stalled:
            time.sleep(0.001)  # for an adapter that is on its way

    def _control(self, message: LoadAdapter | UnloadAdapter | FlushCache | GetStats) -> dict[str, Any]:
        """Send a control message and work until it is answered."""
        self._receive(self.core.handle(message))
        return self._answer(message.rid)

    def _answer(self, rid: str) -> dict[str, Any]:
        """Work until a control message is answered."""
        while rid not in self._replies:
            if not self.core.has_work and not self.core.is_loading:
                raise RuntimeError(f"{rid} was not answered")
            self._step()
        reply = self._replies.pop(rid)
        reply.raise_error()
        return reply.data

    def _next_rid(self) -> str:
        self._calls += 1
        return f"control-{self._calls}"


def _make_request(prompt: Any, is_text: bool, params: dict[str, Any], request: GenerateRequest) -> GenerateRequest:
    """`request` with prompt and sampling filled in; `params` has SGLang's names."""
    if not isinstance(params, dict):
        raise refuse("sampling_params", "a dict", params)
    values = dict(params)
    values["seed"] = same_value(seed=params.get("seed"), sampling_seed=values.pop("sampling_seed", None))  # its name in SGLang
    request.prompt, request.input_ids = (prompt, None) if is_text else (None, prompt)
    stop = values.pop("stop", None)
    request.stop = [stop] if isinstance(stop, str) else [] if stop is None else stop
    for name in _TEXT_FIELDS:
        setattr(request, name, values.pop(name, getattr(request, name)))
    unknown = sorted(set(values) - _SAMPLING_FIELDS)
    if unknown:
        known = ", ".join(["stop", *sorted([*_TEXT_FIELDS, *_SAMPLING_FIELDS])])
        raise RequestError(f"sampling_params: unknown field {unknown[0]!r}; known: {known}", param=unknown[0])
    request.sampling = SamplingParams(**{name: value for name, value in values.items() if value is not None})
    return request
