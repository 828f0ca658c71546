"""/generate in SGLang's shape."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.fake_engine import FakeEngine
from tests.server.test_openai import events

GREEDY = {"temperature": 0, "max_new_tokens": 3}


def generate(client: TestClient, **body: Any) -> Any:
    response = client.post("/generate", json={"sampling_params": GREEDY} | body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture
def adapters(client: TestClient) -> None:
    for name in ("a", "b"):
        client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": f"/adapters/{name}"})


def test_text(client: TestClient) -> None:
    answer = generate(client, text="hello", rid="mine")
    meta = answer["meta_info"]
    assert answer["text"] == "hel" and answer["output_ids"] == [75, 72, 79]
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == ("mine", 6, 3, 3)
    assert meta["finish_reason"] == {"type": "length", "length": 3} and meta["e2e_latency"] > 0
    assert "output_token_logprobs" not in meta


def test_input_ids(client: TestClient, engine: FakeEngine) -> None:
    assert generate(client, input_ids=[75, 72])["text"] == "heh"
    assert [answer["text"] for answer in generate(client, input_ids=[[75, 72], [76]])] == ["heh", "iii"]


def test_defaults(client: TestClient, engine: FakeEngine) -> None:
    assert client.post("/generate", json={"text": "x"}).status_code == 200
    sampling = engine.requests[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k) == (128, 1.0, -1)


def test_list_of_one_is_a_list(client: TestClient) -> None:
    assert [answer["text"] for answer in generate(client, text=["hello"])] == ["hel"]


def test_batch_with_lists_of_everything(client: TestClient, engine: FakeEngine, adapters: None) -> None:
    answers = generate(
        client,
        text=["hello", "hello", "hello"],
        lora_path=["a", None, "b"],
        sampling_params=[GREEDY, GREEDY | {"max_new_tokens": 1}, GREEDY | {"stop": ["g"]}],
        return_logprob=[True, False, True],
        top_logprobs_num=[1, 0, 0],
        rid=["r0", "r1", "r2"],
    )
    assert [answer["text"] for answer in answers] == ["ifm", "h", "j"]
    assert [answer["meta_info"]["id"] for answer in answers] == ["r0", "r1", "r2"]
    assert [answer["meta_info"]["lora_path"] for answer in answers] == ["a", None, "b"]
    assert answers[2]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "g"}
    assert answers[0]["meta_info"]["output_top_logprobs"][0] == [[-1.0, 79, None]]
    assert "output_token_logprobs" not in answers[1]["meta_info"] and "output_top_logprobs" not in answers[2]["meta_info"]


def test_one_adapter_for_all(client: TestClient, adapters: None) -> None:
    assert [answer["text"] for answer in generate(client, text=["hello", "ab"], lora_path="b")] == ["jgn", "cdc"]


def test_several_samples(client: TestClient) -> None:
    answers = generate(client, text="hello", sampling_params={"n": 2, "max_new_tokens": 2}, rid="r")
    assert [(answer["text"], answer["meta_info"]["id"]) for answer in answers] == [("he", "r-0"), ("if", "r-1")]


def test_logprobs(client: TestClient) -> None:
    meta = generate(client, text="hello", return_logprob=True, logprob_start_len=0, top_logprobs_num=2, return_text_in_logprobs=True)["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.1, 75, "h"], [-0.2, 72, "e"], [-0.3, 79, "l"]]
    assert meta["input_token_logprobs"][:2] == [[None, 1, "<bos>"], [-0.5, 75, "h"]] and len(meta["input_token_logprobs"]) == 6
    assert meta["input_top_logprobs"][:2] == [None, [[-1.0, 78, "k"], [-2.0, 79, "l"]]]
    assert len(meta["output_top_logprobs"]) == 3


def test_logprobs_from_a_position(client: TestClient) -> None:
    meta = generate(client, text="hello", return_logprob=True, logprob_start_len=4)["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == [79, 82]
    assert generate(client, text="hello", return_logprob=True)["meta_info"]["input_token_logprobs"] == []


def test_scoring_without_new_tokens(client: TestClient) -> None:
    answer = generate(client, text="hello", sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0)
    assert answer["text"] == "" and answer["meta_info"]["completion_tokens"] == 0 and answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert len(answer["meta_info"]["input_token_logprobs"]) == 6 and answer["meta_info"]["output_token_logprobs"] == []


def test_stop_token_id(client: TestClient) -> None:
    answer = generate(client, text="hello", sampling_params=GREEDY | {"stop_token_ids": [72]})
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": 72}


def test_stream_is_cumulative(client: TestClient) -> None:
    got = events(client.post("/generate", json={"text": "hello", "sampling_params": GREEDY, "stream": True}))
    assert [event["text"] for event in got] == ["h", "he", "hel"]
    assert got[0]["meta_info"]["finish_reason"] is None and got[-1]["meta_info"]["finish_reason"]["type"] == "length"
    assert got[-1]["output_ids"] == [75, 72, 79] and "index" not in got[0]


def test_stream_of_a_batch_has_indices(client: TestClient) -> None:
    got = events(client.post("/generate", json={"text": ["hello", "ab"], "sampling_params": GREEDY, "stream": True}))
    assert {event["index"]: event["text"] for event in got} == {0: "hel", 1: "aba"}


def test_seed_by_both_names(client: TestClient, engine: FakeEngine) -> None:
    for name in ("seed", "sampling_seed"):
        generate(client, text="hello", sampling_params={"max_new_tokens": 1, name: 5})
    assert [request.sampling.seed for request in engine.requests] == [5, 5]
