"""Which adapter revision occupies which device slot. Host only: the scheduler decides with it, the manager moves weights.

A slot is free, filling (its adapter's weights are on their way), idle (resident, no request of it runs) or in use. Idle
slots are reused in the order of `--lora-eviction-policy`; a pinned adapter keeps its slot once it has one. A *draining*
slot takes no new requests, so that it becomes idle for an adapter that has waited too long.
"""

from collections import OrderedDict
from collections.abc import Callable


class SlotTable:
    """Residency of adapter revisions in `num_slots` slots. `policy`: idle slots go "lru" (least recently used) or "fifo" (longest resident) first."""

    def __init__(self, num_slots: int, policy: str = "lru") -> None:
        self.num_slots, self.policy = num_slots, policy
        self.revision_of: list[str | None] = [None] * num_slots
        self.users = [0] * num_slots  # running requests of each slot
        self.stays: Callable[[str], bool] = lambda revision: False  # whether a revision keeps its slot, such as a pinned one
        self.draining: dict[int, str] = {}  # slot -> the revision it is drained for
        self.absent: set[str] = set()  # revisions whose weights are not in host memory, so that no slot can be filled with them
        self._slot_of: dict[str, int] = {}  # in the order in which they got their slots
        self.free = list(range(num_slots - 1, -1, -1))  # all others hold an adapter or wait for its weights
        self._idle: OrderedDict[int, None] = OrderedDict()  # resident without users, next to be reused first
        self.filling: set[int] = set()  # slots whose weights are on their way
        self._writes: list[tuple[int, str]] = []
        self.wanted: dict[str, None] = {}  # absent revisions that requests wait for, in the order of asking

    def slot_of(self, revision: str) -> int | None:
        return self._slot_of.get(revision)

    def is_ready(self, revision: str) -> bool:
        """Requests of `revision` could run now."""
        slot = self._slot_of.get(revision)
        return slot is not None and slot not in self.filling

    def is_coming(self, revision: str) -> bool:
        """The weights of `revision` are on their way, from a file or to a slot: no other adapter has to make room for it."""
        return self._slot_of.get(revision) in self.filling or revision in self.wanted

    def acquire(self, revision: str) -> int | None:
        """A slot for one more running request of `revision`. None: it has to wait; what it waits for has been asked for."""
        slot = self._slot_of.get(revision)
        if slot is None:
            if revision in self.absent:
                self.wanted[revision] = None
            else:
                self.reserve(revision)
            return None
        if slot in self.draining or slot in self.filling:
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

    def reserve(self, revision: str) -> int | None:
        """Give a revision that has no slot a free or idle one, to be filled; None if there is none."""
        assert revision not in self._slot_of, f"{revision} already has slot {self._slot_of[revision]}"
        slot = self.free.pop() if self.free else self._evict()
        if slot is None:
            return None
        self.revision_of[slot] = revision
        self._slot_of[revision] = slot
        self.filling.add(slot)
        self._writes.append((slot, revision))
        return slot

    def filled(self, slot: int) -> None:
        """The weights of the slot's revision are there."""
        self.filling.remove(slot)
        self._idle[slot] = None

    def take_writes(self) -> list[tuple[int, str]]:
        """(slot, revision) pairs reserved since the last call; `filled` says when their weights are there."""
        writes, self._writes = self._writes, []
        return writes

    def present(self, revision: str) -> None:
        """The weights of `revision` are in host memory now, or it has been forgotten."""
        self.absent.discard(revision)
        self.wanted.pop(revision, None)

    def drop(self, revision: str) -> int | None:
        """Forget an unloaded revision; returns the slot whose weights can be cleared, None if it was not resident."""
        self.present(revision)
        slot = self._slot_of.pop(revision, None)
        if slot is not None:
            assert self.users[slot] == 0 and slot not in self.filling, f"{revision} dropped while slot {slot} is in use"
            del self._idle[slot]
            self._vacate(slot)
            self.free.append(slot)
        return slot

    def is_kept(self, slot: int) -> bool:
        """No other adapter may have the slot."""
        return (revision := self.revision_of[slot]) is not None and self.stays(revision)

    def drainable(self) -> list[int]:
        """Slots in use that could be drained for another adapter."""
        return [slot for slot, users in enumerate(self.users) if users > 0 and slot not in self.draining and not self.is_kept(slot)]

    def _evict(self) -> int | None:
        order = self._idle if self.policy == "lru" else self._slot_of.values()
        slot = next((slot for slot in order if slot in self._idle and not self.is_kept(slot)), None)
        if slot is None:
            return None
        revision = self.revision_of[slot]
        assert revision is not None
        del self._idle[slot], self._slot_of[revision]
        self._vacate(slot)
        return slot

    def _vacate(self, slot: int) -> None:
        self.revision_of[slot] = None
        self.draining.pop(slot, None)
