"""--lora-backend csgmv: kernels own tiles of tokens of one adapter from the first token on, and the answers are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_lora_moe.lora.triton_dense import TritonDense
from tests.engine.models import make_engine, reference_greedy

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = [1, *range(20, 25)]
NAMES = ["r16", None, "r16", "r4"]
GREEDY = {"max_new_tokens": 3, "temperature": 0.0, "ignore_eos": True}


def engine_with(backend: str, dtype: str) -> Any:
    return make_engine(adapters=("r4", "r16"), device=DEVICE, dtype=dtype, attention_backend="triton", lora_backend=backend, max_running_requests=4)


def test_answers_are_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped: set[bool] = set()
    addend = TritonDense._addend

    def noted(self: TritonDense, *args: Any) -> Any:
        made = addend(self, *args)
        grouped.add(made.grouped)
        return made

    monkeypatch.setattr(TritonDense, "_addend", noted)
    results = engine_with("csgmv", "float32").generate(input_ids=[PROMPT] * len(NAMES), lora_path=NAMES, sampling_params=GREEDY)
    assert [result["output_ids"] for result in results] == [reference_greedy(name, PROMPT, 3, ignore_eos=True) for name in NAMES]
    assert grouped == {True}


@pytest.mark.gpu
def test_bfloat16_is_near() -> None:
    """In 16 bit further kernels take part (`ops/skinny_linear.py`)."""
    found = []
    for backend in ("triton", "csgmv"):
        results = engine_with(backend, "bfloat16").generate(
            input_ids=[PROMPT] * len(NAMES), lora_path=NAMES, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0
        )
        found.append(torch.tensor([[value for value, *_ in result["meta_info"]["input_token_logprobs"][1:]] for result in results]))
    assert (found[0] - found[1]).abs().median() < 0.02
