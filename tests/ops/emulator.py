"""Operators on CPU tensors as emulated kernels: programs that read a case from their standard input."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HOPPER_OR_EMULATED = pytest.mark.skipif(GPU and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is sm_90's")
POISON = 0x7FFF  # what memory of 16-bit values holds that no kernel has written: NaN, emu::kPoison of csrc/emulator


def answer(driver: Path, head: bytes, *tensors: torch.Tensor | None) -> bytearray:
    """What `driver` writes for `head` and the values of the tensors that are there. Fails with what its sanitizers say."""
    values = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t is not None]
    done = subprocess.run([driver], input=head + b"".join(values), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return bytearray(done.stdout)


Operators = dict[str, Callable[..., None]]  # by name, on CPU tensors


def implemented(operators: Operators) -> Iterator[None]:
    """For a fixture: what runs on CPU tensors meanwhile."""
    library = torch.library.Library("sglang_lora_moe", "IMPL")
    for name, run in operators.items():
        library.impl(name, run, "CPU")
    yield
    library._destroy()


def check_replays(run: Callable[[], torch.Tensor], want: torch.Tensor) -> None:
    """Three replays of a captured graph of `run` are bit-equal to what it gave before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = run()
    for _ in range(3):
        graph.replay()
        assert torch.equal(again, want)
