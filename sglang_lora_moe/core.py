"""Types that the front (text) and the engine (token ids) exchange. No torch, no server library, no behaviour.

The front turns one user request into one `Submit` per sample; the engine answers with `TokenOutput`s and `Reply`s.
Everything here is a plain dataclass of plain values, so that `engine/process.py` alone knows how it is encoded.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]  # stop: an end-of-sequence or stop id, or (decided by the front) a stop string


class RequestError(Exception):
    """A request that cannot be served, with the HTTP status and OpenAI error fields that say so.

    `code` is OpenAI's machine-readable code (`model_not_found`, ...), `param` the field at fault, `retry_after` seconds.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.retry_after = message, status, param, code, retry_after


@dataclass(slots=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. Defaults are SGLang's native ones; text-level `stop` stays in the front."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = -1  # -1 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False


@dataclass(slots=True)
class LogprobOptions:
    """What log-probabilities a request wants. `prompt_start` None = none for the prompt."""

    top: int = 0  # alternatives per position
    prompt_start: int | None = None


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability (natural log, of the unmodified model distribution) of one token and of the best alternatives."""

    token_id: int
    logprob: float | None  # None for the first prompt token
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class Submit:
    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    adapter: str | None = None  # name; bound to a revision when the engine admits it
    logprobs: LogprobOptions | None = None


@dataclass(slots=True)
class Abort:
    rid: str  # a request id; "" = all
    reason: FinishReason = "abort"  # how the books count its end: "stop" where the front has found a stop string


@dataclass(slots=True)
class LoadAdapter:
    rid: str
    name: str
    path: str
    pinned: bool = False
    load_inplace: bool = False  # other content may take the place of what the name stands for


@dataclass(slots=True)
class UnloadAdapter:
    rid: str
    name: str


@dataclass(slots=True)
class FlushCache:
    rid: str


@dataclass(slots=True)
class GetStats:
    rid: str


@dataclass(slots=True)
class TokenOutput:
    """New tokens of one request, in order. `finish_reason` is set on the last one; counts are totals so far."""

    rid: str
    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id that ended the request, when one did (it is the last of token_ids)
    logprobs: list[TokenLogprob] | None = None  # one per token_ids
    prompt_logprobs: list[TokenLogprob] | None = None  # whole list, once, with the first output


@dataclass(slots=True)
class Reply:
    """Answer to a control message, or a refusal of a Submit. `error` None = success and `data` holds the result."""

    rid: str
    data: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    status: int = 200
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    @classmethod
    def refusal(cls, rid: str, error: RequestError) -> "Reply":
        return cls(rid, {}, error.message, error.status, error.param, error.code, error.retry_after)

    def raise_error(self) -> None:
        """Raise the RequestError that this reply carries, if it does."""
        if self.error is not None:
            raise RequestError(self.error, self.status, self.param, self.code, self.retry_after)


FrontMessage = Submit | Abort | LoadAdapter | UnloadAdapter | FlushCache | GetStats
EngineMessage = TokenOutput | Reply
