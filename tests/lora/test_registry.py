"""Names, revisions and slots, without weights."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.lora.registry import LoRARegistry
from sglang_lora_moe.lora.slots import SlotTable


def weights(revision: str) -> Any:
    return SimpleNamespace(revision=revision, rank=4, nbytes=100)


def test_names_are_bound_to_revisions() -> None:
    registry = LoRARegistry(4)
    entry, known = registry.add("a", "/a", weights("r1"), False)
    assert not known and registry.get("a") is entry and entry.revision == "r1"
    again, known = registry.add("a", "/elsewhere", weights("r1"), False)
    assert known and again is entry
    with pytest.raises(RequestError, match="'a' is loaded already with other content .revision r1, from /a.*revision r2. by another name") as error:
        registry.add("a", "/b", weights("r2"), False)
    assert (error.value.status, error.value.param) == (400, "name")


def test_unknown_name_lists_the_loaded_ones() -> None:
    registry = LoRARegistry(4)
    with pytest.raises(RequestError, match="loaded adapters: none"):
        registry.get("x")
    registry.add("b", "/b", weights("r1"), False)
    registry.add("a", "/a", weights("r2"), False)
    with pytest.raises(RequestError, match="no adapter 'x' is loaded; loaded adapters: a, b") as error:
        registry.get("x")
    assert (error.value.status, error.value.code) == (404, "model_not_found")


def test_equal_content_is_kept_once() -> None:
    registry = LoRARegistry(4)
    first, _ = registry.add("a", "/a", weights("r1"), False)
    second, known = registry.add("b", "/b", weights("r1"), False)
    assert not known and second is not first and second.weights is first.weights
    assert registry.end_unload(registry.begin_unload("a", "u")) is False  # b still needs it
    assert registry.weights_of("r1") is second.weights
    assert registry.end_unload(registry.begin_unload("b", "u")) is True


def test_a_name_is_free_while_its_old_entry_drains() -> None:
    registry = LoRARegistry(4)
    old, _ = registry.add("a", "/a", weights("r1"), False)
    old.users = 1
    registry.begin_unload("a", "u")
    with pytest.raises(RequestError, match="no adapter 'a'"):
        registry.get("a")
    new, known = registry.add("a", "/a2", weights("r2"), False)
    assert not known and registry.get("a") is new and registry.weights_of("r1") is old.weights
    old.users = 0
    assert registry.end_unload(old) and registry.entries() == [new]


def test_limits() -> None:
    registry = LoRARegistry(2, max_loaded=2)
    registry.add("a", "/a", weights("r1"), True)
    with pytest.raises(RequestError, match="at most 1 of 2 adapter slots") as error:
        registry.add("b", "/b", weights("r2"), True)
    assert error.value.param == "pinned" and "b" not in registry.loaded
    registry.add("b", "/b", weights("r2"), False)
    with pytest.raises(RequestError, match="2 adapters are loaded, as many as --max-loaded-loras allows"):
        registry.add("c", "/c", weights("r3"), False)
    assert registry.add("a", "/a", weights("r1"), False)[1]  # known ones do not count again
    with pytest.raises(RequestError, match="may be pinned"):
        LoRARegistry(1).add("a", "/a", weights("r1"), True)


def test_pinning_a_loaded_adapter() -> None:
    registry = LoRARegistry(3)
    entry, _ = registry.add("a", "/a", weights("r1"), False)
    assert registry.add("a", "/a", weights("r1"), True) == (entry, True)
    assert entry.pinned and registry.pinned_revisions() == {"r1"}


# ---- slots ----------------------------------------------------------------------------------------------------------
def test_slots_are_given_and_reused() -> None:
    slots = SlotTable(2)
    a, b = slots.acquire("A"), slots.acquire("B")
    assert {a, b} == {0, 1} and slots.acquire("C") is None and slots.acquire("A") == a
    assert a is not None and b is not None
    assert slots.take_writes() == [(a, "A"), (b, "B")] and slots.take_writes() == []
    slots.release(a)
    assert slots.acquire("C") is None  # one more user of A
    slots.release(a)
    assert slots.acquire("C") == a and slots.take_writes() == [(a, "C")]
    slots.check()


def test_pinned_slots_are_not_evicted() -> None:
    slots = SlotTable(2)
    for revision in "AB":
        slot = slots.acquire(revision)
        assert slot is not None
        slots.release(slot)
    slots.pinned = {"A"}
    for revision in "CDE":
        slot = slots.acquire(revision)
        assert slot is not None
        slots.release(slot)
    assert slots.slot_of("A") is not None and slots.slot_of("E") is not None and slots.num_resident == 2


def test_a_draining_slot_takes_nobody_until_it_changes_hands() -> None:
    slots = SlotTable(1)
    slot = slots.acquire("A")
    assert slot is not None and slots.drainable() == [slot]
    slots.draining[slot] = "B"
    assert slots.acquire("A") is None and slots.drainable() == []
    slots.release(slot)
    assert slots.acquire("A") is None and slots.acquire("B") == slot and not slots.draining


def test_dropping_forgets_unwritten_weights() -> None:
    slots = SlotTable(2)
    slot = slots.make_resident("A")
    assert slots.drop("A") == slot and slots.take_writes() == [] and slots.drop("A") is None
    slots.check()


def test_slot_books_hold_under_random_use() -> None:
    rng, slots, held = random.Random(0), SlotTable(3), []  # type: random.Random, SlotTable, list[tuple[int, str]]
    for _ in range(3000):
        revision = f"R{rng.randrange(7)}"
        if held and rng.random() < 0.5:
            slots.release(held.pop(rng.randrange(len(held)))[0])
        elif rng.random() < 0.05 and revision not in [r for _, r in held]:
            slots.drop(revision)
        else:
            slot = slots.acquire(revision)
            if slot is not None:
                held.append((slot, revision))
        slots.check()
        assert all(slots.revision_of[slot] == revision for slot, revision in held)
