"""Steps as padded graphs: the same tokens as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_lora_moe.engine.cuda_graph import DecodeGraphs, PrefillGraphs, prefill_ladder
from tests.engine.models import make_engine, reference_greedy

GPU = torch.cuda.is_available()
PROMPTS = [[1, *range(20, 20 + n), 7 + n] for n in (3, 14, 1, 70, 9)]
ADAPTERS = ["r16", None, "r4", "r16", "r64"]


class Padded(PrefillGraphs):
    """The padding of graphs without capturing them."""

    def _capture_one(self, size: tuple[int, int], lora: bool) -> None:
        self._layouts[size] = self.model.ctx.lora_layout

    def logits(self, size: tuple[int, int], lora_active: bool) -> torch.Tensor:
        used.append((size[0], lora_active))
        return self.model.logits_of(self.model.forward_hidden())


used: list[tuple[int, bool]] = []


def tokens_of(engine: Any, adapters: list[str | None], prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Any]:
    engine.flush_cache()
    params = {"temperature": 0.0, "max_new_tokens": 2}
    results = engine.generate(input_ids=prompts, lora_path=adapters[: len(prompts)], sampling_params=params, **options)
    return [(result["output_ids"], result["meta_info"].get("input_token_logprobs")) for result in results]


def test_ladder() -> None:
    assert prefill_ladder(100, 4) == [] and prefill_ladder(600, 4) == [(128, 4), (256, 4), (512, 4)]
    assert prefill_ladder(700, 900) == [(128, 16), (256, 16), (512, 16), (256, 255), (512, 511)]
    assert prefill_ladder(9000, 256)[-1] == (2560, 256)


@pytest.mark.skipif(GPU, reason="the interpreter's tensors are on the CPU")
def test_padding_changes_nothing() -> None:
    pytest.importorskip("triton")
    engine = make_engine(attention_backend="triton", lora_backend="triton", max_running_requests=6, chunked_prefill_size=6)
    prompts = [[1, 20, 21], [1, *range(30, 36)]]  # steps of 3 and 3 tokens, of 1 and 4, of 1 and 1: each costs the interpreter seconds
    graphs = Padded(engine.core.runner.model, (False, True), [(4, 4), (8, 6)])
    graphs._layouts = dict.fromkeys(graphs.sizes, engine.core.runner.model.ctx.lora_layout)
    engine.core.runner.prefill_graphs = graphs
    assert [ids for ids, _ in tokens_of(engine, ADAPTERS, prompts)] == [reference_greedy(name, ids, 2) for name, ids in zip(ADAPTERS, prompts, strict=False)]
    assert {size for size, _ in used} == {4, 8} and any(active for _, active in used)


class PaddedDecode(DecodeGraphs):
    """As `Padded`, of steps with one token of each request."""

    _capture_one = Padded._capture_one

    def replay(self, size: int, lora_active: bool) -> tuple[torch.Tensor, torch.Tensor]:
        used.append((size, lora_active))
        logits = self.model.forward_logits()
        return logits, logits.argmax(dim=-1)


def test_padded_decode_of_a_model_with_the_forward_of_transformers() -> None:
    """Which reads all rows of logits that the graph has: those beyond the batch's are of its own padding, not what a longer step has left there."""
    used.clear()
    engine = make_engine(max_running_requests=8, chunked_prefill_size=200)
    model = engine.core.runner.model
    assert not model.is_split
    graphs = engine.core.runner.graphs = PaddedDecode(model, (False, True), [4, 8])
    graphs._layouts = dict.fromkeys(graphs.sizes, model.ctx.lora_layout)
    counts = [1, 4, 1, 3, 4]  # of tokens: three requests in the step after the prompts', which are longer than it
    params = [{"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True} for count in counts]
    results = engine.generate(input_ids=PROMPTS, lora_path=ADAPTERS, sampling_params=params)
    assert [result["output_ids"] for result in results] == [reference_greedy(*of, ignore_eos=True) for of in zip(ADAPTERS, PROMPTS, counts, strict=True)]
    assert [size for size, _ in used] == [4, 4, 4]


@pytest.mark.gpu
def test_graphs_change_nothing() -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": "float32", "chunked_prefill_size": 130, "max_running_requests": 6}
    plain, engine = (make_engine(disable_cuda_graph=disabled, **options) for disabled in (True, False))
    graphs: Any = engine.core.runner.prefill_graphs
    assert plain.core.runner.prefill_graphs is None and graphs.sizes == [(128, 6)]
    replayed = []
    logits = graphs.logits
    graphs.logits = lambda size, active: replayed.append((size, active)) or logits(size, active)
    for adapters in (ADAPTERS, [None] * len(PROMPTS)):
        want, got = tokens_of(plain, adapters), tokens_of(engine, adapters)
        assert [ids for ids, _ in got] == [ids for ids, _ in want]
    want, got = (tokens_of(e, ADAPTERS, return_logprob=True, logprob_start_len=0) for e in (plain, engine))
    for (_, a), (_, b) in zip(want, got, strict=True):
        torch.testing.assert_close(torch.tensor([v for v, *_ in a[1:]]), torch.tensor([v for v, *_ in b[1:]]), rtol=0, atol=1e-3)
    assert {active for _, active in replayed} == {False, True} and len(replayed) >= 4


@pytest.mark.gpu
def test_decode_graphs_survive_prefill_graphs_with_more_scratch() -> None:
    """Prefill graphs are captured after decode graphs; up to 256 tokens they need more scratch than decode of 40 requests."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "float32", "chunked_prefill_size": 300, "max_running_requests": 40}
    plain, engine = (make_engine(disable_cuda_graph=disabled, **options) for disabled in (True, False))
    graphs: Any = engine.core.runner.prefill_graphs
    assert (256, 40) in graphs.sizes and engine.core.runner.graphs.sizes[-1] == (40, 40)
    prompts = [[1, *range(20, 26 + i % 5), 7 + i] for i in range(40)]
    adapters = [ADAPTERS[i % len(ADAPTERS)] for i in range(40)]
    params = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    want, got = ([result["output_ids"] for result in e.generate(input_ids=prompts, lora_path=adapters, sampling_params=params)] for e in (plain, engine))
    assert got == want
