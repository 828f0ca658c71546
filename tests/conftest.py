"""Test set-up: without a GPU, Triton kernels run in its interpreter, and tests marked `gpu` are skipped.

Where the server's libraries are not installed (`./run test-gpu` installs nothing), tests of the server are not collected.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SERVER_LIBRARIES = ("fastapi", "uvicorn", "zmq", "msgspec", "httpx", "openai")
if any(importlib.util.find_spec(name) is None for name in SERVER_LIBRARIES):
    collect_ignore_glob = ["server", "engine/test_process*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: ./run test-gpu"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")
