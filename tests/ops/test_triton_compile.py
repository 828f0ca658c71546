"""Gates on the compiled MoE kernels, no GPU needed: nothing spills, matrix and copy instructions are there, shared memory fits."""

from __future__ import annotations

import json

import pytest

from benchmarks.compile_ahead import SHARED_LIMIT
from tests.ops import ahead


def waits_for(item: pytest.Item) -> ahead.Command:
    return ahead.gates("compile_gates")


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    done = ahead.finished(ahead.gates("compile_gates"))
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_spills_and_shared_memory_fits(kernels) -> None:
    assert len(kernels) > 20
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED_LIMIT[kernel["arch"]], kernel


def test_products_run_on_tensor_cores(kernels) -> None:
    for kernel in kernels:
        if kernel["name"] != "_grouped_gemm_kernel":
            continue
        counts = kernel["counts"]
        if kernel["arch"] == 90:
            assert counts["UTMALDG"] > 0, kernel  # weights come through the tensor memory accelerator
            assert (counts["HGMMA"] if kernel["tokens"] >= 1024 else counts["HMMA"]) > 0, kernel
        elif kernel["arch"] == 80:
            assert counts["HMMA"] > 0 and counts["LDGSTS"] > 0, kernel


def test_shrinks_load_whole_pieces(kernels) -> None:
    """Adapters are read 16 bytes at a time, asynchronously but where all of A is under way at once: the kernels tell the compiler of their alignment."""
    shrinks = [kernel for kernel in kernels if kernel["name"].startswith("_shrink")]
    at_once = [kernel for kernel in shrinks if kernel["name"] == "_shrink_scatter_kernel"]
    assert len(shrinks) > len(at_once) > 0 and all(kernel["counts"]["LDG.E.128"] > 0 for kernel in at_once)
    assert all(kernel["counts"]["LDGSTS"] > 0 for kernel in shrinks if kernel not in at_once)
