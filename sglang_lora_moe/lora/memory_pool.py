"""The adapters' weights on the device: one flat pool, a fixed region per slot, and the tables that kernels address it by.

A region holds any adapter up to `max_rank` on every target; inside it an adapter lies packed at its true ranks, every
matrix on a 16-byte boundary. The tables of all stacks are single [stacks, S] tensors, so that a slot is switched by a few
copies, in stream order: weights first, table column last. Nothing moves after construction; captured graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sglang_lora_moe.lora.stacks import EmbeddingStacks, ExpertStacks, LinearStacks, Stack
from sglang_lora_moe.lora.staging import StagedWriter
from sglang_lora_moe.lora.targets import EmbeddingTarget, ExpertTarget, LinearTarget, Target
from sglang_lora_moe.lora.weights import AdapterWeights, ExpertLoRA, ModuleLoRA

ALIGN_BYTES = 16  # vector loads of kernels


@dataclass(frozen=True)
class _Entry:
    """One matrix set of an adapter on its way into the pool, for stack row `stack`."""

    stack: int
    matrices: torch.Tensor  # [experts or 1, rows, cols], as it shall lie
    rank: int
    scaling: float
    split_a: bool
    shared: bool  # one matrix for all experts


class LoRAMemoryPool:
    """S slots for adapters on `targets`. Tables of slot s with rank 0 mean: no adapter there, or none on that target."""

    def __init__(self, targets: Sequence[Target], num_slots: int, max_rank: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.targets = {target.name: target for target in targets}
        self.num_slots, self.max_rank, self.dtype, self.device = num_slots, max_rank, dtype, torch.device(device)
        self._align = ALIGN_BYTES // dtype.itemsize
        self._region = sum(self._capacity(target) for target in targets)  # elements of one slot
        self.pool = torch.zeros(num_slots * self._region, dtype=dtype, device=device)
        self._used = [0] * num_slots  # elements
        self._first_row: dict[str, int] = {}
        rows = 0
        for target in targets:
            self._first_row[target.name] = rows
            rows += 4 if isinstance(target, ExpertTarget) else 2
        self._num_stacks = rows

        def table(kind: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, num_slots, dtype=kind, device=device)

        self._offset, self._expert_stride = table(torch.int64), table(torch.int64)
        self._rank, self._split_a, self._scaling = table(torch.int32), table(torch.int32), table(torch.float32)
        self._stacks = {target.name: self._make_stacks(target) for target in targets}
        self._writer = StagedWriter(self.pool)

    # ---- sizes ------------------------------------------------------------------------------------------------------
    @property
    def bytes_per_slot(self) -> int:
        return self._region * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, tables included."""
        tables = (self._offset, self._expert_stride, self._rank, self._split_a, self._scaling)
        return self.num_slots * self.bytes_per_slot + sum(t.numel() * t.element_size() for t in tables)

    def region_bytes_used(self, slot: int) -> int:
        return self._used[slot] * self.dtype.itemsize

    @staticmethod
    def bytes_needed(targets: Sequence[Target], num_slots: int, max_rank: int, dtype: torch.dtype) -> int:
        """Bytes of a pool before it is made."""
        return LoRAMemoryPool(targets, num_slots, max_rank, dtype, "meta").nbytes

    # ---- use --------------------------------------------------------------------------------------------------------
    def stacks_for(self, target_name: str) -> LinearStacks | EmbeddingStacks | ExpertStacks:
        """The tables of one target, valid for the life of the pool."""
        return self._stacks[target_name]

    def write(self, slot: int, adapter: AdapterWeights) -> int:
        """Put an adapter into a slot, over whatever was there; returns the bytes written. On error the pool is unchanged."""
        self._check_slot(slot)
        entries = [entry for name, module in adapter.modules.items() for entry in self._entries(name, module)]
        offsets, strides, cursor = [], [], slot * self._region
        for entry in entries:
            count, elements = entry.matrices.shape[0], entry.matrices[0].numel()
            stride = self._padded(elements)
            offsets.append(cursor)
            strides.append(0 if entry.shared else stride)
            cursor += count * stride
        used = cursor - slot * self._region
        if used > self._region:
            raise ValueError(f"adapter needs {used * self.dtype.itemsize} bytes, a slot holds {self.bytes_per_slot}: rank above {self.max_rank}")
        for entry, offset in zip(entries, offsets, strict=True):
            self._writer.add(offset, self._padded(entry.matrices[0].numel()), entry.matrices)
        self._writer.flush()
        self._write_column(slot, entries, offsets, strides)
        self._used[slot] = used
        return used * self.dtype.itemsize

    def clear(self, slot: int) -> None:
        """Empty a slot. Its weights stay until overwritten; no table leads to them."""
        self._check_slot(slot)
        self._write_column(slot, [], [], [])
        self._used[slot] = 0

    # ---- inside -----------------------------------------------------------------------------------------------------
    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"expected a slot in 0..{self.num_slots - 1}, got {slot}")

    def _padded(self, elements: int) -> int:
        return -(-elements // self._align) * self._align

    def _capacity(self, target: Target) -> int:
        """Elements of the largest adapter on one target: rank max_rank, gate and up with an A each, nothing shared."""
        r = self.max_rank
        if isinstance(target, LinearTarget):
            return self._padded(r * target.in_features) + self._padded(target.out_features * r)
        if isinstance(target, EmbeddingTarget):
            return self._padded(target.vocab * r) + self._padded(target.hidden * r)
        a13 = r * target.hidden * (2 if target.gated else 1)
        sizes = (a13, target.w13_rows * r, r * target.intermediate, target.hidden * r)
        return target.num_experts * sum(self._padded(size) for size in sizes)

    def _make_stacks(self, target: Target) -> LinearStacks | EmbeddingStacks | ExpertStacks:
        rows: Iterator[int] = iter(range(self._first_row[target.name], self._num_stacks))

        def stack(dim: int, may_split: bool = False) -> Stack:
            i = next(rows)
            tables = (self._offset[i], self._expert_stride[i], self._rank[i], self._scaling[i], self._split_a[i])
            return Stack(self.pool, *tables, dim=dim, max_rank=self.max_rank, may_split=may_split)

        if isinstance(target, LinearTarget):
            return LinearStacks(stack(target.in_features), stack(target.out_features))
        if isinstance(target, EmbeddingTarget):
            return EmbeddingStacks(stack(target.vocab), stack(target.hidden))
        return ExpertStacks(stack(target.hidden, target.gated), stack(target.w13_rows, target.gated), stack(target.intermediate), stack(target.hidden))

    def _entries(self, name: str, module: ModuleLoRA) -> list[_Entry]:
        """The matrix sets of one module, checked against the target."""
        target = self.targets.get(name)
        if target is None:
            raise ValueError(f"adapter has weights for {name}, which is not a target of this pool")
        first = self._first_row[name]
        if isinstance(target, ExpertTarget) and isinstance(module, ExpertLoRA):
            return self._expert_entries(first, target, module)
        if isinstance(target, ExpertTarget) or isinstance(module, ExpertLoRA):
            raise ValueError(f"{name} is a {type(target).__name__}, the adapter has a {type(module).__name__} for it")
        inputs, outputs = (target.in_features, target.out_features) if isinstance(target, LinearTarget) else (target.vocab, target.hidden)
        a, b, rank = module.a, module.b, module.a.shape[0]
        self._check(f"{name} A", a, (rank, inputs), rank)
        self._check(f"{name} B", b, (outputs, rank), rank)
        a = a.t() if isinstance(target, EmbeddingTarget) else a
        return [_Entry(first + i, matrix.unsqueeze(0), rank, module.scaling, False, True) for i, matrix in enumerate((a, b))]

    def _expert_entries(self, first: int, target: ExpertTarget, module: ExpertLoRA) -> list[_Entry]:
        halves = (
            ("13", module.a13, module.b13, target.hidden, target.w13_rows, module.scaling13, module.split_a),
            ("2", module.a2, module.b2, target.intermediate, target.hidden, module.scaling2, False),
        )
        entries = []
        for i, (half, a, b, inputs, outputs, scaling, split_a) in enumerate(halves):
            if a is None and b is None:
                continue
            if a is None or b is None:
                raise ValueError(f"{target.name}: adapter has A{half} or B{half} without the other")
            rank = b.shape[-1]
            shapes = (("A", a, (rank * (2 if split_a else 1), inputs)), ("B", b, (outputs, rank)))
            for j, (side, matrices, shape) in enumerate(shapes):
                count = 1 if matrices.shape[0] == 1 else target.num_experts
                self._check(f"{target.name} {side}{half}", matrices, (count, *shape), rank)
                entries.append(_Entry(first + 2 * i + j, matrices, rank, scaling, split_a, count == 1))
        return entries

    def _check(self, name: str, matrix: torch.Tensor, shape: tuple[int, ...], rank: int) -> None:
        if tuple(matrix.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(matrix.shape)}")
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"{name}: expected rank in 1..{self.max_rank}, got {rank}")

    def _write_column(self, slot: int, entries: list[_Entry], offsets: list[int], strides: list[int]) -> None:
        """Set slot `slot` in the tables of all stacks; stacks without an entry get rank 0."""
        integers = torch.zeros(4, self._num_stacks, dtype=torch.int64)
        scaling = torch.zeros(self._num_stacks, dtype=torch.float32)
        if entries:
            index = torch.tensor([entry.stack for entry in entries])
            values = [offsets, strides, [entry.rank for entry in entries], [int(entry.split_a) for entry in entries]]
            integers[:, index] = torch.tensor(values)
            scaling[index] = torch.tensor([entry.scaling for entry in entries], dtype=torch.float32)
        on_device = integers.to(self.device)
        for table, column in zip((self._offset, self._expert_stride, self._rank, self._split_a), on_device, strict=True):
            table[:, slot] = column
        self._scaling[:, slot] = scaling.to(self.device)
        for stacks in self._stacks.values():
            for stack in vars(stacks).values():
                stack.host_cache.pop(slot, None)
