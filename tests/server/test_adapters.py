"""Loading and unloading adapters over HTTP."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.conftest import wait_for
from tests.server.fake_engine import FakeEngine

LOAD = {"lora_name": "a", "lora_path": "/adapters/a"}
PREFIXES = ("", "/v1")  # SGLang's and vLLM's names of the endpoints


@pytest.mark.parametrize("prefix", PREFIXES)
def test_load_and_unload(client: TestClient, engine: FakeEngine, prefix: str) -> None:
    response = client.post(f"{prefix}/load_lora_adapter", json=LOAD | {"pinned": True})
    answer = response.json()
    assert response.status_code == 200 and answer["success"] is True and answer["error_message"] == "" and answer["already_loaded"] is False
    assert answer["loaded_adapters"] == {"a": "/adapters/a"} and answer["rank"] == 8 and engine.loaded["a"]["pinned"] is True
    response = client.post(f"{prefix}/unload_lora_adapter", json={"lora_name": "a"})
    assert response.status_code == 200 and response.json()["success"] is True
    assert response.json()["loaded_adapters"] == {} and response.json()["freed_bytes"] == 1024 and "already_loaded" not in response.json()


def test_loading_again(client: TestClient) -> None:
    client.post("/load_lora_adapter", json=LOAD)
    again = client.post("/load_lora_adapter", json=LOAD)
    assert again.status_code == 200 and again.json()["already_loaded"] is True
    other = client.post("/load_lora_adapter", json=LOAD | {"lora_path": "/adapters/other"})
    assert other.status_code == 400 and "rev-/adapters/a" in other.json()["error"]["message"]
    other = client.post("/load_lora_adapter", json=LOAD | {"lora_path": "/adapters/other", "load_inplace": True})
    assert other.status_code == 200 and other.json()["already_loaded"] is False and other.json()["loaded_adapters"] == {"a": "/adapters/other"}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_refusal_has_both_shapes(client: TestClient, prefix: str) -> None:
    response = client.post(f"{prefix}/load_lora_adapter", json=LOAD | {"lora_path": "/missing"})
    answer = response.json()
    assert response.status_code == 400 and answer["success"] is False and answer["loaded_adapters"] == {}
    assert answer["error_message"] == answer["error"]["message"] and answer["error"]["param"] == "lora_path"


def test_unload_of_an_unknown_adapter(client: TestClient) -> None:
    response = client.post("/unload_lora_adapter", json={"lora_name": "nobody"})
    assert response.status_code == 404 and response.json()["error"]["param"] == "lora_name"


def test_without_lora(client_of: Any) -> None:
    client = client_of(FakeEngine(enable_lora=False))
    response = client.post("/load_lora_adapter", json=LOAD)
    assert response.status_code == 400 and "--enable-lora" in response.json()["error_message"]
    response = client.post("/v1/completions", json={"model": "a", "prompt": "x"})
    assert response.status_code == 404 and "--enable-lora" in response.json()["error"]["message"]


def test_unload_waits_for_running_requests_and_refuses_new_ones(client: TestClient, engine: FakeEngine) -> None:
    client.post("/load_lora_adapter", json=LOAD)
    engine.delay = 0.5  # of each token, until what must happen meanwhile has happened
    body = {"model": "a", "prompt": "hello", "max_tokens": 20, "temperature": 0}
    answers: dict[str, Any] = {}
    with client:  # one event loop for all threads
        running = threading.Thread(target=lambda: answers.update(first=client.post("/v1/completions", json=body)))
        running.start()
        wait_for(lambda: engine.running)
        unload = threading.Thread(target=lambda: answers.update(unload=client.post("/unload_lora_adapter", json={"lora_name": "a"})))
        unload.start()
        wait_for(lambda: not engine.loaded)
        assert client.post("/v1/completions", json=body).status_code == 404
        time.sleep(0.05)
        assert unload.is_alive() and running.is_alive()
        assert client.post("/load_lora_adapter", json=LOAD).status_code == 200  # the name is free at once
        engine.delay = 0.0
        running.join()
        unload.join()
        assert 'generated_tokens_total{model_name="a"} 20.0' in client.get("/metrics").text  # the new adapter of this name keeps them
    assert answers["first"].json()["usage"]["completion_tokens"] == 20 and answers["unload"].status_code == 200
