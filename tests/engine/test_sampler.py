"""The sampler against straightforward formulas: distributions, seeds, cuts, penalties, log-probabilities."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from sglang_lora_moe.core import LogprobOptions, SamplingParams, TokenLogprob
from sglang_lora_moe.engine.request import Request
from sglang_lora_moe.engine.sampler import Sampler
from sglang_lora_moe.engine.seeds import derive_seed, uniform

V = 40


def request(seed: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, eos: int | None = None, **sampling: Any) -> Request:
    eos_ids = frozenset() if eos is None else frozenset({eos})
    made = Request(f"r{seed}", prompt or [1, 2, 3], SamplingParams(**sampling), eos_ids=eos_ids, seed=seed)
    made.tokens.extend(output or [])
    return made


def sample(sampler: Sampler, logits: torch.Tensor, requests: list[Request]) -> tuple[list[int], dict[int, TokenLogprob]]:
    """One token per row of logits float32 [B, V] (left unchanged); log-probabilities by row, where asked for."""
    chosen = sampler.choose(logits, requests)
    found, token_ids = sampler.logprobs(logits, requests, chosen), chosen.tolist()
    return token_ids, {} if found is None else dict(zip(found[0], found[1].read([token_ids[row] for row in found[0]]), strict=True))


def draw(logits: torch.Tensor, count: int, **sampling: Any) -> torch.Tensor:
    """Frequencies of `count` draws with different seeds."""
    sampler = Sampler(logits.shape[0])
    requests = [request(seed, **sampling) for seed in range(count)]
    tokens, _ = sample(sampler, logits.expand(count, -1), requests)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[0]).double()


def reference_probabilities(logits: torch.Tensor, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    p = torch.softmax(logits.double() / temperature, -1)
    order = p.argsort(descending=True).tolist()
    kept = order[:top_k] if top_k > 0 else order
    mass, total, nucleus = 0.0, sum(p[i].item() for i in kept), []
    for i in kept:
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += p[i].item() / total
    nucleus = [i for i in nucleus if p[i] >= min_p * p.max()]
    out = torch.zeros_like(p)
    out[nucleus] = p[nucleus]
    return out / out.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 8, "top_p": 0.6},
        {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.1},
        {"top_p": 0.01},
    ],
    ids=str,
)
def test_distribution(params: dict[str, Any]) -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 1.5
    count = 8000
    expected = reference_probabilities(logits, **params)
    found = draw(logits, count, **params)
    assert found[expected == 0].sum() == 0, "a token outside the cut was drawn"
    kept = expected > 0
    chi2 = ((found - count * expected)[kept] ** 2 / (count * expected)[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi2 <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9, f"chi-square {chi2:.1f} with {freedom} degrees of freedom"


def test_top_p_beyond_the_first_candidates() -> None:
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 0.1  # nearly flat: the nucleus is most of it
    found = draw(logits, 4000, top_p=0.9)
    expected = reference_probabilities(logits, top_p=0.9)
    assert found[expected == 0].sum() == 0 and (found > 0).sum() > 1200


def test_uniform_is_uniform_and_keyed() -> None:
    values = [uniform(seed, position) for seed in range(100) for position in range(100)]
    bins = torch.histc(torch.tensor(values), 20, 0, 1)
    assert ((bins - 500) ** 2 / 500).sum() < 19 + 5 * math.sqrt(38)
    assert len(set(values)) == len(values)
    pairs = torch.tensor(values).view(100, 100)
    assert abs(torch.corrcoef(torch.stack([pairs[:, :-1].flatten(), pairs[:, 1:].flatten()]))[0, 1]) < 0.04
    assert len({derive_seed(7, i) for i in range(100)}) == 100 and derive_seed(7, 0) == 7


def test_a_seed_gives_the_same_token_whatever_else_is_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    rng = random.Random(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 0.0},
        {"repetition_penalty": 1.3},
        {"logit_bias": {3: 2.0}},
    ]
    logits = torch.randn(30, V, generator=generator).bfloat16().float()  # bfloat16: many ties
    requests = [request(seed, output=[rng.randrange(V) for _ in range(rng.randrange(5))], **rng.choice(kinds)) for seed in range(30)]
    together, _ = sample(Sampler(V), logits, requests)
    for i in range(30):
        alone, _ = sample(Sampler(V), logits[i : i + 1], [requests[i]])
        assert alone == [together[i]]
    again, _ = sample(Sampler(V), logits.flip(0), requests[::-1])
    assert again[::-1] == together


def test_position_changes_the_draw() -> None:
    logits = torch.zeros(1, V)
    tokens = {sample(Sampler(V), logits, [request(1, output=[0] * n)])[0][0] for n in range(30)}
    assert len(tokens) > 10


def test_greedy_and_sampled_rows_mix() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(2))
    requests = [request(1, temperature=0.0), request(2), request(3, top_k=1)]
    tokens, logprobs = sample(Sampler(V), logits, requests)
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax() and not logprobs


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    assert (draw(logits, 500, top_k=2)[:4] > 0).all() and draw(logits, 500, top_k=2)[4] == 0


@pytest.mark.parametrize("repetition, presence, frequency", [(1.4, 0.0, 0.0), (0.7, 0.0, 0.0), (1.0, 0.8, 0.0), (1.0, 0.0, 0.5), (1.2, -0.4, 0.3)])
def test_penalties(repetition: float, presence: float, frequency: float) -> None:
    generator = torch.Generator().manual_seed(4)
    sampler = Sampler(V)
    prompt, output = [4, 5, 6, 5], [7, 7, 8, 4]
    penalised = request(9, prompt, [], temperature=0.0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    other = request(8)
    for token in output:  # the history grows step by step, in batches of changing composition
        penalised.tokens.append(token)
        logits = torch.randn(2, V, generator=generator)
        expected = logits[0].clone()
        for v in range(V):
            generated = penalised.tokens[len(prompt) :].count(v)
            if generated or v in prompt:
                expected[v] = expected[v] / repetition if expected[v] > 0 else expected[v] * repetition
            expected[v] -= frequency * generated + presence * (generated > 0)
        for batch, rows in (([penalised, other], logits), ([other, penalised], logits.flip(0)), ([penalised], logits[:1])):
            tokens, _ = sample(sampler, rows, batch)
            assert tokens[batch.index(penalised)] == expected.argmax()
            plan = sampler._plan
            assert plan is not None
            torch.testing.assert_close(sampler._modify(rows, plan)[batch.index(penalised)], expected)


def test_history_rows_are_reused() -> None:
    sampler = Sampler(V)
    kept = request(99, prompt=[1], temperature=0.0, presence_penalty=1.0, output=[2, 2])
    for i in range(20):
        one = request(i, prompt=[i], temperature=0.0, presence_penalty=1.0, output=[i + 10])
        sample(sampler, torch.zeros(2, V), [kept, one])
        counts, seen = sampler._history.gather([kept, one], None)  # nothing of those whose row it was
        assert (counts[0].nonzero().flatten().tolist(), int(counts[0, 2]), seen[0].nonzero().flatten().tolist()) == ([2], 2, [1, 2])
        assert counts[1].nonzero().flatten().tolist() == [i + 10] and seen[1].nonzero().flatten().tolist() == [i, i + 10]
        one.finish_reason = "stop"
    assert sampler._history._counts.shape[0] == 4


def test_logit_bias() -> None:
    logits = torch.zeros(2, V)
    logits[:, 1] = 1.0
    tokens, _ = sample(Sampler(V), logits, [request(0, temperature=0.0, logit_bias={9: 5.0}), request(1, temperature=0.0, logit_bias={1: -100.0, 2: 0.5})])
    assert tokens == [9, 2]
    assert logits[0, 9] == 0, "the caller's logits were changed"


def test_min_new_tokens_forbids_stop_ids() -> None:
    logits = torch.zeros(1, V)
    logits[0, 2], logits[0, 7], logits[0, 4] = 3.0, 2.0, 1.0
    early = request(0, temperature=0.0, min_new_tokens=2, stop_token_ids=[7, 10**6], eos=2)
    sampler = Sampler(V)
    assert sample(sampler, logits, [early])[0] == [4]
    early.tokens.extend([4, 4])
    assert sample(sampler, logits, [early])[0] == [2]


def test_logprobs_are_of_the_unmodified_logits() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(6))
    requests = [request(1, temperature=0.3, logit_bias={4: 9.0}), request(2), request(3, temperature=0.0)]
    requests[0].logprobs, requests[2].logprobs = LogprobOptions(top=3), LogprobOptions(top=0)
    tokens, logprobs = sample(Sampler(V), logits, requests)
    expected = torch.log_softmax(logits, -1)
    assert set(logprobs) == {0, 2}
    for row, values in logprobs.items():
        assert values.token_id == tokens[row] and values.logprob == pytest.approx(expected[row, tokens[row]].item(), abs=1e-6)
    assert tokens[0] == 4 and [i for i, _ in logprobs[0].top] == expected[0].topk(3).indices.tolist()
    assert logprobs[2].top == []


def test_extreme_logits() -> None:
    logits = torch.full((1, V), -1e30)
    logits[0, 3] = 1e30
    assert sample(Sampler(V), logits, [request(0, temperature=2.0, top_p=0.5)])[0] == [3]
    assert sample(Sampler(V), torch.full((1, V), -math.inf).index_fill(1, torch.tensor([6]), 0.0), [request(0)])[0] == [6]
