"""Launch shapes of the expert GEMMs: a small measured table, and rules for every other shape.

`LayerTiles` says how one layer runs at one number of tokens. The table's rows were measured on an H200
(benchmarks/RESULTS.md); the rules below it extend them by tokens per expert and by sizes. Nothing is tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops.moe_grouped_gemm import GemmTile
from sglang_lora_moe.ops.moe_pair_gemv import GemvTile

MAX_PAIR_TOKENS = 4  # up to here two tokens rarely meet in an expert, and a sort costs more than reading it twice


@dataclass(frozen=True)
class LayerTiles:
    """`by_pair`: the tiles are GemvTile and rows lie in pair order; else GemmTile and sorted rows. lora_block: rows of a LoRA tile."""

    gate_up: GemmTile | GemvTile
    down: GemmTile | GemvTile
    lora_block: int = 16

    @property
    def by_pair(self) -> bool:
        return isinstance(self.gate_up, GemvTile)

    @property
    def base_block(self) -> int:
        return self.gate_up.m if isinstance(self.gate_up, GemmTile) else 16


def choose_tiles(spec: MoESpec, tokens: int, itemsize: int, lora: bool = False) -> LayerTiles:
    """The launch shape of a layer at this many tokens (the padded number of a captured graph); itemsize of an activation in bytes.

    With `lora` the step has adapters, whose deltas make other shapes best. A step without runs the shapes of a server without.
    """
    if itemsize == 4:
        return _float32_tiles(tokens)
    if tokens == 1:
        return LayerTiles(GemvTile(8, 256, 4, 2), GemvTile(8, 1024, 4, 3)) if lora else LayerTiles(GemvTile(16, 512, 4, 3), GemvTile(16, 1024, 8, 4))
    if tokens <= MAX_PAIR_TOKENS:
        return LayerTiles(GemvTile(8, 256, 4, 4), GemvTile(16, 256, 4, 3)) if lora else LayerTiles(GemvTile(16, 256, 4, 3), GemvTile(16, 512, 4, 4))
    rows = tokens * spec.top_k / spec.num_experts  # mean rows of an expert
    if rows <= 8:
        up = GemmTile(16, 64, 128, 4, 4, 0) if lora else GemmTile(16, 64 if rows > 2 else 32, 128, 4, 3, 0)
        return LayerTiles(up, GemmTile(16, 128, 128, 4, 3, 0))
    if rows <= 20:
        return LayerTiles(GemmTile(32, 64, 128, 4, 3, 0), GemmTile(32, 128, 64, 4, 3, 0))
    if rows <= 96:
        return LayerTiles(GemmTile(128, 128, 64, 8, 4, 1, tail=True), GemmTile(128, 128, 64, 4, 3, 2, tail=True), lora_block=32)
    group = 1 if spec.num_experts > 64 else 8  # few experts: their row tiles share w in L2 only if they walk together
    return LayerTiles(GemmTile(128, 128, 64, 8, 3, 1, group, tail=True), GemmTile(128, 128, 64, 4, 3, 2, group), lora_block=64)


def _float32_tiles(tokens: int) -> LayerTiles:
    """float32 runs on the plain multipliers: small tiles that fit shared memory; for tests and small models."""
    if tokens <= MAX_PAIR_TOKENS:
        return LayerTiles(GemvTile(8, 256, 4, 2), GemvTile(8, 256, 4, 2))
    return LayerTiles(GemmTile(16, 32, 32, 4, 2, 4), GemmTile(16, 64, 32, 4, 2, 4))
