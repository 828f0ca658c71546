"""Cases of the Marlin GEMM and its repack, and how they reach the emulated kernels."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sglang_lora_moe.moe.activation import apply_activation
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import marlin_moe as op
from sglang_lora_moe.ops.moe_lora_align import Alignment, moe_lora_align_block_size
from sglang_lora_moe.quantization.wna16 import WNA16Weight, dequantize, quantize
from tests.moe_cases import generator, make_topk_ids


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

    def weight(self) -> WNA16Weight:
        g = generator(self.rows + self.bits)
        return quantize(torch.randn(self.experts, self.rows, self.k, generator=g) * self.k**-0.5, self.bits, self.group, not self.zeros, self.dtype)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, topk_ids, bias."""
        g = generator(self.tokens * 7 + self.experts)
        ids = make_topk_ids(self.routing, self.tokens, self.top_k, self.experts, g, torch.int32)
        x = torch.randn(self.tokens if self.halves == 2 else ids.numel(), self.k, generator=g).to(self.dtype)
        return x, ids, torch.randn(self.experts, self.rows, generator=g).to(self.dtype) if self.bias else None

    def alignment(self) -> Alignment | None:
        return None if self.by_pair else moe_lora_align_block_size(self.inputs()[1], None, self.experts, 0, op.SHAPES[self.config].block_tokens, 16)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 output and which of its rows are written."""
        x, ids, bias = self.inputs()
        weights, flat, align = dequantize(self.weight(), self.dtype).float(), ids.flatten(), self.alignment()
        order = torch.arange(flat.numel()) if align is None else align.sorted_pairs.long()
        out = torch.zeros(flat.numel(), self.rows)
        written = torch.zeros(flat.numel(), dtype=torch.bool)
        for place, pair in enumerate(order.tolist()):
            expert = int(flat[pair])
            if not 0 <= expert < self.experts:
                continue
            row = pair if self.halves == 1 else place
            out[row] = weights[expert] @ x[pair // self.top_k if self.halves == 2 else place].float() + (0 if bias is None else bias[expert].float())
            written[row] = True
        return (out if self.spec is None else apply_activation(out, replace(self.spec, intermediate_size=self.rows // 2))), written


def encode_repack(weight: WNA16Weight, halves: int) -> bytes:
    experts, rows, k = weight.packed.shape[0], weight.out_features, weight.in_features
    sizes = op.padded_units(rows, k, halves)
    head = [1, 0, 0, 0, experts, rows, k, weight.bits, *sizes, halves] + [0] * 20
    return struct.pack("31i", *head) + weight.packed.numpy().tobytes()


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
    tensors = (x, packed.packed, packed.scales, packed.zeros, bias, tiles, sorted_pairs, ids)
    blobs = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t is not None and t.numel())
    return struct.pack("27i4f", *map(int, head), *formula) + blobs


def emulate(driver: Path, blob: bytes) -> bytes:
    run = subprocess.run([driver], input=blob, capture_output=True)
    assert run.returncode == 0, f"exit {run.returncode}: {run.stderr.decode()[-4000:]}"
    return run.stdout
