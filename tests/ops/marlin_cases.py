"""Cases of the Marlin GEMM and its repack, and how they reach the emulated kernels."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from sglang_lora_moe.moe.spec import MoESpec, apply_activation
from sglang_lora_moe.ops import marlin_moe as op
from sglang_lora_moe.ops.moe_lora_align import Alignment, moe_lora_align_block_size
from sglang_lora_moe.quantization.wna16 import WNA16Weight, dequantize, pack, unpack
from tests.moe_cases import generator, make_topk_ids
from tests.quantize import quantize


@dataclass(frozen=True)
class Adapters:
    """What a shrink leaves for the GEMM, as `LowRank` of ops/low_rank.py has it."""

    s: torch.Tensor  # [P, width] in sorted order, or pair order
    pool: torch.Tensor
    records: torch.Tensor  # int64 [.., 5]
    ranges: torch.Tensor  # int32 [tiles, 2], or [P, 2]
    max_rank: int

    def addend(self) -> SimpleNamespace:
        s, pool, records, ranges = (t.cuda() for t in (self.s[None], self.pool, self.records, self.ranges))
        return SimpleNamespace(s=s, b=SimpleNamespace(pool=pool, max_rank=self.max_rank), records=records, ranges=ranges)


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
    by_pair: bool = False
    order: int = 0
    ranks: tuple[int, ...] = ()  # of adapters in turn, some rows between them without
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

    def alignment(self) -> Alignment | None:
        return None if self.by_pair else moe_lora_align_block_size(self.inputs()[1], None, self.experts, 0, op.SHAPES[self.config].block_tokens, 16)

    def adapters(self) -> Adapters | None:
        """Runs of 5 rows of one adapter in records of up to 3, cut where an expert ends, or single pairs; every second has an A of its own for up."""
        align = self.alignment()
        if not self.ranks:
            return None
        g, ids, most = generator(self.tokens), self.inputs()[1].flatten(), max(self.ranks)
        if align is None:
            return self._adapters_by_pair(ids.tolist(), g)
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
        s, pool = torch.randn(len(ids), width, generator=g), torch.randn(place + 8, generator=g) * 0.1
        ranges = [(sum(r[0] + r[1] <= t[1] for r in records), sum(r[0] < t[1] + t[2] for r in records)) for t in tiles]
        table = torch.tensor(records, dtype=torch.int64).view(-1, 5)
        return Adapters(s.to(self.dtype), pool.to(self.dtype), table, torch.tensor(ranges, dtype=torch.int32).view(-1, 2), most)

    def _adapters_by_pair(self, ids: list[int], g: torch.Generator) -> Adapters:
        """A record for every pair; rank 0 for every third and where there is no expert."""
        records, place, most = [], 0, max(self.ranks)
        for pair, expert in enumerate(ids):
            rank = self.ranks[pair % len(self.ranks)] if pair % 3 and 0 <= expert < self.experts else 0
            records.append((pair, 1, rank, pair % 2 * (self.halves == 2), place // 8))
            place += -(-self.rows * rank // 8) * 8
        s, pool = torch.randn(len(ids), most * self.halves, generator=g), torch.randn(place + 8, generator=g) * 0.1
        ranges = torch.arange(len(ids), dtype=torch.int32)[:, None] + torch.tensor([0, 1], dtype=torch.int32)
        return Adapters(s.to(self.dtype), pool.to(self.dtype), torch.tensor(records, dtype=torch.int64), ranges, most)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 output and which of its rows are written."""
        x, ids, bias = self.inputs()
        weights, flat, align = dequantize(self.weight(), self.dtype).float(), ids.flatten().long(), self.alignment()
        order = torch.arange(flat.numel()) if align is None else align.sorted_pairs.long()
        rows = x.float()[order // self.top_k if self.halves == 2 else torch.arange(len(order))]
        sums, valid = torch.zeros(flat.numel(), self.rows), (flat >= 0) & (flat < self.experts)
        for expert in flat[valid].unique().tolist():
            mine = flat[order] == expert
            sums[mine] = rows[mine] @ weights[expert].T + (0 if bias is None else bias[expert].float())
        adapters = self.adapters()
        for start, count, rank, split, place in [] if adapters is None else adapters.records.tolist():
            assert adapters is not None
            b, low = adapters.pool[place * 8 :][: self.rows * rank].view(self.rows, rank).float(), adapters.s[start : start + count].float()
            half = self.rows // self.halves
            sums[start : start + count, :half] += low[:, :rank] @ b[:half].T
            if self.halves == 2:
                sums[start : start + count, half:] += low[:, split * adapters.max_rank :][:, :rank] @ b[half:].T
        out, written = torch.zeros_like(sums), torch.zeros(flat.numel(), dtype=torch.bool)
        to = order if self.halves == 1 else torch.arange(len(order))
        out[to], written[to] = sums, valid[order]
        return (out if self.spec is None else apply_activation(out, replace(self.spec, intermediate_size=self.rows // 2))), written


def encode_repack(weight: WNA16Weight, halves: int) -> bytes:
    experts, rows, k = weight.packed.shape[0], weight.out_features, weight.in_features
    sizes = op.padded_units(rows, k, halves)
    head = [1, 0, 0, 0, experts, rows, k, weight.bits, *sizes, halves] + [0] * 24
    return struct.pack("35i", *head) + weight.packed.numpy().tobytes()


def encode_gemm(case: Case) -> bytes:
    weight, (x, ids, bias), align = case.weight(), case.inputs(), case.alignment()
    packed = op.marlin_moe_repack(weight, case.halves)
    active, *formula = op.activation_of(case.spec)
    columns = case.rows // 2 if active else case.rows
    tiles = None if align is None else align.base_tiles[: int(align.counts[1])]
    sorted_pairs = torch.empty(0, dtype=torch.int32) if align is None else align.sorted_pairs
    head = [0, case.order, case.config, case.sms, case.experts, case.rows, case.k, case.bits, *packed.packed.shape[1:3], case.halves]
    head += [
        packed.scales.shape[2],
        packed.group_size,
        case.zeros,
        case.bias,
        case.dtype == torch.bfloat16,
        tiles is not None,
        0 if tiles is None else len(tiles),
    ]
    head += [ids.numel(), case.top_k, x.shape[0], ids.numel(), columns, active, case.halves == 2, case.halves == 1, sorted_pairs.numel()]
    adapters = case.adapters()
    head += [0, 0, 0, 0] if adapters is None else [adapters.s.shape[1], adapters.max_rank, adapters.pool.numel(), len(adapters.records)]
    low = () if adapters is None else (adapters.s, adapters.pool, adapters.records, adapters.ranges if tiles is None else adapters.ranges[: len(tiles)])
    tensors = (x, packed.packed, packed.scales, packed.zeros, bias, tiles, sorted_pairs, ids, *low)
    blobs = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t is not None and t.numel())
    return struct.pack("31i4f", *map(int, head), *formula) + blobs


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
