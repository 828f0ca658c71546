"""An engine without a model: answers are a deterministic echo of the prompt, so that a test can say what must come.

Token j of sample k is prompt token j (cyclic), moved by the adapter's number and, when sampling, by k and the seed. Its
log-probability is -(j + 1) / 10. It can be slow, refuse, break off, and it records what it was asked and what was aborted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from sglang_lora_moe.config import Config
from sglang_lora_moe.core import RequestError, TokenLogprob
from sglang_lora_moe.engine.front import Chunk, GenerateRequest
from sglang_lora_moe.engine.tokenizer import encode
from tests.tiny_models import EOS_ID, VOCAB_SIZE, make_tokenizer

FIRST_CHARACTER, LAST_CHARACTER = 3, 97  # ids of ' ' and '~'


class FakeEngine:
    """What the server uses of `engine.process.AsyncEngine`."""

    def __init__(self, *, delay: float = 0.0, max_model_len: int = 512, chat_template: bool | str = True, **config: Any) -> None:
        file = chat_template if isinstance(chat_template, str) else None
        self.config = Config(model_path="/models/base", served_model_name="base", chat_template=file, **({"enable_lora": True} | config))
        self.tokenizer: Any = make_tokenizer()
        self.decode = self.tokenizer.decode
        if not chat_template:
            self.tokenizer.chat_template = None
        self.max_model_len = max_model_len
        self.model_info: dict[str, Any] = {"model_path": "/models/base", "served_model_name": "base", "max_model_len": max_model_len}
        self.model_info |= {"eos_token_ids": [EOS_ID], "vocab_size": VOCAB_SIZE}
        self.healthy = True
        self.delay = delay
        self.refusal: RequestError | None = None  # raised for every request
        self.break_after: int | None = None  # a bug after so many tokens
        self.loaded: dict[str, dict[str, Any]] = {}
        self.requests: list[GenerateRequest] = []
        self.prompts: list[list[int]] = []  # of these, as token ids
        self.running: dict[str, GenerateRequest] = {}
        self.aborted: list[str] = []  # by closed iterators
        self.abort_calls: list[str] = []
        self.flushed = self.num_outputs = 0
        self.in_thread = False  # where the last prompt was to be tokenized

    # ---- generation -------------------------------------------------------------------------------------------------
    async def generate(self, request: GenerateRequest, in_thread: bool = False) -> AsyncGenerator[Chunk, None]:
        ids = self._admit(request)
        self.in_thread = in_thread
        self.requests.append(request)
        self.running[request.rid] = request
        finished = False
        try:
            number = 1 + list(self.loaded).index(request.adapter) if request.adapter else 0
            streams = [self._sample(request, ids, k, number) for k in range(request.n)]
            live = list(range(request.n))
            while live:
                for k in list(live):
                    await asyncio.sleep(self.delay)
                    chunk = next(streams[k])
                    if request.rid in self.abort_calls or "" in self.abort_calls:
                        chunk.finish_reason, chunk.matched_stop = "abort", None
                    if chunk.finish_reason is not None:
                        live.remove(k)
                    self.num_outputs += 1
                    yield chunk
            finished = True
        finally:
            del self.running[request.rid]
            if not finished:
                self.aborted.append(request.rid)

    def _admit(self, request: GenerateRequest) -> list[int]:
        if self.refusal is not None:
            raise RequestError(self.refusal.message, self.refusal.status, self.refusal.param, self.refusal.code, self.refusal.retry_after)
        ids, limit = request.input_ids, self.max_model_len
        if ids is None:
            ids = encode(self.tokenizer, request.prompt or "", limit, "prompt", add_special_tokens=request.add_special_tokens)
        self.prompts.append(ids)
        if len(ids) >= limit:
            raise RequestError(f"the prompt has {len(ids)} tokens, the model takes {limit}", param="input_ids", code="context_length_exceeded")
        if request.adapter is not None and request.adapter not in self.loaded:
            raise RequestError(f"{request.adapter!r} is not loaded", 404, "model", "model_not_found")
        if request.rid in self.running:
            raise RequestError(f"rid {request.rid!r} is running", param="rid")
        return ids

    def _sample(self, request: GenerateRequest, ids: list[int], k: int, number: int) -> Any:
        """Chunks of one token each."""
        sampling, text, prompt_logprobs = request.sampling, "", []
        echo = [i for i in ids if i >= FIRST_CHARACTER] or [FIRST_CHARACTER]
        shift = number + (k + (sampling.seed or 0) if sampling.temperature > 0 else 0)
        if request.logprobs is not None and request.logprobs.prompt_start is not None:
            start = request.logprobs.prompt_start
            prompt_logprobs = [TokenLogprob(t, None if i == 0 else -0.5, self._top(request, t, i)) for i, t in enumerate(ids)][start:]
        if sampling.max_new_tokens == 0:
            yield Chunk(request.rid, k, "", [], "length", None, len(ids), 0, len(ids) // 2, [], prompt_logprobs)
        for j in range(sampling.max_new_tokens):
            token = FIRST_CHARACTER + (echo[j % len(echo)] - FIRST_CHARACTER + shift) % (LAST_CHARACTER - FIRST_CHARACTER + 1)
            piece = self.decode([token])
            matched: int | str | None = None
            text += piece
            if any(text.endswith(stop) for stop in request.stop):
                matched = next(stop for stop in request.stop if text.endswith(stop))
                piece = ""
            elif token in sampling.stop_token_ids:
                matched, piece = token, ""
            if self.break_after is not None and j >= self.break_after:
                raise RuntimeError("the fake engine broke")
            logprobs = [] if request.logprobs is None else [TokenLogprob(token, -(j + 1) / 10, self._top(request, token, 1))]
            reason = "stop" if matched is not None else "length" if j + 1 == sampling.max_new_tokens else None
            yield Chunk(request.rid, k, piece, [token], reason, matched, len(ids), j + 1, len(ids) // 2, logprobs, prompt_logprobs)
            prompt_logprobs = []

    def _top(self, request: GenerateRequest, token: int, position: int) -> list[tuple[int, float]]:
        count = request.logprobs.top if request.logprobs else 0
        return [(FIRST_CHARACTER + (token + i) % 90, -float(i + 1)) for i in range(count)] if position else []

    # ---- control ----------------------------------------------------------------------------------------------------
    async def load_adapter(self, name: str, path: str, pinned: bool = False, load_inplace: bool = False) -> dict[str, Any]:
        if not self.config.enable_lora:
            raise RequestError("LoRA is not enabled: start the server with --enable-lora", param="name")
        if name in self.loaded and not load_inplace:
            if self.loaded[name]["path"] != path:
                raise RequestError(f"{name!r} is loaded with revision {self.loaded[name]['revision']}", param="name")
            return self.loaded[name] | {"already_loaded": True}
        if "missing" in path:
            raise RequestError(f"{path}/adapter_config.json: no such file", param="path")
        record = {"name": name, "path": path, "revision": f"rev-{path}", "rank": 8, "nbytes": 1024}
        self.loaded[name] = record | {"pinned": pinned, "resident": True, "running": 0}
        return self.loaded[name] | {"already_loaded": False}

    async def unload_adapter(self, name: str) -> dict[str, Any]:
        if name not in self.loaded:
            raise RequestError(f"{name!r} is not loaded", 404, "model", "model_not_found")
        record = self.loaded.pop(name)
        while any(request.adapter == name for request in self.running.values()):
            await asyncio.sleep(0.005)
        return {"name": name, "freed_bytes": record["nbytes"]}

    async def adapters(self) -> list[dict[str, Any]]:
        return [dict(record) for record in self.loaded.values()]

    async def flush_cache(self) -> dict[str, Any]:
        self.flushed += 1
        return {"flushed_pages": 3}

    async def abort(self, rid: str) -> None:
        self.abort_calls.append(rid)

    async def stats(self) -> dict[str, Any]:
        return {"running": len(self.running), "waiting": 2, "kv_pages_total": 100, "kv_pages_used": 7, "prefix_hit_tokens": 30, "prefix_query_tokens": 40}
