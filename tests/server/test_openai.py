"""/v1/completions, /v1/chat/completions, /v1/models over the fake engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.fake_engine import FakeEngine


def events(response: Any) -> list[dict[str, Any]]:
    """The JSON of each server-sent event; the stream must end with [DONE]."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def complete(client: TestClient, **body: Any) -> Any:
    response = client.post("/v1/completions", json={"model": "base", "prompt": "hello", "temperature": 0, "max_tokens": 4} | body)
    assert response.status_code == 200, response.text
    return response.json()


def chat_body(**body: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 4} | body


def chat(client: TestClient, **body: Any) -> Any:
    response = client.post("/v1/chat/completions", json=chat_body(**body))
    assert response.status_code == 200, response.text
    return response.json()


def test_completion(client: TestClient) -> None:
    answer = complete(client)
    assert answer["object"] == "text_completion" and answer["model"] == "base" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "hell", "logprobs": None, "finish_reason": "length", "matched_stop": None}]
    usage = {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 3}}
    assert answer["usage"] == usage


def test_default_lengths(client: TestClient, engine: FakeEngine) -> None:
    client.post("/v1/completions", json={"prompt": "x"})
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], "stop": "i"})
    assert [request.sampling.max_new_tokens for request in engine.requests] == [16, 512]  # OpenAI's 16; a chat fills the context, as the scheduler has it


def test_sampling_fields_reach_the_engine(client: TestClient, engine: FakeEngine) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.3}
    complete(client, **given, seed=7, logit_bias={"5": 10, "6": -100}, stop_token_ids=[9], ignore_eos=True, min_tokens=2, stop="zz", user="me", store=False)
    request = engine.requests[0]
    assert {name: getattr(request.sampling, name) for name in given} == given
    assert (request.sampling.seed, request.sampling.logit_bias, request.sampling.stop_token_ids) == (7, {5: 10.0, 6: -100.0}, [9])
    assert (request.sampling.ignore_eos, request.sampling.min_new_tokens, request.stop) == (True, 2, ["zz"])


@pytest.mark.parametrize("name", ["no_stop_trim", "include_stop_str_in_output"])
def test_text_options_reach_the_engine(client: TestClient, engine: FakeEngine, name: str) -> None:
    complete(client, skip_special_tokens=False, spaces_between_special_tokens=False)
    complete(client, **{name: True})
    chat(client, **{name: True}, skip_special_tokens=None)
    client.post("/generate", json={"text": "x", "sampling_params": {"skip_special_tokens": False, "no_stop_trim": True}})
    assert [(r.skip_special_tokens, r.no_stop_trim) for r in engine.requests] == [(False, False), (True, True), (True, True), (False, True)]


def test_null_means_default(client: TestClient, engine: FakeEngine) -> None:
    complete(client, temperature=None, top_p=None, n=None, stop=None, seed=None, logit_bias=None, stream=None, suffix=None)
    assert engine.requests[0].sampling.temperature == 1.0


def test_stop(client: TestClient) -> None:
    choice = complete(client, stop=["l", "zz"])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == ("he", "stop", "l")


def test_several_samples(client: TestClient) -> None:
    answer = complete(client, n=3, temperature=1.0)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "hell"), (1, "ifmm"), (2, "jgnn")]
    assert answer["usage"]["prompt_tokens"] == 6 and answer["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("prompt", [["hello", "abcd"], [[75, 72, 79, 79, 82], [68, 69, 70, 71]]])
def test_batch(client: TestClient, prompt: Any) -> None:
    answer = complete(client, prompt=prompt, n=2, temperature=1.0)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "hell"), (1, "ifmm"), (2, "abcd"), (3, "bcde")]


def test_prompt_of_ids(client: TestClient, engine: FakeEngine) -> None:
    assert complete(client, prompt=[75, 72])["choices"][0]["text"] == "hehe"
    assert engine.requests[0].input_ids == [75, 72]


def test_logprobs_and_echo(client: TestClient) -> None:
    choice = complete(client, logprobs=2, echo=True, max_tokens=2)["choices"][0]
    assert choice["text"] == "hellohe"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<bos>", *"hellohe"]
    assert logprobs["token_logprobs"] == [None, *[-0.5] * 5, -0.1, -0.2]
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3, 4, 5, 6]  # <bos> is not in the text
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][6] == {"k": -1.0, "l": -2.0, "h": -0.1}


def test_logprobs_zero_gives_the_chosen_tokens_only(client: TestClient) -> None:
    logprobs = complete(client, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-0.1, -0.2, -0.3, -0.4] and logprobs["top_logprobs"] is None and logprobs["text_offset"] == [0, 1, 2, 3]


def test_scoring_a_prompt_generates_nothing(client: TestClient) -> None:
    answer = complete(client, max_tokens=0, echo=True, logprobs=0)
    assert answer["choices"][0]["text"] == "hello" and len(answer["choices"][0]["logprobs"]["tokens"]) == 6
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 0


def test_completion_stream(client: TestClient) -> None:
    body = {"model": "base", "prompt": ["hello", "ab"], "max_tokens": 3, "temperature": 0, "stream": True, "echo": True, "logprobs": 1}
    got = events(client.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}}))
    *parts, last = got
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 6 + 3 + 6
    assert all(part["usage"] is None and part["object"] == "text_completion" for part in parts)
    for index, text in ((0, "hellohel"), (1, "ababa")):
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine] == [None, None, "length"]
        assert sum((choice["logprobs"]["text_offset"] for choice in mine), []) == [0, *range(len(text))]


def test_usage_in_every_event(client: TestClient) -> None:
    body = chat_body(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events(client.post("/v1/chat/completions", json=body))]
    assert counts == sorted(counts) and set(counts) == {1, 2, 3, 4} and counts[0] == 1


def test_chat(client: TestClient, engine: FakeEngine) -> None:
    answer = chat(client)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": "hi>h", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "matched_stop": None}]
    assert engine.prompts == [[1, 75, 76, 33]]  # the template's own <bos>, once, and its '>'


def test_chat_content_parts_and_history(client: TestClient, engine: FakeEngine) -> None:
    reply = chat(client)["choices"][0]["message"]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, reply, {"role": "user", "content": parts, "name": "x"}]
    assert chat(client, messages=messages)["usage"]["prompt_tokens"] == 1 + 3 + 1  # 'a\nb' in the template's last message


def test_chat_logprobs(client: TestClient) -> None:
    content = chat(client, logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    assert content[0] == {"token": "h", "logprob": -0.1, "bytes": [104], "top_logprobs": [{"token": "k", "logprob": -1.0, "bytes": [107]}]}
    assert len(content) == 4


def test_chat_stream(client: TestClient) -> None:
    body = chat_body(stream=True, n=2, temperature=1, logprobs=True, stream_options={"include_usage": True})
    *parts, last = events(client.post("/v1/chat/completions", json=body))
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
    for index, text in ((0, "hi>h"), (1, "ij?i")):
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine] == [None] * 5 + ["length"]
        assert [entry["logprob"] for choice in mine if choice["logprobs"] for entry in choice["logprobs"]["content"]] == [-0.1, -0.2, -0.3, -0.4]


def test_chat_continues_the_final_message(client: TestClient, engine: FakeEngine) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    chat(client, messages=messages, continue_final_message=True)
    assert len(engine.prompts[0]) == 1 + 3  # no generation prompt


@pytest.mark.parametrize("length", [20, 20_001])
def test_a_long_conversation_is_tokenized_beside_the_event_loop(client_of: Any, length: int) -> None:
    """By the engine's front, which knows the request meanwhile, so that it can be aborted."""
    engine = FakeEngine(max_model_len=30_000)
    answer = chat(client_of(engine), messages=[{"role": "user", "content": "a" * length}], max_tokens=2)
    assert answer["usage"]["prompt_tokens"] == len(engine.prompts[0]) > length and engine.in_thread == (length > 20_000)


def test_models(client: TestClient, engine: FakeEngine) -> None:
    client.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": "/adapters/a"})
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"], card["root"], card["max_model_len"]) for card in cards] == [
        ("base", None, "/models/base", 512),
        ("a", "base", "/adapters/a", 512),
    ]
    assert client.get("/v1/models/a").json() == client.get("/v1/models/base:a").json() == cards[1]
    assert client.get("/v1/models/base").json() == cards[0]
    assert client.get("/v1/models/b").status_code == 404


@pytest.mark.parametrize(
    ("model", "adapter"),
    [("base", None), ("base:", None), ("a", "a"), ("base:a", "a"), (None, None)],
)
def test_model_names(client: TestClient, engine: FakeEngine, model: str | None, adapter: str | None) -> None:
    client.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": "/adapters/a"})
    answer = complete(client, model=model)
    assert engine.requests[-1].adapter == adapter
    assert answer["choices"][0]["text"] == ("ifmm" if adapter else "hell") and answer["model"] == (model or "base")


def test_adapter_by_lora_path(client: TestClient, engine: FakeEngine) -> None:
    client.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": "/adapters/a"})
    texts = [choice["text"] for choice in complete(client, prompt=["hello", "hello"], lora_path=["a", None])["choices"]]
    assert texts == ["ifmm", "hell"]
    assert chat(client, lora_path="a")["choices"][0]["message"]["content"] == "ij?i"


def test_adapter_loaded_behind_the_servers_back(client: TestClient, engine: FakeEngine) -> None:
    engine.loaded["b"] = {"name": "b", "path": "/b", "revision": "r", "rank": 4, "nbytes": 1, "resident": True}
    assert complete(client, model="b")["choices"][0]["text"] == "ifmm"


def test_neutral_values_of_missing_features_are_taken(client: TestClient) -> None:
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "service_tier": "auto",
    }
    chat(client, **neutral, metadata={"a": "b"}, store=False, user="u", safety_identifier="s", prompt_cache_key="k")
    complete(client, best_of=1, suffix="")


def test_what_other_servers_tools_send_with_every_request(client: TestClient) -> None:
    """SGLang's bench_serving and gateway, vLLM's bench serve, lm-eval."""
    own = {"ignore_eos": True, "no_stop_trim": False, "skip_special_tokens": True, "continue_final_message": False, "return_hidden_states": False}
    chat(client, **own, separate_reasoning=True, stream_reasoning=True, max_tokens=None, max_completion_tokens=3)
    complete(client, temperature=0.0, best_of=1, max_tokens=3, ignore_eos=True, return_routed_experts=False)
    complete(client, repetition_penalty=1.0, max_tokens=3, logprobs=None, echo=True, seed=1234)
    body = {"input_ids": [5, 6], "sampling_params": {"temperature": 0.0, "max_new_tokens": 3, "ignore_eos": True}, "stream": False, "lora_path": None}
    bench = {"return_logprob": False, "return_routed_experts": False, "logprob_start_len": -1, "image_data": None}
    gateway = dict.fromkeys(("background", "no_logs", "return_bytes", "return_entropy", "return_hidden_states", "return_text_in_logprobs"), False)
    for more in (bench, gateway | {"log_metrics": True}):
        answer = client.post("/generate", json=body | more)
        assert answer.status_code == 200, answer.text
