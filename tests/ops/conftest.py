"""Begins the compilations that collected tests wait for, and lets these tests run last."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_lora_moe.ops import build
from tests.ops import ahead, emulator

os.environ.setdefault("ASAN_OPTIONS", "detect_leaks=0")  # that checker needs ptrace, which some containers forbid; it would fail every emulated kernel


def waits_for(item: pytest.Item) -> ahead.Command | None:
    module = getattr(item, "module", None)
    needs_driver = "driver" in getattr(item, "fixturenames", ()) or hasattr(module, "emulate") and not torch.cuda.is_available()
    if needs_driver and shutil.which("g++"):
        return ahead.emulated(module.DRIVER)  # type: ignore[union-attr]
    return module.waits_for(item) if hasattr(module, "waits_for") else None  # type: ignore[union-attr]


def turn(item: pytest.Item) -> int:
    """Tests that wait for no program come first, then those that run what they wait for, beside the last compilers, then readers of compilers' reports.

    Programs are begun in this order: of those that report, Triton's first, since one of them takes longest; many short ones end together.
    """
    command = waits_for(item)
    return 0 if command is None else {"g++": 1, sys.executable: 2}.get(command[0], 3)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=turn)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    for item in session.items:
        if (command := waits_for(item)) is not None:
            ahead.begin(command)


def pytest_sessionfinish() -> None:
    ahead.stop()


@pytest.fixture(scope="module")
def driver(request: pytest.FixtureRequest) -> Path:
    """The module's DRIVER, compiled for the emulator."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    compiled = ahead.finished(ahead.emulated(request.module.DRIVER))
    assert compiled.returncode == 0, compiled.stderr
    return ahead.FOLDER / request.module.DRIVER.stem


@pytest.fixture(scope="module", autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without a GPU the operators that the module's `emulate(driver)` returns run on CPU tensors; with one they are the library's own."""
    if not hasattr(request.module, "emulate"):
        yield
    elif torch.cuda.is_available():
        build.load()
        yield
    else:
        yield from emulator.implemented(request.module.emulate(request.getfixturevalue("driver")))
