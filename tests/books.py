"""Whether the books of an engine agree: pages, slots, adapters, and the requests that hold them. Cheap enough for tests, not for every step."""

from __future__ import annotations

from collections import Counter

from sglang_lora_moe.engine.engine_core import EngineCore
from sglang_lora_moe.engine.kv_cache import PrefixCache
from sglang_lora_moe.engine.scheduler import Scheduler
from sglang_lora_moe.lora.manager import LoRAManager
from sglang_lora_moe.lora.registry import AdapterEntry
from sglang_lora_moe.lora.slots import SlotTable


def check_core(core: EngineCore) -> None:
    """All books of an engine."""
    check_scheduler(core.scheduler)
    assert set(core._entries) == {request for request in core.scheduler.requests.values() if request.revision is not None}
    if core.lora is not None:
        check_manager(core.lora)
        for entry in all_entries(core.lora):
            assert entry.users == sum(e is entry for e in core._entries.values()), f"{entry.name}: {entry.users} users"


def check_scheduler(scheduler: Scheduler) -> None:
    """Pages and slots agree with the requests that hold them."""
    check_cache(scheduler.cache)
    held = Counter(page for request in scheduler.running for page in request.pages)
    refs = {page: refs for page, refs in enumerate(scheduler.cache.pool.refs) if refs}
    assert held == refs, f"requests hold {dict(held)}, the pool counts {refs}"
    assert all(not request.pages and request.slot < 0 for request in scheduler.waiting), "a waiting request holds pages or a slot"
    assert len(scheduler.requests) == len(scheduler.waiting) + len(scheduler.running)
    slots = scheduler.slots
    if slots is not None:
        check_slots(slots)
        users = Counter(request.slot for request in scheduler.running if request.slot >= 0)
        assert users == Counter({slot: n for slot, n in enumerate(slots.users) if n}), f"slots in use {slots.users}, by requests {users}"
        for request in scheduler.running:
            assert request.slot < 0 or slots.revision_of[request.slot] == request.revision
    if not scheduler.running:
        assert not scheduler._pending_keys, "page keys pending without a running request"


def check_cache(cache: PrefixCache) -> None:
    """Every page is free, cached or in use."""
    free, idle = set(cache.pool.free), set(cache._idle)
    assert len(free) == len(cache.pool.free), "a page is free twice"
    assert not free & idle and 0 not in free | idle, f"pages both free and cached: {sorted(free & idle)}"
    held = {page for page, refs in enumerate(cache.pool.refs) if refs > 0}
    assert not held & (free | idle), f"pages held and not in use: {sorted(held & (free | idle))}"
    assert len(free) + len(idle) + len(held) == cache.pool.total, f"{len(free)} free + {len(idle)} cached + {len(held)} in use != {cache.pool.total}"
    assert idle <= set(cache._key_of), "a cached page has no key"
    assert {page: key for key, page in cache._page_of.items()} == cache._key_of, "keys and pages of the prefix cache disagree"


def check_slots(slots: SlotTable) -> None:
    """Every slot is free, filling, idle or in use."""
    in_use = {slot for slot, users in enumerate(slots.users) if users > 0}
    parts = (set(slots.free), slots.filling, set(slots._idle), in_use)
    assert sum(map(len, parts)) == len(set().union(*parts)) == slots.num_slots, (
        f"free {parts[0]}, filling {parts[1]}, idle {parts[2]}, in use {parts[3]} of {slots.num_slots}"
    )
    assert {slot: revision for revision, slot in slots._slot_of.items()} == {s: r for s, r in enumerate(slots.revision_of) if r is not None}
    assert all(slots.revision_of[slot] is None for slot in slots.free), "a free slot has a revision"
    assert set(slots.wanted) <= slots.absent, "a revision is wanted that is not absent"


def check_manager(lora: LoRAManager) -> None:
    """Slots, pool, host memory and registry agree."""
    check_slots(lora.slots)
    known = {entry.revision for entry in all_entries(lora)}
    of_names = {revision: {entry for entry in all_entries(lora) if entry.revision == revision} for revision in known}
    assert {revision: set(lora.registry.entries(revision)) for revision in lora.registry._of} == of_names, "entries by revision differ from the names"
    for slot, revision in enumerate(lora.slots.revision_of):
        used = lora.pool.region_bytes_used(slot)
        assert revision is None or revision in known, f"slot {slot} holds {revision}, which is not loaded"
        assert revision is not None or used == 0, f"slot {slot} is free and holds {used} bytes"
    assert all(entry.in_use for entry in lora.registry.leaving), "an adapter that nobody uses has not gone"
    assert {revision for revision in known if revision not in lora.host} == lora.slots.absent, "absent revisions differ from host memory"
    assert set(lora.host._adapters) <= known, "host memory holds what is not loaded"
    assert lora.host.limit is None or len(lora.host) <= lora.host.limit, f"{len(lora.host)} adapters in host memory, at most {lora.host.limit} may be"
    pinned = {entry.revision for entry in lora.registry.loaded.values() if entry.pinned}
    assert all(map(lora.slots.stays, pinned)) and len(pinned) < max(lora.slots.num_slots, 1), f"pinned: {pinned}"
    for entry in all_entries(lora):
        assert entry.fills == sum(fill.entry is entry for fill in lora._fills.values()), f"{entry.name}: {entry.fills} fills"


def all_entries(lora: LoRAManager) -> list[AdapterEntry]:
    return [*lora.registry.loaded.values(), *lora.registry.leaving]
