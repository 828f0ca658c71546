"""Which adapter revision occupies which device slot. Host only: the scheduler decides with it, the manager writes weights.

A slot is free, idle (its adapter is resident and no request of it runs) or in use. Idle slots are reused least recently
used first; a pinned adapter keeps its slot once it has one. A *draining* slot takes no new requests, so that it becomes
idle for an adapter that has waited too long.
"""

from __future__ import annotations

from collections import OrderedDict


class SlotTable:
    """Residency of adapter revisions in `num_slots` slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.revision_of: list[str | None] = [None] * num_slots
        self.users = [0] * num_slots  # running requests of each slot
        self.pinned: set[str] = set()  # revisions; at most num_slots - 1, which the registry checks
        self.draining: dict[int, str] = {}  # slot -> the revision it is drained for
        self._slot_of: dict[str, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # resident without users, least recently used first
        self._writes: list[tuple[int, str]] = []

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @property
    def num_resident(self) -> int:
        return len(self._slot_of)

    def slot_of(self, revision: str) -> int | None:
        return self._slot_of.get(revision)

    def acquire(self, revision: str) -> int | None:
        """A slot for one more running request of `revision`, or None if it has to wait."""
        slot = self._slot_of.get(revision)
        if slot is None:
            slot = self.make_resident(revision)
            if slot is None:
                return None
        elif slot in self.draining:
            return None
        if self.users[slot] == 0:
            self._idle.pop(slot)
        self.users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        assert self.users[slot] > 0, f"slot {slot} released without users"
        self.users[slot] -= 1
        if self.users[slot] == 0:
            self._idle[slot] = None

    def make_resident(self, revision: str) -> int | None:
        """Give a revision that has no slot a free or idle one, to be written before the next step; None if there is none."""
        assert revision not in self._slot_of, f"{revision} already has slot {self._slot_of[revision]}"
        slot = self._free.pop() if self._free else self._evict()
        if slot is None:
            return None
        self.revision_of[slot] = revision
        self._slot_of[revision] = slot
        self._idle[slot] = None
        self._writes.append((slot, revision))
        return slot

    def take_writes(self) -> list[tuple[int, str]]:
        """(slot, revision) pairs assigned since the last call, whose weights must be written before the next step."""
        writes, self._writes = self._writes, []
        return writes

    def drop(self, revision: str) -> int | None:
        """Forget an unloaded revision; returns the slot whose weights can be cleared, None if it was not resident."""
        self.pinned.discard(revision)
        slot = self._slot_of.pop(revision, None)
        if slot is not None:
            assert self.users[slot] == 0, f"{revision} dropped while {self.users[slot]} requests run in slot {slot}"
            del self._idle[slot]
            self._vacate(slot)
            self._free.append(slot)
        return slot

    def drainable(self) -> list[int]:
        """Slots in use that could be drained for another adapter."""
        return [slot for slot, users in enumerate(self.users) if users > 0 and slot not in self.draining and self.revision_of[slot] not in self.pinned]

    def check(self) -> None:
        """Assert the books: free + idle + in use == num_slots."""
        in_use = {slot for slot, users in enumerate(self.users) if users > 0}
        parts = (set(self._free), set(self._idle), in_use)
        assert sum(map(len, parts)) == len(set().union(*parts)) == self.num_slots, f"free {parts[0]}, idle {parts[1]}, in use {parts[2]} of {self.num_slots}"
        assert {slot: revision for revision, slot in self._slot_of.items()} == {s: r for s, r in enumerate(self.revision_of) if r is not None}
        assert all(self.revision_of[slot] is None for slot in self._free), "a free slot has a revision"

    def _evict(self) -> int | None:
        for slot in self._idle:
            revision = self.revision_of[slot]
            if revision not in self.pinned:
                assert revision is not None
                del self._idle[slot], self._slot_of[revision]
                self._vacate(slot)
                return slot
        return None

    def _vacate(self, slot: int) -> None:
        revision, self.revision_of[slot] = self.revision_of[slot], None
        self.draining.pop(slot, None)
        self._writes = [write for write in self._writes if write != (slot, revision)]
