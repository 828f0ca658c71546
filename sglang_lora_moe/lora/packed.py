"""An adapter as a slot of the device pool holds it: one flat buffer, and for each stack where in it the matrices lie.

Packing is done once, where the adapter is read; from then on an adapter is bytes that are copied whole. Every matrix lies
on a 16-byte boundary at its true rank, so an image is as long as the adapter needs and no longer than a slot.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sglang_lora_moe.lora.targets import EmbeddingTarget, ExpertTarget, PairTarget, Target
from sglang_lora_moe.lora.weights import AdapterWeights, ExpertLoRA, ModuleLoRA

ALIGN_BYTES = 16  # vector loads of kernels


@dataclass(frozen=True)
class PackedStack:
    """One matrix set of an adapter, for table row `stack`. `offset` and `stride` count elements from the image's begin; stride 0 = shared by all experts."""

    stack: int
    offset: int
    stride: int
    rank: int
    scaling: float
    split_a: bool


@dataclass(frozen=True)
class PackedAdapter:
    """A whole adapter, ready to be copied into a slot. `revision` identifies its content; `path` "" = it has no files to be read from again."""

    path: str
    revision: str
    rank: int
    image: torch.Tensor  # [n], of the pool's dtype, on the host or on the pool's device
    stacks: tuple[PackedStack, ...]
    targets: frozenset[str]
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.image.numel() * self.image.element_size()


class PoolLayout:
    """Where the matrices of adapters up to `max_rank` on `targets` go. Host only; it may be sent to another process."""

    def __init__(self, targets: Sequence[Target], max_rank: int, dtype: torch.dtype) -> None:
        self.targets = {target.name: target for target in targets}
        self.max_rank, self.dtype = max_rank, dtype
        self._align = ALIGN_BYTES // dtype.itemsize
        self.slot_elements = sum(self._capacity(target) for target in targets)
        self.slot_bytes = self.slot_elements * dtype.itemsize
        self.first_row: dict[str, int] = {}  # of a target's stacks in the tables
        self.num_stacks = 0
        for target in targets:
            self.first_row[target.name] = self.num_stacks
            self.num_stacks += 4 if isinstance(target, ExpertTarget) else 2

    def pack(self, adapter: AdapterWeights, allocate: Callable[[int], torch.Tensor] | None = None) -> PackedAdapter:
        """Lay a whole adapter out; ValueError if it is not one of this layout. `allocate` as in `pack_modules`."""
        image, stacks = self.pack_modules(adapter.modules, allocate)
        rank = max((stack.rank for stack in stacks), default=0)
        return PackedAdapter(adapter.path, adapter.revision, rank, image, stacks, frozenset(adapter.modules), tuple(adapter.warnings))

    def pack_modules(
        self, modules: Mapping[str, ModuleLoRA], allocate: Callable[[int], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[PackedStack, ...]]:
        """(image, stacks) of `modules` by target name. `allocate(elements)` makes the flat image, by default where the weights are."""
        sets = [one for name, module in modules.items() for one in self._sets(name, module)]
        places, cursor = [], 0
        for stack, matrices in sets:
            places.append(replace(stack, offset=cursor))
            cursor += matrices.shape[0] * self._padded(matrices[0].numel())
        if cursor > self.slot_elements:
            raise ValueError(f"adapter needs {cursor * self.dtype.itemsize} bytes, a slot holds {self.slot_bytes}: rank above {self.max_rank}")
        device = sets[0][1].device if sets else "cpu"
        image = allocate(cursor) if allocate is not None else torch.zeros(cursor, dtype=self.dtype, device=device)
        for (_, matrices), place in zip(sets, places, strict=True):
            count, rows, cols = matrices.shape
            image.as_strided((count, rows, cols), (self._padded(rows * cols), cols, 1), place.offset).copy_(matrices)
        return image, tuple(places)

    def _padded(self, elements: int) -> int:
        return -(-elements // self._align) * self._align

    def _capacity(self, target: Target) -> int:
        """Elements of the largest adapter on one target: rank max_rank, gate and up with an A each, nothing shared."""
        r = self.max_rank
        if isinstance(target, PairTarget):
            return self._padded(r * target.in_features) + self._padded(target.out_features * r)
        a13 = r * target.hidden * (2 if target.gated else 1)
        sizes = (a13, target.w13_rows * r, r * target.intermediate, target.hidden * r)
        return target.num_experts * sum(self._padded(size) for size in sizes)

    def _sets(self, name: str, module: ModuleLoRA) -> list[tuple[PackedStack, torch.Tensor]]:
        """The matrices [n, rows, cols] of each stack of one module, checked against the target; they have no offset yet."""
        target = self.targets.get(name)
        if target is None:
            raise ValueError(f"adapter has weights for {name}, which is not a target of this pool")
        first = self.first_row[name]
        if isinstance(target, ExpertTarget) and isinstance(module, ExpertLoRA):
            return self._expert_sets(first, target, module)
        if isinstance(target, ExpertTarget) or isinstance(module, ExpertLoRA):
            raise ValueError(f"{name} is a {type(target).__name__}, the adapter has a {type(module).__name__} for it")
        a, b, rank = module.a, module.b, module.a.shape[0]
        self._check(f"{name} A", a, (rank, target.in_features), rank)
        self._check(f"{name} B", b, (target.out_features, rank), rank)
        a = a.t() if isinstance(target, EmbeddingTarget) else a
        return [(PackedStack(first + i, 0, 0, rank, module.scaling, False), matrix.unsqueeze(0)) for i, matrix in enumerate((a, b))]

    def _expert_sets(self, first: int, target: ExpertTarget, module: ExpertLoRA) -> list[tuple[PackedStack, torch.Tensor]]:
        halves = (
            ("13", module.a13, module.b13, target.hidden, target.w13_rows, module.scaling13, module.split_a),
            ("2", module.a2, module.b2, target.intermediate, target.hidden, module.scaling2, False),
        )
        sets = []
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
                stride = 0 if count == 1 else self._padded(matrices[0].numel())
                sets.append((PackedStack(first + 2 * i + j, 0, stride, rank, scaling, split_a), matrices))
        return sets

    def _check(self, name: str, matrix: torch.Tensor, shape: tuple[int, ...], rank: int) -> None:
        if tuple(matrix.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(matrix.shape)}")
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"{name}: expected rank in 1..{self.max_rank}, got {rank}")
