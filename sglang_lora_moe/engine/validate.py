"""Checks of what a user asks for. Every refusal is a RequestError whose `param` names the field."""

from collections.abc import Callable
from typing import Any

from sglang_lora_moe.core import LogprobOptions, RequestError, SamplingParams

MAX_SAMPLES = 128
MAX_STOPS = 64
MAX_BIAS = 100.0


def shown(value: object) -> str:
    """`value` as an error quotes it, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def refuse(param: str, expected: str, found: object) -> RequestError:
    return RequestError(f"{param}: expected {expected}, got {shown(found)}", param=param, code="invalid_value")


def spread(value: Any, count: int, param: str) -> list[Any]:
    """One value per prompt: `value` for all, or a list of exactly `count`."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise refuse(param, f"one value or a list of {count}, one per prompt", value)
    return value


def same_value(**names: Any) -> Any:
    """The value of a field that has several names, None where none was given; RequestError where they differ."""
    given = [(name, value) for name, value in names.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise refuse(name, f"the same as {given[0][0]}, which is another name of it", value)
    return given[0][1] if given else None


def too_long(tokens: int | str, capacity: int, param: str) -> RequestError:
    text = f"the prompt has {tokens} tokens; with one for the answer it exceeds the {capacity} of a request (--context-length, --max-total-tokens)"
    return RequestError(text, 400, param, "context_length_exceeded")


def check_text(text: str, param: str) -> str:
    """`text` if it is valid Unicode: JSON's escapes can write lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{param}: not valid Unicode: {error.reason} at character {error.start}", param=param, code="invalid_value") from error
    return text


def check_ids(ids: list[Any], param: str) -> list[int]:
    """`ids` if they are integers >= 0 (the engine knows how many there are)."""
    if set(map(type, ids)) <= {int} and min(ids, default=0) >= 0 and max(ids, default=0) < 2**63:
        return ids
    i = next(i for i, value in enumerate(ids) if type(value) is not int or not 0 <= value < 2**63)
    raise RequestError(f"{param}: element {i} must be a token id, an integer >= 0, got {shown(ids[i])}", param=param, code="invalid_value")


def is_int(value: object) -> bool:
    """An integer that fits 64 bits, as messages need."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: object) -> bool:
    """A number that float32 holds, as tensors of them do."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -3e38 < value < 3e38


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda v: is_int(v) and v >= 0, "an integer of at least 0"),
    "min_new_tokens": (lambda v: is_int(v) and v >= 0, "an integer of at least 0"),
    "temperature": (lambda v: is_number(v) and v >= 0, "a number of at least 0"),
    "top_p": (lambda v: is_number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "top_k": (lambda v: is_int(v) and (v == -1 or v >= 1), "an integer of at least 1, or -1 for all"),
    "min_p": (lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda v: is_number(v) and 0 < v <= 2, "a number above 0 and at most 2"),
    "presence_penalty": (lambda v: is_number(v) and -2 <= v <= 2, "a number from -2 to 2"),
    "frequency_penalty": (lambda v: is_number(v) and -2 <= v <= 2, "a number from -2 to 2"),
    "seed": (lambda v: v is None or is_int(v), "an integer of 64 bits"),
    "ignore_eos": (lambda v: isinstance(v, bool), "true or false"),
    "stop_token_ids": (lambda v: isinstance(v, list) and all(map(is_int, v)), "a list of token ids"),
    "logit_bias": (lambda v: isinstance(v, dict), "an object of token id -> bias"),
}


def check_request(params: SamplingParams, stops: list[str], n: int, logprobs: LogprobOptions | None, vocab_size: int) -> None:
    """Raise for the first field whose value can never be right."""
    for name, (is_right, expected) in _CHECKS.items():
        value = getattr(params, name)
        if not is_right(value):
            raise refuse(name, expected, value)
    if params.min_new_tokens > params.max_new_tokens:
        raise refuse("min_new_tokens", f"at most the {params.max_new_tokens} tokens that may be generated", params.min_new_tokens)
    if bad := [token for token in params.stop_token_ids if not 0 <= token < vocab_size]:
        raise refuse("stop_token_ids", f"token ids from 0 to {vocab_size - 1}", bad[0])
    for token, bias in params.logit_bias.items():
        if not is_int(token) or not 0 <= token < vocab_size:
            raise refuse("logit_bias", f"token ids from 0 to {vocab_size - 1}", token)
        if not is_number(bias) or abs(bias) > MAX_BIAS:
            raise refuse("logit_bias", f"biases from -{MAX_BIAS:g} to {MAX_BIAS:g}", bias)
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise refuse("stop", f"a list of at most {MAX_STOPS} texts, none of them empty", stops)
    if not is_int(n) or not 1 <= n <= MAX_SAMPLES:
        raise refuse("n", f"an integer from 1 to {MAX_SAMPLES}", n)
    if logprobs is not None and (not is_int(logprobs.top) or not 0 <= logprobs.top <= vocab_size):
        raise refuse("top_logprobs", f"an integer from 0 to {vocab_size}", logprobs.top)
    if logprobs is not None and logprobs.prompt_start is not None and (not is_int(logprobs.prompt_start) or logprobs.prompt_start < 0):
        raise refuse("logprob_start_len", "an integer of at least 0", logprobs.prompt_start)
