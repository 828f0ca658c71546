"""Who gets how much memory, and what is said when it does not fit."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_lora_moe.config import Config
from sglang_lora_moe.engine import memory
from sglang_lora_moe.engine.engine import Engine
from sglang_lora_moe.engine.memory import MemoryBudget
from sglang_lora_moe.lora.packed import PoolLayout
from sglang_lora_moe.lora.targets import LinearTarget
from tests.engine.models import make_engine, model_path

GIB = 2**30


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """140 GiB of GPU memory, one of it taken by others."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (139 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)


def gpu_budget(**fields: Any) -> MemoryBudget:
    defaults: dict[str, Any] = {"model_path": "m", "device": "cuda", "context_length": 32768, "max_lora_rank": 64, "enable_lora": True}
    return MemoryBudget(Config(**(defaults | fields)))


def layout_of(gib_per_slot: float) -> PoolLayout:
    return PoolLayout([LinearTarget("l", int(gib_per_slot * GIB / 2 / 64) - 8, 8)], 64, torch.bfloat16)


def taken(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int((139 - gib) * GIB), 140 * GIB))


def test_what_fits(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = gpu_budget(max_lora_rank=16)
    assert budget.limit == int(139 * GIB - 140 * GIB * (1 - 0.85))
    budget.note("weights", 57 * GIB)
    budget.plan_adapters(layout_of(1.66))
    taken(monkeypatch, 57 + 8 * 1.66 + 2)
    budget.measure_workspace()
    tokens = budget.plan_kv_cache(98304)
    assert tokens % 16 == 0 and 0 <= budget.left < 16 * 98304 and abs(budget.parts["workspace"] - 2 * GIB) < GIB / 100
    text = budget.arithmetic()
    assert re.search(
        r"GPU memory 140.00 GiB, 139.00 GiB free at start, of which --mem-fraction-static 0.85 gives 118.00 GiB: weights 57.00 GiB \+ adapters", text
    )
    assert re.search(rf"\(8 slots of rank 16, 1.66 GiB each\) \+ workspace 2.0\d GiB .* \+ KV cache 45.\d\d GiB \({tokens} tokens of 98304 bytes", text), text


def suggestions(error: ValueError) -> dict[str, float]:
    """The flags of "Set --a 1, or --b 2."."""
    found = re.search(r"\. Set (.*)\.$", str(error))
    assert found, str(error)
    return {flag: float(value) for flag, value in (way.split(" ") for way in found.group(1).split(", or "))}


@pytest.mark.parametrize("slots, slot_gib", [(8, 8.0), (16, 6.65), (64, 6.65), (5000, 6.65)])
def test_suggestions_for_adapters_fit(h200: None, slots: int, slot_gib: float) -> None:
    budget = gpu_budget(max_loras_per_batch=slots)
    budget.note("weights", 57 * GIB)
    with pytest.raises(
        ValueError, match=rf"it does not fit: GPU memory .*needed: weights 57.00 GiB \+ adapters .*\({slots} slots of rank 64, {slot_gib:.2f} GiB each"
    ) as error:
        budget.plan_adapters(layout_of(slot_gib))
    ways = suggestions(error.value)
    assert set(ways) <= {"--mem-fraction-static", "--max-loras-per-batch", "--max-lora-rank"} and "--max-loras-per-batch" in ways
    for flag, value in ways.items():
        changed = gpu_budget(**({"max_loras_per_batch": slots} | {flag[2:].replace("-", "_"): value if "fraction" in flag else int(value)}))
        changed.note("weights", 57 * GIB)
        changed.plan_adapters(layout_of(slot_gib * (value / 64 if flag == "--max-lora-rank" else 1)))
        assert changed.left >= 0


def test_a_model_that_is_too_large(h200: None) -> None:
    with pytest.raises(ValueError, match="needed: weights 240.00 GiB. Use a smaller or a quantized model, or a device with more memory.$"):
        gpu_budget().note("weights", 240 * GIB)


@pytest.mark.parametrize(
    "slots, given, way", [(1, ["a=/a"], "Use a smaller"), (2, ["a=/a"], "Set --max-loras-per-batch 1."), (1, None, "Set --max-lora-rank 48.")]
)
def test_only_ways_out_that_are_possible_are_suggested(h200: None, slots: int, given: list[str] | None, way: str) -> None:
    budget = gpu_budget(max_loras_per_batch=slots, lora_paths=given)
    budget.note("weights", 57 * GIB)
    with pytest.raises(ValueError, match=re.escape(f"needed: weights 57.00 GiB + adapters 75.00 GiB ({slots} slots")) as error:
        budget.plan_adapters(layout_of(75 / slots))
    assert f" left. {way}" in str(error.value) or f" each). {way}" in str(error.value)


def test_no_room_for_the_kv_cache(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = gpu_budget(chunked_prefill_size=8192, max_loras_per_batch=8)
    budget.note("weights", 57 * GIB)
    budget.plan_adapters(layout_of(6.65))
    taken(monkeypatch, 57 + 8 * 6.65 + 7.8)
    budget.measure_workspace()
    with pytest.raises(ValueError, match="a KV cache of 4096 tokens .0.38 GiB. does not fit: 0 tokens do: GPU memory") as error:
        budget.plan_kv_cache(98304)
    assert suggestions(error.value) == {"--mem-fraction-static": 0.86, "--max-loras-per-batch": 7, "--max-lora-rank": 56, "--chunked-prefill-size": 4096}


def test_more_tokens_than_fit(h200: None) -> None:
    budget = gpu_budget(max_total_tokens=2_000_000, enable_lora=False)
    budget.note("weights", 57 * GIB)
    with pytest.raises(ValueError, match=r"a KV cache of 2000000 tokens \(183.11 GiB\) does not fit: 666\d\d\d tokens do") as error:
        budget.plan_kv_cache(98304)
    tokens = int(suggestions(error.value)["--max-total-tokens"])
    again = gpu_budget(max_total_tokens=tokens)
    again.note("weights", 57 * GIB)
    assert again.plan_kv_cache(98304) == tokens


def test_running_out_of_memory_is_a_sentence(h200: None) -> None:
    budget = gpu_budget()
    budget.note("weights", 57 * GIB)
    with (
        pytest.raises(
            ValueError, match=r"memory ran out while capturing decode graphs \(CUDA out of memory. Tried .*\): GPU memory .*Set --disable-cuda-graph\.$"
        ),
        budget.guard("capturing decode graphs", "--disable-cuda-graph"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(ValueError, match="memory ran out while loading .*can't allocate memory"), budget.guard("loading"):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="something else"), budget.guard("loading"):
        raise RuntimeError("something else")


# ---- engines on a CPU -----------------------------------------------------------------------------------------------
def test_sizes_are_said_at_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), make_engine() as engine:
        parts = engine.model_info["memory"]
    assert list(parts) == ["weights", "adapters", "KV cache"] and all(value > 0 for value in parts.values())
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("memory: ")]
    assert re.search(
        r"main memory .* weights .* \+ adapters .*\(8 slots of rank 64, .* \+ KV cache .*\(4096 tokens of \d+ bytes, 1024 pages of 4\) \+ .* left", line
    )


def with_memory(monkeypatch: pytest.MonkeyPatch, mib: float) -> None:
    monkeypatch.setattr(memory, "main_memory", lambda: (int(mib * 2**20), 2**33))


def test_an_engine_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_engine() as engine:
        parts = {name: nbytes / 2**20 for name, nbytes in engine.model_info["memory"].items()}
    with_memory(monkeypatch, parts["weights"] / 2)
    with pytest.raises(ValueError, match="it does not fit: main memory .*needed: weights .*Use a smaller or a quantized model"):
        make_engine()
    with_memory(monkeypatch, (parts["weights"] + parts["adapters"] / 2) / 0.85)
    with pytest.raises(ValueError, match="needed: weights .* adapters .*Set --max-loras-per-batch 3") as error:
        make_engine()
    with make_engine(max_loras_per_batch=int(suggestions(error.value)["--max-loras-per-batch"]), max_total_tokens=64):
        pass
    with_memory(monkeypatch, (parts["weights"] + parts["adapters"] + parts["KV cache"] / 2) / 0.85)
    with pytest.raises(ValueError, match="a KV cache of 4096 tokens .* does not fit: .*Set --max-total-tokens 20") as error:
        make_engine()
    with make_engine(max_total_tokens=int(suggestions(error.value)["--max-total-tokens"])):
        pass


def test_tokens_below_two_pages() -> None:
    with pytest.raises(ValueError, match="--max-total-tokens 7 is less than two pages"):
        Engine(model_path=str(model_path()), max_total_tokens=7, page_size=4)


@pytest.mark.parametrize(("limit", "expected"), [("268435456", (268435456 - 100_000_000 + 30_000_000, 268435456)), ("max", None), (str(2**60), None)])
def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: tuple[int, int] | None) -> None:
    machine = memory.main_memory()[1]
    files = {"memory.max": limit, "memory.current": "100000000", "memory.stat": "anon 5\ninactive_file 30000000\nactive_file 7\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    found = memory.main_memory()
    assert found == expected if expected is not None else found[1] == machine
