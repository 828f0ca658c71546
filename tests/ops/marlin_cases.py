"""Cases of the Marlin GEMM and its repack, and how they reach the emulated kernels."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch

from sglang_lora_moe.lora.stacks import Stack
from sglang_lora_moe.moe.spec import MoESpec, apply_activation
from sglang_lora_moe.ops import marlin_moe as op
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.moe_lora_align import Alignment, moe_lora_align_block_size
from sglang_lora_moe.quantization.wna16 import WNA16Weight, dequantize, pack, unpack
from tests.moe_cases import generator, make_topk_ids
from tests.quantize import quantize


@dataclass(frozen=True)
class Adapters:
    """What a shrink leaves for the GEMM, as `LowRank` of ops/low_rank.py has it."""

    s: torch.Tensor  # [P, width] in sorted order
    pool: torch.Tensor
    records: torch.Tensor  # int64 [.., 5]
    ranges: torch.Tensor  # int32 [tiles, 2]
    max_rank: int

    def addend(self) -> SimpleNamespace:
        s, pool, records, ranges = (t.cuda() for t in (self.s[None], self.pool, self.records, self.ranges))
        return SimpleNamespace(s=s, b=SimpleNamespace(pool=pool, max_rank=self.max_rank), records=records, ranges=ranges, a=None, following=None)

    def products(self, case: Case) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(first row, B, s of the first half, s of the second) of each record, in float32."""
        for start, count, rank, split, place in self.records.tolist():
            low = self.s[start : start + count].float()
            b = self.pool[place * 8 :][: case.rows * rank].view(case.rows, rank).float()
            yield start, b, low[:, :rank], low[:, split * self.max_rank :][:, :rank]


@dataclass(frozen=True)
class SlotAdapters:
    """Adapters by slot; s is what a shrink leaves, or NaN where the GEMM computes it itself."""

    s: torch.Tensor  # [P, width]
    a: Stack
    b: Stack
    token_slots: torch.Tensor
    shrinks: bool  # the GEMM computes s

    def addend(self) -> LowRank:
        def on_gpu(stack: Stack) -> Stack:
            return replace(stack, **{f.name: getattr(stack, f.name).cuda() for f in fields(stack) if isinstance(getattr(stack, f.name), torch.Tensor)})

        records = None if self.shrinks else torch.empty(0, 5, dtype=torch.int64, device="cuda")
        return LowRank(self.s[None].cuda(), on_gpu(self.b), self.token_slots.cuda(), records, a=on_gpu(self.a))

    def products(self, case: Case) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        align, x = case.alignment(), case.inputs()[0].float()
        for expert, slot, start, count in align.lora_tiles[: int(align.counts[2])].tolist():
            rank, rows = int(self.a.rank[slot]), torch.arange(start, start + count)
            all_ranks = rank * (1 + int(self.a.split_a[slot]))
            at_a, at_b = (int(t.offset[slot] + expert * t.expert_stride[slot]) for t in (self.a, self.b))
            matrix = self.a.pool[at_a:][: all_ranks * case.k].view(all_ranks, case.k).float()
            rows = align.sorted_pairs[rows].long() // case.top_k if case.halves == 2 else rows
            low = (x[rows] @ matrix.T * self.b.scaling[slot]).to(case.dtype).float()
            yield start, self.b.pool[at_b:][: case.rows * rank].view(case.rows, rank).float(), low[:, :rank], low[:, all_ranks - rank :]


@dataclass(frozen=True)
class Case:
    """One GEMM. `halves` 2: a gate_up, gathering x by token; 1: a down, scattering by pair."""

    tokens: int
    top_k: int = 2
    experts: int = 4
    rows: int = 128
    k: int = 128
    bits: int = 4
    group: int = 32
    zeros: bool = False
    dtype: torch.dtype = torch.bfloat16
    halves: int = 1
    spec: MoESpec | None = None  # the fused activation
    bias: bool = False
    routing: str = "uniform"
    config: int = 1
    sms: int = 3
    order: int = 0
    ranks: tuple[int, ...] = ()  # of adapters in turn, some rows between them without
    by_slot: bool = False  # adapters by slot, one of each rank, in place of records
    x_is_identity: bool = False  # the output is the weights themselves
    sizes: float = 1.0  # of the weights

    def weight(self) -> WNA16Weight:
        g = generator(self.rows + self.bits)
        weights = torch.randn(self.experts, self.rows, self.k, generator=g) * (self.sizes * self.k**-0.5)
        return quantize(weights, self.bits, self.group, not self.zeros, self.dtype)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, topk_ids, bias."""
        g = generator(self.tokens * 7 + self.experts)
        ids = make_topk_ids(self.routing, self.tokens, self.top_k, self.experts, g, torch.int32)
        x = torch.randn(self.tokens if self.halves == 2 else ids.numel(), self.k, generator=g).to(self.dtype)
        if self.x_is_identity:
            x = torch.eye(x.shape[0], self.k, dtype=self.dtype)
        return x, ids, torch.randn(self.experts, self.rows, generator=g).to(self.dtype) if self.bias else None

    def alignment(self, on: str = "cpu") -> Alignment:
        slots = self.token_slots()
        number = 0 if slots is None else len(self.ranks)
        made = moe_lora_align_block_size(self.inputs()[1], slots, self.experts, number, op.SHAPES[self.config].block_tokens, 16)
        return Alignment(*(t.to(on) for t in (made.sorted_pairs, made.base_tiles, made.lora_tiles, made.counts)))

    def token_slots(self) -> torch.Tensor | None:
        return torch.randint(-1, len(self.ranks), (self.tokens,), generator=generator(self.tokens), dtype=torch.int32) if self.by_slot else None

    def _by_slot(self, slots: torch.Tensor) -> SlotAdapters:
        """One adapter a slot; every second has an A of its own for up, every third the same matrices for all experts."""
        g, most, split = generator(self.tokens), max(self.ranks), [i % 2 * (self.halves == 2) for i in range(len(self.ranks))]

        def stack(sizes: list[int], dim: int) -> Stack:
            strides = torch.tensor([0 if i % 3 == 2 else size for i, size in enumerate(sizes)])
            ends = torch.tensor(sizes).cumsum(0) * self.experts
            pool = (torch.randn(int(ends[-1]), generator=g) * self.k**-0.5).to(self.dtype)
            ranks, scaling = torch.tensor(self.ranks, dtype=torch.int32), torch.arange(1, len(sizes) + 1) / 2
            offset = ends - torch.tensor(sizes) * self.experts
            return Stack(pool, offset, strides, ranks, scaling, torch.tensor(split, dtype=torch.int32), dim, most, self.halves == 2)

        a = stack([rank * (1 + s) * self.k for rank, s in zip(self.ranks, split, strict=True)], self.k)
        s = torch.full((self.tokens * self.top_k, a.shrink_width), float("nan"), dtype=self.dtype)
        found = SlotAdapters(s, a, stack([rank * self.rows for rank in self.ranks], self.rows), slots, self.config == 1 and self.halves == 1)
        if not found.shrinks:
            for start, b, low, low_up in found.products(self):
                s[start : start + len(low), : b.shape[1]] = low.to(s.dtype)
                s[start : start + len(low), -most:][:, : b.shape[1]] = low_up.to(s.dtype)
        return found

    def adapters(self) -> Adapters | SlotAdapters | None:
        """Runs of 5 rows of one adapter in records of up to 3, cut where an expert ends; every second has an A of its own for up. The rest is NaN."""
        align, slots = self.alignment(), self.token_slots()
        if not self.ranks:
            return None
        if slots is not None:
            return self._by_slot(slots)
        g, ids, most = generator(self.tokens), self.inputs()[1].flatten(), max(self.ranks)
        ids = ids[align.sorted_pairs.long()]
        tiles = [t if i < int(align.counts[1]) else (0, 0, 0) for i, t in enumerate(align.base_tiles.tolist())]
        records, runs, place, row, valid = [], 0, 0, 1, int(align.counts[0])
        while row < valid:
            rows = next((i for i in range(1, 5) if row + i == valid or ids[row + i] != ids[row]), 5)
            rank = self.ranks[runs % len(self.ranks)]
            fields = rank, (runs % 2) * (self.halves == 2), place // 8
            records += [(row + i, min(3, rows - i), *fields) for i in range(0, rows, 3)]
            runs, row, place = runs + 1, row + rows + (runs + 1) % 2, place + -(-self.rows * rank // 8) * 8
        width = most * self.halves
        s, pool = torch.full((len(ids), width), float("nan")), torch.full((place + 8,), float("nan"))
        for start, count, rank, split, at in records:
            pool[at * 8 :][: self.rows * rank] = torch.randn(self.rows * rank, generator=g) * 0.1
            for half in range(1 + split):
                s[start : start + count, half * most :][:, :rank] = torch.randn(count, rank, generator=g)
        ranges = [(sum(r[0] + r[1] <= t[1] for r in records), sum(r[0] < t[1] + t[2] for r in records)) for t in tiles]
        table = torch.tensor(records, dtype=torch.int64).view(-1, 5)
        return Adapters(s.to(self.dtype), pool.to(self.dtype), table, torch.tensor(ranges, dtype=torch.int32).view(-1, 2), most)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 output and which of its rows are written."""
        x, ids, bias = self.inputs()
        weights, flat, align = dequantize(self.weight(), self.dtype).float(), ids.flatten().long(), self.alignment()
        order = align.sorted_pairs.long()
        rows = x.float()[order // self.top_k if self.halves == 2 else torch.arange(len(order))]
        sums, valid = torch.zeros(flat.numel(), self.rows), (flat >= 0) & (flat < self.experts)
        for expert in flat[valid].unique().tolist():
            mine = flat[order] == expert
            sums[mine] = rows[mine] @ weights[expert].T + (0 if bias is None else bias[expert].float())
        adapters = self.adapters()
        half = self.rows // self.halves
        for start, b, low, low_up in () if adapters is None else adapters.products(self):
            sums[start : start + len(low), :half] += low @ b[:half].T
            sums[start : start + len(low), half:] += low_up @ b[half:].T
        out, written = torch.zeros_like(sums), torch.zeros(flat.numel(), dtype=torch.bool)
        to = order if self.halves == 1 else torch.arange(len(order))
        out[to], written[to] = sums, valid[order]
        return (out if self.spec is None else apply_activation(out, replace(self.spec, intermediate_size=self.rows // 2))), written


def encode_repack(weight: WNA16Weight, halves: int) -> bytes:
    experts, rows, k = weight.packed.shape[0], weight.out_features, weight.in_features
    sizes = op.padded_units(rows, k, halves)
    head = [1, 0, 0, 0, experts, rows, k, weight.bits, *sizes, halves] + [0] * 26
    return struct.pack("37i", *head) + weight.packed.numpy().tobytes()


def encode_gemm(case: Case) -> bytes:
    weight, (x, ids, bias), align = case.weight(), case.inputs(), case.alignment()
    packed = op.marlin_moe_repack(weight, case.halves)
    active, *formula = op.activation_of(case.spec)
    columns = case.rows // 2 if active else case.rows
    tiles = align.base_tiles[: int(align.counts[1])]
    head = [0, case.order, case.config, case.sms, case.experts, case.rows, case.k, case.bits, *packed.packed.shape[1:3], case.halves]
    head += [packed.scales.shape[2], packed.group_size, case.zeros, case.bias, case.dtype == torch.bfloat16, len(tiles)]
    head += [ids.numel(), case.top_k, x.shape[0], ids.numel(), columns, active, case.halves == 2, case.halves == 1]
    adapters = case.adapters()
    low: tuple[torch.Tensor, ...] = ()
    if isinstance(adapters, Adapters):
        head += [adapters.s.shape[1], adapters.max_rank, adapters.pool.numel(), len(adapters.records), 0, 0, 0, 0]
        low = adapters.s, adapters.pool, adapters.records, adapters.ranges[: len(tiles)]
    elif adapters is None:
        head += [0] * 8
    else:
        a, b, lora_tiles = adapters.a, adapters.b, align.lora_tiles[: int(align.counts[2])]
        head += [a.shrink_width, a.max_rank, b.pool.numel(), 0, a.pool.numel() if adapters.shrinks else 0, a.num_slots, len(lora_tiles), case.tokens]
        low = adapters.s, b.pool, adapters.token_slots, b.rank, b.split_a, b.offset, b.expert_stride
        low += (*((a.pool,) if adapters.shrinks else ()), a.offset, a.expert_stride, b.scaling, lora_tiles)
    tensors = (x, packed.packed, packed.scales, packed.zeros, bias, tiles, align.sorted_pairs, *low)
    blobs = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t is not None and t.numel())
    return struct.pack("33i4f", *map(int, head), *formula) + blobs


def unpack_weight(weight: op.MarlinWeight) -> WNA16Weight:
    """Repacked weights back in the canonical form."""
    row_units, k_units = weight.packed.shape[1:3]
    stored = unpack(weight.packed, weight.bits)  # [E, row units, k units, 1024]
    units = torch.empty_like(stored)
    units[..., op.fragment_order(weight.bits).to(stored.device)] = stored
    by_row = units.unflatten(-1, (op.UNIT, op.UNIT)).transpose(2, 3).reshape(-1, row_units * op.UNIT, k_units * op.UNIT)
    order = op._row_order(weight.rows, row_units, weight.halves).to(stored.device)
    place = torch.empty(weight.rows, dtype=torch.int64, device=stored.device)
    place[order[order < weight.rows]] = (order < weight.rows).nonzero().squeeze(1)

    groups = -(-weight.k // (weight.group_size or weight.k))

    def rows_of(values: torch.Tensor) -> torch.Tensor:  # [E, row units, groups, 32] -> [E, rows, groups]
        return values.transpose(2, 3).flatten(1, 2)[:, place, :groups].contiguous()

    zeros = None if weight.zeros is None else rows_of(weight.zeros)
    return WNA16Weight(pack(by_row[:, place, : weight.k].contiguous(), weight.bits), rows_of(weight.scales), zeros, weight.bits, weight.group_size or weight.k)
