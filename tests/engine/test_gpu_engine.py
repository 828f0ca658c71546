"""The whole GPU path with tiny models: adapters swapped between replays, graphs captured again, launches counted.

That every architecture and adapter layout equals transformers is test_architectures.py's, which runs on a GPU too; bfloat16 is test_forced_logits.py's.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_lora_moe.engine.engine import Engine
from tests.adapter_files import merged_reference_model, write_adapter
from tests.books import check_core
from tests.engine.models import ADAPTERS, adapter_path, make_engine, model_path, other_adapter_path, reference_greedy
from tests.models.test_against_transformers import OTHERS, ROTATIONS
from tests.quantized_checkpoints import GENUINE, genuine, write_reference
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.gpu
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
    check_core(engine.core)


@pytest.mark.parametrize("case", ["glm4_moe", "granitemoe", "phimoe", *ROTATIONS])
def test_graphs_of_the_forward_of_transformers(case: str, tmp_path: Path) -> None:
    """Decode in padded graphs behind a longer step, whose wanted rows of logits lie beyond these graphs' tokens."""
    arch, fields = ROTATIONS.get(case) or (case, OTHERS[case])
    path = make_tiny_model(arch, tmp_path, **fields | {"max_position_embeddings": 256})
    plain, engine = (engine_on("cuda", path, disable_cuda_graph=disabled, chunked_prefill_size=200) for disabled in (True, False))
    assert engine.core.runner.graphs is not None and engine.core.runner.model.is_split == (arch == "qwen3")
    prompts = [[1, *range(20, 20 + n)] for n in (4, 15, 2, 71, 10)]
    params = [{"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True} for count in (1, 6, 1, 5, 6)]  # three of them in graphs of four
    want, got = (ids(e.generate(input_ids=prompts, sampling_params=params)) for e in (plain, engine))
    assert got == want


def test_steps_that_wait_for_each_other_give_the_same() -> None:
    """--disable-overlap."""
    found = []
    for disabled in (False, True):
        with make_engine(adapters=("r16",), device="cuda", dtype="float32", disable_overlap=disabled) as engine:
            assert engine.core.overlap is not disabled
            found.append(ids(engine.generate(input_ids=PROMPTS, lora_path=["r16", None] * 4, sampling_params=GREEDY)))
    assert found[0] == found[1]


def keep_replays(runner: Any) -> list[tuple[str, torch.Tensor]]:
    """What every later replay of this runner returns: ("decode" or "prefill", logits)."""
    kept: list[tuple[str, torch.Tensor]] = []

    def wrap(kind: str, call: Any) -> Any:
        def recorded(size: Any, active: bool) -> Any:
            assert not active, "a step without adapters ran a graph with them"
            out = call(size, active)
            kept.append((kind, (out[0] if kind == "decode" else out).clone()))
            return out

        return recorded

    runner.graphs.replay = wrap("decode", runner.graphs.replay)
    if runner.prefill_graphs is not None:
        runner.prefill_graphs.logits = wrap("prefill", runner.prefill_graphs.logits)
    return kept


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "qwen2_moe", "deepseek_v3", "qwen3_moe-w4a16"])
def test_base_steps_are_bit_identical_with_adapters_enabled(name: str, tmp_path: Path) -> None:
    """In graph replay, prefill where it has graphs, and while an adapter is resident; the last one on the marlin backend."""
    path = genuine(name, tmp_path) if name in GENUINE else make_tiny_model(name, tmp_path)
    adapter = write_adapter("experts_and_attention", write_reference(path, tmp_path / "reference") if name in GENUINE else path, tmp_path / "adapter")
    found = []
    for config in ({}, {"enable_lora": True, "lora_paths": [f"one={adapter}"]}):
        engine = engine_on("cuda", path, dtype="bfloat16", chunked_prefill_size=130, **config)
        assert engine.model_info["moe_runner_backend"] == ("marlin" if name in GENUINE else "triton")
        if config:
            engine.generate(input_ids=PROMPTS, lora_path="one", sampling_params=GREEDY)
        replays = keep_replays(engine.core.runner)
        engine.generate(input_ids=PROMPTS, sampling_params=GREEDY | {"max_new_tokens": 8})
        found.append(replays)
        assert {kind for kind, _ in replays} == {"decode"} | ({"prefill"} if engine.core.runner.prefill_graphs is not None else set())
    assert len(found[0]) == len(found[1]) > 4
    for step, ((kind, base), (_, with_lora)) in enumerate(zip(*found, strict=True)):
        assert torch.equal(base[: len(PROMPTS)], with_lora[: len(PROMPTS)]), f"step {step}, {kind}"


def test_graphs_are_captured_again_when_an_adapter_first_touches_a_rare_layer(tmp_path: Path) -> None:
    """Router, then embedding and head: the graphs with adapters are replaced once each, those without never."""
    engine = make_engine(adapters=("r8",), device="cuda", dtype="float32", max_loras_per_batch=4, max_lora_rank=64, max_running_requests=4)
    graphs: Any = engine.core.runner.graphs
    prompt, base_graph = PROMPTS[2], graphs._graphs[(1, 1), False]

    def generate(adapter: str) -> list[int]:
        engine.flush_cache()
        return engine.generate(input_ids=prompt, lora_path=adapter, sampling_params=GREEDY)["output_ids"]

    expected = reference_greedy("r8", prompt, 12, ignore_eos=True)
    assert generate("r8") == expected
    for layout in ("router", "embedding"):
        path = write_adapter(layout, model_path(), tmp_path / layout, rank=8, alpha=16, seed=5)
        without = graphs._graphs[(1, 1), True]
        engine.load_lora_adapter(layout, str(path))
        reference = merged_reference_model(model_path(), path)
        with torch.no_grad():
            out = reference.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)  # type: ignore[operator]
        assert generate(layout) == out[0, len(prompt) :].tolist(), layout
        again = graphs._graphs[(1, 1), True]
        assert again is not without, f"{layout}: the old graph is still there"
        assert generate("r8") == expected and generate(layout) == out[0, len(prompt) :].tolist()
        assert graphs._graphs[(1, 1), True] is again, f"{layout}: captured more than once"
    assert graphs._graphs[(1, 1), False] is base_graph


def test_graphs_are_captured_while_another_thread_uses_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory, a copy and an event, as the thread that fills slots uses them, in the middle of each capture; no garbage is collected there."""
    engine = make_engine(adapters=("r8",), device="cuda", dtype="float32", max_loras_per_batch=2, max_lora_rank=64, max_running_requests=2)
    graphs: Any = engine.core.runner.graphs
    step, before, copied = graphs._step, dict(graphs._graphs), []

    def copy() -> None:
        stream, source = torch.cuda.Stream(), torch.ones(3_000_001 + len(copied), pin_memory=True)
        with torch.cuda.stream(stream):
            target = torch.empty_like(source, device="cuda")
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            event.synchronize()
            copied.append(target.sum().item())

    def step_beside_a_copy(size: Any) -> torch.Tensor:
        out = step(size)
        if torch.cuda.is_current_stream_capturing():
            thread = threading.Thread(target=copy)
            thread.start()
            thread.join()
            assert not gc.isenabled()
        return out

    monkeypatch.setattr(graphs, "_step", step_beside_a_copy)
    graphs.capture(show_progress=False)
    assert len(copied) == len(graphs._graphs) and all(copied) and all(graphs._graphs[key] is not before[key] for key in before) and gc.isenabled()
    for adapter in (None, "r8"):
        out = engine.generate(input_ids=PROMPTS[2], lora_path=adapter, sampling_params=GREEDY)["output_ids"]
        assert out == reference_greedy(adapter, PROMPTS[2], 12, ignore_eos=True)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "adapters"])
@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe", "olmoe", "deepseek_v3"])
def test_launches_per_layer(arch: str, lora: bool, tmp_path: Path) -> None:
    """At most 16 kernels a decoder layer at decode, experts included: what two more layers add to a replay."""
    from torch.profiler import ProfilerActivity, profile

    names: dict[tuple[int, int], list[str]] = {}
    for layers in (2, 4):
        more: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if arch == "gpt_oss" else {}
        more |= {"hidden_size": 256, "q_lora_rank": 256, "v_head_dim": 64} if arch == "deepseek_v3" else {}  # linears that are one kernel with their adapters
        path = make_tiny_model(arch, tmp_path, num_hidden_layers=layers, **more)
        engine = engine_on("cuda", path, dtype="bfloat16", enable_lora=lora, **({"max_lora_rank": 16, "max_loras_per_batch": 2} if lora else {}))
        graphs: Any = engine.core.runner.graphs
        for size in (1, 12):
            graphs.replay(size, lora)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                graphs.replay(size, lora)
                torch.cuda.synchronize()
            names[layers, size] = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    counts = {size: (len(names[4, size]) - len(names[2, size])) / 2 for size in (1, 12)}
    print(f"launches of a layer of {arch}, {'with' if lora else 'without'} adapters: {counts}\n  " + "\n  ".join(name[:60] for name in names[4, 12][:40]))
    assert all(0 < count <= 16 for count in counts.values()), counts
