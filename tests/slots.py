"""Slots of a memory pool written at once, as an engine's `SlotLoader` and manager do between steps."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.weights import ModuleLoRA


def write_slot(pool: LoRAMemoryPool, slot: int, modules: Mapping[str, ModuleLoRA]) -> int:
    """Put modules by target name into a slot, over whatever was there; the bytes written. On error the pool is unchanged."""
    image, stacks = pool.layout.pack_modules(modules)
    pool.region(slot)[: image.numel()].copy_(image)
    pool.bind(slot, image.numel(), stacks)
    return pool.region_bytes_used(slot)
