"""Adapters of one model: reads them, keeps them in host memory, and puts into slots what the next steps need.

An adapter is on its way from files (`AdapterReader`, in a process of its own) through host memory (`HostCache`) to a slot of the device pool (`SlotLoader`, in
a thread of its own). Nothing here waits for any of it: `poll`, once a step, takes in what has arrived. Which revision has which slot is the `SlotTable`'s, with
which the scheduler decides; `start_fills` begins the copies that it has asked for. Answers to load and unload requests collect in `replies`.
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_lora_moe.core import LoadAdapter, Reply, RequestError, UnloadAdapter
from sglang_lora_moe.lora.host_cache import HostCache
from sglang_lora_moe.lora.layers import wrap_layers
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.packed import PackedAdapter
from sglang_lora_moe.lora.reader import AdapterReader
from sglang_lora_moe.lora.registry import AdapterEntry, LoRARegistry
from sglang_lora_moe.lora.slot_loader import SlotLoader
from sglang_lora_moe.lora.slots import SlotTable
from sglang_lora_moe.models.served import ServedModel

logger = logging.getLogger(__name__)


@dataclass
class _Load:
    """A load request while its adapter is being read, and the unload requests for its name that came meanwhile."""

    message: LoadAdapter
    adapter: Future[PackedAdapter]
    begin: float
    unloads: list[UnloadAdapter] = field(default_factory=list)


@dataclass
class _Fill:
    """A copy into a slot that is on its way."""

    adapter: PackedAdapter
    entry: AdapterEntry
    done: Future[None]


class LoRAManager:
    """The adapters that `reader` gives, in the slots of `pool`, on the layers of `model`, which are wrapped here."""

    def __init__(
        self,
        model: ServedModel,
        reader: AdapterReader,
        pool: LoRAMemoryPool,
        *,
        max_loaded: int | None = None,
        policy: str = "lru",
        backend: str = "torch_native",
    ) -> None:
        self.pool = pool
        self.slots = SlotTable(pool.num_slots, policy)
        self.registry = LoRARegistry(pool.num_slots)
        self.host = HostCache(max_loaded)
        self.slots.stays = self._keeps_slot
        self.replies: list[Reply] = []
        self.reader, self._thread = reader, ThreadPoolExecutor(1, "adapter-reader")
        self._loader = SlotLoader(pool.device)
        self._loads: list[_Load] = []
        self._reading: tuple[str, Future[PackedAdapter]] | None = None  # a revision that requests wait for
        self._fills: dict[int, _Fill] = {}  # by slot
        self._answers: dict[str, list[tuple[_Load, AdapterEntry, dict[str, Any]]]] = {}  # by revision: loads to answer when it is in its slot
        self._ctx = model.ctx
        self._unused = wrap_layers(model.hf, pool, model.ctx, backend)
        for layer in self._unused.values():
            layer.used = False

    # ---- names ------------------------------------------------------------------------------------------------------
    @property
    def is_loading(self) -> bool:
        """Something is on its way; `poll` will take it in."""
        return bool(self._loads or self._fills or self._reading or self.slots.wanted or self._loader.trash)

    def load(self, message: LoadAdapter) -> None:
        """Read an adapter and register it; answered when it is in its slot, if there is one for it."""
        self._loads.append(_Load(message, self._thread.submit(self.reader.read, message.path), time.monotonic()))

    def load_tensors(self, message: LoadAdapter, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
        """As `load`, with PEFT's tensors and adapter_config.json in memory instead of `message.path`."""
        self._loads.append(_Load(message, self._thread.submit(self.reader.read_tensors, message.name, tensors, config), time.monotonic()))

    def register(self, name: str, adapter: PackedAdapter, pinned: bool = False, in_place: bool = False) -> tuple[AdapterEntry, bool]:
        """Give a name to an adapter that was read; its entry, and whether it was there already. It gets a slot if one is free, a pinned one an idle one too."""
        self.registry.check(name, adapter, pinned, in_place)  # before others leave host memory for it
        has_room = adapter.revision in self.host or self._frees_room(name) or self._make_room()
        if not has_room and not adapter.path:
            raise RequestError(f"{len(self.host)} adapters are in use, as many as --max-loaded-loras lets host memory hold; unload one first", 400, "name")
        entry, known, old = self.registry.add(name, adapter, pinned, in_place)
        if old is not None:
            self._forget_if_over(old)
        self._keep(adapter, has_room)
        for target in adapter.targets & self._unused.keys():
            self._unused.pop(target).used = True
            self._ctx.lora_layout += 1  # graphs captured without this layer's adapters are captured again
        if self.slots.slot_of(entry.revision) is None and entry.revision in self.host and (self.slots.free or entry.pinned):
            self.slots.reserve(entry.revision)
            self.start_fills()
        for warning in adapter.warnings:
            logger.warning("adapter %s: %s", name, warning)
        logger.info("adapter %s: rank %d, %d bytes, revision %s%s", name, entry.rank, entry.nbytes, entry.revision[:12], " (known)" * known)
        return entry, known

    def unload(self, message: UnloadAdapter) -> None:
        """Unload a name, after a load of it that is on its way; answered when nobody uses it any more. RequestError for an unknown name."""
        pending = [load for load in self._loads if load.message.name == message.name]
        if pending:
            pending[-1].unloads.append(message)
        else:
            self._forget_if_over(self.registry.begin_unload(message.name, message.rid))

    def release(self, entry: AdapterEntry) -> None:
        """One user less."""
        entry.users -= 1
        self._forget_if_over(entry)

    def describe(self, entry: AdapterEntry) -> dict[str, Any]:
        facts = {name: getattr(entry, name) for name in ("name", "path", "revision", "rank", "nbytes", "pinned")}
        return facts | {"resident": self.slots.is_ready(entry.revision), "state": self._state(entry.revision), "running": entry.users}

    def adapters(self) -> list[dict[str, Any]]:
        return [self.describe(entry) for entry in self.registry.loaded.values()]

    # ---- between steps ----------------------------------------------------------------------------------------------
    def poll(self) -> tuple[bool, list[tuple[str, RequestError]]]:
        """Take in what has arrived: whether waiting requests should be looked at, and the revisions that cannot be read, with the reason."""
        changed, failed = False, []
        self._loader.empty_trash()
        while self._loads and self._loads[0].adapter.done():
            self._finish_load(self._loads.pop(0))
            changed = True
        if self._reading is not None and self._reading[1].done():
            (revision, future), self._reading = self._reading, None
            failed += self._finish_reading(revision, future)
            changed = True
        if self._reading is None and self.slots.wanted:
            failed += self._read_next()
        for slot in [slot for slot, fill in self._fills.items() if fill.done.done()]:
            self._finish_fill(slot)
            changed = True
        return changed, failed

    def start_fills(self) -> None:
        """Begin to copy the weights of revisions that got a slot."""
        for slot, revision in self.slots.take_writes():
            adapter, entry = self.host.use(revision), self.registry.entries(revision)[0]
            entry.fills += 1
            self._fills[slot] = _Fill(adapter, entry, self._loader.start(self.pool.region(slot), adapter.image))

    def take_replies(self) -> list[Reply]:
        replies, self.replies = self.replies, []
        return replies

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._loader.close()

    # ---- arrivals ---------------------------------------------------------------------------------------------------
    def _finish_load(self, load: _Load) -> None:
        """Register what was read, or say what is wrong with it; then unload it if that was asked for meanwhile."""
        message = load.message
        try:
            entry, known = self.register(message.name, _result(load.adapter, message.path), message.pinned, message.load_inplace)
            facts = {"already_loaded": known, "warnings": list(load.adapter.result().warnings)}
            if any(fill.adapter.revision == entry.revision for fill in self._fills.values()):
                self._answers.setdefault(entry.revision, []).append((load, entry, facts))
            else:
                self._answer(load, entry, facts)
        except RequestError as error:
            logger.warning("adapter %s: %s", message.name, error)
            self.replies.append(Reply.refusal(message.rid, error))
        for unload in load.unloads:  # before a later load of the name, which `unload` would wait for
            try:
                self._forget_if_over(self.registry.begin_unload(unload.name, unload.rid))
            except RequestError as error:
                self.replies.append(Reply.refusal(unload.rid, error))

    def _answer(self, load: _Load, entry: AdapterEntry, facts: dict[str, Any]) -> None:
        self.replies.append(Reply(load.message.rid, self.describe(entry) | facts | {"seconds": time.monotonic() - load.begin}))

    def _finish_fill(self, slot: int) -> None:
        fill = self._fills.pop(slot)
        fill.done.result()
        self.pool.bind(slot, fill.adapter.image.numel(), fill.adapter.stacks)
        self.slots.filled(slot)
        fill.entry.fills -= 1
        for answer in self._answers.pop(fill.adapter.revision, []):
            self._answer(*answer)
        self._forget_if_over(fill.entry)

    def _read_next(self) -> list[tuple[str, RequestError]]:
        """Read the adapter that requests have waited for longest, as soon as there is room for it; or say why there is none that would ever be free."""
        entries = [entry for revision in self.slots.wanted for entry in self.registry.entries(revision) if entry.users]
        self.slots.wanted = {entry.revision: None for entry in entries}
        if entries and self._make_room():
            revision = entries[0].revision
            self._reading = revision, self._thread.submit(self._read_again, revision, [entry.path for entry in self.registry.entries(revision)])
        elif entries and len({entry.revision for entry in self.registry.loaded.values() if not entry.path}) == self.host.limit:
            text = f"adapter {entries[0].name!r} cannot be read again: adapters from tensors fill host memory; unload one, or raise --max-loaded-loras"
            del self.slots.wanted[entries[0].revision]
            return [(entries[0].revision, RequestError(text, 503, "model", "adapter_unreadable"))]
        return []

    def _read_again(self, revision: str, paths: list[str]) -> PackedAdapter:
        """From the first of `paths` that still has the revision, or else what the last one has. Runs in the thread that reads."""
        for path in paths[:-1]:
            with contextlib.suppress(ValueError, OSError):
                adapter = self.reader.read(path)
                if adapter.revision == revision:
                    return adapter
        return self.reader.read(paths[-1])

    def _finish_reading(self, revision: str, future: Future[PackedAdapter]) -> list[tuple[str, RequestError]]:
        """Take in an adapter that was read again; the revision and the error for those who wait for it if that failed."""
        entries = self.registry.entries(revision)
        if not entries or revision in self.host:
            return []
        left = all(entry.leaving for entry in entries)
        try:
            adapter = _result(future, entries[-1].path)
            if adapter.revision != revision:
                text = f"its files in {adapter.path} have changed since it was loaded (revision {revision}, now {adapter.revision})"
                way_out = "it was replaced before this request could begin: send it again" if left else "load it again with load_inplace=true"
                raise RequestError(f"adapter {entries[-1].name!r}: {text}; {way_out}", 400)
        except RequestError as error:
            self.slots.wanted.pop(revision, None)
            return [(revision, RequestError(error.message, 503 if left else 500, "model", "adapter_unreadable"))]
        self._keep(adapter, self._make_room())
        return []

    # ---- host memory ------------------------------------------------------------------------------------------------
    def _keep(self, adapter: PackedAdapter, has_room: bool) -> None:
        if adapter.revision in self.host:
            return
        if has_room:
            self.host.add(adapter)
            self.slots.present(adapter.revision)
        else:
            self.slots.absent.add(adapter.revision)

    def _may_go(self, adapter: PackedAdapter) -> bool:
        """Whether an adapter may leave host memory: it can be read again, and nobody waits for it."""
        entries = self.registry.entries(adapter.revision)
        waiting = any(entry.users for entry in entries) and self.slots.slot_of(adapter.revision) is None
        return all(entry.path for entry in entries) and not waiting

    def _frees_room(self, name: str) -> bool:
        """Whether the adapter that `name` stands for leaves host memory as soon as another takes its place."""
        old = self.registry.loaded.get(name)
        return old is not None and not old.in_use and old.revision in self.host and self.registry.entries(old.revision) == [old]

    def _make_room(self) -> bool:
        """Whether host memory has room for one more adapter, after what may go for it has gone, pinned ones only if no other may."""
        going = self.host.make_room(self._may_go, lambda adapter: self._keeps_slot(adapter.revision))
        for adapter in going or ():
            self.slots.absent.add(adapter.revision)
            self._loader.discard(adapter.image)
        return going is not None

    def _keeps_slot(self, revision: str) -> bool:
        """Whether no other adapter may have its slot: it is pinned, or has left its name and host memory, and its files may be others by now."""
        return any(revision not in self.host if entry.leaving else entry.pinned for entry in self.registry.entries(revision))

    def _state(self, revision: str) -> str:
        """Where the weights are: "resident" in a slot, "loading" into one or from files, in "host" memory, or only on "disk"."""
        if self.slots.is_ready(revision):
            return "resident"
        return "loading" if self.slots.is_coming(revision) else "host" if revision in self.host else "disk"

    def _forget_if_over(self, entry: AdapterEntry) -> None:
        """End an entry that has left, once it is not in use; its weights go with the last name of its revision."""
        if not entry.leaving or entry.in_use:
            return
        host = device = 0
        if self.registry.forget(entry):
            adapter, slot = self.host.drop(entry.revision), self.slots.drop(entry.revision)
            if adapter is not None:
                host = adapter.nbytes
                self._loader.discard(adapter.image)
            if slot is not None:
                device = self.pool.region_bytes_used(slot)
                self.pool.clear(slot)
        logger.info("adapter %s: revision %s has gone, %d bytes freed on the host, %d on the device", entry.name, entry.revision[:12], host, device)
        data = {"name": entry.name, "revision": entry.revision, "freed_bytes": host + device, "freed_host_bytes": host, "freed_device_bytes": device}
        self.replies += [Reply(rid, data) for rid in entry.unload_rids]


def _result(future: Future[PackedAdapter], path: str) -> PackedAdapter:
    """The adapter that was read, or a RequestError: whatever is in a file, the server goes on."""
    try:
        return future.result()
    except (ValueError, OSError) as error:
        message = str(error) if path in str(error) else f"{path}: {error}"
        raise RequestError(f"adapter not loaded: {message}", 400, "path", "invalid_adapter") from error
    except Exception as error:
        logger.exception("reading the adapter %s failed unexpectedly", path)
        raise RequestError(f"adapter not loaded: {path}: {type(error).__name__}: {error}", 500, "path") from error
