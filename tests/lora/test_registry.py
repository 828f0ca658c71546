"""Names, revisions and slots, without weights."""

from __future__ import annotations

import random
import time

import pytest
import torch

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.lora.host_cache import HostCache
from sglang_lora_moe.lora.packed import PackedAdapter
from sglang_lora_moe.lora.registry import LoRARegistry
from sglang_lora_moe.lora.slots import SlotTable
from tests.books import check_slots


def packed(revision: str, path: str = "/a") -> PackedAdapter:
    return PackedAdapter(path, revision, 4, torch.zeros(25), (), frozenset())


def test_names_are_bound_to_revisions() -> None:
    registry = LoRARegistry(4)
    entry, known, old = registry.add("a", packed("r1"), False)
    assert not known and old is None and registry.get("a") is entry and (entry.revision, entry.rank, entry.nbytes) == ("r1", 4, 100)
    again, known, old = registry.add("a", packed("r1", "/elsewhere"), False)
    assert known and again is entry and old is None
    assert entry.path == "/elsewhere", "read again from where it was found last: the old files may have gone"
    assert registry.add("a", packed("r1", ""), False)[1] and entry.path == "/elsewhere"  # from tensors, which cannot be read again
    with pytest.raises(RequestError, match="loaded already with other content .revision r1, from /elsewhere.*load_inplace=true.*r2.*by another") as error:
        registry.add("a", packed("r2", "/b"), False)
    assert (error.value.status, error.value.param) == (400, "name") and registry.get("a") is entry


def test_unknown_name_lists_the_loaded_ones() -> None:
    registry = LoRARegistry(4)
    with pytest.raises(RequestError, match="loaded adapters: none"):
        registry.get("x")
    registry.add("b", packed("r1"), False)
    registry.add("a", packed("r2"), False)
    with pytest.raises(RequestError, match="no adapter 'x' is loaded; loaded adapters: a, b") as error:
        registry.get("x")
    assert (error.value.status, error.value.code) == (404, "model_not_found")


def test_a_revision_goes_with_its_last_name() -> None:
    registry = LoRARegistry(4)
    first, _, _ = registry.add("a", packed("r1"), False)
    second, known, _ = registry.add("b", packed("r1"), False)
    assert not known and registry.entries("r1") == [first, second]
    registry.begin_unload("a", "u")
    assert registry.entries("r1") == [second, first], "files of what is loaded are the first to be tried"
    assert registry.forget(first) is False  # b still needs it
    assert registry.entries("r1") == [second]
    assert registry.forget(registry.begin_unload("b", "u")) is True


def test_a_name_is_free_while_its_old_entry_drains() -> None:
    registry = LoRARegistry(4)
    old, _, _ = registry.add("a", packed("r1"), False)
    old.users = 1
    registry.begin_unload("a", "u")
    with pytest.raises(RequestError, match="no adapter 'a'"):
        registry.get("a")
    new, known, replaced = registry.add("a", packed("r2"), False)
    assert not known and replaced is None and registry.get("a") is new and registry.entries("r1") == [old]
    old.users = 0
    assert registry.forget(old) and registry.entries("r1") == registry.leaving == [] and registry.entries("r2") == [new]


def test_thousands_of_names() -> None:
    """The names of a revision are looked up in every step in which requests wait for adapters on disk: once for each of these."""
    registry = LoRARegistry(4)
    for i in range(30_000):
        registry.add(f"a{i}", packed(f"r{i}"), False)
    begin = time.thread_time()  # which goes on for this thread's own work only
    assert all(len(registry.entries(f"r{i}")) == 1 for i in range(2000))
    assert time.thread_time() - begin < 0.5  # 2 seconds if each looked at all names


def test_other_content_in_place() -> None:
    registry = LoRARegistry(3)
    first, _, _ = registry.add("a", packed("r1"), True)
    first.users = 1
    second, known, replaced = registry.add("a", packed("r2", ""), False, in_place=True)  # the pin is the name's
    assert replaced is first and not known and first.leaving and registry.get("a") is second and second.pinned
    assert registry.entries("r1") == [first] and second.path == ""
    assert registry.add("a", packed("r2"), False, in_place=True) == (second, True, None)


def test_limits() -> None:
    registry = LoRARegistry(2)
    registry.add("a", packed("r1"), True)
    with pytest.raises(RequestError, match="at most 1 of 2 adapter slots") as error:
        registry.add("b", packed("r2"), True)
    assert error.value.param == "pinned" and "b" not in registry.loaded
    registry.add("b", packed("r2"), False)
    with pytest.raises(RequestError, match="may be pinned"):
        registry.add("b", packed("r3"), True, in_place=True)
    assert registry.get("b").revision == "r2"
    with pytest.raises(RequestError, match="may be pinned"):
        LoRARegistry(1).add("a", packed("r1"), True)


def test_pins_are_counted_by_revision() -> None:
    registry = LoRARegistry(2)
    registry.add("other", packed("r0"), False)
    for name in "ab":  # names of one revision share its slot
        registry.add(name, packed("r1"), True)
    with pytest.raises(RequestError, match="may be pinned"):
        registry.add("a", packed("r2"), False, in_place=True)  # the pin is the name's: b keeps the other slot
    registry.begin_unload("b", "u")
    assert registry.add("a", packed("r2"), True, in_place=True)[0].pinned, "the pin of what is replaced does not count"


def test_pinning_a_loaded_adapter() -> None:
    registry = LoRARegistry(3)
    entry, _, _ = registry.add("a", packed("r1"), False)
    assert registry.add("a", packed("r1"), True) == (entry, True, None)
    assert entry.pinned and registry.get("a") is entry


def test_host_memory_gives_up_the_least_recently_used() -> None:
    cache, pinned = HostCache(2), set[str]()

    def make_room(may_go: bool = True, of: HostCache = cache) -> list[str] | None:
        gone = of.make_room(lambda adapter: may_go, lambda adapter: adapter.revision in pinned)
        return None if gone is None else [adapter.revision for adapter in gone]

    for revision in ("r1", "r2"):
        assert make_room() == []
        cache.add(packed(revision))
    cache.use("r1")
    assert make_room() == ["r2"] and "r2" not in cache
    cache.add(packed("r3"))
    assert make_room(may_go=False) is None and len(cache) == 2
    assert make_room(may_go=False, of=HostCache()) == []
    pinned.add("r1")
    assert make_room() == ["r3"]
    pinned.add("r4")
    cache.add(packed("r4"))
    assert make_room() == ["r1"]


# ---- slots ----------------------------------------------------------------------------------------------------------
def arrive(slots: SlotTable) -> list[tuple[int, str]]:
    """All weights that were asked for are there."""
    writes = slots.take_writes()
    for slot, _ in writes:
        slots.filled(slot)
    return writes


def take(slots: SlotTable, revision: str) -> int | None:
    """A slot for a request that waits for the weights if need be."""
    slot = slots.acquire(revision)
    return slot if slot is not None or not arrive(slots) else slots.acquire(revision)


def test_slots_are_given_and_reused() -> None:
    slots = SlotTable(2)
    assert slots.acquire("A") is None and slots.is_coming("A") and slots.acquire("A") is None  # asked for once
    assert slots.acquire("B") is None and slots.acquire("C") is None and not slots.is_coming("C")
    writes = arrive(slots)
    assert sorted(slot for slot, _ in writes) == [0, 1] and [revision for _, revision in writes] == ["A", "B"] and slots.take_writes() == []
    a, b = slots.acquire("A"), slots.acquire("B")
    assert {a, b} == {0, 1} and slots.acquire("A") == a and slots.acquire("C") is None
    assert a is not None and b is not None
    slots.release(a)
    assert slots.acquire("C") is None and not slots.is_coming("C")  # one more user of A
    slots.release(a)
    assert slots.acquire("C") is None and slots.is_coming("C") and slots.slot_of("A") is None
    assert arrive(slots) == [(a, "C")] and slots.acquire("C") == a
    check_slots(slots)


def test_absent_weights_are_asked_for_before_a_slot_is_taken() -> None:
    slots = SlotTable(1)
    slots.absent = {"A", "B"}
    assert slots.acquire("A") is None and slots.acquire("B") is None and slots.acquire("A") is None
    assert list(slots.wanted) == ["A", "B"] and slots.is_coming("B") and slots.free and slots.take_writes() == []
    slots.present("B")
    assert list(slots.wanted) == ["A"] and take(slots, "B") == 0
    del slots.wanted["A"]
    assert not slots.wanted and slots.absent == {"A"} and not slots.is_coming("A")
    check_slots(slots)


def test_pinned_slots_are_not_evicted() -> None:
    slots = SlotTable(2)
    for revision in "AB":
        slot = take(slots, revision)
        assert slot is not None
        slots.release(slot)
    slots.stays = {"A"}.__contains__
    for revision in "CDE":
        slot = take(slots, revision)
        assert slot is not None
        slots.release(slot)
    assert slots.slot_of("A") is not None and slots.slot_of("E") is not None and not slots.free


@pytest.mark.parametrize("policy, gone", [("lru", "B"), ("fifo", "A")])
def test_eviction_policy(policy: str, gone: str) -> None:
    slots = SlotTable(2, policy)
    for revision in "ABA":
        slot = take(slots, revision)
        assert slot is not None
        slots.release(slot)
    assert take(slots, "C") is not None and slots.slot_of(gone) is None


def test_a_draining_slot_takes_nobody_until_it_changes_hands() -> None:
    slots = SlotTable(1)
    slot = take(slots, "A")
    assert slot is not None and slots.drainable() == [slot]
    slots.draining[slot] = "B"
    assert slots.acquire("A") is None and slots.drainable() == []
    slots.release(slot)
    assert slots.acquire("A") is None and take(slots, "B") == slot and not slots.draining


def test_dropping() -> None:
    slots = SlotTable(2)
    slot = slots.reserve("A")
    with pytest.raises(AssertionError, match="in use"):
        slots.drop("A")  # its weights are on their way
    slots = SlotTable(2)
    slot = slots.reserve("A")
    arrive(slots)
    assert slots.drop("A") == slot and slots.drop("A") is None
    check_slots(slots)


def test_slot_books_hold_under_random_use() -> None:
    rng, slots, held = random.Random(0), SlotTable(3), []  # type: random.Random, SlotTable, list[tuple[int, str]]
    for _ in range(3000):
        revision = f"R{rng.randrange(7)}"
        if held and rng.random() < 0.5:
            slots.release(held.pop(rng.randrange(len(held)))[0])
        elif rng.random() < 0.05 and revision not in [r for _, r in held] and not slots.is_coming(revision):
            slots.drop(revision)
        elif rng.random() < 0.3:
            arrive(slots)
        else:
            slot = slots.acquire(revision)
            if slot is not None:
                held.append((slot, revision))
        check_slots(slots)
        assert all(slots.revision_of[slot] == revision for slot, revision in held)
