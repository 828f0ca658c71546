"""A step launched before the tokens of the one before are known must change nothing but when they come."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_lora_moe.core import Abort, LogprobOptions, SamplingParams, Submit, TokenOutput
from sglang_lora_moe.engine.engine_core import EngineCore
from tests.books import check_core
from tests.engine.models import make_engine


def run(core: EngineCore, overlap: bool, late: bool, abort: str | None = None) -> tuple[dict[str, list[int]], dict[str, str]]:
    """All requests' tokens and ends. `late`: half of them are submitted while others run."""
    core.overlap = overlap
    work = []
    for i in range(8):
        sampled: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": i} if i % 3 == 0 else {}
        if i == 5:
            sampled = {"repetition_penalty": 1.3}  # counts tokens that the host does not know yet
        limits = {"max_new_tokens": 3 + 5 * i, "ignore_eos": i % 2 == 0}
        work.append(Submit(f"r{i}", [1, *range(10 + i, 14 + 3 * i)], SamplingParams(**{"temperature": 0.0} | sampled | limits), "r8" if i % 2 else None))
    tokens: dict[str, list[int]] = {message.rid: [] for message in work}
    ends: dict[str, str] = {}
    steps = 0
    while work or core.has_work:
        while work and (not late or steps >= 4 * (8 - len(work))):
            core.handle(work.pop(0))
        messages = core.step()
        steps += 1
        if abort and steps == 12:
            messages += core.handle(Abort(abort))
        for message in messages:
            assert isinstance(message, TokenOutput)
            tokens[message.rid] += message.token_ids
            if message.finish_reason:
                ends[message.rid] = message.finish_reason
        check_core(core)
    return tokens, ends


@pytest.mark.parametrize("late", [False, True])
def test_same_tokens(late: bool) -> None:
    engine = make_engine(max_total_tokens=512)
    expected = run(engine.core, False, late)
    engine.flush_cache()
    ahead = 0
    launch = engine.core.runner.launch

    def counted(batch: Any) -> Any:
        nonlocal ahead
        ahead += any(request.tokens[-1] < 0 for request in batch.requests)
        return launch(batch)

    engine.core.runner.launch = counted  # type: ignore[method-assign]
    assert run(engine.core, True, late) == expected
    assert ahead > 10, "hardly any step ran ahead"
    assert set(expected[1].values()) <= {"stop", "length"} and len(expected[1]) == 8


def test_abort_while_a_step_runs() -> None:
    engine = make_engine(max_total_tokens=512)
    expected, _ = run(engine.core, False, False)
    engine.flush_cache()
    tokens, ends = run(engine.core, True, False, abort="r6")
    assert ends["r6"] == "abort" and tokens["r6"] == expected["r6"][: len(tokens["r6"])]
    assert {rid: found for rid, found in tokens.items() if rid != "r6"} == {rid: found for rid, found in expected.items() if rid != "r6"}


def test_arrivals_do_not_stop_the_overlap() -> None:
    """A request every other step, prompts in chunks, some that end at once: only the first step finds nothing in flight."""
    core = make_engine(max_total_tokens=2048, chunked_prefill_size=24).core
    core.overlap = True
    core.handle(Submit("long", [1, 20, 30], SamplingParams(temperature=0.0, max_new_tokens=100, ignore_eos=True)))
    alone, mixed, launch = [], 0, core.runner.launch

    def counted(batch: Any) -> Any:
        nonlocal mixed
        mixed += batch.num_tokens > len(batch.requests)
        if core._in_flight is None:
            alone.append(core.num_steps)
        return launch(batch)

    core.runner.launch = counted  # type: ignore[method-assign]
    for step in range(60):
        if step % 2:
            count = 1 + 7 * step % 60
            core.handle(
                Submit(f"r{step}", [1, *range(10, 10 + count)], SamplingParams(temperature=0.0, max_new_tokens=1 + step % 9), "r8" if step % 3 else None)
            )
        core.step()
        check_core(core)
    assert alone == [1], f"steps that were not launched beside another: {alone}"
    assert mixed > 20, "hardly any step had a prompt"


def test_inputs_of_pending_tokens_beside_a_scored_prompt() -> None:
    """The older request waits for a slot; when it comes, the rows that it wants scored lie before those of the running one."""
    core = make_engine(max_total_tokens=512, max_loras_per_batch=1).core
    core.overlap = True
    taken: list[tuple[Any, int, int]] = []
    sampler: Any = core.runner.sampler  # type: ignore[attr-defined]
    choose = sampler.choose

    def recorded(logits: Any, requests: list[Any], best: Any, inputs: Any) -> Any:
        ends = zip(requests, inputs().tolist(), strict=True)
        taken.extend((request, len(request.tokens) - 1, token) for request, token in ends)
        return choose(logits, requests, best, inputs)

    sampler.choose = recorded
    for rid, adapter, logprobs in (("other", "r4", None), ("scored", "r8", LogprobOptions(prompt_start=0)), ("running", None, None)):
        limits = SamplingParams(temperature=0.0, max_new_tokens=40 if adapter is None else 6, ignore_eos=True)
        core.handle(Submit(rid, [1, *range(11, 39)], limits, adapter, logprobs))
    while core.has_work:
        core.step()
    assert len(taken) == 52 and all(request.tokens[position] == token for request, position, token in taken)
