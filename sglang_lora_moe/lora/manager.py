"""Adapters of one model: wraps its layers, loads and unloads adapters, and puts into slots what the next step needs.

Weights go from a file (`read`, which may run in another thread) through the host cache (the registry's entries) to a
slot of the device pool. Which revision has which slot is the `SlotTable`'s, with which the scheduler decides; `flush_writes`
copies the weights before the step that needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from sglang_lora_moe.layers.embedding import Embedding
from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.layers.topk import Router
from sglang_lora_moe.lora.dense import make_dense_delta
from sglang_lora_moe.lora.layers import EmbeddingWithLoRA, FusedMoEWithLoRA, LinearWithLoRA
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.registry import AdapterEntry, LoRARegistry
from sglang_lora_moe.lora.slots import SlotTable
from sglang_lora_moe.lora.stacks import EmbeddingStacks, ExpertStacks, LinearStacks
from sglang_lora_moe.lora.targets import collect_targets
from sglang_lora_moe.lora.weights import AdapterWeights

logger = logging.getLogger(__name__)


class Model(Protocol):
    """What the manager needs of `models.build.ServedModel`."""

    hf: Any
    ctx: StepContext
    dtype: torch.dtype
    device: torch.device


class LoRAManager:
    """`reader(path)` gives the weights of an adapter directory, or raises a ValueError that says what is wrong with it."""

    def __init__(
        self,
        model: Model,
        reader: Callable[[str], AdapterWeights],
        *,
        num_slots: int,
        max_rank: int,
        max_loaded: int | None = None,
        backend: str = "torch_native",
    ) -> None:
        self.read = reader
        self.slots = SlotTable(num_slots)
        self.registry = LoRARegistry(num_slots, max_loaded)
        self.pool = LoRAMemoryPool(list(collect_targets(model.hf).values()), num_slots, max_rank, model.dtype, model.device)
        self._ctx = model.ctx
        self._unused = wrap_layers(model.hf, self.pool, model.ctx, backend)
        for layer in self._unused.values():
            layer.used = False

    # ---- names ------------------------------------------------------------------------------------------------------
    def load(self, name: str, path: str, weights: AdapterWeights, pinned: bool) -> dict[str, Any]:
        """Register weights that were read. An adapter gets a slot at once if one is free, and a pinned one also an idle one."""
        entry, known = self.registry.add(name, path, weights, pinned)
        for target in weights.modules.keys() & self._unused.keys():
            self._unused.pop(target).used = True
            self._ctx.lora_layout += 1  # graphs captured without this layer's adapters are captured again
        self.slots.pinned = self.registry.pinned_revisions()
        if self.slots.slot_of(entry.revision) is None and (self.slots.has_free or entry.pinned):
            self.slots.make_resident(entry.revision)
            self.flush_writes()
        for warning in weights.report.warnings:
            logger.warning("adapter %s: %s", name, warning)
        logger.info("adapter %s: rank %d, %d bytes, revision %s%s", name, entry.weights.rank, entry.weights.nbytes, entry.revision[:12], " (known)" * known)
        return self.describe(entry) | {"already_loaded": known, "warnings": list(weights.report.warnings)}

    def bind(self, name: str) -> AdapterEntry:
        """The entry that a new request runs on; give it back with `release`."""
        entry = self.registry.get(name)
        entry.users += 1
        return entry

    def release(self, entry: AdapterEntry) -> list[tuple[str, dict[str, Any]]]:
        """One user less. Returns the answers (rid, data) of unloads that this completes."""
        entry.users -= 1
        return self._finish_unload(entry) if entry.unloading and not entry.users else []

    def unload(self, name: str, rid: str) -> list[tuple[str, dict[str, Any]]]:
        """Unload a name; the answer comes from here if nobody uses it, else from the last `release`."""
        entry = self.registry.begin_unload(name, rid)
        self.slots.pinned = self.registry.pinned_revisions()
        return self._finish_unload(entry) if not entry.users else []

    def describe(self, entry: AdapterEntry) -> dict[str, Any]:
        return {
            "name": entry.name,
            "path": entry.path,
            "revision": entry.revision,
            "rank": entry.weights.rank,
            "nbytes": entry.weights.nbytes,
            "pinned": entry.pinned,
            "resident": self.slots.slot_of(entry.revision) is not None,
            "running": entry.users,
        }

    def adapters(self) -> list[dict[str, Any]]:
        return [self.describe(entry) for entry in self.registry.loaded.values()]

    # ---- device -----------------------------------------------------------------------------------------------------
    def flush_writes(self) -> None:
        """Write the weights of revisions that got a slot since the last step."""
        for slot, revision in self.slots.take_writes():
            self.pool.write(slot, self.registry.weights_of(revision))

    def check(self) -> None:
        """Assert that slots, pool and registry agree."""
        self.slots.check()
        known = {entry.revision for entry in self.registry.entries()}
        for slot, revision in enumerate(self.slots.revision_of):
            used = self.pool.region_bytes_used(slot)
            assert revision is None or revision in known, f"slot {slot} holds {revision}, which is not loaded"
            assert revision is not None or used == 0, f"slot {slot} is free and holds {used} bytes"
        assert all(entry.users > 0 for entry in self.registry.unloading), "an unload without users has not ended"

    def _finish_unload(self, entry: AdapterEntry) -> list[tuple[str, dict[str, Any]]]:
        host = device = 0
        if self.registry.end_unload(entry):
            host = entry.weights.nbytes
            slot = self.slots.drop(entry.revision)
            if slot is not None:
                device = self.pool.region_bytes_used(slot)
                self.pool.clear(slot)
        logger.info("adapter %s: unloaded, %d bytes freed on the host, %d on the device", entry.name, host, device)
        data = {"name": entry.name, "revision": entry.revision, "freed_bytes": host + device, "freed_host_bytes": host, "freed_device_bytes": device}
        return [(rid, data) for rid in entry.unload_rids]


def wrap_layers(hf: nn.Module, pool: LoRAMemoryPool, ctx: StepContext, backend: str) -> dict[str, LinearWithLoRA | EmbeddingWithLoRA]:
    """Replace each layer of `hf` that adapters may touch by its wrapper over `pool`. `backend` computes linears and embeddings.

    Returns, by target, the layers that few adapters touch: routers, the embedding, the language-model head.
    """
    delta = make_dense_delta(backend, ctx)
    rare: dict[str, LinearWithLoRA | EmbeddingWithLoRA] = {}
    for path, module in list(hf.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, FusedMoE):
            setattr(hf.get_submodule(parent), leaf, FusedMoEWithLoRA(module, _stacks(pool, module.name, ExpertStacks), ctx))
        elif isinstance(module, Linear):
            linear = LinearWithLoRA(module, [_stacks(pool, name, LinearStacks) for name, _ in module.parts], ctx, delta)
            if module.slot_source == "logits" or isinstance(hf.get_submodule(parent), Router):
                rare |= {name: linear for name, _ in module.parts}
            setattr(hf.get_submodule(parent), leaf, linear)
        elif isinstance(module, Embedding):
            rare[module.name] = EmbeddingWithLoRA(module, _stacks(pool, module.name, EmbeddingStacks), ctx, delta)
            setattr(hf.get_submodule(parent), leaf, rare[module.name])
    return rare


def _stacks(pool: LoRAMemoryPool, name: str, kind: type[Any]) -> Any:
    stacks = pool.stacks_for(name)
    assert isinstance(stacks, kind), f"{name}: the pool has {type(stacks).__name__}, its layer needs {kind.__name__}"
    return stacks
