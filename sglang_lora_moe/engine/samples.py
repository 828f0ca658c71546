"""One sample of a request, added up from its chunks, and SGLang's result object for it: the same in-process and over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sglang_lora_moe.core import TokenLogprob
from sglang_lora_moe.engine.front import Chunk, GenerateRequest

Triple = tuple[float | None, int, str | None]  # SGLang's (logprob, token id, text or None)


@dataclass(slots=True)
class Sample:
    """The chunks of one sample of one prompt, added up."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    matched_stop: int | str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs or ()
        self.prompt_logprobs += chunk.prompt_logprobs or ()
        self.finish_reason, self.matched_stop = chunk.finish_reason, chunk.matched_stop
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.completion_tokens, chunk.cached_tokens


def plain_triple(logprob: float | None, token_id: int) -> Triple:
    return logprob, token_id, None


def native_result(
    request: GenerateRequest, index: int, sample: Sample, seconds: float, triple: Callable[[float | None, int], Triple] = plain_triple
) -> dict[str, Any]:
    """SGLang's {text, output_ids, meta_info} of sample `index`, `seconds` after the request came; `triple` writes one log-probability."""
    meta: dict[str, Any] = {
        "id": request.rid if request.n == 1 else f"{request.rid}-{index}",
        "finish_reason": _finish(sample),
        "prompt_tokens": sample.prompt_tokens,
        "completion_tokens": sample.completion_tokens,
        "cached_tokens": sample.cached_tokens,
        "lora_path": request.adapter,
        "e2e_latency": seconds,
    }
    if request.logprobs is not None:
        for side, entries in (("input", sample.prompt_logprobs), ("output", sample.logprobs)):
            meta[f"{side}_token_logprobs"] = [triple(entry.logprob, entry.token_id) for entry in entries]
            if request.logprobs.top:
                meta[f"{side}_top_logprobs"] = [[triple(value, i) for i, value in entry.top] if entry.logprob is not None else None for entry in entries]
    return {"text": sample.text, "output_ids": list(sample.token_ids), "meta_info": meta}


def _finish(sample: Sample) -> dict[str, Any] | None:
    if sample.finish_reason is None:
        return None
    if sample.finish_reason == "stop":
        return {"type": "stop", "matched": sample.matched_stop}
    if sample.finish_reason == "length":
        return {"type": "length", "length": sample.completion_tokens}
    return {"type": sample.finish_reason, "message": "aborted"}
