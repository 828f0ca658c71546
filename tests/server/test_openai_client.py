"""The official client against a real HTTP server on loopback."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.front import GenerateRequest
from sglang_lora_moe.server.openai_protocol import ChatRequest, CompletionRequest
from tests.server.conftest import http_server, wait_for
from tests.server.fake_engine import FakeEngine

HI: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine(api_key="key", admin_api_key="admin")
    with http_server(engine) as url:
        yield engine, url


@pytest.fixture
def engine(shared: tuple[FakeEngine, str]) -> FakeEngine:
    shared[0].refusal = shared[0].break_after = None
    return shared[0]


@pytest.fixture
def api(shared: tuple[FakeEngine, str], engine: FakeEngine) -> Iterator[OpenAI]:
    with OpenAI(base_url=shared[1] + "/v1", api_key="key", max_retries=0) as api:
        api.with_options(api_key="admin").post("/load_lora_adapter", cast_to=object, body={"lora_name": "a", "lora_path": "/a"})
        yield api


def test_list_and_retrieve(api: OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["base", "a"]
    card = api.models.retrieve("a")
    assert card.object == "model" and card.model_extra is not None and card.model_extra["parent"] == "base"


def test_chat(api: OpenAI) -> None:
    answer = api.chat.completions.create(model="base", messages=HI, max_completion_tokens=4, temperature=0)
    assert answer.choices[0].message.content == "hi>h" and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 4)
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 2


def test_adapters_by_model_name(api: OpenAI) -> None:
    for model in ("a", "base:a"):
        assert api.completions.create(model=model, prompt="hello", max_tokens=3, temperature=0).choices[0].text == "ifm"


def test_extras_by_extra_body(api: OpenAI) -> None:
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2, "lora_path": "a", "ignore_eos": True, "stop_token_ids": [80]}
    answer = api.completions.create(model="base", prompt="hello", max_tokens=9, temperature=0, extra_body=extra)
    assert answer.choices[0].text == "if" and answer.choices[0].finish_reason == "stop"


def test_every_parameter_of_the_client_is_known(api: OpenAI) -> None:
    for create, kind in ((api.chat.completions.create, ChatRequest), (api.completions.create, CompletionRequest)):
        assert set(inspect.signature(create).parameters) - {"extra_headers", "extra_query", "extra_body", "timeout"} <= {*kind.model_fields, *kind.unsupported}
    answer = api.chat.completions.create(model="base", messages=HI, prompt_cache_retention="24h", prompt_cache_options={"mode": "explicit"}, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="moderation: is not implemented"):
        api.chat.completions.create(model="base", messages=HI, moderation={"model": "omni-moderation-latest"})


def test_chat_stream(api: OpenAI) -> None:
    stream = api.chat.completions.create(model="a", messages=HI, max_tokens=5, temperature=0, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "ij?ij"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 5


def test_completion_stream(api: OpenAI) -> None:
    stream = api.completions.create(model="base", prompt="hello", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "hello"


def test_leaving_a_stream_aborts_it(api: OpenAI, engine: FakeEngine) -> None:
    engine.aborted.clear()
    engine.delay = 0.05  # of each of 500 tokens
    with api.completions.create(model="base", prompt="hello", max_tokens=500, stream=True) as stream:
        next(iter(stream))
    wait_for(lambda: engine.aborted)
    engine.delay = 0.0
    assert api.completions.create(model="base", prompt="hello", max_tokens=1, temperature=0).choices[0].text == "h"


def test_logprobs(api: OpenAI) -> None:
    chat = api.chat.completions.create(model="base", messages=HI, max_tokens=2, temperature=0, logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and [(entry.token, entry.logprob, entry.bytes) for entry in content] == [("h", -0.1, [104]), ("i", -0.2, [105])]
    assert [entry.token for entry in content[0].top_logprobs] == ["k", "l"]
    plain = api.completions.create(model="base", prompt="hello", max_tokens=2, temperature=0, logprobs=1).choices[0].logprobs
    assert plain is not None and plain.tokens == ["h", "e"] and plain.token_logprobs == [-0.1, -0.2] and plain.text_offset == [0, 1]


def test_n_stop_and_seed(api: OpenAI) -> None:
    assert [choice.text for choice in api.completions.create(model="base", prompt="hello", max_tokens=3, n=3).choices] == ["hel", "ifm", "jgn"]
    stopped = api.completions.create(model="base", prompt="hello", max_tokens=9, temperature=0, stop=["o", "zz"]).choices[0]
    assert stopped.text == "hell" and stopped.finish_reason == "stop"
    once, again, other = (api.completions.create(model="base", prompt="hello", max_tokens=3, seed=seed).choices[0].text for seed in (4, 4, 5))
    assert once == again != other


def test_history_with_the_clients_own_message_object(api: OpenAI) -> None:
    reply = api.chat.completions.create(model="base", messages=HI, max_tokens=2, temperature=0).choices[0].message
    history = [*HI, reply.to_dict(), {"role": "user", "content": "again"}]
    assert api.chat.completions.create(model="base", messages=history, max_tokens=5, temperature=0).choices[0].message.content == "again"  # type: ignore[arg-type]


def test_typed_errors(api: OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError, match="loaded are: base, a") as not_found:
        api.chat.completions.create(model="nobody", messages=HI)
    assert not_found.value.code == "model_not_found" and not_found.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        api.chat.completions.create(model="base", messages=HI, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="600|601"):
        api.completions.create(model="base", prompt="x" * 600)
    with pytest.raises(openai.BadRequestError, match="tools"):
        api.chat.completions.create(model="base", messages=HI, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.AuthenticationError, match="admin"):
        api.post("/unload_lora_adapter", cast_to=object, body={"lora_name": "a"})
    engine.refusal = RequestError("the queue is full", 503, retry_after=1)
    with pytest.raises(openai.InternalServerError) as full:
        api.completions.create(model="base", prompt="x")
    assert full.value.status_code == 503 and full.value.response.headers["retry-after"] == "1"


def test_error_in_mid_stream_is_raised(api: OpenAI, engine: FakeEngine) -> None:
    engine.break_after = 2
    stream = api.completions.create(model="base", prompt="hello", max_tokens=9, temperature=0, stream=True)
    with pytest.raises(openai.APIError, match="internal error"):
        list(stream)


def test_a_full_queue_is_retried_by_the_client(api: OpenAI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    admit, asked = engine._admit, []

    def full_at_first(request: GenerateRequest) -> list[int]:
        asked.append(request)
        engine.refusal = RequestError("the queue is full", 503, retry_after=1) if len(asked) == 1 else None
        return admit(request)

    monkeypatch.setattr(engine, "_admit", full_at_first)
    assert api.with_options(max_retries=2).completions.create(model="base", prompt="hello", max_tokens=1, temperature=0).choices[0].text == "h"
    assert len(asked) == 2
