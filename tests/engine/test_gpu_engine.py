"""Tiny models through the whole GPU path: graphs on and off, adapters swapped between replays, against the CPU engine and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_lora_moe.engine.engine import Engine
from tests.engine.models import ADAPTERS, adapter_path, make_engine, other_adapter_path, reference_greedy
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.gpu
ARCHS = ("qwen3_moe", "gpt_oss", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "qwen3")
PROMPTS = [[1, *range(10 + i, 14 + 3 * i)] for i in range(8)]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def ids(results: Any) -> list[list[int]]:
    return [result["output_ids"] for result in results]


def engine_on(device: str, path: Path, **config: Any) -> Engine:
    defaults: dict[str, Any] = {"page_size": 4, "max_total_tokens": 2048, "max_running_requests": 12, "chunked_prefill_size": 64, "dtype": "float32"}
    return Engine(model_path=str(path), device=device, **(defaults | config))


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_equals_the_cpu_engine(arch: str, graphs: bool, tmp_path: Path) -> None:
    path = make_tiny_model(arch, tmp_path)
    expected = ids(engine_on("cpu", path).generate(input_ids=PROMPTS, sampling_params=GREEDY))
    engine = engine_on("cuda", path, disable_cuda_graph=not graphs)
    assert (engine.core.runner.graphs is not None) == graphs
    assert ids(engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)) == expected
    assert ids(engine.generate(input_ids=PROMPTS[:3], sampling_params=GREEDY)) == expected[:3]


@pytest.mark.parametrize("graphs", [True, False])
def test_adapters_equal_transformers(graphs: bool) -> None:
    engine = make_engine(device="cuda", dtype="float32", disable_cuda_graph=not graphs, max_running_requests=12)
    names = [*ADAPTERS, None, *ADAPTERS]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(names))]
    expected = [reference_greedy(name, prompt, 12, ignore_eos=True) for name, prompt in zip(names, prompts, strict=True)]
    assert ids(engine.generate(input_ids=prompts, lora_path=names, sampling_params=GREEDY)) == expected


def test_swaps_between_replays_equal_solo_runs() -> None:
    """500 requests over 8 adapters on two slots, mixed with base requests."""
    engine = make_engine(adapters=(), device="cuda", dtype="float32", max_loras_per_batch=2, max_lora_rank=64, max_running_requests=12)
    names: list[str | None] = [None]
    for i in range(4):
        engine.load_lora_adapter(f"o{i}", str(other_adapter_path(i)))
        names.append(f"o{i}")
    for name in ADAPTERS:
        engine.load_lora_adapter(name, str(adapter_path(name)))
        names.append(name)
    work = [(PROMPTS[i * 5 % 8], names[i * 7 % 9]) for i in range(500)]
    solo = {(tuple(prompt), name): engine.generate(input_ids=prompt, lora_path=name, sampling_params=GREEDY)["output_ids"] for prompt, name in work[:72]}
    engine.flush_cache()
    found = ids(engine.generate(input_ids=[prompt for prompt, _ in work], lora_path=[name for _, name in work], sampling_params=GREEDY))
    assert found == [solo[tuple(prompt), name] for prompt, name in work]
    engine.core.check()


def test_base_steps_are_bit_identical_with_adapters_enabled() -> None:
    """In graph replay, and while an adapter is resident."""
    params = GREEDY | {"max_new_tokens": 8}
    found = []
    for lora in (False, True):
        engine = make_engine(lora, device="cuda", dtype="bfloat16", max_running_requests=12)
        runner, logits = engine.core.runner, []
        replay = runner.graphs.replay

        def recorded(size: int, active: bool, replay: Any = replay, logits: Any = logits) -> Any:
            out = replay(size, active)
            logits.append(out[0].clone())
            return out

        runner.graphs.replay = recorded
        engine.generate(input_ids=PROMPTS, sampling_params=params)
        found.append(logits)
    assert len(found[0]) == len(found[1]) > 4
    for step, (base, with_lora) in enumerate(zip(*found, strict=True)):
        count = len(PROMPTS)
        assert torch.equal(base[:count], with_lora[:count]), f"step {step}"


@pytest.mark.parametrize("adapter", [None, "r16"])
def test_bfloat16_is_near_float32(adapter: str | None) -> None:
    """Prompt log-probabilities of one engine in bf16 against transformers in float32: median absolute difference."""
    from tests.engine.models import reference_logprobs

    engine = make_engine(device="cuda", dtype="bfloat16", max_running_requests=12)
    tokens = [1, *range(20, 60)]
    result = engine.generate(input_ids=tokens, lora_path=adapter, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0)
    got = torch.tensor([value for value, _, _ in result["meta_info"]["input_token_logprobs"][1:]])
    want = reference_logprobs(adapter, tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert (got - want).abs().median() < 0.05  # a routing flip between near-equal experts may move single rows


def test_launches_per_layer(tmp_path: Path) -> None:
    """At most 16 kernels a decoder layer at decode, experts included."""
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for layers in (2, 4):
        path = make_tiny_model("qwen3_moe", tmp_path, num_hidden_layers=layers)
        engine = engine_on("cuda", path, dtype="bfloat16")
        graphs: Any = engine.core.runner.graphs
        graphs.replay(8, False)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            graphs.replay(8, False)
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(len(names))
    per_layer = (counts[1] - counts[0]) / 2
    print(f"launches of a layer: {per_layer}, of a step of 4 layers: {counts[1]}: {names[:24]}")
    assert 0 < per_layer <= 16
