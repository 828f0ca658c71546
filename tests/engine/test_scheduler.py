"""The scheduler with a fake runner: chunking, decoding beside prefill, fairness of slots and pages, retraction, aborts."""

import random

import pytest

from sglang_lora_moe.core import LogprobOptions, RequestError
from tests.books import check_scheduler
from tests.engine.fake_runner import EOS, Harness, expected_output


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{length}/{seed}/{i}").randrange(1, 50) for i in range(length)]


def test_one_request() -> None:
    h = Harness()
    h.submit("a", prompt_of(10), 6)
    h.run()
    assert h.finished["a"] in ("stop", "length")
    h.check_outputs()
    assert h.cache.num_in_use == 0


def test_long_prompts_are_chunked_while_others_decode() -> None:
    h = Harness(prefill_budget=8)
    h.submit("short", prompt_of(4), 30, ignore_eos=True)
    h.step()
    long = h.submit("long", prompt_of(50), 4, ignore_eos=True)
    for _ in range(7):
        assert not h.outputs["long"]
        before = len(h.outputs["short"])
        batch = h.step()
        assert batch is not None and max(batch.query_lens) <= 8
        assert len(h.outputs["short"]) == before + 1  # decoding never waits for the prompt
    assert long.num_computed == 50 and len(h.outputs["long"]) == 1
    h.run()
    h.check_outputs()


def test_prefill_is_first_come_first_served() -> None:
    h = Harness(prefill_budget=8)
    for i in range(4):
        h.submit(f"r{i}", prompt_of(20, i), 1)
    h.run()
    assert sorted(h.finished_at, key=lambda rid: h.finished_at[rid]) == ["r0", "r1", "r2", "r3"]
    assert max(h.runner.steps) == 8


def test_admission_goes_on_in_the_next_step() -> None:
    h = Harness(prefill_budget=4)
    for i in range(3):
        h.submit(f"r{i}", prompt_of(4, i), 20, ignore_eos=True)
    for _ in range(3):
        h.step()
    assert len(h.scheduler.running) == 3


def test_max_running_is_respected() -> None:
    h = Harness(max_running=3)
    for i in range(9):
        h.submit(f"r{i}", prompt_of(5, i), 10, ignore_eos=True)
    while h.scheduler.has_work:
        h.step()
        assert len(h.scheduler.running) <= 3
    h.check_outputs()


@pytest.mark.parametrize("seed", range(3))
def test_retraction_leaves_outputs_unchanged(seed: int) -> None:
    h = Harness(num_pages=20, page_size=4)  # 76 tokens for 8 requests of up to 44
    for i in range(8):
        h.submit(f"r{i}", prompt_of(4 + 3 * i, seed), 23, ignore_eos=True)
    h.run()
    assert h.scheduler.totals["retractions"] > 0
    assert len(h.finished) == 8
    h.check_outputs()


def test_retraction_takes_the_youngest_back_to_its_place() -> None:
    h = Harness(num_pages=9, page_size=4, prefix_cache=False, max_running=2)
    h.submit("old", prompt_of(8), 20, ignore_eos=True)
    h.submit("young", prompt_of(8, 1), 20, ignore_eos=True)
    h.submit("last", prompt_of(12, 2), 20, ignore_eos=True)
    while not h.scheduler.totals["retractions"]:
        h.step()
    assert [r.rid for r in h.scheduler.running] == ["old"] and [r.rid for r in h.scheduler.waiting] == ["young", "last"]
    h.run()
    h.check_outputs()
    assert h.finished_at["old"] < h.finished_at["young"] < h.finished_at["last"]


def test_a_prompt_that_never_fits_is_refused() -> None:
    h = Harness(num_pages=6, page_size=4, max_model_len=100)
    with pytest.raises(RequestError, match="has 20 tokens; .* exceeds the 20 of a request") as error:
        h.submit("a", prompt_of(20), 1)
    assert (error.value.status, error.value.param) == (400, "prompt")
    h.submit("b", prompt_of(19), 50, ignore_eos=True)
    h.run()
    assert h.finished["b"] == "length" and len(h.outputs["b"]) == 1
    h = Harness(max_model_len=12)
    with pytest.raises(RequestError, match="exceeds the 12 of a request"):
        h.submit("a", prompt_of(12), 1)
    with pytest.raises(RequestError, match="the prompt is empty"):
        h.submit("a", [], 1)


def test_full_queue_is_503() -> None:
    h = Harness(max_running=2, max_queued=3)
    for i in range(5):
        h.submit(f"r{i}", prompt_of(5, i))
    with pytest.raises(RequestError, match="the queue is full") as error:
        h.submit("more", prompt_of(5))
    assert (error.value.status, error.value.retry_after) == (503, 1)
    h.run()
    assert len(h.finished) == 5


def test_prefix_is_shared_within_an_adapter_only() -> None:
    h = Harness(num_slots=2)
    prompt = prompt_of(17)
    for rid, revision in (("base", None), ("a", "A"), ("b", "B")):
        assert h.submit(rid, prompt, 2, revision).num_cached == 0
        h.run()
        assert h.requests[rid].num_cached == 0, f"{rid} hit a page of another adapter"
    for rid, revision in (("base2", None), ("a2", "A"), ("b2", "B")):
        h.submit(rid, prompt, 2, revision)
        h.run()
        assert h.requests[rid].num_cached == 16
    h.check_outputs()  # the fake runner also checks every row it reads


def test_equal_prompts_submitted_together_are_computed_once() -> None:
    h = Harness(prefill_budget=16, num_pages=129)
    prompt = prompt_of(64)
    for i in range(5):
        h.submit(f"r{i}", [*prompt, i + 1], 4, ignore_eos=True)
    h.run()
    assert sum(h.runner.steps) < 65 + 5 * (1 + 4)
    h.check_outputs()


def test_waiting_prompts_are_hashed_up_to_their_first_new_page() -> None:
    """A queue of long prompts is looked through between two steps of everybody."""
    h = Harness(prefill_budget=256, num_pages=40)
    running = h.submit("running", prompt_of(100), 4, ignore_eos=True)
    new = h.submit("new", prompt_of(100, 1), 4, ignore_eos=True)
    shares = h.submit("shares", prompt_of(100)[:40] + prompt_of(60, 2), 4, ignore_eos=True)
    h.step()
    assert running.running and not new.running and not shares.running
    assert len(new.page_keys) == 1
    assert len(shares.page_keys) == 11 and shares.page_keys[:10] == running.page_keys[:10]  # ten pages of four tokens, about to be computed or known
    h.run()
    assert shares.num_cached == 40
    h.check_outputs()


@pytest.mark.parametrize("waits_for", ["pages", "prefix", "loading"])
def test_a_step_looks_at_few_of_those_who_wait(waits_for: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at each takes time for all pages that it shares with others: with thousands of them every step would wait for it."""
    h = Harness(num_pages=40 if waits_for == "pages" else 400, num_slots=1, prefill_budget=64, max_running=400)
    if waits_for == "loading":
        monkeypatch.setattr(h, "fill_slots", lambda: None)
    looks: list[str | None] = []
    try_start = h.scheduler._try_start
    monkeypatch.setattr(h.scheduler, "_try_start", lambda request: looks.append(try_start(request)) or looks[-1])
    for i in range(200):
        h.submit(f"r{i}", [*prompt_of(100), *prompt_of(8, i)], 4, "A" if waits_for == "loading" else None, ignore_eos=True)
    seen: set[str | None] = set()
    for _ in range(6):
        h.step()
        assert len(looks) <= 33 + sum(found is None for found in looks), f"{len(looks)} requests were looked at in one step"
        seen.update(looks)
        looks.clear()
    assert waits_for in seen
    monkeypatch.undo()
    h.run()
    assert len(h.finished) == 200
    h.check_outputs()


def test_whole_prompt_cached_still_computes_the_last_token() -> None:
    h = Harness()
    for rid in ("a", "b"):
        h.submit(rid, prompt_of(16), 1)
        h.run()
    assert h.requests["b"].num_cached == 12  # three of four pages: the last one holds the last token
    h.check_outputs()


def test_output_pages_are_shared_by_the_next_turn() -> None:
    h = Harness()
    h.submit("turn1", prompt_of(10), 9, ignore_eos=True)
    h.run()
    h.submit("turn2", prompt_of(10) + h.outputs["turn1"] + [7], 1)
    h.run()
    assert h.requests["turn2"].num_cached == 16


def test_prompt_logprobs_bound_the_shared_prefix() -> None:
    h = Harness(prefill_budget=8)
    h.submit("warm", prompt_of(20), 1)
    h.run()
    request = h.submit("lp", prompt_of(20), 1)
    request.logprobs = LogprobOptions(prompt_start=9)
    h.run()
    assert request.num_cached == 8
    (values,) = h.prompt_logprobs["lp"]
    assert [v.logprob for v in values] == [-float(i) for i in range(9, 20)]


def test_prompt_logprobs_are_given_once_after_a_retraction() -> None:
    h = Harness(num_pages=10, prompt_logit_rows=2)
    h.submit("old", prompt_of(4), 30, ignore_eos=True)
    h.step()
    request = h.submit("lp", prompt_of(24, 1), 1)
    request.logprobs = LogprobOptions(prompt_start=1)
    while not h.scheduler.totals["retractions"]:
        before = len(request.prompt_logprobs)
        h.step()
    assert 0 < before < 23 and not request.running and "lp" not in h.prompt_logprobs  # in the middle of its prompt
    h.run()
    (values,) = h.prompt_logprobs["lp"]
    assert [v.logprob for v in values] == [-float(i) for i in range(1, 24)]


def test_prompt_logprobs_are_not_given_again_after_the_first_token() -> None:
    h = Harness(num_pages=8)
    h.submit("old", prompt_of(4), 20, ignore_eos=True)
    request = h.submit("lp", prompt_of(12, 1), 8, ignore_eos=True)
    request.logprobs = LogprobOptions(prompt_start=1)
    for _ in range(20):
        if not h.scheduler.totals["retractions"]:
            h.step()
    assert request.num_output > 0 and not request.running
    h.run()
    assert [len(values) for values in h.prompt_logprobs["lp"]] == [11]
    assert h.scheduler.totals["prompt_tokens"] == 16, "a prompt counts once"


def test_rows_of_prompts_with_logits_are_budgeted() -> None:
    h = Harness(prompt_logit_rows=6)
    for rid in "ab":
        h.submit(rid, prompt_of(20, ord(rid)), 1).logprobs = LogprobOptions(prompt_start=1)
    h.run()
    assert max(h.runner.steps) == 6 and sum(h.runner.steps) == 40


@pytest.mark.parametrize("start, steps", [(90, 4), (99, 3), (100, 3), (200, 3)])
def test_rows_before_those_with_logits_are_not_budgeted(start: int, steps: int) -> None:
    h = Harness(prefill_budget=40, prompt_logit_rows=6)
    h.submit("a", prompt_of(100), 1).logprobs = LogprobOptions(prompt_start=start)
    h.run()
    assert sum(h.runner.steps) == 100 and len(h.runner.steps) == steps, h.runner.steps
    assert [-value.logprob for (values,) in h.prompt_logprobs.values() for value in values if value.logprob] == list(range(start, 100))


def test_a_prompt_that_waits_for_equal_pages_stops_nobody() -> None:
    h = Harness(prefill_budget=64, patience=0)
    for rid, prompt in (("first", prompt_of(60)), ("same", prompt_of(60)), ("young", prompt_of(4, 1))):
        h.submit(rid, prompt, 1)
    h.step()
    assert {"first", "young"} == set(h.finished) and not h.requests["same"].running
    h.run()
    assert h.requests["same"].num_cached == 56, "it goes on with the pages that it waited for"
    h.check_outputs()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_more_adapters_than_slots_all_make_progress(slots: int) -> None:
    """Steady arrivals for the resident adapters must not keep the others out."""
    h = Harness(num_slots=slots, num_pages=513, patience=20, max_running=8)
    adapters = [f"A{i}" for i in range(6)]
    waited: dict[str, int] = {}
    count = 0
    submitted_at: dict[str, int] = {}
    for step in range(600):
        if len(h.scheduler.waiting) < 12:
            for _ in range(2):
                adapter = adapters[count % 2] if count % 4 else adapters[(count // 4) % 6]  # A0 and A1 are popular
                h.submit(f"r{count}", prompt_of(4, count), 6, adapter, ignore_eos=True)
                submitted_at[f"r{count}"] = step
                count += 1
        h.step()
    h.run()
    assert len(h.finished) == count
    h.check_outputs()
    for rid, step in h.finished_at.items():
        adapter = h.requests[rid].revision
        assert adapter is not None
        waited[adapter] = max(waited.get(adapter, 0), step - submitted_at[rid])
    assert set(waited) == set(adapters)
    assert max(waited.values()) < 200, waited


def test_a_late_adapter_gets_a_slot_although_the_resident_one_never_pauses() -> None:
    h = Harness(num_slots=1, num_pages=513, patience=30)
    for i in range(4):
        h.submit(f"a{i}", prompt_of(4, i), 10 + 3 * i, "A", ignore_eos=True)
    h.step()
    h.submit("late", prompt_of(4, 99), 4, "B", ignore_eos=True)
    for i in range(4, 100):
        h.submit(f"a{i}", prompt_of(4, i), 12, "A", ignore_eos=True)
        h.submit(f"b{i}", prompt_of(4, 200 + i), 2, "B", ignore_eos=True)  # younger ones do not hide that the adapter is overdue
        h.step()
        if "late" in h.finished:
            break
    assert h.finished_at["late"] < 60
    h.run()
    assert len(h.finished) == len(h.requests)
    h.check_outputs()


@pytest.mark.parametrize("places", [1, 4])
def test_slots_change_hands_when_all_places_are_taken(places: int) -> None:
    """With every running place taken all the time, an overdue adapter must still get its slot."""
    h = Harness(num_slots=1, num_pages=513, max_running=places, patience=20)
    for i in range(60):
        h.submit(f"a{i}", prompt_of(4, i), 5, "A", ignore_eos=True)
        if i == 20:
            h.submit("late", prompt_of(4, 99), 5, "B", ignore_eos=True)
    h.run()
    order = sorted(h.finished_at, key=lambda rid: h.finished_at[rid])
    assert order.index("late") < 20 + 4 + 3 * places
    h.check_outputs()


def test_draining_stops_when_nobody_waits_for_it() -> None:
    h = Harness(num_slots=1, num_pages=513, patience=3)
    assert h.slots is not None
    h.submit("a", prompt_of(4), 12, "A", ignore_eos=True)
    h.submit("b", prompt_of(4), 12, "B", ignore_eos=True)
    for i in range(6):
        h.submit(f"a{i}", prompt_of(4, i), 5, "A", ignore_eos=True)
        h.step()
    assert list(h.slots.draining.values()) == ["B"]
    h.scheduler.abort("b")
    h.run()
    assert not h.slots.draining and len(h.finished) == 7


def test_nothing_is_drained_while_a_copy_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies come one after the other: a slot that was emptied meanwhile would only wait, and its adapter be missed."""
    h = Harness(num_slots=2, num_pages=513, patience=3)
    assert h.slots is not None
    h.submit("a", prompt_of(4), 80, "A", ignore_eos=True)
    h.step()
    copies: list[tuple[int, str]] = []
    slots = h.slots
    monkeypatch.setattr(h, "fill_slots", lambda: copies.extend(slots.take_writes()))
    h.submit("b", prompt_of(4), 80, "B", ignore_eos=True)
    h.submit("c", prompt_of(4), 4, "C", ignore_eos=True)
    for i in range(10):
        h.submit(f"a{i}", prompt_of(4, i), 4, "A", ignore_eos=True)
        h.step()
    assert [revision for _, revision in copies] == ["B"] and not slots.draining
    assert "a5" in h.finished, "an adapter on its way stops nobody else, however long that takes"
    monkeypatch.undo()
    h.runner.write_slots(copies)
    slots.filled(copies[0][0])
    h.scheduler.wake()
    h.step()
    assert list(slots.draining.values()) == ["C"]
    h.run()
    h.check_outputs()


def test_draining_stops_where_the_adapter_is_pinned_meanwhile() -> None:
    """Its requests would otherwise wait for one that waits for its slot, as long as the others are never idle."""
    h = Harness(num_slots=2, num_pages=513, max_running=30, patience=3)
    assert h.slots is not None
    h.submit("long", prompt_of(4), 200, "L", ignore_eos=True)
    h.submit("pinned", prompt_of(4), 20, "P", ignore_eos=True)
    h.step()
    h.submit("new", prompt_of(4), 2, "N", ignore_eos=True)
    while not h.slots.draining:
        h.step()
    assert h.slots.draining == {h.slots.slot_of("P"): "N"}
    h.slots.stays = {"P"}.__contains__
    h.submit("late", prompt_of(4, 1), 2, "P", ignore_eos=True)
    h.run()
    assert h.finished_at["late"] < h.finished_at["long"] < h.finished_at["new"] and h.slots.slot_of("P") is not None
    h.check_outputs()


def test_a_slot_is_not_kept_empty_for_an_adapter_that_got_another_one() -> None:
    """Z ends by itself before Y, whose slot is being drained for X; then X has a slot, and always somebody who waits."""
    h = Harness(num_slots=2, num_pages=513, max_running=4, patience=3)
    assert h.slots is not None
    prompt = next(p for p in ([o % 50, o // 50, 7, 9] for o in range(2500)) if 14 < len(expected_output(p, "Z", 200)) < 22)
    h.submit("y", prompt_of(4), 60, "Y", ignore_eos=True)
    h.submit("z", prompt, 200, "Z")
    for _ in range(2):
        h.step()
    h.submit("x", prompt_of(4, 2), 20, "X", ignore_eos=True)
    while not h.slots.draining:
        h.step()
    h.submit("late", prompt_of(4, 3), 5, "Y", ignore_eos=True)
    for i in range(60):
        while sum(request.revision == "X" for request in h.scheduler.waiting) < 6:
            h.submit(f"x{i}-{len(h.scheduler.waiting)}", prompt_of(4, i), 10, "X", ignore_eos=True)
        h.step()
    assert "late" in h.finished and h.slots.slot_of("X") is not None
    h.run()
    h.check_outputs()


def test_drain_picks_the_adapter_closest_to_finished_and_never_a_pinned_one() -> None:
    h = Harness(num_slots=3, num_pages=513, max_running=30, patience=3)
    assert h.slots is not None
    h.slots.stays = {"P"}.__contains__
    h.submit("p", prompt_of(4), 5, "P", ignore_eos=True)
    h.submit("long", prompt_of(4), 200, "L", ignore_eos=True)
    h.submit("short", prompt_of(4), 60, "S", ignore_eos=True)
    h.step()
    h.submit("new", prompt_of(4), 2, "N", ignore_eos=True)
    for i in range(10):
        h.submit(f"s{i}", prompt_of(4, i), 60, "S", ignore_eos=True)
        h.submit(f"p{i}", prompt_of(4, i), 60, "P", ignore_eos=True)
        h.step()
    short = h.slots.slot_of("S")
    assert short is not None and h.slots.draining == {short: "N"}
    h.run()
    assert h.finished_at["new"] < h.finished_at["long"]
    assert h.slots.slot_of("P") is not None
    h.check_outputs()


def test_slots_are_reused_least_recently_used_first() -> None:
    h = Harness(num_slots=2)
    for rid, revision in (("1", "A"), ("2", "B"), ("3", "A"), ("4", "C")):
        h.submit(rid, prompt_of(4), 1, revision)
        h.run()
    assert h.slots is not None and h.slots.slot_of("B") is None and h.slots.slot_of("A") is not None and h.slots.slot_of("C") is not None


def test_a_large_request_is_not_starved_of_pages_by_small_ones() -> None:
    h = Harness(num_pages=17, page_size=4, patience=8)
    for i in range(3):
        h.submit(f"s{i}", prompt_of(4, i), 8, ignore_eos=True)
    h.step()
    large = h.submit("large", prompt_of(52), 4, ignore_eos=True)
    overtook = 0
    for i in range(3, 60):
        small = h.submit(f"s{i}", prompt_of(4, i), 8, ignore_eos=True)
        h.step()
        overtook += small.running and large.first_scheduled
    assert 0 < overtook <= 8 and "large" in h.finished  # younger ones that fit go ahead as long as it is not overdue
    h.run()
    h.check_outputs()


def test_an_abort_makes_way_for_those_behind() -> None:
    h = Harness(num_pages=17, patience=2)
    h.submit("old", prompt_of(4), 40, ignore_eos=True)
    h.step()
    h.submit("large", prompt_of(60), 2)
    for _ in range(3):
        h.step()
    late = h.submit("late", prompt_of(4, 2), 4)
    h.step()
    assert not late.running and not h.requests["large"].running
    h.step()
    h.scheduler.abort("large")
    h.step()
    assert late.running or "late" in h.finished


def test_abort_in_every_state() -> None:
    h = Harness(num_slots=1, prefill_budget=4, max_running=3)
    h.submit("decoding", prompt_of(4), 50, "A", ignore_eos=True)
    h.step()
    h.submit("prefilling", prompt_of(30), 5, "A")
    h.submit("slot wait", prompt_of(5), 5, "B")
    h.submit("waiting", prompt_of(30, 1), 5, "A")
    h.step()
    for rid in ("decoding", "prefilling", "slot wait", "waiting"):
        output = h.scheduler.abort(rid)
        assert output is not None and output.finish_reason == "abort" and output.token_ids == []
        assert h.scheduler.abort(rid) is None  # twice does no harm
        check_scheduler(h.scheduler)
    assert h.scheduler.abort("never seen") is None
    assert not h.scheduler.has_work and h.cache.num_in_use == 0
    assert h.step() is None


def test_zero_new_tokens_only_scores_the_prompt() -> None:
    h = Harness()
    h.submit("a", prompt_of(6), 0)
    h.run()
    assert h.outputs["a"] == [] and h.finished["a"] == "length"


def test_stop_ids_and_ignore_eos() -> None:
    prompt = next(p for p in (prompt_of(6, s) for s in range(500)) if EOS in expected_output(p, None, 10)[:-1] or expected_output(p, None, 10)[-1] == EOS)
    h = Harness()
    h.submit("eos", prompt, 30)
    h.submit("ignored", prompt, 30, ignore_eos=True)
    full = expected_output(prompt, None, 30, frozenset())
    h.submit("stop", prompt, 30, ignore_eos=True, stop_token_ids=[full[1]])
    h.run()
    assert h.outputs["eos"][-1] == EOS and h.finished["eos"] == "stop"
    assert h.outputs["ignored"] == full and h.finished["ignored"] == "length"
    assert h.outputs["stop"] == full[: full.index(full[1]) + 1]


@pytest.mark.parametrize("seed", range(8))
def test_random_schedules_keep_the_books_and_every_answer(seed: int) -> None:
    """Random arrivals, adapters, aborts, cache flushes and sizes: no leak, no starvation, every answer as if alone."""
    rng = random.Random(seed)
    slots = rng.choice([0, 1, 2, 4])
    h = Harness(
        num_pages=rng.randrange(20, 80),
        page_size=rng.choice([1, 2, 4, 8]),
        num_slots=slots,
        prefix_cache=rng.random() < 0.8,
        prefill_budget=rng.choice([3, 8, 32]),
        max_running=rng.choice([2, 8, 16]),
        patience=rng.choice([4, 40]),
    )
    longest = min(40, h.scheduler.capacity - 1)
    prefixes = [prompt_of(rng.randrange(1, longest), i) for i in range(4)]
    submitted = aborted = 0
    for _ in range(300):
        if rng.random() < 0.4 and submitted < 90:
            prompt = (rng.choice(prefixes)[: rng.randrange(1, longest + 1)] + prompt_of(rng.randrange(0, 9), submitted))[:longest]
            revision = rng.choice([None, *(f"R{i}" for i in range(7))]) if slots else None
            h.submit(f"r{submitted}", prompt, rng.randrange(0, 20), revision, ignore_eos=rng.random() < 0.5)
            submitted += 1
        if rng.random() < 0.05 and h.scheduler.requests:
            rid = rng.choice(list(h.scheduler.requests))
            assert h.scheduler.abort(rid) is not None
            aborted += 1
        if rng.random() < 0.02:
            h.cache.flush()
        h.step()
    h.run()
    assert len(h.finished) == submitted - aborted
    h.check_outputs()
    assert h.cache.num_in_use == 0 and (h.slots is None or not any(h.slots.users))
