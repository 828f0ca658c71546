"""The adapters' weights on the device: one flat pool, a fixed region per slot, and the tables that kernels address it by.

A region holds any adapter up to `max_rank` on every target, as `PackedAdapter` describes it. The tables of all stacks are single [stacks, S] tensors, so that a
slot is switched by a few copies: weights first (`slot_loader.py`), table column last. Nothing moves after construction; captured graphs stay valid.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sglang_lora_moe.lora.packed import PackedStack, PoolLayout
from sglang_lora_moe.lora.stacks import EmbeddingStacks, ExpertStacks, LinearStacks, Stack
from sglang_lora_moe.lora.targets import EmbeddingTarget, PairTarget, Target


class LoRAMemoryPool:
    """S slots for adapters on `targets`. Tables of slot s with rank 0 mean: no adapter there, or none on that target."""

    def __init__(self, targets: Sequence[Target], num_slots: int, max_rank: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.layout = PoolLayout(targets, max_rank, dtype)
        self.num_slots, self.dtype, self.device = num_slots, dtype, torch.device(device)
        self.pool = torch.zeros(num_slots * self.layout.slot_elements, dtype=dtype, device=device)
        self._used = [0] * num_slots  # elements

        def table(kind: torch.dtype) -> torch.Tensor:
            return torch.zeros(self.layout.num_stacks, num_slots, dtype=kind, device=device)

        self._offset, self._expert_stride = table(torch.int64), table(torch.int64)
        self._rank, self._split_a, self._scaling = table(torch.int32), table(torch.int32), table(torch.float32)
        self._stacks = {target.name: self._make_stacks(target) for target in targets}

    def region_bytes_used(self, slot: int) -> int:
        return self._used[slot] * self.dtype.itemsize

    def stacks_for(self, target_name: str) -> Any:
        """The tables of one target, by its kind `LinearStacks`, `EmbeddingStacks` or `ExpertStacks`; valid for the life of the pool."""
        return self._stacks[target_name]

    def region(self, slot: int) -> torch.Tensor:
        """The flat memory of a slot, into which an image is copied before `bind`."""
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        return self.pool[slot * self.layout.slot_elements : (slot + 1) * self.layout.slot_elements]

    def bind(self, slot: int, elements: int, stacks: Sequence[PackedStack]) -> None:
        """Lead the tables to an image of `elements` that lies in the slot's region, in stream order and without waiting; stacks without an entry get rank 0."""
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        pinned = self.device.type == "cuda"
        integers = torch.zeros(4, self.layout.num_stacks, dtype=torch.int64, pin_memory=pinned)
        scaling = torch.zeros(self.layout.num_stacks, dtype=torch.float32, pin_memory=pinned)
        if stacks:
            begin = slot * self.layout.slot_elements
            index = torch.tensor([stack.stack for stack in stacks])
            integers[:, index] = torch.tensor([[begin + s.offset, s.stride, s.rank, int(s.split_a)] for s in stacks]).t()
            scaling[index] = torch.tensor([stack.scaling for stack in stacks], dtype=torch.float32)
        on_device = integers.to(self.device, non_blocking=True)
        for table, column in zip((self._offset, self._expert_stride, self._rank, self._split_a), on_device, strict=True):
            table[:, slot] = column
        self._scaling[:, slot] = scaling.to(self.device, non_blocking=True)
        for of in self._stacks.values():
            for stack in vars(of).values():
                stack.host_cache.pop(slot, None)
        self._used[slot] = elements

    def clear(self, slot: int) -> None:
        """Empty a slot. Its weights stay until overwritten; no table leads to them."""
        self.bind(slot, 0, ())

    def _make_stacks(self, target: Target) -> LinearStacks | ExpertStacks:
        rows: Iterator[int] = iter(range(self.layout.first_row[target.name], self.layout.num_stacks))

        def stack(dim: int, may_split: bool = False) -> Stack:
            i = next(rows)
            tables = (self._offset[i], self._expert_stride[i], self._rank[i], self._scaling[i], self._split_a[i])
            return Stack(self.pool, *tables, dim=dim, max_rank=self.layout.max_rank, may_split=may_split)

        if isinstance(target, PairTarget):
            kind = EmbeddingStacks if isinstance(target, EmbeddingTarget) else LinearStacks
            return kind(stack(target.in_features), stack(target.out_features))
        return ExpertStacks(stack(target.hidden, target.gated), stack(target.w13_rows, target.gated), stack(target.intermediate), stack(target.hidden))
