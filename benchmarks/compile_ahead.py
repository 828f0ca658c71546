"""Compile Triton kernels without a GPU by launching the ops on meta tensors: nothing runs, the cubins land in Triton's cache.

Inside `compiling(arch)` every launch only compiles, with the specialisation that a launch on aligned CUDA tensors would
have; `Compiled` records say what came out. Benchmarks fill the cache from many processes before they touch the GPU, and
tests gate on spills, matrix instructions and shared memory.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sglang_lora_moe.ops import launch

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Compiled:
    """One compiled kernel. `counts` of SASS instructions: HGMMA and HMMA (matrix), UTMALDG and LDGSTS (async loads), LDG.E.128 (of 16 bytes), STL (spills)."""

    name: str
    shared: int
    registers: int = 0
    stack: int = 0
    counts: dict[str, int] = field(default_factory=dict)


class _FakeDriver:
    """Enough of Triton's active driver for a launch that only compiles."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps one target a device: each family is one of its own

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: int = 90, *, multiprocessors: int = 132, inspect: bool = False) -> Iterator[list[Compiled]]:
    """Every launch inside compiles for sm_<arch>; yields the list that records them (SASS only with `inspect`)."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        record = Compiled(self.__name__, kernel.metadata.shared)
        if inspect:
            record.registers, record.stack, record.counts = _disassemble(kernel.asm["cubin"])
        found.append(record)
        return kernel

    hopper = arch >= 90
    options = {"PDL": True, "launch_pdl": True} if hopper else {"PDL": False}
    driver = triton.runtime.driver
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "options", lambda device: dict(options)),
        mock.patch.object(launch, "has_tma", lambda device: hopper),
        mock.patch.object(launch, "has_wgmma", lambda device: arch == 90),
        mock.patch.object(launch, "multiprocessors", lambda device: multiprocessors),
        mock.patch.object(launch, "shared_memory", lambda device: SHARED_LIMIT[arch]),
        mock.patch.object(driver, "_active", _FakeDriver(arch)),
    ):
        yield found


@functools.cache  # the same kernel is launched in many places
def _disassemble(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers of a thread, bytes of its stack, how often each instruction of some stands there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_BIN / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([_BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))
    return registers, stack, {word: sass.count(word) for word in ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDG.E.128", "STL", "LDL")}


def _job(call: Callable[[], object], arch: int, inspect: bool) -> list[Compiled] | str:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with compiling(arch, inspect=inspect) as found:
            call()
        return found
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"[:300]


def compile_all(calls: Sequence[Callable[[], object]], *, arch: int = 90, workers: int | None = None, inspect: bool = False) -> list[list[Compiled] | str]:
    """Run picklable calls in worker processes; per call its kernels, or the error's text. Call it before CUDA is initialised."""
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("fork")) as pool:
        return list(pool.map(functools.partial(_job, arch=arch, inspect=inspect), calls, chunksize=1))
