"""The text side of the engine: one user request in, one `Submit` per sample out; token ids back, text out.

Tokenizes, expands n, detokenizes piece by piece, finds stop strings (trimmed from the text) and builds `Chunk`s. Plain
synchronous code without a thread or a socket: the in-process `Engine` and the server's `AsyncEngine` both drive it.
"""

import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_lora_moe.core import Abort, EngineMessage, LogprobOptions, Reply, RequestError, SamplingParams, Submit, TokenLogprob, TokenOutput
from sglang_lora_moe.engine.detokenizer import CONTEXT, Detokenizer, StopStrings, make_decode, silent_ids
from sglang_lora_moe.engine.seeds import derive_seed
from sglang_lora_moe.engine.tokenizer import encode
from sglang_lora_moe.engine.validate import check_ids, check_request, is_int, refuse, too_long

logger = logging.getLogger(__name__)
_SAMPLE = "sample-"  # how the engine's names of samples begin
Triple = tuple[float | None, int, str | None]  # SGLang's (logprob, token id, text or None)
LONG_TEXT = 20_000  # characters of a request or a batch; more of them the server tokenizes in threads, so that no stream waits for it


@dataclass(slots=True)
class GenerateRequest:
    """What a user asks for: exactly one of `prompt` and `input_ids`, continued `n` times."""

    prompt: str | None = None
    input_ids: list[int] | None = None
    add_special_tokens: bool = True  # to the prompt; a chat template writes them itself
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: list[str] = field(default_factory=list)
    n: int = 1
    skip_special_tokens: bool = True  # in the text
    no_stop_trim: bool = False  # the text ends with what ended it, a stop string or the text of a stop id
    adapter: str | None = None  # name, None = base model
    logprobs: LogprobOptions | None = None
    stream: bool = False  # False: one chunk per sample, at its end
    rid: str = ""


@dataclass(slots=True)
class Chunk:
    """What is new of sample `index` of request `rid`, or with `add` all of it so far. Text and ids are deltas, counts are totals so far.

    While streaming, ids wait until some text can be said with them. `matched_stop` is the stop string or the stop id that
    ended the sample; neither is part of the text, but with `no_stop_trim`.
    """

    rid: str
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    matched_stop: int | str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, new: "Chunk") -> None:
        """Append what came after this."""
        self.text += new.text
        self.token_ids += new.token_ids
        self.logprobs += new.logprobs
        self.prompt_logprobs += new.prompt_logprobs
        self.finish_reason, self.matched_stop = new.finish_reason, new.matched_stop
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = new.prompt_tokens, new.completion_tokens, new.cached_tokens


@dataclass(slots=True)
class Failure:
    """Request `rid` ends with an error instead of a last chunk."""

    rid: str
    error: RequestError


class _Sample:
    """One sample on its way from ids to text."""

    def __init__(self, request: GenerateRequest, index: int, detokenizer: Detokenizer | None) -> None:
        self.request, self.index, self.detokenizer = request, index, detokenizer
        self.stops = StopStrings(request.stop)
        self.waits = not request.stream and not request.stop  # text is needed at the end only
        self.unread: list[int] = []  # ids that the detokenizer has not seen
        self.pending = Chunk(request.rid, index)
        self.completion_tokens = 0

    def push(self, output: TokenOutput) -> Chunk | None:
        """Take in new tokens; returns what can be said, None if nothing yet."""
        chunk = self.pending
        chunk.token_ids += output.token_ids
        self.completion_tokens += len(output.token_ids)
        chunk.prompt_tokens, chunk.cached_tokens, chunk.completion_tokens = output.prompt_tokens, output.cached_tokens, self.completion_tokens
        chunk.logprobs += output.logprobs or ()
        chunk.prompt_logprobs += output.prompt_logprobs or ()
        chunk.finish_reason = output.finish_reason
        self.unread += output.token_ids
        if output.stop_token_id is not None:
            chunk.matched_stop = output.stop_token_id
            if not self.request.no_stop_trim:
                self.unread.pop()
        if not self.waits or output.finish_reason is not None:
            self._read(last=output.finish_reason is not None)
        said = chunk.text or (self.detokenizer is None and chunk.token_ids)  # without a tokenizer ids are all that can be said
        if chunk.finish_reason is None and not (self.request.stream and said):
            return None
        self.pending = Chunk(self.request.rid, self.index)
        return chunk

    def _read(self, last: bool) -> None:
        """Turn unread ids into text, up to a stop string, of which none ends before the last of `min_new_tokens`."""
        chunk, detokenizer = self.pending, self.detokenizer
        if detokenizer is None:
            return
        text = detokenizer.push(self.unread, last)
        self.unread = []
        said, stop = self.stops.push(text, may_end=self.completion_tokens >= self.request.sampling.min_new_tokens)
        if stop is not None:
            chunk.finish_reason, chunk.matched_stop = "stop", stop
            said += stop if self.request.no_stop_trim else ""
        elif last:
            said += self.stops.finish()
        chunk.text += said


class Front:
    """All requests of one engine that have not ended. `tokenizer` None: ids only, texts are empty. `capacity`: most tokens of a request."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: list[int], capacity: int) -> None:
        self.tokenizer, self.vocab_size, self.capacity = tokenizer, vocab_size, capacity
        eos = getattr(tokenizer, "eos_token_id", None)
        # A chat model often ends with another id than its config's
        self._more_eos: list[Any] = [eos] if is_int(eos) and eos not in eos_ids else []
        self._decode = {skip: make_decode(tokenizer, skip) for skip in (True, False)} if tokenizer is not None else {}
        self._silent = {True: silent_ids(tokenizer), False: frozenset[int]()}  # by skip_special_tokens, as above
        self._samples: dict[str, _Sample] = {}  # by the id that the engine knows, which is never used twice
        self._requests: dict[str, list[str]] = {}  # request -> ids of its samples that have not ended; until `forget`
        self._serial = 0

    def submit(self, request: GenerateRequest, ids: list[int] | None = None) -> list[Submit]:
        """Check and register a request, giving it an id if it has none: messages that go to the engine, in order. `ids`: what `tokenize` gave.

        RequestError, and nothing registered, for a value that cannot be right.
        """
        self.check(request)
        request.rid = request.rid or uuid.uuid4().hex
        if request.rid in self._requests:
            raise RequestError(f"rid: a request with the id {request.rid!r} is running already", param="rid")
        ids = self.tokenize(request) if ids is None else ids
        if max(ids, default=0) >= self.vocab_size:
            raise RequestError(f"input_ids: token id {max(ids)} is outside the vocabulary of {self.vocab_size}", param="input_ids")
        if request.stop and not self._decode:
            raise RequestError("stop: this engine has no tokenizer, so it cannot look for texts; use stop_token_ids", param="stop")
        sampling = request.sampling
        if self._more_eos and not sampling.ignore_eos:
            sampling = replace(sampling, stop_token_ids=[*sampling.stop_token_ids, *self._more_eos])
        messages, decode = [], self._decode.get(request.skip_special_tokens)
        for index in range(request.n):
            self._serial += 1
            name = f"{_SAMPLE}{self._serial}"
            detokenizer = Detokenizer(decode, ids[-CONTEXT:], self._silent[request.skip_special_tokens]) if decode is not None else None
            self._samples[name] = _Sample(request, index, detokenizer)
            own = sampling if sampling.seed is None or index == 0 else replace(sampling, seed=derive_seed(sampling.seed, index))
            messages.append(Submit(name, ids, own, request.adapter, request.logprobs))
        self._requests[request.rid] = [message.rid for message in messages]
        return messages

    def check(self, request: GenerateRequest) -> None:
        """RequestError for what can be said to be wrong without its prompt."""
        check_request(request.sampling, request.stop, request.n, request.logprobs, self.vocab_size)
        for name in ("skip_special_tokens", "no_stop_trim"):
            if not isinstance(getattr(request, name), bool):
                raise refuse(name, "true or false", getattr(request, name))
        if request.adapter is not None and not isinstance(request.adapter, str):
            raise refuse("lora_path", "the name of an adapter", request.adapter)

    def on_message(self, message: EngineMessage) -> list[Chunk | Failure | Abort | Reply]:
        """Chunks and failures for users, aborts for the engine; replies to control messages pass through."""
        sample = self._samples.get(message.rid)
        if sample is None:  # answers a control message, or a sample that ended (by a stop string, or forgotten) before the engine knew
            return [message] if isinstance(message, Reply) and not message.rid.startswith(_SAMPLE) else []
        rid = sample.request.rid
        if isinstance(message, Reply):
            error = RequestError(message.error or "refused", message.status, message.param, message.code, message.retry_after)
            return [Failure(rid, error), *self.aborts(rid)]
        try:
            return list(self._on_output(message, sample))
        except Exception as error:  # of the tokenizer's: the other requests go on
            logger.exception("request %s: its tokens cannot be made text", rid)
            return [Failure(rid, RequestError(f"the tokenizer failed: {type(error).__name__}: {error}", 500)), *self.aborts(rid)]

    def aborts(self, rid: str) -> list[Abort]:
        """Messages that end a request ("" = all); its last chunks will say so."""
        return [Abort(name) for name in self._requests.get(rid, [])] if rid else [Abort("")]

    def forget(self, rid: str) -> list[Abort]:
        """End a request of which nobody wants to hear any more. To be called for every one: until then its id is taken."""
        names = self._requests.pop(rid, [])
        for name in names:
            del self._samples[name]
        return [Abort(name) for name in names]

    def _on_output(self, output: TokenOutput, sample: _Sample) -> Iterable[Chunk | Abort]:
        chunk = sample.push(output)
        if chunk is None:
            return
        yield chunk
        if chunk.finish_reason is not None:
            del self._samples[output.rid]
            self._requests[sample.request.rid].remove(output.rid)
            if output.finish_reason is None:  # a stop string: the engine goes on until it is told
                yield Abort(output.rid, "stop")

    def tokenize(self, request: GenerateRequest) -> list[int]:
        """The token ids of the prompt, checked. Changes nothing, so that any thread may do it."""
        if (request.prompt is None) == (request.input_ids is None):
            raise RequestError("prompt: exactly one of prompt and input_ids must be given", param="prompt")
        if request.input_ids is not None:
            if not isinstance(request.input_ids, list) or not request.input_ids:
                raise refuse("input_ids", "a list of token ids that is not empty", request.input_ids)
            if len(request.input_ids) >= self.capacity:
                raise too_long(len(request.input_ids), self.capacity, "input_ids")
            return check_ids(request.input_ids, "input_ids")
        if not isinstance(request.prompt, str):
            raise refuse("prompt", "a text", request.prompt)
        if self.tokenizer is None:
            raise RequestError("prompt: this engine has no tokenizer; give input_ids", param="prompt")
        return encode(self.tokenizer, request.prompt, self.capacity, "prompt", add_special_tokens=request.add_special_tokens)


# ---- SGLang's result object, the same in-process and over HTTP --------------------------------------------------------
def native_result(
    request: GenerateRequest, sample: Chunk, seconds: float, triple: Callable[[float | None, int], Triple] = lambda logprob, token_id: (logprob, token_id, None)
) -> dict[str, Any]:
    """SGLang's {text, output_ids, meta_info} of a sample so far, `seconds` after the request came; `triple` writes one log-probability."""
    meta: dict[str, Any] = {
        "id": request.rid if request.n == 1 else f"{request.rid}-{sample.index}",
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


def _finish(sample: Chunk) -> dict[str, Any] | None:
    if sample.finish_reason is None:
        return None
    details: dict[str, dict[str, Any]] = {"stop": {"matched": sample.matched_stop}, "length": {"length": sample.completion_tokens}}
    return {"type": sample.finish_reason} | details.get(sample.finish_reason, {"message": "aborted"})
