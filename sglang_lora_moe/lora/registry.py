"""Adapter names: which revision each stands for, who runs on it, and when an unloaded one is free. Host only.

A name is bound to a *revision* (hash of content) when it is loaded; requests are bound to the entry when they are
accepted. Unloading takes the name away at once, so that new requests get 404, and ends when the last user does; the same
name may be loaded with other content meanwhile. Two names with equal content share weights and slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.lora.weights import AdapterWeights

LORA_DISABLED = "this server runs without adapters; start it with --enable-lora or --lora-paths"


@dataclass(eq=False)
class AdapterEntry:
    """One loaded name. Compared by identity: a name that is loaded anew is another entry."""

    name: str
    path: str
    weights: AdapterWeights
    pinned: bool = False
    users: int = 0  # requests that are bound to it, running or waiting
    unload_rids: list[str] = field(default_factory=list)  # unload requests to answer when the last user ends

    @property
    def revision(self) -> str:
        return self.weights.revision

    @property
    def unloading(self) -> bool:
        return bool(self.unload_rids)


class LoRARegistry:
    """All entries: loaded ones by name, and unloading ones that still have users."""

    def __init__(self, num_slots: int, max_loaded: int | None = None) -> None:
        self.num_slots, self.max_loaded = num_slots, max_loaded
        self.loaded: dict[str, AdapterEntry] = {}
        self.unloading: list[AdapterEntry] = []

    def get(self, name: str) -> AdapterEntry:
        entry = self.loaded.get(name)
        if entry is None:
            known = ", ".join(sorted(self.loaded)) or "none"
            raise RequestError(f"no adapter {name!r} is loaded; loaded adapters: {known}", 404, "model", "model_not_found")
        return entry

    def entries(self) -> list[AdapterEntry]:
        return [*self.loaded.values(), *self.unloading]

    def weights_of(self, revision: str) -> AdapterWeights:
        return next(entry.weights for entry in self.entries() if entry.revision == revision)

    def add(self, name: str, path: str, weights: AdapterWeights, pinned: bool) -> tuple[AdapterEntry, bool]:
        """Register a name; returns its entry and whether it was loaded with equal content already. Refusals change nothing."""
        entry = self.loaded.get(name)
        if entry is not None and entry.revision != weights.revision:
            raise RequestError(
                f"adapter {name!r} is loaded already with other content (revision {entry.revision}, from {entry.path}); "
                f"unload it first, or load {path} (revision {weights.revision}) by another name",
                400, "name", "adapter_already_loaded",
            )  # fmt: skip
        if entry is None and self.max_loaded is not None and len(self.loaded) >= self.max_loaded:
            raise RequestError(f"{len(self.loaded)} adapters are loaded, as many as --max-loaded-loras allows; unload one first", 400, "name")
        if pinned:
            self._check_pins(weights.revision)
        if entry is not None:
            entry.pinned = entry.pinned or pinned
            return entry, True
        same = next((other for other in self.entries() if other.revision == weights.revision), None)
        entry = self.loaded[name] = AdapterEntry(name, path, same.weights if same is not None else weights, pinned)
        return entry, False

    def begin_unload(self, name: str, rid: str) -> AdapterEntry:
        """Take the name away. The caller ends the unload at once if the entry has no users, else when the last one ends."""
        entry = self.get(name)
        del self.loaded[name]
        entry.unload_rids.append(rid)
        self.unloading.append(entry)
        return entry

    def end_unload(self, entry: AdapterEntry) -> bool:
        """Forget an entry without users; returns whether its revision is gone with it."""
        assert entry.users == 0 and entry.unloading, f"{entry.name} forgotten with {entry.users} users"
        self.unloading.remove(entry)
        return all(other.revision != entry.revision for other in self.entries())

    def pinned_revisions(self) -> set[str]:
        return {entry.revision for entry in self.loaded.values() if entry.pinned}

    def _check_pins(self, revision: str) -> None:
        pinned = self.pinned_revisions() | {revision}
        if len(pinned) >= self.num_slots:
            raise RequestError(
                f"at most {self.num_slots - 1} of {self.num_slots} adapter slots (--max-loras-per-batch) may be pinned, so that the others can be served",
                400, "pinned",
            )  # fmt: skip
