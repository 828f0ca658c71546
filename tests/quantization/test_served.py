"""Quantized checkpoints through the engine with adapters (`tests/server/test_quantized.py`: over HTTP)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_tasks import ADAPTERS, TASKS, held_out_words
from sglang_lora_moe.engine.engine import Engine
from tests.demo_server import DEMO
from tests.quantized_checkpoints import write_quantized

WORDS = held_out_words(100, seed=2)
GREEDY = {"temperature": 0.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base as compressed-tensors W4A16, group 128."""
    return write_quantized(DEMO / "base", tmp_path_factory.mktemp("demo") / "w4a16", "compressed-tensors", group_size=128)


@pytest.fixture(scope="module")
def engine(demo_base: Path) -> Iterator[Engine]:
    with Engine(model_path=str(demo_base), lora_paths=[f"{name}={DEMO / name}" for name in ADAPTERS]) as engine:
        yield engine


@pytest.mark.parametrize("task", TASKS)
def test_demo_in_four_bits(engine: Engine, task: str) -> None:
    """Adapters that were trained on the 16-bit base still do their task on held-out words."""
    outputs = engine.generate([f"{word}>" for word in WORDS], GREEDY, lora_path=None if task == "base" else task)
    wrong = [(word, out["text"]) for word, out in zip(WORDS, outputs, strict=True) if out["text"] != TASKS[task](word)]
    assert len(wrong) <= 2, wrong  # one word of upper's was found to be
