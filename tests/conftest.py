"""Test set-up: without a GPU, Triton kernels run in its interpreter, tests marked `gpu` are skipped, and memory that nobody wrote holds NaN.

The largest error of each kernel against its reference is printed at the end with its test, and written to `--errors FILE` as
a results file (benchmarks/results/).
Where the server's libraries are not installed (`./run test-gpu` installs nothing), tests of the server are not collected.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops import ahead  # noqa: F401  # makes the folder that the processes of pytest-xdist share, before they begin

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the references run on the CPU: processes that each take all cores stand in each other's way
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _spoilt(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """As `make`, which leaves memory as it is: with NaN and numbers that are no index, so that what reads it fails every time instead of now and then."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "cpu":
            with torch.no_grad():
                if tensor.dtype.is_floating_point:
                    tensor.view(torch.uint8).fill_(0x7F) if tensor.dtype.itemsize == 1 else tensor.fill_(torch.nan)
                elif tensor.dtype in (torch.int32, torch.int64):
                    tensor.fill_(2**30 - 1)
        return tensor

    return made


if not GPU:
    torch.empty, torch.empty_like = _spoilt(torch.empty), _spoilt(torch.empty_like)
    torch.Tensor.new_empty = _spoilt(torch.Tensor.new_empty)

SERVER_LIBRARIES = ("fastapi", "uvicorn", "zmq", "msgspec", "httpx", "openai")
if any(importlib.util.find_spec(name) is None for name in SERVER_LIBRARIES):
    collect_ignore_glob = ["server", "engine/test_process*"]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run on whatever device there is are GPU tests where there is one."""
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: ./run test-gpu"))
        elif GPU and ("device" in getattr(item, "fixturenames", ()) or hasattr(getattr(item, "module", None), "DEVICE")):
            item.add_marker(pytest.mark.gpu)
        if (folder := item.path.parent.name) not in ("moe", "ops"):  # --dist loadgroup gives a group to one process, and tests of none to whichever is free
            item.add_marker(pytest.mark.xdist_group("servers" if folder in ("engine", "server", "tests") else item.path.stem))


@pytest.fixture(scope="session")
def device() -> torch.device:
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if GPU else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--errors", type=Path, metavar="FILE", help="write the largest error of each kernel as JSON")


@pytest.fixture(autouse=True)
def _keep_largest_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hands what the test measured to the report, which is how it reaches the summary from other processes too."""
    from tests.references import largest_errors

    largest_errors.clear()
    yield
    request.node.user_properties.extend(largest_errors.items())
    if GPU and torch.cuda.memory_reserved() > 1 << 30:  # other processes' tests share the GPU
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found: dict[str, tuple[float, str]] = {}  # the largest error and its test
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for kernel, error in getattr(report, "user_properties", ()):
            found[kernel] = max((error, report.nodeid), found.get(kernel, (0.0, "")))
    if found and (GPU or config.option.errors):
        terminalreporter.section("largest errors")
        for kernel, (error, test) in sorted(found.items()):
            terminalreporter.line(f"{error:.2e}  {kernel}  ({test})")
    if config.option.errors:
        from benchmarks import timing

        rows = [{"what": kernel, "error": float(f"{error:.3g}"), "test": test} for kernel, (error, test) in sorted(found.items())]
        head = {"bench": "errors", "date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": timing.current_commit(), "gpu": timing.gpu_name()}
        record = {**head, "versions": timing.package_versions(), "settings": {}, "rows": rows}
        config.option.errors.write_text(json.dumps(record, indent=1) + "\n")
