"""The whole server as a user starts it: HTTP, engine process, a tiny model and real adapter files."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI

from benchmarks.soak import Options, soak
from sglang_lora_moe.server.serve import FINISH_SECONDS
from tests.adapter_files import edit_adapter, merged_reference_model
from tests.server.conftest import send_raw, wait_for
from tests.server.launched import ADAPTERS, PROMPT, Server, alive

BIN, CONFIG, WEIGHTS = "adapter_model.bin", "adapter_config.json", "adapter_model.safetensors"
ENDLESS = {"max_new_tokens": 480, "ignore_eos": True, "n": 32}  # runs for some ten seconds: longer than anybody is held up


@pytest.fixture(scope="module")
def server(files: tuple[Path, Path]) -> Iterator[Server]:
    model, adapters = files
    flags = ["--model-path", str(model), "--served-model-name", "tiny", "--max-loras-per-batch", "2", "--max-lora-rank", "16", "--max-total-tokens", "2048"]
    one = Server(*flags, "--lora-root", str(adapters), "--lora-paths", f"a={adapters / 'a'}", f"b={adapters / 'b'}")
    yield one
    if one.process.poll() is None:
        one.end()


def reference(model: Path, adapter: Path | None, count: int) -> str:
    """transformers' greedy continuation of PROMPT."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    hf = merged_reference_model(model, adapter) if adapter else AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for _ in range(count):
        ids = torch.cat([ids, hf(ids).logits[:, -1:].argmax(-1)], 1)
    return str(tokenizer.decode(ids[0, -count:], skip_special_tokens=True))


def test_ready_line_and_models(server: Server) -> None:
    assert server.line == f"Ready: {server.url} serves tiny, adapters: a (rank 8), b (rank 4)\n"
    assert [(card["id"], card["parent"]) for card in server.get("/v1/models")["data"]][:3] == [("tiny", None), ("a", "tiny"), ("b", "tiny")]
    assert server.get("/health") == server.get("/health_generate") == {"status": "ok"}


def test_answers_are_transformers_answers(server: Server, files: tuple[Path, Path]) -> None:
    model, adapters = files
    with OpenAI(base_url=server.url + "/v1", api_key="none") as api:
        texts = {}
        for name in ("tiny", "a", "b"):
            texts[name] = api.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}).choices[0].text
            assert texts[name] == reference(model, None if name == "tiny" else adapters / name, 8)
        assert len(set(texts.values())) == 3


def test_load_use_unload(server: Server, files: tuple[Path, Path]) -> None:
    path = str(files[1] / "c")
    assert server.post("/v1/completions", model="c", prompt=PROMPT).status_code == 404
    answer = server.post("/load_lora_adapter", lora_name="c", lora_path=path).json()
    assert answer["success"] and not answer["already_loaded"] and answer["rank"] == 16 and set(answer["loaded_adapters"]) == {"a", "b", "c"}
    assert server.post("/load_lora_adapter", lora_name="c", lora_path=path).json()["already_loaded"] is True
    other = server.post("/load_lora_adapter", lora_name="c", lora_path=str(files[1] / "d"))
    assert other.status_code == 400 and answer["revision"] in other.json()["error"]["message"]
    text = server.generate(text=PROMPT, lora_path="c")["text"]
    assert text != server.generate(text=PROMPT)["text"]
    gone = server.post("/unload_lora_adapter", lora_name="c").json()
    assert gone["success"] and gone["freed_bytes"] > 0 and set(gone["loaded_adapters"]) == {"a", "b"}
    missing = server.post("/generate", text=PROMPT, lora_path="c")
    assert missing.status_code == 404 and "a, b" in missing.json()["error"]["message"]


def test_more_adapters_than_slots_in_one_batch(server: Server, files: tuple[Path, Path]) -> None:
    for name in ("c", "d"):
        server.post("/load_lora_adapter", lora_name=name, lora_path=str(files[1] / name))
    paths = ["a", None, "b", "c", "d", "a", None, "d"]
    together = [answer["output_ids"] for answer in server.generate(text=[PROMPT] * len(paths), lora_path=paths)]
    assert together == [server.generate(text=PROMPT, lora_path=path)["output_ids"] for path in paths]
    for name in ("c", "d"):
        server.post("/unload_lora_adapter", lora_name=name)


def test_logprobs_are_probabilities(server: Server) -> None:
    answer = server.generate(text=PROMPT, lora_path="a", return_logprob=True, top_logprobs_num=3, logprob_start_len=0)
    meta = answer["meta_info"]
    assert len(meta["output_token_logprobs"]) == 12 and len(meta["input_token_logprobs"]) == meta["prompt_tokens"] == len(PROMPT) + 1
    for (value, token, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert top[0][:2] == [value, token] and len(top) == 3 and 0 >= top[0][0] >= top[1][0]  # greedy takes the best
    assert meta["input_token_logprobs"][0][0] is None
    scored = server.generate(text=PROMPT, lora_path="a", return_logprob=True, logprob_start_len=0, sampling_params={"max_new_tokens": 0})
    assert scored["output_ids"] == [] and scored["meta_info"]["input_token_logprobs"][1][0] == pytest.approx(meta["input_token_logprobs"][1][0], abs=1e-4)


def test_chat_samples_seed_and_stop_with_the_official_client(server: Server) -> None:
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as api:
        messages: Any = [{"role": "user", "content": PROMPT}]
        answer = api.chat.completions.create(model="tiny:a", messages=messages, max_completion_tokens=6, n=3, seed=3, logprobs=True, top_logprobs=2)
        again = api.chat.completions.create(model="a", messages=messages, max_completion_tokens=6, n=3, seed=3)
        assert [choice.message.content for choice in answer.choices] == [choice.message.content for choice in again.choices]
        assert len({choice.message.content for choice in answer.choices}) > 1
        scored = [choice.logprobs.content or [] if choice.logprobs else [] for choice in answer.choices]
        assert answer.usage and 3 <= sum(map(len, scored)) == answer.usage.completion_tokens
        assert {len(token.top_logprobs) for tokens in scored for token in tokens} == {2}
        whole = api.completions.create(model="b", prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}).choices[0].text
        stream = api.completions.create(model="b", prompt=PROMPT, max_tokens=12, temperature=0, stop=whole[4:6], stream=True, extra_body={"ignore_eos": True})
        events = list(stream)
        assert "".join(event.choices[0].text for event in events) == whole[: whole.find(whole[4:6])] and events[-1].choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match="512"):
            api.completions.create(model="tiny", prompt="x" * 600)
        with pytest.raises(openai.BadRequestError, match="min_tokens: expected at most the 16 tokens"):
            api.completions.create(model="tiny", prompt="x", extra_body={"min_tokens": 17})
        with pytest.raises(openai.NotFoundError, match="tiny, a, b"):
            api.completions.create(model="nobody", prompt="x")


def no_half(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def wrong_shape(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-3]


def still_runs_after_a_load_in_place(server: Server, files: tuple[Path, Path]) -> bool:
    """A request of `policy`, which gets new weights meanwhile, and one after that; whether the first still ran then."""
    load = {"lora_name": "policy", "lora_path": str(files[1] / "c")}
    assert server.post("/load_lora_adapter", **load).json()["already_loaded"] is False
    long = {"text": PROMPT, "lora_path": "policy", "sampling_params": {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}}
    old, new = server.generate(**long)["output_ids"], server.generate(**long | {"lora_path": "b"})["output_ids"]
    running, answers = server.start(**long)
    other = load | {"lora_path": str(files[1] / "b")}
    refused = server.post("/load_lora_adapter", **other)
    assert refused.status_code == 400 and "load_inplace=true" in refused.json()["error_message"]
    loaded = server.post("/v1/load_lora_adapter", **other, load_inplace=True)
    assert loaded.status_code == 200 and loaded.json()["loaded_adapters"]["policy"] == str(files[1] / "b"), loaded.text
    unloading = server.stats()["adapters_unloading"]
    result = server.generate(**long | {"sampling_params": {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}})
    running.join()
    assert answers[0].json()["output_ids"] == old and result["output_ids"] == new[:20] != old[:20]
    wait_for(lambda: not server.stats()["adapters_unloading"])
    assert server.post("/unload_lora_adapter", lora_name="policy").status_code == 200
    return bool(unloading == ["policy"])


def test_new_weights_in_place_while_a_request_runs(server: Server, files: tuple[Path, Path]) -> None:
    tries = (still_runs_after_a_load_in_place(server, files) for _ in range(10))  # a busy machine can hold this process up until the request has ended
    assert any(tries), "each request had ended before the load"


def not_finite(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def leftover(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors["base_model.model.surprise.weight"] = torch.zeros(2, 2)


def high_rank(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "high", path)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing half": (lambda path: edit_adapter(path, no_half), WEIGHTS),
    "wrong shape": (lambda path: edit_adapter(path, wrong_shape), WEIGHTS),
    "not a number": (lambda path: edit_adapter(path, not_finite), WEIGHTS),
    "leftover key": (lambda path: edit_adapter(path, leftover), "surprise"),
    "rank too high": (high_rank, "--max-lora-rank"),
    "pickle": (lambda path: (path / WEIGHTS).rename(path / BIN), BIN),
    "truncated": (lambda path: os.truncate(path / WEIGHTS, 5000), WEIGHTS),
    "no config": (lambda path: (path / CONFIG).unlink(), CONFIG),
    "broken config": (lambda path: (path / CONFIG).write_text("{"), CONFIG),
    "no Unicode": (lambda path: edit_adapter(path, lambda _, config: config.update({"use_\ud800": True})), "use_?"),
    "nothing there": (lambda path: shutil.rmtree(path), "bad"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_adapters_are_refused_and_the_server_goes_on(server: Server, files: tuple[Path, Path], kind: str) -> None:
    path = files[1] / "bad"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(files[1] / "b", path)
    text, before = server.generate(text=PROMPT, lora_path="b")["text"], server.get("/server_info")  # in this order: b may get its slot only now
    spoil, named = BAD[kind]
    spoil(path)
    response = server.post("/load_lora_adapter", lora_name="bad", lora_path=str(path))
    error = response.json()["error"]
    assert response.status_code == 400 and named in error["message"] and str(path) in error["message"], response.text
    after = server.get("/server_info")
    assert after["adapters"] == before["adapters"] and after["stats"]["slots_used"] == before["stats"]["slots_used"]
    assert server.generate(text=PROMPT, lora_path="b")["text"] == text


def test_paths_outside_the_root_are_refused(server: Server, files: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(files[1] / "b", tmp_path / "out")
    (files[1] / "link").symlink_to(tmp_path / "out")
    for path in (tmp_path / "out", files[1] / ".." / ".." / tmp_path.name / "out", files[1] / "link"):
        response = server.post("/load_lora_adapter", lora_name="out", lora_path=str(path))
        assert response.status_code == 400 and "--lora-root" in response.json()["error"]["message"], response.text
    (files[1] / "link").unlink()


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_pages(server: Server, stream: bool) -> None:
    wait_for(server.is_idle)
    before = Counter(server.stats()["finished"])
    with send_raw(server.url, "/generate", {"text": PROMPT, "lora_path": "a", "sampling_params": ENDLESS, "stream": stream}) as connection:
        if stream:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        wait_for(lambda: server.stats()["running"] >= 3)
    wait_for(server.is_idle)
    ends = Counter(server.stats()["finished"]) - before
    assert ends.total() == ENDLESS["n"] and ends["abort"] > ENDLESS["n"] // 2, ends


def test_abort_by_name(server: Server) -> None:
    thread, answers = server.start(text=[PROMPT, PROMPT], rid="long", sampling_params=ENDLESS)
    assert server.post("/abort_request", rid="long").status_code == 200
    thread.join()
    ends = [(answer["meta_info"]["finish_reason"]["type"], answer["meta_info"]["completion_tokens"]) for answer in answers[0].json()]
    assert len(ends) == 2 * ENDLESS["n"] and all(reason == "abort" or count == ENDLESS["max_new_tokens"] for reason, count in ends)
    assert [reason for reason, _ in ends].count("abort") > ENDLESS["n"] and ends[-1][0] == "abort"
    wait_for(server.is_idle)


def unload_was_seen_to_wait(server: Server, files: tuple[Path, Path]) -> bool:
    """An unload while a request runs must be answered after that has ended; whether it was seen before."""
    server.post("/load_lora_adapter", lora_name="d", lora_path=str(files[1] / "d"))
    running, answers = server.start(text=PROMPT, lora_path="d", sampling_params={"max_new_tokens": 300, "ignore_eos": True, "temperature": 0})
    unloads: list[tuple[int, int]] = []  # status, and what runs after it
    unload = threading.Thread(target=lambda: unloads.append((server.post("/unload_lora_adapter", lora_name="d").status_code, server.stats()["running"])))
    unload.start()
    seen = wait_for(lambda: server.stats()["adapters_unloading"] or unloads)
    for thread in (running, unload):
        thread.join()
    assert unloads == [(200, 0)] and answers[0].json()["meta_info"]["completion_tokens"] == 300
    return bool(seen == ["d"])


def test_unload_waits_for_the_running_request(server: Server, files: tuple[Path, Path]) -> None:
    tries = (unload_was_seen_to_wait(server, files) for _ in range(10))  # as above
    assert any(tries), "each request had ended before the unload"


def test_metrics_of_a_real_engine(server: Server) -> None:
    text = httpx.get(server.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["sglang_lora_moe_adapter_slots"]) == 2 and float(values['sglang_lora_moe_adapter_bytes{model_name="a"}']) > 0
    assert float(values["sglang_lora_moe_kv_pages"]) == 2048 // 16 and 0 < float(values["sglang_lora_moe_prefix_hit_rate"]) < 1
    assert float(values['sglang_lora_moe_generated_tokens_total{model_name="a"}']) > 12
    assert set(re.findall(r'model_name="([^"]*)"', text)) == {"tiny", "a", "b"}


def soak_was_busy(server: Server, files: tuple[Path, Path], seed: int) -> bool:
    """No answer may be wrong and no book uneven; whether adapters came and went between the requests, and most of these found theirs."""
    adapters = {name: str(files[1] / name) for name in ADAPTERS}
    report = asyncio.run(soak(server.url, adapters, Options(requests=120, concurrency=12, prompts=4, max_tokens=12, seed=seed)))
    assert report.is_clean, report
    return report.finished > 80 and report.aborted > 3 and report.reloads > 2


def test_small_soak(server: Server, files: tuple[Path, Path]) -> None:
    assert any(soak_was_busy(server, files, seed) for seed in range(10))  # again where all came while one adapter was being loaded


def test_clean_end_while_requests_run(server: Server) -> None:
    """The last test of the shared server."""
    thread, answers = server.start(text=PROMPT, sampling_params={"max_new_tokens": 400, "ignore_eos": True})
    begin = time.monotonic()
    code, err = server.end()
    thread.join()
    assert code == 0 and "Traceback" not in err and "Exception" not in err, err
    assert answers[0].json()["meta_info"]["completion_tokens"] == 400 or time.monotonic() - begin > FINISH_SECONDS, "it was aborted too early"
    assert server.children and not any(map(alive, server.children))
