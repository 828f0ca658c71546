"""Adapter names: which revision each stands for, who runs on it, and when one that has gone is free. Host only.

A name is bound to a *revision* (hash of content) when it is loaded; requests are bound to the entry when they are
accepted. Unloading takes the name away at once, so that new requests get 404, and ends when the last user does; loading
other content in place takes it away in favour of the new entry. Two names with equal content share weights and slot.
"""

from dataclasses import dataclass, field

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.lora.packed import PackedAdapter

LORA_DISABLED = "this server runs without adapters; start it with --enable-lora or --lora-paths"


@dataclass(eq=False)
class AdapterEntry:
    """One loaded name. Compared by identity: a name that is loaded anew is another entry."""

    name: str
    path: str  # "" = loaded from tensors: it cannot be read again
    revision: str
    rank: int
    nbytes: int
    pinned: bool = False
    users: int = 0  # requests that are bound to it, running or waiting
    fills: int = 0  # copies of its weights into a slot that are on their way
    leaving: bool = False  # unloaded or replaced; it stays until nobody uses it
    unload_rids: list[str] = field(default_factory=list)  # unload requests to answer when it has gone

    @property
    def in_use(self) -> bool:
        return self.users + self.fills > 0


class LoRARegistry:
    """All entries: loaded ones by name, and leaving ones that are still in use."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.loaded: dict[str, AdapterEntry] = {}
        self.leaving: list[AdapterEntry] = []
        self._of: dict[str, list[AdapterEntry]] = {}  # both, by revision: steps ask for one of thousands

    def get(self, name: str) -> AdapterEntry:
        entry = self.loaded.get(name)
        if entry is None:
            known = ", ".join(sorted(self.loaded)) or "none"
            raise RequestError(f"no adapter {name!r} is loaded; loaded adapters: {known}", 404, "model", "model_not_found")
        return entry

    def entries(self, revision: str) -> list[AdapterEntry]:
        """Those of one revision, loaded ones first."""
        return sorted(self._of.get(revision, ()), key=lambda entry: entry.leaving)

    def check(self, name: str, adapter: PackedAdapter, pinned: bool, in_place: bool = False) -> AdapterEntry | None:
        """What the name stands for; RequestError for what `add` may not register."""
        old = self.loaded.get(name)
        if old is not None and old.revision != adapter.revision and not in_place:
            raise RequestError(
                f"adapter {name!r} is loaded already with other content (revision {old.revision}, from {old.path or 'tensors'}); load with "
                f"load_inplace=true to replace it by revision {adapter.revision}, or unload it first, or load {adapter.path or 'the tensors'} by another name",
                400, "name", "adapter_already_loaded",
            )  # fmt: skip
        if pinned or (old is not None and old.pinned):
            pins = {entry.revision for entry in self.loaded.values() if entry.pinned and entry is not old} | {adapter.revision}
            if len(pins) >= self.num_slots:
                most = f"at most {self.num_slots - 1} of {self.num_slots} adapter slots (--max-loras-per-batch) may be pinned"
                raise RequestError(f"{most}, so that the others can be served", 400, "pinned")
        return old

    def add(self, name: str, adapter: PackedAdapter, pinned: bool, in_place: bool = False) -> tuple[AdapterEntry, bool, AdapterEntry | None]:
        """Register a name; its entry, whether it was loaded with equal content already, and the entry that it replaces. Refusals change nothing.

        The caller forgets the replaced entry (`forget`) once it is not in use.
        """
        old = self.check(name, adapter, pinned, in_place)
        pinned = pinned or (old is not None and old.pinned)  # a name stays pinned until it is unloaded
        if old is not None and old.revision == adapter.revision:
            old.pinned, old.path = pinned, adapter.path or old.path  # where it was found last
            return old, True, None
        if old is not None:
            self._leave(old)
        entry = self.loaded[name] = AdapterEntry(name, adapter.path, adapter.revision, adapter.rank, adapter.nbytes, pinned)
        self._of[entry.revision] = [*self._of.get(entry.revision, ()), entry]
        return entry, False, old

    def begin_unload(self, name: str, rid: str) -> AdapterEntry:
        """Take the name away. The caller forgets the entry at once if it is not in use, else when that ends."""
        entry = self.get(name)
        entry.unload_rids.append(rid)
        self._leave(entry)
        return entry

    def forget(self, entry: AdapterEntry) -> bool:
        """Forget a leaving entry that is not in use; returns whether its revision is gone with it."""
        assert entry.leaving and not entry.in_use, f"{entry.name} forgotten with {entry.users} users and {entry.fills} fills"
        self.leaving.remove(entry)
        others = [other for other in self._of.pop(entry.revision) if other is not entry]
        if others:
            self._of[entry.revision] = others
        return not others

    def _leave(self, entry: AdapterEntry) -> None:
        del self.loaded[entry.name]
        entry.leaving = True
        self.leaving.append(entry)
