"""Compile C++ for tests: kernels on the emulator with sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_for_emulator(source: Path, folder: Path) -> Path:
    """`source` as a program, with the kernels it includes running on csrc/emulator."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    target = folder / source.stem
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-cast-function-type", *SANITIZERS]
    run = subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", "-x", "c++", source, "-o", target], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target
