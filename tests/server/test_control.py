"""Health, facts, cache, abort and metrics."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from sglang_lora_moe.core import RequestError
from tests.server.conftest import wait_for
from tests.server.fake_engine import FakeEngine


def test_health(client: TestClient, engine: FakeEngine) -> None:
    assert client.get("/health").status_code == client.get("/health_generate").status_code == 200
    assert engine.requests[0].sampling.max_new_tokens == 1
    engine.healthy = False
    for path in ("/health", "/health_generate"):
        response = client.get(path)
        assert response.status_code == 503 and response.json()["error"]["code"] == "unhealthy"


@pytest.mark.parametrize("refusal", [None, RequestError("the queue is full", 503)])
def test_health_generate_gives_up(client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, refusal: RequestError | None) -> None:
    monkeypatch.setattr("sglang_lora_moe.server.control.HEALTH_SECONDS", 0.05)
    engine.delay, engine.refusal = 5, refusal
    assert client.get("/health").status_code == 200 and client.get("/health_generate").status_code == 503
    assert len(engine.aborted) == (refusal is None)


def test_an_engine_whose_queue_is_full_is_healthy_while_it_answers_others(client: TestClient, engine: FakeEngine) -> None:
    engine.delay = 0.02
    answers: list[Any] = []
    with client:
        thread = in_background(client, "/v1/completions", {"prompt": "hello", "rid": "mine", "max_tokens": 400}, answers)
        wait_for(lambda: engine.running)
        engine.refusal = RequestError("the queue is full", 503)
        assert client.get("/health_generate").status_code == 200
        client.post("/abort_request", json={"rid": "mine"})
        thread.join()


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(client: TestClient, path: str) -> None:
    info = client.get(path).json()
    assert info["model_path"] == info["tokenizer_path"] == "/models/base" and info["is_generation"] is True and info["max_model_len"] == 512


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_shows_books_but_no_keys(client_of: Any, path: str) -> None:
    client = client_of(FakeEngine(api_key="secret-1", admin_api_key="secret-2"))
    response = client.get(path, headers={"Authorization": "Bearer secret-1"})
    info = response.json()
    assert "secret" not in response.text and info["config"]["api_key"] == "***"
    assert info["stats"]["kv_pages_total"] == 100 and info["config"]["page_size"] == 16 and info["adapters"] == [] and info["version"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache(client: TestClient, engine: FakeEngine, method: str) -> None:
    assert client.request(method, "/flush_cache").json() == {"success": True, "flushed_pages": 3} and engine.flushed == 1


def in_background(client: TestClient, path: str, body: dict[str, Any], answers: list[Any]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(client.post(path, json=body)))
    thread.start()
    return thread


@pytest.mark.parametrize("everything", [False, True])
def test_abort_request(client: TestClient, engine: FakeEngine, everything: bool) -> None:
    engine.delay = 0.02
    answers: list[Any] = []
    with client:
        body = {"prompt": ["hello", "ab"], "rid": "mine", "max_tokens": 400}
        thread = in_background(client, "/v1/completions", body, answers)
        wait_for(lambda: len(engine.running) == 2)
        assert client.post("/abort_request", json={"abort_all": True} if everything else {"rid": "mine"}).json() == {"success": True}
        thread.join()
    assert engine.abort_calls == ([""] if everything else ["mine-0", "mine-1"])  # a batch goes by one name
    assert [choice["finish_reason"] for choice in answers[0].json()["choices"]] == ["abort", "abort"]


@pytest.mark.parametrize("prompt", [["hello", "ab"], "hello"])
def test_a_second_request_with_the_name_of_a_running_batch_is_refused(client: TestClient, engine: FakeEngine, prompt: Any) -> None:
    engine.delay = 0.02
    answers: list[Any] = []
    with client:
        thread = in_background(client, "/v1/completions", {"prompt": ["hello", "ab"], "rid": "mine", "max_tokens": 400}, answers)
        wait_for(lambda: len(engine.running) == 2)
        second = client.post("/v1/completions", json={"prompt": prompt, "rid": "mine"})
        client.post("/abort_request", json={"rid": "mine"})
        thread.join()
    assert second.status_code == 400 and second.json()["error"]["param"] == "rid"
    assert engine.abort_calls == ["mine-0", "mine-1"]  # the first can still be aborted


def test_abort_native(client: TestClient, engine: FakeEngine) -> None:
    engine.delay = 0.02
    answers: list[Any] = []
    with client:
        thread = in_background(client, "/generate", {"text": "hello", "rid": "r1", "sampling_params": {"max_new_tokens": 400}}, answers)
        wait_for(lambda: engine.running)
        duplicate = client.post("/generate", json={"text": "hello", "rid": "r1"})
        assert duplicate.status_code == 400 and duplicate.json()["error"]["param"] == "rid"
        client.post("/abort_request", json={"rid": "r1"})
        thread.join()
    assert answers[0].json()["meta_info"]["finish_reason"]["type"] == "abort"


def samples(client: TestClient) -> dict[tuple[str, str], float]:
    """(metric, model_name) -> value, from the text that Prometheus would read."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name.removeprefix("sglang_lora_moe_"), s.labels.get("model_name", "")): s.value for family in families for s in family.samples}


def test_metrics(client: TestClient, engine: FakeEngine) -> None:
    client.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": "/a"})
    for model in ("base", "a", "base:a", "nobody"):
        client.post("/v1/completions", json={"model": model, "prompt": "hello", "max_tokens": 4, "n": 2})
    got = samples(client)
    assert (got["prompt_tokens_total", "base"], got["prompt_tokens_total", "a"]) == (6, 12)
    assert (got["generated_tokens_total", "base"], got["generated_tokens_total", "a"]) == (8, 16)
    assert (got["requests_total", "base"], got["requests_total", "a"]) == (2, 4)
    assert got["time_to_first_token_seconds_count", "a"] == 2 and got["inter_token_seconds_count", "a"] == 12
    assert got["cached_prompt_tokens_total", "a"] == 6
    assert (got["running_requests", ""], got["waiting_requests", ""], got["kv_pages_used", ""], got["kv_pages", ""]) == (0, 2, 7, 100)
    assert got["prefix_hit_rate", ""] == 0.75 and got["adapters_loaded", ""] == 1 and got["adapter_bytes", "a"] == 1024
    assert got["adapter_resident", "a"] == 1 and (got["request_seconds_count", "base"], got["request_seconds_count", "a"]) == (2, 4)
    assert 'finish_reason="abort"' not in client.get("/metrics").text
    assert {model for _, model in got} == {"", "base", "a"}

    client.post("/unload_lora_adapter", json={"lora_name": "a"})
    assert {model for _, model in samples(client)} == {"", "base"}


def test_metrics_count_refusals_and_aborts(client: TestClient, engine: FakeEngine) -> None:
    client.post("/v1/completions", json={"prompt": "x" * 600})
    engine.break_after = 1
    client.post("/v1/completions", json={"prompt": "x"})
    text = client.get("/metrics").text
    assert 'requests_refused_total{status="400"} 1.0' in text
    assert 'requests_total{finish_reason="abort",model_name="base"} 1.0' in text


def test_apps_do_not_share_metrics(client_of: Any) -> None:
    first, second = client_of(FakeEngine()), client_of(FakeEngine())
    first.post("/v1/completions", json={"prompt": "x"})
    assert ("requests_total", "base") in samples(first) and ("requests_total", "base") not in samples(second)


def test_docs_describe_the_endpoints(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/generate", "/load_lora_adapter", "/metrics"} <= set(paths)
    assert client.get("/docs").status_code == 200
