"""Gates on the compiled kernels of a decoder layer beside the experts, no GPU needed: they compile, do not spill and fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compile_ahead import SHARED_LIMIT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, "-m", "tests.ops.decoder_gates"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_for_both_caches_without_spills(kernels: list[dict]) -> None:
    names = {kernel["name"] for kernel in kernels}
    assert names >= {
        "_norm_shrink_tiles_kernel",
        "_add_norm_tiles_kernel",
        "_qk_norm_rope_tiles_kernel",
        "_shrink_kernel",
        "_merge_kernel",
        "_attention_kernel",
    }
    assert {kernel["cache"] for kernel in kernels} == {"torch.bfloat16", "torch.float8_e4m3fn"}
    for kernel in kernels:
        assert kernel["stack"] <= 32, kernel  # a few bytes outside the loops
        assert kernel["shared"] <= SHARED_LIMIT[90], kernel
