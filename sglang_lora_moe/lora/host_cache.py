"""Packed adapters in host memory, ready to be copied into a slot; the least recently used ones make room for others."""

from collections import OrderedDict
from collections.abc import Callable

from sglang_lora_moe.lora.packed import PackedAdapter


class HostCache:
    """By revision, at most `limit` of them (None: no limit), apart from those that may not go."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()  # least recently used first

    def __contains__(self, revision: str) -> bool:
        return revision in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def use(self, revision: str) -> PackedAdapter:
        self._adapters.move_to_end(revision)
        return self._adapters[revision]

    def make_room(self, may_go: Callable[[PackedAdapter], bool], last: Callable[[PackedAdapter], bool]) -> list[PackedAdapter] | None:
        """Take out what one more adapter needs to go, of the `last` ones only if no other may; None, and nothing changed, if there is no room for one."""
        if self.limit is None or len(self._adapters) < self.limit:
            return []
        going = min(filter(may_go, self._adapters.values()), key=last, default=None)
        return None if going is None else [self._adapters.pop(going.revision)]

    def add(self, adapter: PackedAdapter) -> None:
        self._adapters[adapter.revision] = adapter

    def drop(self, revision: str) -> PackedAdapter | None:
        return self._adapters.pop(revision, None)
