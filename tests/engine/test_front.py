"""The front without an engine: what goes to it, and what users get of its outputs."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_lora_moe.core import Abort, LogprobOptions, Reply, RequestError, SamplingParams, Submit, TokenLogprob, TokenOutput
from sglang_lora_moe.engine.front import Chunk, Failure, Front, GenerateRequest
from tests.engine.test_detokenizer import byte_level_tokenizer, sentencepiece_tokenizer
from tests.tiny_models import EOS_ID, VOCAB_SIZE, make_tokenizer

TOKENIZER = make_tokenizer()


def front(tokenizer: Any = TOKENIZER, eos_ids: list[int] | None = None) -> Front:
    return Front(tokenizer, VOCAB_SIZE, [EOS_ID] if eos_ids is None else eos_ids, 1000)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def feed(f: Front, rid: str, text: str, last: str | None = None) -> list[Any]:
    events: list[Any] = []
    for i, token in enumerate(ids_of(text)):
        events += f.on_message(TokenOutput(rid, [token], 3, finish_reason=last if i == len(text) - 1 else None))
    return events


def text_of(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


def test_one_request() -> None:
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="hi", sampling=SamplingParams(seed=5), adapter="a", rid="r"))
    assert submit.input_ids == [1, *ids_of("hi")] and submit.adapter == "a" and submit.sampling.seed == 5
    events = feed(f, submit.rid, "hello", "length")
    (chunk,) = events  # not streamed: one chunk
    assert (chunk.rid, chunk.index, chunk.text, chunk.finish_reason, chunk.completion_tokens, chunk.prompt_tokens) == ("r", 0, "hello", "length", 5, 3)
    assert chunk.token_ids == ids_of("hello") and not f._samples and f.forget("r") == [] and not f._requests


def test_streaming_gives_deltas() -> None:
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="hi", stream=True))
    events = feed(f, submit.rid, "hello", "length")
    assert [event.text for event in events] == list("hello") and [event.completion_tokens for event in events] == [1, 2, 3, 4, 5]
    assert events[0].rid and [event.finish_reason for event in events] == [None] * 4 + ["length"]


def test_streamed_ids_wait_for_their_text() -> None:
    tokenizer = byte_level_tokenizer()
    f = Front(tokenizer, len(tokenizer), [0], 1000)
    (submit,) = f.submit(GenerateRequest(prompt="x", stream=True))
    ids = tokenizer.encode("é!")
    events = [event for token in ids for event in f.on_message(TokenOutput(submit.rid, [token], 1, logprobs=[TokenLogprob(token, -1.0)]))]
    assert [(event.text, event.token_ids) for event in events] == [("é", ids[:2]), ("!", ids[2:])]
    assert [len(event.logprobs) for event in events] == [2, 1]


def test_end_of_sequence_is_no_text() -> None:
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="hi"))
    feed(f, submit.rid, "ok")
    (chunk,) = f.on_message(TokenOutput(submit.rid, [ids_of("!")[0]], 3, finish_reason="stop", stop_token_id=ids_of("!")[0]))
    assert (chunk.text, chunk.matched_stop, chunk.finish_reason) == ("ok", ids_of("!")[0], "stop")
    assert chunk.token_ids == ids_of("ok!") and chunk.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_trims_and_aborts(stream: bool) -> None:
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="hi", stop=["END", "XX"], stream=stream))
    events = feed(f, submit.rid, "some EN ENDmore")
    assert text_of(events) == "some EN "
    assert isinstance(events[-1], Abort) and events[-1].rid == submit.rid
    assert (events[-2].finish_reason, events[-2].matched_stop, events[-2].completion_tokens) == ("stop", "END", 11)
    assert f.on_message(TokenOutput(submit.rid, [], 3, finish_reason="abort")) == []  # the engine's answer to the abort
    assert not f._samples


@pytest.mark.parametrize(("skip", "untrimmed", "text"), [(True, False, "ok"), (True, True, "ok"), (False, False, "ok"), (False, True, "ok<eos>")])
def test_special_tokens_and_what_ended_the_text_may_stay(skip: bool, untrimmed: bool, text: str) -> None:
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="hi", skip_special_tokens=skip, no_stop_trim=untrimmed, stop=["END"]))
    (chunk,) = f.on_message(TokenOutput(submit.rid, [*ids_of("ok"), EOS_ID], 3, finish_reason="stop", stop_token_id=EOS_ID))
    assert (chunk.text, chunk.matched_stop) == (text, EOS_ID)
    (submit,) = f.submit(GenerateRequest(prompt="hi", skip_special_tokens=skip, no_stop_trim=untrimmed, stop=["END"], stream=True))
    assert text_of(feed(f, submit.rid, "some ENDmore")) == ("some END" if untrimmed else "some ")
    with pytest.raises(RequestError, match="no_stop_trim: expected true or false, got 1"):
        f.submit(GenerateRequest(prompt="hi", no_stop_trim=1))  # type: ignore[arg-type]


def test_stop_string_in_the_last_token_needs_no_abort() -> None:
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="hi", stop=["z"]))
    events = feed(f, submit.rid, "abz", "length")
    assert [type(event) for event in events] == [Chunk]
    assert (events[0].text, events[0].finish_reason, events[0].matched_stop) == ("ab", "stop", "z")


def test_held_back_text_comes_at_the_end() -> None:
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="hi", stop=["END"], stream=True))
    events = feed(f, submit.rid, "the EN", "length")
    assert text_of(events) == "the EN" and events[-1].text == "EN"


def test_samples_have_seeds_of_their_own() -> None:
    f = front()
    first = f.submit(GenerateRequest(prompt="hi", n=3, sampling=SamplingParams(seed=9), rid="r"))
    seeds = [submit.sampling.seed for submit in first]
    assert seeds[0] == 9 and len(set(seeds)) == 3 and len({submit.rid for submit in first}) == 3
    assert [submit.sampling.seed for submit in f.submit(GenerateRequest(prompt="hi", n=3, sampling=SamplingParams(seed=9)))] == seeds
    assert [submit.sampling.seed for submit in f.submit(GenerateRequest(prompt="hi", n=2))] == [None, None]
    ends = [feed(f, submit.rid, "ab", "length")[0] for submit in reversed(first)]
    assert [chunk.index for chunk in ends] == [2, 1, 0] and {chunk.rid for chunk in ends} == {"r"}


def test_refusal_ends_all_samples() -> None:
    f = front()
    submits = f.submit(GenerateRequest(prompt="hi", n=2, rid="r"))
    failure, *aborts = f.on_message(Reply(submits[1].rid, error="queue full", status=503, retry_after=2))
    assert isinstance(failure, Failure) and (failure.rid, failure.error.status, failure.error.retry_after) == ("r", 503, 2)
    assert aborts == [Abort(submit.rid) for submit in submits]
    assert f.on_message(TokenOutput(submits[0].rid, [4], 3)) == []
    assert f.forget("r") == aborts and not f._requests and not f._samples  # again, which the engine takes: some may have begun between


class Picky:
    """A tokenizer that, as some written in Python, has no word for an id."""

    eos_token_id = EOS_ID

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return ids_of(text)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if VOCAB_SIZE - 1 in ids:
            raise KeyError(VOCAB_SIZE - 1)
        return str(TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens))


def test_what_the_tokenizer_cannot_decode_ends_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    f = front(Picky())
    bad, other = f.submit(GenerateRequest(prompt="hi", n=2, rid="r", stream=True))
    (good,) = f.submit(GenerateRequest(prompt="hi"))
    failure, *aborts = f.on_message(TokenOutput(bad.rid, [VOCAB_SIZE - 1], 3))
    assert isinstance(failure, Failure) and failure.error.status == 500 and "KeyError" in failure.error.message
    assert aborts == [Abort(bad.rid), Abort(other.rid)] and "request r" in caplog.text
    assert text_of(feed(f, good.rid, "hello", "length")) == "hello"


def test_aborts_and_forget() -> None:
    f = front()
    submits = f.submit(GenerateRequest(prompt="hi", n=2, rid="r"))
    assert f.aborts("r") == [Abort(submit.rid) for submit in submits]
    (chunk,) = f.on_message(TokenOutput(submits[0].rid, [], 3, finish_reason="abort"))
    assert chunk.finish_reason == "abort"
    assert f.forget("r") == [Abort(submits[1].rid)]
    assert f.forget("r") == [] == f.aborts("r") and f.aborts("") == [Abort("")]


@pytest.mark.parametrize("ended", [False, True])
def test_an_id_may_be_used_again_when_its_reader_has_gone(ended: bool) -> None:
    """Not before: what the reader has not taken yet, and its end, would be the new request's."""
    f = front()
    (old,) = f.submit(GenerateRequest(prompt="hi", rid="r"))
    if ended:
        feed(f, old.rid, "a", "length")
    with pytest.raises(RequestError, match="'r' is running already"):
        f.submit(GenerateRequest(prompt="hi", rid="r"))
    f.forget("r")
    (new,) = f.submit(GenerateRequest(prompt="hi", rid="r"))
    assert f.on_message(TokenOutput(old.rid, [5], 3, finish_reason="abort")) == []  # late words of the old one
    assert feed(f, new.rid, "a", "length")[0].text == "a"


def test_prompt_logprobs_come_with_the_first_chunk() -> None:
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="hi", logprobs=LogprobOptions(prompt_start=0), stream=True))
    first = f.on_message(TokenOutput(submit.rid, [40], 3, logprobs=[TokenLogprob(40, -1.0)], prompt_logprobs=[TokenLogprob(1, None)]))[0]
    second = f.on_message(TokenOutput(submit.rid, [41], 3, logprobs=[TokenLogprob(41, -2.0)], finish_reason="length"))[0]
    assert isinstance(first, Chunk) and first.prompt_logprobs == [TokenLogprob(1, None)] and first.logprobs == [TokenLogprob(40, -1.0)]
    assert isinstance(second, Chunk) and second.prompt_logprobs == [] and second.logprobs == [TokenLogprob(41, -2.0)]


def test_the_tokenizers_end_of_sequence_counts_too() -> None:
    f = front(eos_ids=[77])
    (submit,) = f.submit(GenerateRequest(prompt="hi", sampling=SamplingParams(stop_token_ids=[5])))
    assert submit.sampling.stop_token_ids == [5, EOS_ID]
    (submit,) = f.submit(GenerateRequest(prompt="hi", sampling=SamplingParams(ignore_eos=True)))
    assert submit.sampling.stop_token_ids == []


def test_without_a_tokenizer_ids_are_served() -> None:
    f = front(tokenizer=None)
    (submit,) = f.submit(GenerateRequest(input_ids=[4, 5]))
    (chunk,) = f.on_message(TokenOutput(submit.rid, [6], 2, finish_reason="length"))
    assert isinstance(chunk, Chunk) and (chunk.text, chunk.token_ids) == ("", [6])
    (submit,) = f.submit(GenerateRequest(input_ids=[4, 5], stream=True))
    events = [event for token in (6, 7) for event in f.on_message(TokenOutput(submit.rid, [token], 2, finish_reason="length" if token == 7 else None))]
    assert [event.token_ids for event in events if isinstance(event, Chunk)] == [[6], [7]]  # each as it comes
    for request in (GenerateRequest(prompt="x"), GenerateRequest(input_ids=[1], stop=["x"])):
        with pytest.raises(RequestError, match="no tokenizer"):
            f.submit(request)


BAD_SAMPLING: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", 0),
    ("top_k", 2.5),
    ("min_p", -1),
    ("repetition_penalty", 0),
    ("presence_penalty", 2.1),
    ("frequency_penalty", float("inf")),
    ("max_new_tokens", -1),
    ("max_new_tokens", True),
    ("min_new_tokens", 200),
    ("seed", 1.5),
    ("seed", 2**64),
    ("ignore_eos", 1),
    ("stop_token_ids", [1.0]),
    ("logit_bias", {VOCAB_SIZE: 1.0}),
    ("logit_bias", {3: 200.0}),
    ("logit_bias", {3: float("nan")}),
]


@pytest.mark.parametrize("name, value", BAD_SAMPLING, ids=str)
def test_bad_sampling_values_name_their_field(name: str, value: Any) -> None:
    f = front()
    with pytest.raises(RequestError, match=name) as error:
        f.submit(GenerateRequest(prompt="hi", sampling=SamplingParams(**{name: value})))
    assert (error.value.status, error.value.param) == (400, name) and not f._requests


@pytest.mark.parametrize(
    "param, fields",
    [
        ("stop", {"stop": [""]}),
        ("stop", {"stop": ["x"] * 65}),
        ("n", {"n": 0}),
        ("n", {"n": 10_000}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": "x", "input_ids": [1]}),
        ("prompt", {"prompt": "\ud800"}),
        ("prompt", {"prompt": 5}),
        ("input_ids", {"prompt": None, "input_ids": []}),
        ("input_ids", {"prompt": None, "input_ids": [1, "2"]}),
        ("input_ids", {"prompt": None, "input_ids": [1, VOCAB_SIZE]}),
        ("input_ids", {"prompt": None, "input_ids": [1] * 1000}),
        ("lora_path", {"adapter": 5}),
        ("top_logprobs", {"logprobs": LogprobOptions(top=-1)}),
        ("logprob_start_len", {"logprobs": LogprobOptions(prompt_start=-1)}),
    ],
    ids=str,
)
def test_bad_requests_name_their_field(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        front().submit(GenerateRequest(**({"prompt": "hi"} | fields)))
    assert error.value.param == param


def test_submits_are_plain_messages() -> None:
    (submit,) = front().submit(GenerateRequest(prompt="hi"))
    assert isinstance(submit, Submit)


def test_a_text_far_too_long_is_refused_by_its_beginning() -> None:
    seen = []

    class Watched:
        decode = staticmethod(TOKENIZER.decode)

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            seen.append(len(text))
            return ids_of(text)

    f = front(Watched())
    with pytest.raises(RequestError, match="more than 8000 tokens") as error:
        f.submit(GenerateRequest(prompt="x" * 10**7))
    assert seen == [8000] and error.value.param == "prompt" and error.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="has 1000 tokens"):
        f.submit(GenerateRequest(prompt="x" * 1000))
    assert f.submit(GenerateRequest(prompt="x" * 999))


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_stop_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(RequestError, match="stop_token_ids: expected token ids from 0 to") as error:
        front().submit(GenerateRequest(prompt="x", sampling=SamplingParams(stop_token_ids=[5, token])))
    assert error.value.param == "stop_token_ids"


def test_stop_strings_wait_for_the_fewest_tokens() -> None:
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="x", stop=["l"], sampling=SamplingParams(min_new_tokens=4)))
    assert text_of(feed(f, submit.rid, "hello all")) == "hel"  # the second l is token 4
    (submit,) = f.submit(GenerateRequest(prompt="x", stop=["l"], sampling=SamplingParams(min_new_tokens=5)))
    assert text_of(feed(f, submit.rid, "hello all")) == "hello a"


@pytest.mark.parametrize("fewest, text", [(0, "ab"), (3, "ab"), (4, "abX"), (5, "abXY"), (7, "abXYcd")])
def test_a_stop_string_may_begin_before_the_fewest_tokens(fewest: int, text: str) -> None:
    """What was said of it before stays."""
    f = front()
    (submit,) = f.submit(GenerateRequest(prompt="x", stop=["XY", "cde"], sampling=SamplingParams(min_new_tokens=fewest), stream=True))
    events = feed(f, submit.rid, "abXYcdef", "length")
    assert text_of(events) == text and [event.matched_stop for event in events if isinstance(event, Chunk)][-1] == ("cde" if fewest > 4 else "XY")


def test_text_goes_on_where_the_prompt_ends() -> None:
    """Such tokenizers drop the space at the beginning of a text, which the beginning of an answer is not."""
    tokenizer = sentencepiece_tokenizer("the", "capital", "is", "Paris", "!")
    f = Front(tokenizer, len(tokenizer), [0], 1000)
    for stream in (False, True):
        (submit,) = f.submit(GenerateRequest(prompt="the capital is", stream=stream))
        answer = tokenizer.encode("Paris Paris", add_special_tokens=False)
        events = [e for i, token in enumerate(answer) for e in f.on_message(TokenOutput(submit.rid, [token], 3, finish_reason="length" if i else None))]
        assert text_of(events) == " Paris Paris"
