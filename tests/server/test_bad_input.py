"""Each kind of bad input is answered with OpenAI's error object, the right status, and the field at fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.server.native import NativeRequest
from sglang_lora_moe.server.openai_protocol import ChatRequest
from tests.server.fake_engine import FakeEngine

COMPLETION = {"model": "base", "prompt": "hello"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
GENERATE = {"text": "hello"}
LOAD = {"lora_name": "a", "lora_path": "/a"}
BODIES: dict[str, dict[str, Any]] = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT, "/generate": GENERATE, "/load_lora_adapter": LOAD}
SURROGATE = "\\ud800"


def error_of(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} | more]}


CASES: list[tuple[str, dict[str, Any], str]] = [
    # unknown fields, everywhere
    *((path, {"surprise": 1}, "surprise") for path in BODIES),
    ("/unload_lora_adapter", {"lora_name": "a", "surprise": 1}, "surprise"),
    ("/abort_request", {"surprise": 1}, "surprise"),
    ("/generate", {"sampling_params": {"surprise": 1}}, "sampling_params.surprise"),
    ("/generate", {"sampling_params": {"Surprise": 1}}, "sampling_params.Surprise"),
    ("/v1/chat/completions", user("x", surprise=1), "messages.0.surprise"),
    ("/v1/completions", {"stream": True, "stream_options": {"surprise": 1}}, "stream_options.surprise"),
    # sampling values
    ("/v1/completions", {"temperature": -0.1}, "temperature"),
    ("/v1/completions", {"temperature": "hot"}, "temperature"),
    ("/v1/completions", {"top_p": 0}, "top_p"),
    ("/v1/completions", {"top_p": 1.1}, "top_p"),
    ("/v1/completions", {"top_k": -2}, "top_k"),
    ("/v1/completions", {"min_p": 2}, "min_p"),
    ("/v1/completions", {"repetition_penalty": 0}, "repetition_penalty"),
    ("/v1/completions", {"presence_penalty": 3}, "presence_penalty"),
    ("/v1/completions", {"frequency_penalty": -3}, "frequency_penalty"),
    ("/v1/completions", {"n": 0}, "n"),
    ("/v1/completions", {"n": True}, "n"),
    ("/v1/completions", {"n": 1.5}, "n"),
    ("/v1/completions", {"n": 10**6}, "n"),
    ("/v1/completions", {"max_tokens": -1}, "max_tokens"),
    ("/v1/completions", {"max_tokens": 10**30}, "max_tokens"),
    ("/v1/completions", {"prompt": ["a"] * 50, "n": 128}, "n"),
    ("/generate", {"text": ["a"] * 50, "sampling_params": {"n": 128}}, "sampling_params.n"),
    ("/v1/completions", {"prompt": ["a"] * 5000}, "prompt"),
    ("/generate", {"text": ["a"] * 5000}, "text"),
    ("/v1/completions", {"stop_token_ids": [1] * 1025}, "stop_token_ids"),
    ("/v1/completions", {"seed": 2**63}, "seed"),
    ("/v1/completions", {"logprobs": 21}, "logprobs"),
    ("/v1/completions", {"logprobs": True}, "logprobs"),
    ("/v1/completions", {"stop": ["a", ""]}, "stop"),
    ("/v1/completions", {"stop": 5}, "stop"),
    ("/v1/completions", {"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ("/v1/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("/v1/completions", {"logit_bias": {"5": 101}}, "logit_bias.5"),
    ("/v1/completions", {"rid": "with space"}, "rid"),
    ("/generate", {"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ("/generate", {"sampling_params": 5}, "sampling_params"),
    ("/generate", {"text": ["a", "b"], "sampling_params": [{}, {"top_p": 2}]}, "sampling_params.1.top_p"),
    ("/generate", {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params"),
    ("/generate", {"logprob_start_len": -2}, "logprob_start_len"),
    # prompts
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": 5}, "prompt"),
    ("/v1/completions", {"prompt": ["a", 5]}, "prompt"),
    ("/v1/completions", {"prompt": ["a", [5]]}, "prompt"),
    ("/v1/completions", {"prompt": [[5], 5]}, "prompt"),
    ("/v1/completions", {"prompt": [5, -1]}, "prompt"),
    ("/v1/completions", {"prompt": [5, 1.5]}, "prompt"),
    ("/v1/completions", {"prompt": [True]}, "prompt"),
    ("/v1/completions", {"prompt": "x" * 600}, "prompt"),
    ("/generate", {"text": ["a", [1]]}, "text"),
    ("/generate", {"text": [1, 2]}, "text"),
    ("/generate", {"text": None, "input_ids": "a"}, "input_ids"),
    ("/generate", {"text": None, "input_ids": [[1], 2]}, "input_ids"),
    ("/generate", {"text": None, "input_ids": [5] * 600}, "input_ids"),
    ("/generate", {"text": "x" * 600}, "text"),
    ("/generate", {"input_ids": [1]}, "text"),
    ("/generate", {"text": None}, "text"),
    ("/generate", {"text": ["a", "b"], "lora_path": ["a"]}, "lora_path"),
    ("/generate", {"text": ["a", "b"], "rid": ["x"]}, "rid"),
    ("/v1/chat/completions", user("x" * 600), "messages"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": "hi"}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
    ("/v1/chat/completions", user(5), "messages.0.content"),
    ("/v1/chat/completions", user([{"type": "image_url", "image_url": {"url": "x"}}]), "messages.0.content.0"),
    ("/v1/chat/completions", user([{"type": "text"}]), "messages.0.content.0"),
    ("/v1/chat/completions", user(["x"]), "messages.0.content.0"),
    # what is not implemented is refused when it is asked for
    ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools"),
    ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
    ("/v1/chat/completions", {"modalities": ["audio"]}, "modalities"),
    ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
    ("/v1/chat/completions", {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ("/v1/chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"surprise": 1}}, "chat_template_kwargs.surprise"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"mess": 1}}, "chat_template_kwargs.mess"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs.add_generation_prompt"),
    ("/v1/completions", {"suffix": "x"}, "suffix"),
    ("/v1/completions", {"best_of": 2}, "best_of"),
    ("/v1/completions", {"use_beam_search": True}, "use_beam_search"),
    ("/v1/chat/completions", user("x") | {"store": True}, "store"),
    ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("/v1/completions", {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]}, "messages.1.tool_calls"),
    ("/generate", {"return_hidden_states": True}, "return_hidden_states"),
    ("/v1/chat/completions", {"return_routed_experts": True}, "return_routed_experts"),
    ("/generate", {"sampling_params": {"regex": "a"}}, "sampling_params.regex"),
    ("/generate", {"sampling_params": {"seed": 1, "sampling_seed": 2}}, "sampling_params.sampling_seed"),
    ("/generate", {"top_logprobs_num": 2}, "top_logprobs_num"),
    # adapters
    ("/load_lora_adapter", {"lora_name": "a:b"}, "lora_name"),
    ("/load_lora_adapter", {"lora_name": ""}, "lora_name"),
    ("/load_lora_adapter", {"lora_name": "base"}, "lora_name"),
    ("/load_lora_adapter", {"lora_path": ""}, "lora_path"),
    ("/load_lora_adapter", {"lora_path": "/missing"}, "lora_path"),
    ("/load_lora_adapter", {"pinned": "yes"}, "pinned"),
    ("/v1/load_lora_adapter", LOAD | {"load_inplace": "no"}, "load_inplace"),
    ("/abort_request", {}, "rid"),
]


@pytest.mark.parametrize(("path", "change", "param"), CASES, ids=[f"{path}-{param}-{i}" for i, (path, _, param) in enumerate(CASES)])
def test_refused_with_the_field(client: TestClient, engine: FakeEngine, path: str, change: dict[str, Any], param: str) -> None:
    error = error_of(client.post(path, json=BODIES.get(path, {}) | change))
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["code"]
    assert param.rpartition(".")[2] in error["message"] or error["message"].startswith(("the prompt has 60", "/missing/"))
    assert engine.requests == [] and engine.loaded == {}


@pytest.mark.parametrize("path", BODIES)
def test_missing_field(client: TestClient, path: str) -> None:
    required = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/generate": "text", "/load_lora_adapter": "lora_name"}[path]
    error = error_of(client.post(path, json={key: value for key, value in BODIES[path].items() if key != required}))
    assert error["param"] == required


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("body", ["{broken", "[1]", '"text"', "", "nul", b'{"prompt": "\xe9"}', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"])
def test_malformed_body(client: TestClient, path: str, body: str | bytes) -> None:
    error = error_of(client.post(path, content=body, headers={"content-type": "application/json"}))
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}])
def test_a_body_that_any_web_page_may_send(client: TestClient, engine: FakeEngine, path: str, headers: dict[str, str]) -> None:
    """Browsers ask first only where a page wants to send JSON as JSON."""
    error = error_of(client.post(path, content=json.dumps(BODIES[path]), headers={"origin": "https://a.page", **headers}))
    assert error["code"] == "invalid_json" and "Content-Type: application/json" in error["message"] and engine.requests == [] and engine.loaded == {}


@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_is_too_large(client: TestClient, chunked: bool) -> None:
    pieces = [b'{"prompt": "x", "user": "', *[b"a" * (1 << 20)] * 64, b'"}']
    body = iter(pieces) if chunked else b"".join(pieces)
    error = error_of(client.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 413)
    assert error["type"] == "invalid_request_error" and "67108864 bytes" in error["message"]


def test_body_of_another_type_says_what_to_send(client: TestClient) -> None:
    error = error_of(client.post("/v1/completions", data={"prompt": "x"}))
    assert "application/json" in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(client: TestClient, number: str) -> None:
    body = f'{{"prompt": "x", "temperature": {number}}}'
    assert error_of(client.post("/v1/completions", content=body, headers={"content-type": "application/json"}))["param"] == "temperature"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", '{"prompt": "x%s"}', "prompt"),
        ("/v1/completions", '{"prompt": "x", "stop": "%s"}', "stop.0"),
        ("/v1/completions", '{"prompt": "x", "surprise%s": 1}', r"surprise\ud800"),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "%s"}]}', "messages.0.content"),
        ("/generate", '{"text": ["x%s"]}', "text"),
        ("/load_lora_adapter", '{"lora_name": "%s", "lora_path": "/a"}', "lora_name"),
        ("/load_lora_adapter", '{"lora_name": "a", "lora_path": "/%s"}', "lora_path"),
    ],
)
def test_text_that_is_not_unicode(client: TestClient, path: str, body: str, param: str | None) -> None:
    error = error_of(client.post(path, content=body % SURROGATE, headers={"content-type": "application/json"}))
    assert error["param"] == param


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("model", ["nobody", "base:nobody", "other:base", "\udc80".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_unknown_model_lists_the_loaded_ones(client: TestClient, path: str, model: str) -> None:
    client.post("/load_lora_adapter", json=LOAD)
    error = error_of(client.post(path, json=BODIES[path] | {"model": model}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model" and error["message"].endswith("loaded are: base, a")


def test_unknown_lora_path(client: TestClient) -> None:
    error = error_of(client.post("/generate", json={"text": "x", "lora_path": "nobody"}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "lora_path"


def test_model_and_lora_path_that_disagree(client: TestClient) -> None:
    for name in ("a", "b"):
        client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": f"/{name}"})
    assert error_of(client.post("/v1/completions", json=COMPLETION | {"model": "a", "lora_path": "b"}))["param"] == "lora_path"
    assert client.post("/v1/completions", json=COMPLETION | {"model": "base:a", "lora_path": "a"}).status_code == 200


def test_adapter_that_went_between_resolving_and_running(client: TestClient, engine: FakeEngine) -> None:
    client.post("/load_lora_adapter", json=LOAD)
    engine.loaded.clear()
    error = error_of(client.post("/v1/completions", json=COMPLETION | {"model": "a"}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_ids_that_no_tokenizer_takes(client: TestClient, engine: FakeEngine, stream: bool) -> None:
    engine.refusal = RequestError("input_ids: outside the vocabulary", param="input_ids")
    assert error_of(client.post("/v1/completions", json={"prompt": [5, 2**40], "echo": True, "stream": stream}))["param"] == "prompt"


@pytest.mark.parametrize(("path", "prompt"), [("/v1/completions", "prompt"), ("/generate", "text")])
def test_more_samples_than_may_wait_and_run(client_of: Callable[[FakeEngine], TestClient], path: str, prompt: str) -> None:
    engine = FakeEngine(max_queued_requests=4, max_running_requests=2)
    small = client_of(engine)

    def ask(count: int, n: int) -> Any:
        sampling = {"n": n, "max_tokens": 1} if prompt == "prompt" else {"sampling_params": {"n": n, "max_new_tokens": 1}}
        return small.post(path, json={prompt: ["x"] * count} | sampling)

    assert ask(3, 2).status_code == ask(6, 1).status_code == 200
    engine.requests.clear()
    assert error_of(ask(7, 1))["param"] == prompt and error_of(ask(1, 7))["param"].endswith("n") and error_of(ask(4, 2))["param"].endswith("n")
    assert engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue(client: TestClient, engine: FakeEngine, stream: bool) -> None:
    engine.refusal = RequestError("the queue is full: 4096 requests wait", 503, code="queue_full", retry_after=3)
    response = client.post("/v1/completions", json=COMPLETION | {"stream": stream})
    assert error_of(response, 503)["type"] == "server_error" and response.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    "body",
    [
        {f"surprise{i}": 1 for i in range(9)},
        {"messages": [5] * 9},
        {"messages": [{"role": "user"}], "stop_token_ids": [-1] * 9},
        {"messages": [{"role": "user"}], "metadata": {str(i): 5 for i in range(99)}},
        {"messages": [{"role": "user"}], "logit_bias": {str(i): "x" for i in range(2000)}},
    ],
    ids=["fields", "messages", "ids", "metadata", "biases"],
)
def test_only_the_first_mistake_is_looked_for(body: dict[str, Any]) -> None:
    """Millions of them would take minutes to collect."""
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate(body)
    assert error.value.error_count() == 1


@pytest.mark.parametrize("field", ["lora_path", "return_logprob", "logprob_start_len", "top_logprobs_num", "rid"])
def test_only_the_first_mistake_of_a_batch_is_looked_for(field: str) -> None:
    with pytest.raises(ValidationError) as error:
        NativeRequest.model_validate({"text": "x", field: [-7] * 9})
    assert error.value.error_count() == 2  # neither one value, nor a list


def test_native_names_of_what_the_engine_refuses(client: TestClient, engine: FakeEngine) -> None:
    engine.refusal = RequestError("logit_bias: no such token", param="logit_bias")
    error = error_of(client.post("/generate", json=GENERATE))
    assert error["param"] == "sampling_params.logit_bias" and error["message"].startswith("sampling_params.logit_bias: ")


def test_a_conversation_far_too_long_is_refused_by_its_beginning(client: TestClient, engine: FakeEngine, monkeypatch: Any) -> None:
    seen, encode = [], engine.tokenizer.encode
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text, **options: seen.append(len(text)) or encode(text, **options))
    error = error_of(client.post("/v1/chat/completions", json=user("x" * 10**6)))
    assert seen == [8 * 512] and error["param"] == "messages" and error["code"] == "context_length_exceeded"


def test_no_chat_template(client_of: Any) -> None:
    client = client_of(FakeEngine(chat_template=False))
    error = error_of(client.post("/v1/chat/completions", json=CHAT))
    assert error["param"] == "messages" and "--chat-template" in error["message"]


def test_no_tokenizer(client_of: Any) -> None:
    engine = FakeEngine()
    engine.tokenizer, engine.decode = None, lambda ids: ""
    client = client_of(engine)
    assert error_of(client.post("/v1/chat/completions", json=CHAT))["code"] == "no_tokenizer"
    choice = client.post("/v1/completions", json={"prompt": [75, 72], "temperature": 0, "max_tokens": 2, "logprobs": 0, "echo": True}).json()["choices"][0]
    assert choice["text"] == "" and choice["logprobs"]["tokens"] == ["token_id:75", "token_id:72"] * 2


@pytest.mark.parametrize("text, words", [("{{ raise_exception('only one message') }}", "only one message"), ("{{ 1 // (messages | length - 1) }}", "by zero")])
def test_template_that_refuses(client_of: Any, tmp_path: Any, text: str, words: str) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(text)
    error = error_of(client_of(FakeEngine(chat_template=str(template))).post("/v1/chat/completions", json=CHAT))
    assert words in error["message"] and error["param"] == "messages"


def test_a_template_variable_that_is_not_unicode(client_of: Any, tmp_path: Any) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ tone }}: {{ messages[0]['content'] }}")
    client = client_of(FakeEngine(chat_template=str(template)))
    assert client.post("/v1/chat/completions", json=CHAT | {"chat_template_kwargs": {"tone": "calm"}}).status_code == 200
    body = json.dumps(CHAT | {"chat_template_kwargs": {"tone": "\ud800"}})
    error = error_of(client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"}))
    assert error["param"] == "messages" and "not valid Unicode" in error["message"]


def test_unknown_route_and_method(client: TestClient) -> None:
    assert "/nowhere" in error_of(client.post("/nowhere", json={}), 404)["message"]
    response = client.get("/v1/completions")
    assert "GET" in error_of(response, 405)["message"] and response.headers["allow"] == "POST"


def test_bug_is_500_and_logged(client: TestClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine.break_after = 1
    error = error_of(client.post("/v1/completions", json=COMPLETION), 500)
    assert error["type"] == "server_error" and "the fake engine broke" not in error["message"]
    assert "the fake engine broke" in caplog.text
    engine.break_after = None
    assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_error_in_mid_stream_is_an_event(client: TestClient, engine: FakeEngine) -> None:
    engine.break_after = 2
    response = client.post("/v1/completions", json=COMPLETION | {"stream": True})
    lines = [line for line in response.text.split("\n\n") if line]
    assert response.status_code == 200 and len(lines) == 4 and lines[-1] == "data: [DONE]"
    assert '"error":{' in lines[2] and '"type":"server_error"' in lines[2]
