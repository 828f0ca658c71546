"""Gates on the compiled kernels of a decoder layer beside the experts, no GPU needed: they compile, do not spill and fit."""

from __future__ import annotations

import json

import pytest

from benchmarks.compile_ahead import SHARED_LIMIT
from tests.ops import ahead


def waits_for(item: pytest.Item) -> ahead.Command:
    return ahead.gates("decoder_gates")


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    done = ahead.finished(ahead.gates("decoder_gates"))
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_for_both_caches_without_spills(kernels: list[dict]) -> None:
    names = {kernel["name"] for kernel in kernels}
    assert names >= {
        "_expand_kernel",
        "_qk_norm_rope_tiles_kernel",
        "_shrink_kernel",
        "_merge_kernel",
        "_attention_kernel",
        "_router_logits_kernel",
        "_router_topk_kernel",
        "_queries_kernel",
        "_values_kernel",
    }
    assert {kernel["cache"] for kernel in kernels} == {"torch.bfloat16", "torch.float8_e4m3fn"}
    for kernel in kernels:
        assert kernel["stack"] <= 32, kernel  # a few bytes outside the loops
        assert kernel["shared"] <= SHARED_LIMIT[kernel["arch"]], kernel
