"""The in-process engine end to end, on a tiny Qwen3-MoE against transformers and PEFT."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.engine import Engine
from tests.adapter_files import edit_adapter, write_adapter
from tests.books import check_core
from tests.engine.models import ADAPTERS, make_engine, model_path, reference_greedy, reference_logprobs

GREEDY = {"temperature": 0.0, "max_new_tokens": 16}
NAMES: list[str | None] = [None, *ADAPTERS]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [1] + [random.Random(f"{seed}/{i}").randrange(3, 98) for i in range(length - 1)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with make_engine() as made:
        yield made
        check_core(made.core)


def logprobs_of(result: dict[str, Any]) -> list[float]:
    return [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]


def test_mixed_batch_equals_transformers_and_solo_runs(engine: Engine) -> None:
    prompts = [prompt(length, i) for i, length in enumerate((3, 9, 30, 70, 12, 5, 41, 8, 17, 2))]
    adapters = [NAMES[i % len(NAMES)] for i in range(len(prompts))]
    params = GREEDY | {"ignore_eos": True}
    together = engine.generate(input_ids=prompts, sampling_params=params, lora_path=adapters, return_logprob=True)
    for ids, adapter, result in zip(prompts, adapters, together, strict=True):
        assert result["output_ids"] == reference_greedy(adapter, ids, 16, ignore_eos=True), f"{adapter} on {len(ids)} tokens"
        expected = reference_logprobs(adapter, ids + result["output_ids"])[len(ids) - 1 : -1]
        found = torch.tensor(logprobs_of(result))
        torch.testing.assert_close(found, expected.gather(1, torch.tensor(result["output_ids"]).unsqueeze(1)).squeeze(1), atol=1e-4, rtol=0)
    engine.flush_cache()
    for ids, adapter, result in zip(prompts, adapters, together, strict=True):
        alone = engine.generate(input_ids=ids, sampling_params=params, lora_path=adapter, return_logprob=True)
        assert alone["output_ids"] == result["output_ids"]
        assert max(abs(a - b) for a, b in zip(logprobs_of(alone), logprobs_of(result), strict=True)) < 1e-4


def test_adapters_change_the_answer(engine: Engine) -> None:
    results = engine.generate(input_ids=[prompt(12)] * 5, sampling_params=GREEDY | {"ignore_eos": True}, lora_path=NAMES)
    assert len({tuple(result["output_ids"]) for result in results}) == 5


def test_end_of_sequence(engine: Engine) -> None:
    ends = 0
    for seed in range(12):
        ids = prompt(6, seed)
        expected = reference_greedy(None, ids, 40)
        result = engine.generate(input_ids=ids, sampling_params={"temperature": 0.0, "max_new_tokens": 40})
        assert result["output_ids"] == expected
        reason = result["meta_info"]["finish_reason"]
        ends += reason["type"] == "stop"
        assert reason == ({"type": "stop", "matched": 2} if expected[-1] == 2 else {"type": "length", "length": 40})
    assert ends


def test_base_is_bit_identical_with_and_without_lora(engine: Engine) -> None:
    prompts = [prompt(length, 50 + length) for length in (4, 20, 90)]
    with make_engine(lora=False) as plain:
        for params in (GREEDY, GREEDY | {"temperature": 1.0, "seed": 3}):
            engine.flush_cache()
            plain.flush_cache()
            asked: dict[str, Any] = {"sampling_params": params, "return_logprob": True, "top_logprobs_num": 128, "logprob_start_len": 0}
            one, other = (e.generate(input_ids=prompts, **asked) for e in (engine, plain))
            for a, b in zip(one, other, strict=True):
                assert a["output_ids"] == b["output_ids"]
                for name in ("input_top_logprobs", "output_top_logprobs"):  # the whole distribution, compared exactly
                    assert a["meta_info"][name] == b["meta_info"][name]


@pytest.mark.parametrize("chunk, page", [(1, 1), (7, 4), (16, 16), (512, 3)])
def test_chunk_and_page_sizes_do_not_change_tokens(chunk: int, page: int) -> None:
    prompts = [prompt(length, length) for length in (50, 3, 33)]
    with make_engine(adapters=("r8",), chunked_prefill_size=chunk, page_size=page, disable_prefix_cache=page == 3) as sized:
        for adapter in (None, "r8"):
            results = sized.generate(input_ids=prompts, sampling_params=GREEDY, lora_path=adapter)
            assert [result["output_ids"] for result in results] == [reference_greedy(adapter, ids, 16) for ids in prompts]
        check_core(sized.core)


def test_retraction_leaves_answers_unchanged() -> None:
    with make_engine(adapters=("r4",), max_total_tokens=160) as small:
        prompts = [prompt(10, i) for i in range(8)]
        adapters = [None, "r4"] * 4
        results = small.generate(input_ids=prompts, sampling_params={"temperature": 0.0, "max_new_tokens": 30, "ignore_eos": True}, lora_path=adapters)
        assert small.get_server_info()["retractions"] > 0
        for ids, adapter, result in zip(prompts, adapters, results, strict=True):
            assert result["output_ids"] == reference_greedy(adapter, ids, 30, ignore_eos=True)
        check_core(small.core)


def test_an_adapter_that_overflows_changes_nobody_elses_answer(tmp_path: Path) -> None:
    big = edit_adapter(
        write_adapter("experts_and_attention", model_path(), tmp_path / "big", rank=4), lambda tensors, _: [t.mul_(1e30) for t in tensors.values()]
    )
    params = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
    with make_engine(adapters=("r8",), max_total_tokens=256) as small:
        small.load_lora_adapter("big", str(big))
        prompts, names = [prompt(10 + i, i) for i in range(6)], ["big", "r8", None] * 2
        for _ in range(3):  # pages that held its NaN are used again
            for ids, name, result in zip(prompts, names, small.generate(input_ids=prompts, sampling_params=params, lora_path=names), strict=True):
                assert name == "big" or result["output_ids"] == reference_greedy(name, ids, 12, ignore_eos=True)
            prompts, names = prompts[::-1], names[1:] + names[:1]
        value, *_ = small.generate(input_ids=prompts[0], sampling_params=params, lora_path="big", return_logprob=True)["meta_info"]["output_token_logprobs"][0]
        assert value != value  # it is NaN indeed
        check_core(small.core)


def test_prompt_logprobs_equal_transformers(engine: Engine) -> None:
    ids = prompt(80, 7)  # more than a chunk
    for adapter in (None, "r16"):
        expected = reference_logprobs(adapter, ids)
        for start in (0, 1, 33, 79):
            result = engine.generate(
                input_ids=ids, sampling_params=GREEDY, lora_path=adapter, return_logprob=True, logprob_start_len=start, top_logprobs_num=3
            )["meta_info"]
            entries = result["input_token_logprobs"]
            assert [token for _, token, _ in entries] == ids[start:]
            assert (entries[0][0] is None) == (start == 0)
            for position, ((value, token, _), top) in enumerate(zip(entries, result["input_top_logprobs"], strict=True), start):
                if value is not None:
                    assert value == pytest.approx(expected[position - 1, token].item(), abs=1e-4)
                    assert top[0][0] == pytest.approx(expected[position - 1].max().item(), abs=1e-4) and len(top) == 3
    scored = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0)
    assert scored["output_ids"] == [] and len(scored["meta_info"]["input_token_logprobs"]) == 80
    for params in ({"max_new_tokens": 0}, GREEDY):  # a prompt of one token has nothing to compute, but its first token
        alone = engine.generate(input_ids=[9], sampling_params=params, return_logprob=True, logprob_start_len=0, top_logprobs_num=2)["meta_info"]
        assert alone["input_token_logprobs"] == [(None, 9, None)] and alone["input_top_logprobs"] == [None]


def test_prefix_cache_hits_within_an_adapter_only(engine: Engine) -> None:
    engine.flush_cache()
    ids = prompt(41, 99)
    for adapter in NAMES:
        assert engine.generate(input_ids=ids, sampling_params=GREEDY, lora_path=adapter)["meta_info"]["cached_tokens"] == 0
    for adapter in NAMES:
        again = engine.generate(input_ids=ids, sampling_params=GREEDY, lora_path=adapter)
        assert again["meta_info"]["cached_tokens"] == 40
        assert again["output_ids"] == reference_greedy(adapter, ids, 16)
    assert engine.flush_cache()["flushed_pages"] > 0


def test_samples_and_seeds(engine: Engine) -> None:
    params = {"temperature": 1.2, "max_new_tokens": 12, "seed": 11, "n": 3, "ignore_eos": True}
    first = engine.generate("hello", params, lora_path="r8")
    assert len({tuple(result["output_ids"]) for result in first}) == 3
    noise = [{"temperature": 1.5, "max_new_tokens": 9, "top_p": 0.9}] * 6
    mixed = engine.generate(["hello", *"abcdef"], [params | {"n": 1}, *noise], lora_path=["r8", *(NAMES * 2)[:6]])
    assert mixed[0]["output_ids"] == first[0]["output_ids"]  # whatever else is in the batch
    params |= {"sampling_seed": params["seed"], "seed": None}  # SGLang's name, as over HTTP
    assert [r["output_ids"] for r in engine.generate("hello", params, lora_path="r8")] == [r["output_ids"] for r in first]
    unseeded = {"temperature": 1.2, "max_new_tokens": 12, "ignore_eos": True}
    assert engine.generate("hello", unseeded)["output_ids"] != engine.generate("hello", unseeded)["output_ids"]


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_random_seed_decides_samples_and_dummy_weights(load_format: str) -> None:
    def made(seed: int) -> tuple[list[int], torch.Tensor]:
        with make_engine(False, random_seed=seed, load_format=load_format) as one:
            weight = next(parameter for parameter in one.core.runner.model.hf.parameters() if parameter.dim() == 2)
            return one.generate("hello", {"temperature": 1.2, "max_new_tokens": 12, "ignore_eos": True})["output_ids"], weight.detach().clone()

    (ids, weight), (same_ids, same_weight), (other_ids, other_weight) = made(1), made(1), made(2)
    assert ids == same_ids != other_ids
    assert torch.equal(weight, same_weight) and torch.equal(weight, other_weight) == (load_format == "auto")


def test_text_stop_strings_and_streams(engine: Engine) -> None:
    params = GREEDY | {"max_new_tokens": 30, "ignore_eos": True}
    full = engine.generate("hello", params)
    decoded = engine.tokenizer.decode(full["output_ids"], skip_special_tokens=True)
    assert full["text"] == decoded
    stop = decoded[10:12]
    before = dict(engine.core.stats()["finished"])
    stopped = engine.generate("hello", params | {"stop": [stop, "never this"]})
    counted = engine.core.stats()["finished"]
    assert {reason: n - before.get(reason, 0) for reason, n in counted.items() if n != before.get(reason, 0)} == {"stop": 1}
    assert stopped["text"] == decoded[: decoded.index(stop)] and stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    untrimmed = engine.generate("hello", params | {"stop": stop, "no_stop_trim": True, "skip_special_tokens": False})
    assert untrimmed["text"].endswith(stop)
    parts = list(engine.generate("hello", params, stream=True))
    assert parts[-1]["text"] == decoded and parts[-1]["output_ids"] == full["output_ids"] and len(parts) > 20
    assert all(parts[-1]["text"].startswith(part["text"]) for part in parts)
    check_core(engine.core)
    assert not engine.core.has_work


def test_closing_a_stream_aborts(engine: Engine) -> None:
    stream = engine.generate(["hello", "world"], GREEDY | {"max_new_tokens": 300, "ignore_eos": True}, lora_path=["r4", None], stream=True)
    next(stream)
    assert engine.core.scheduler.running
    stream.close()
    assert not engine.core.has_work and engine.core.scheduler.cache.num_in_use == 0
    check_core(engine.core)


def test_abort_request_ends_a_stream(engine: Engine) -> None:
    stream = engine.generate("hello", GREEDY | {"max_new_tokens": 300, "ignore_eos": True}, stream=True)
    first = next(stream)
    engine.abort_request(first["meta_info"]["id"])
    engine.abort_request(first["meta_info"]["id"])
    engine.abort_request("unknown")
    assert list(stream)[-1]["meta_info"]["finish_reason"]["type"] == "abort"


def test_refusals(engine: Engine) -> None:
    def refused(**call: Any) -> RequestError:
        with pytest.raises(RequestError) as error:
            engine.generate(**call)
        check_core(engine.core)
        assert not (engine.core.has_work or engine.front._requests or engine._replies)
        return error.value

    unknown = refused(prompt="x", lora_path="nobody")
    assert unknown.status == 404 and unknown.code == "model_not_found" and all(name in unknown.message for name in ADAPTERS)
    assert refused(prompt="x", sampling_params={"n": 3}, lora_path="nobody").status == 404  # three refusals, of which one is heard
    assert refused(input_ids=[5, 128]).param == "input_ids"
    assert refused(input_ids=[-1]).param == "input_ids"
    too_long = refused(input_ids=prompt(512))
    assert too_long.code == "context_length_exceeded" and "512 tokens" in too_long.message
    assert refused(prompt=["x", "y"], lora_path=["r4", "nobody"]).status == 404  # one bad request refuses the call
    assert refused(prompt="x", sampling_params={"max_tokens": 3}).param == "max_tokens"
    assert refused(prompt="x", sampling_params={"temperature": -1}).param == "temperature"
    assert refused(prompt="x", sampling_params={"n": 0}).param == refused(prompt="x", sampling_params={"n": "2"}).param == "n"
    assert refused(prompt="x", sampling_params={"seed": 1, "sampling_seed": 2}).param == "sampling_seed"
    assert refused(prompt="x", sampling_params={"stop": 0}).param == "stop"
    assert refused(prompt="x", top_logprobs_num=2).param == "top_logprobs_num"
    assert refused(prompt=["x"], lora_path=["r4", "r8"]).param == "lora_path"
    assert refused().param == "prompt"


def test_no_adapters_without_enable_lora() -> None:
    with make_engine(lora=False) as plain:
        for call in (lambda: plain.generate("x", lora_path="r4"), lambda: plain.load_lora_adapter("a", "b"), lambda: plain.unload_lora_adapter("a")):
            with pytest.raises(RequestError, match="--enable-lora") as error:
                call()
            assert error.value.status == 400


def test_output_stops_at_the_context_length(engine: Engine) -> None:
    result = engine.generate(input_ids=prompt(500), sampling_params={"temperature": 0.0, "max_new_tokens": 100, "ignore_eos": True})
    assert len(result["output_ids"]) == 12 and result["meta_info"]["finish_reason"]["type"] == "length"


def test_more_adapters_than_slots() -> None:
    with make_engine(max_loras_per_batch=2) as small:
        prompts = [prompt(6 + i % 5, i) for i in range(20)]
        adapters = [NAMES[i % 5] for i in range(20)]
        results = small.generate(input_ids=prompts, sampling_params=GREEDY, lora_path=adapters)
        for ids, adapter, result in zip(prompts, adapters, results, strict=True):
            assert result["output_ids"] == reference_greedy(adapter, ids, 16)
        check_core(small.core)


def test_a_long_list_waits_for_room_in_the_queue() -> None:
    with make_engine(lora=False, max_running_requests=2, max_queued_requests=3) as small:
        prompts = [prompt(5, i) for i in range(20)]
        results = small.generate(input_ids=prompts, sampling_params=GREEDY)
        assert [result["output_ids"] for result in results] == [reference_greedy(None, ids, 16) for ids in prompts]
        with pytest.raises(RequestError, match="queue is full"):
            small.generate("hi", GREEDY | {"n": 20})
        assert not small.core.has_work


def test_continuous_batching_pays(engine: Engine) -> None:
    """32 at a time make at least 4 times the tokens per second of one at a time."""

    def rate(count: int) -> float:
        begin = time.perf_counter()
        engine.generate(input_ids=[prompt(8, i) for i in range(count)], sampling_params={"temperature": 0.0, "max_new_tokens": 40, "ignore_eos": True})
        return count * 40 / (time.perf_counter() - begin)

    rate(2)
    together, alone = [rate(32), rate(32)], [rate(1), rate(1)]
    for _ in range(10):  # again where other programs took the machine
        together.append(rate(32))
        alone.append(rate(1))
        if max(together) >= 4 * max(alone):
            return
    raise AssertionError(f"tokens per second: {together} together, {alone} alone")


BLOCKED = """
import sys
class Blocker:
    names = {"fastapi", "uvicorn", "pydantic", "zmq", "msgspec", "starlette", "prometheus_client"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocker())
from sglang_lora_moe.engine.engine import Engine
with Engine(model_path=sys.argv[1], lora_paths=["a=" + sys.argv[2]]) as engine:
    result = engine.generate("hi", {"temperature": 0, "max_new_tokens": 4}, lora_path="a")
    assert len(result["output_ids"]) > 0
assert not Blocker.names & set(sys.modules)
print("served")
"""


def test_engine_needs_no_server_library() -> None:
    from tests.engine.models import adapter_path

    command = [sys.executable, "-c", BLOCKED, str(model_path()), str(adapter_path("r8"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.stdout == "served\n", done.stderr[-3000:]
