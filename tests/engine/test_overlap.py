"""A step launched before the tokens of the one before are known must change nothing but when they come."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_lora_moe.core import Abort, SamplingParams, Submit, TokenOutput
from sglang_lora_moe.engine.engine_core import EngineCore
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
        core.check()
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
