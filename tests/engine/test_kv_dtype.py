"""A float8 KV cache: less memory, nearly the same log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_lora_moe.layers.attention import read_rows, write_rows
from tests.engine.models import make_engine
from tests.references import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = [1, *range(20, 60)]


def logprobs(engine: Any) -> torch.Tensor:
    found = engine.generate(input_ids=TOKENS, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0)
    return torch.tensor([value for value, *_ in found["meta_info"]["input_token_logprobs"][1:]])


def test_logprobs_are_near() -> None:
    engines = [make_engine(False, device=DEVICE, kv_cache_dtype=dtype) for dtype in ("auto", "bfloat16", "fp8_e4m3")]
    models = [engine.core.runner.model for engine in engines]
    assert [model.kv_dtype for model in models][1:] == [torch.bfloat16, torch.float8_e4m3fn]
    assert models[1].kv_bytes_per_token() == 2 * models[2].kv_bytes_per_token()
    exact, half, eighth = (logprobs(engine) for engine in engines)
    assert 0 < relative_error(eighth, exact) < 2e-2  # 9.9e-3 on a CPU
    assert relative_error(half, exact) < 2e-3  # 6e-4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32])
def test_rows_are_written_and_read(dtype: torch.dtype) -> None:
    cache = torch.zeros(6, 1, 4, dtype=dtype, device=DEVICE)
    values = torch.tensor([[[1.0, -2.5, 1e6, -1e6]], [[0.25, 3.0, 7.0, 0.0]]], device=DEVICE)
    write_rows(cache, torch.tensor([4, 1], device=DEVICE), values)
    top = 448.0 if dtype.itemsize == 1 else float("inf")
    want = values.clamp(-top, top)
    assert torch.equal(read_rows(cache, torch.tensor([4, 1], device=DEVICE), torch.float32), want)
    assert not read_rows(cache, torch.tensor([0, 2, 3, 5], device=DEVICE), torch.float32).any()
