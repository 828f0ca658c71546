"""Launch shapes of the expert GEMMs: a small measured table, and rules for every other shape.

`LayerTiles` says how one layer runs at one number of tokens. The table's rows were measured on an H200 with `python -m benchmarks.bench_moe_lora --sweep`,
whole layers, once without and once with four adapters of rank 16; the rules extend them by the mean rows of an expert. A second table says where the wgmma
kernel of Hopper takes over. Nothing is tuned at run time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops.marlin_moe import fuses_activation
from sglang_lora_moe.ops.moe_grouped_gemm import GemmTile
from sglang_lora_moe.ops.moe_pair_gemv import GemvTile
from sglang_lora_moe.ops.moe_wgmma_gemm import WgmmaTile

LOW_RANK = 16  # up to which adapters have tiles of their own where that measured faster
MAX_PAIR_TOKENS = 4  # more tokens than this meet in experts too often, and every meeting reads the expert once more
MEASURED_MEMORY = 163 * 1024  # bytes of shared memory in which all of these tiles fit
_SUMS = 64  # registers of a thread for them: with 128 mma.sync's kernels spill
_BESIDE_STAGES = 1024  # bytes of shared memory beside the stages but one that are there at once
_LORA_BLOCK = {16: 16, 32: 16, 64: 32, 128: 64}  # rows of a LoRA tile by those of a base tile


@dataclass(frozen=True)
class LayerTiles:
    """`by_pair`: the tiles are GemvTile and rows lie in pair order; else GemmTile and sorted rows. lora_block: rows of a LoRA tile."""

    gate_up: GemmTile | WgmmaTile | GemvTile
    down: GemmTile | WgmmaTile | GemvTile
    lora_block: int = 16

    @property
    def by_pair(self) -> bool:
        return isinstance(self.gate_up, GemvTile)


def choose_tiles(spec: MoESpec, tokens: int, itemsize: int, max_rank: int = 0, wgmma: bool = False) -> LayerTiles:
    """The launch shape of a layer at this many tokens (the padded number of a captured graph); itemsize of an activation in bytes.

    With `max_rank` the step has adapters up to that rank, whose deltas make other shapes best. A step without runs the shapes of a server without.
    `wgmma`: the GPU runs csrc/moe_wgmma_gemm.cu, which takes over where it measured faster.
    """
    if itemsize == 4:
        return _float32_tiles(tokens)
    shape, load = (spec.num_experts, spec.hidden_size, spec.intermediate_size), (max_rank > 0) + (max_rank > LOW_RANK)
    if wgmma and fuses_activation(spec):
        for least, most, tiles in _WGMMA.get(shape, ()):
            found = tiles[min(load, len(tiles) - 1)]
            if least <= tokens <= most and found is not None:
                return found
    for most, measured in _MEASURED.get(shape, ()) if spec.gated else ():
        if tokens <= most:
            return measured[min(load, len(measured) - 1)]
    return _by_rule(spec, tokens, max_rank > 0)


def _by_rule(spec: MoESpec, tokens: int, lora: bool) -> LayerTiles:
    wide, inter = spec.hidden_size, spec.intermediate_size
    if tokens <= MAX_PAIR_TOKENS and 2 * tokens * spec.top_k <= spec.num_experts:
        return LayerTiles(GemvTile(8, 512 if wide >= 512 else 256, 4, 3), GemvTile(16, 256, 4, 3) if inter <= 512 else GemvTile(8, 1024, 4, 3))
    rows = tokens * spec.top_k / spec.num_experts  # mean rows of an expert
    if rows <= 10:
        up = GemmTile(16, 64, 128, 4, 3, 0) if lora else GemmTile(16, 32, 128, 4, 4, 0)
        return LayerTiles(up, GemmTile(16, 128 if inter <= 1024 else 64, 64 if inter <= 512 else 128, 4, 3, 0))
    if rows <= 20:
        return LayerTiles(GemmTile(32, 64, 128, 4, 3, 0), GemmTile(32, 128, 64, 4, 3, 0))
    if rows <= 48:
        return LayerTiles(GemmTile(64, 128, 64, 8, 4, 0), GemmTile(64, 128, 64, 4, 3, 0), lora_block=32)
    group = 1 if spec.num_experts > 64 or rows <= 96 else 8  # few experts: their row tiles share w in L2 only if they walk together
    return LayerTiles(GemmTile(128, 128, 64, 8, 4, 1, group, tail=True), GemmTile(128, 128, 64, 4, 3, 2, group, tail=True), lora_block=64)


def fitting(tiles: LayerTiles, gated: bool, shared: int) -> LayerTiles:
    """`tiles` of 16-bit weights for GPUs with `shared` bytes a block: with as many stages as fit, and sums that leave registers for operands."""

    def fit(tile: Any, halves: int) -> Any:
        if isinstance(tile, WgmmaTile):
            return tile
        while isinstance(tile, GemmTile) and tile.m * halves * tile.n > _SUMS * 32 * tile.warps:
            tile = replace(tile, n=tile.n // 2)
        stage = 2 * ((tile.m if isinstance(tile, GemmTile) else 1) + halves * tile.n) * tile.k
        return replace(tile, stages=min(tile.stages, (shared - _BESIDE_STAGES) // stage + 1))

    return replace(tiles, gate_up=fit(tiles.gate_up, 1 + gated), down=fit(tiles.down, 1))


def choose_integer_tiles(spec: MoESpec, tokens: int, itemsize: int) -> LayerTiles:
    """The launch shape for weights of 4 or 8 bits: grouped at every size, with room in registers for dequantized weights."""
    if itemsize == 4:
        return LayerTiles(GemmTile(16, 32, 32, 4, 2, 4), GemmTile(16, 32, 32, 4, 2, 4))
    rows = tokens * spec.top_k / spec.num_experts  # mean rows of an expert
    m = 16 if rows <= 10 else 32 if rows <= 20 else 64 if rows <= 64 else 128
    warps = 8 if m == 128 else 4
    return LayerTiles(GemmTile(m, 64, 64, warps, 3, 0, tma=False), GemmTile(m, 64, 64, warps, 3, 0, tma=False), _LORA_BLOCK[m])


def _float32_tiles(tokens: int) -> LayerTiles:
    """float32 runs on the plain multipliers: small tiles that fit shared memory; for tests and small models."""
    if tokens <= MAX_PAIR_TOKENS:
        return LayerTiles(GemvTile(8, 256, 4, 2), GemvTile(8, 256, 4, 2))
    return LayerTiles(GemmTile(16, 32, 32, 4, 2, 4), GemmTile(16, 64, 32, 4, 2, 4))


def _pair(up: tuple[int, ...], down: tuple[int, ...]) -> LayerTiles:
    return LayerTiles(GemvTile(*up), GemvTile(*down))


def _grouped(m: int, up: tuple, down: tuple) -> LayerTiles:
    """up and down = (n, k, warps, stages, ctas[, group, tail]) of a GemmTile."""
    return LayerTiles(GemmTile(m, *up), GemmTile(m, *down), _LORA_BLOCK[m])


_MANY = 1 << 30
_LOW = _grouped(16, (32, 128, 4, 3, 0), (64, 128, 4, 3, 0))
_WIDER = _grouped(16, (64, 128, 4, 3, 0), (128, 128, 4, 3, 0))
# (E, H, I of this rank) -> rows (up to so many tokens, tiles without adapters, with ranks up to LOW_RANK, with more), measured at that many tokens.
# The last of a row's tiles stand also for those after them that are not there. Where wgmma takes all that is larger, rules have it on other GPUs.
_MEASURED: dict[tuple[int, int, int], list[tuple[int, list[LayerTiles]]]] = {
    (128, 2048, 768): [  # Qwen3-30B-A3B
        (1, [_pair((16, 512, 4, 3), (16, 1024, 8, 4)), _pair((8, 256, 4, 2), (8, 1024, 4, 3))]),
        (4, [_pair((16, 256, 4, 3), (16, 512, 4, 4)), _pair((8, 256, 4, 4), (16, 256, 4, 3))]),
        (16, [_LOW]),
        (191, [_WIDER, _WIDER, _LOW]),
    ],
    (8, 4096, 14336): [  # Mixtral-8x7B
        (1, [_pair((4, 512, 4, 3), (16, 1024, 8, 4)), _pair((8, 512, 4, 3), (8, 512, 4, 3))]),
        (4, [_grouped(16, (32, 256, 4, 3, 0), (64, 256, 4, 3, 0)), _LOW]),
        (32, [_grouped(16, (32, 256, 4, 3, 0), (64, 256, 4, 3, 0)), _grouped(16, (64, 128, 4, 3, 0), (64, 128, 4, 3, 0))]),
        (96, [_grouped(32, (64, 128, 4, 3, 0), (128, 128, 4, 3, 0))]),
        (384, [_grouped(128, (64, 64, 4, 3, 2, 1, True), (128, 64, 4, 3, 2, 1, True)), _grouped(128, (64, 64, 4, 3, 2, 1, True), (128, 64, 4, 3, 0))]),
        (_MANY, [_grouped(128, (128, 64, 8, 3, 1, 8), (128, 64, 4, 3, 0, 8)), _grouped(128, (128, 64, 8, 4, 1, 8), (256, 64, 8, 3, 1, 8))]),
    ],
    (256, 7168, 256): [  # DeepSeek-V3, one of 8 tensor-parallel ranks
        (1, [_pair((8, 512, 4, 3), (16, 256, 4, 3))]),
        (4, [_pair((16, 256, 4, 3), (16, 256, 4, 3)), _pair((8, 512, 4, 3), (16, 256, 4, 3))]),
        (32, [_grouped(16, (32, 128, 4, 4, 0), (128, 128, 4, 3, 0)), _grouped(16, (64, 128, 4, 3, 0), (128, 64, 4, 3, 0))]),
        (128, [_grouped(16, (32, 256, 4, 3, 0), (128, 64, 4, 3, 0)), _grouped(16, (32, 128, 4, 4, 0), (128, 64, 4, 3, 0))]),
        (384, [_grouped(16, (32, 128, 4, 3, 0), (128, 64, 4, 3, 0)), _grouped(16, (32, 256, 4, 3, 0), (128, 64, 4, 3, 0))]),
        (1536, [_grouped(64, (128, 64, 8, 4, 0), (128, 64, 4, 3, 0))]),
        (_MANY, [_grouped(128, (128, 64, 8, 4, 1), (128, 64, 4, 3, 2, 1, True))]),
    ],
    (32, 2880, 2880): [  # gpt-oss-20b
        (1, [_pair((16, 256, 4, 3), (8, 1024, 4, 3)), _pair((8, 256, 4, 4), (8, 1024, 4, 3))]),
        (4, [_pair((8, 256, 4, 4), (8, 1024, 4, 3)), _pair((8, 512, 4, 3), (16, 512, 4, 4))]),
        (32, [_grouped(16, (32, 256, 4, 3, 0), (64, 256, 4, 3, 0)), _LOW]),
        (96, [_grouped(16, (32, 256, 4, 3, 0), (64, 128, 4, 4, 0)), _WIDER]),
        (448, [_grouped(64, (64, 64, 4, 4, 0), (128, 64, 4, 3, 0)), _grouped(64, (256, 64, 8, 3, 0), (128, 64, 4, 3, 0))]),
    ],
}


def _wgmma(group: int, cluster: int, lora_block: int = 64, stream: bool = False, tokens: int = 144, rows: int = 0) -> LayerTiles:
    tile = WgmmaTile(group, cluster, stream, tokens, rows)
    return LayerTiles(tile, tile, lora_block)


_SHORT = _wgmma(1, 1, 16, True, 32)
_DOWN_BY_TRITON = LayerTiles(WgmmaTile(1, 1, True, rows=128), GemmTile(128, 128, 64, 4, 3, 2, 1, True), 64)
# (E, H, I of this rank) -> (from so many tokens, to so many, tiles as above), None = the table above, against which they were measured: at 192 to 768, 1,536,
# 2,048 and 8,192 (Qwen3), 96 to 512, 1,536, 2,048, 3,072, 3,584 (Mixtral), 256 to 768 (DeepSeek), 128 to 640 (gpt-oss), 1,024 and 4,096 tokens; with adapters
# of rank 16 (1 and 4), 32 and 64 (1, 4, 16).
_WGMMA: dict[tuple[int, int, int], list[tuple[int, int, Sequence[LayerTiles | None]]]] = {
    (128, 2048, 768): [
        (192, 415, [_SHORT]),
        (416, 831, [_wgmma(1, 1, 32, True, 72), _wgmma(1, 1, 32, True, 72), _wgmma(1, 1, 32, True)]),
        (832, 1536, [_wgmma(1, 1, 32, True), _wgmma(2, 1, 64, True), _wgmma(1, 1, 32, True)]),
        (1537, 3072, [_wgmma(2, 1)]),
        (3073, 6144, [_wgmma(4, 2)]),
        (6145, _MANY, [_wgmma(4, 1), _wgmma(4, 1, 128)]),
    ],
    (8, 4096, 14336): [
        (96, 191, [_wgmma(1, 1, 16, True, 72)]),
        (192, 223, [_DOWN_BY_TRITON, _wgmma(1, 1, 16, True, 72)]),
        (224, 319, [_DOWN_BY_TRITON, _wgmma(1, 1, stream=True)]),
        (320, 767, [_wgmma(1, 1)]),
        (768, 1088, [_wgmma(8, 2)]),
        # n tiles of an expert, which walk together; without adapters Triton's, 64 x 256 a warpgroup, take less power, which is the limit from n = 7 on
        *((544 * n - 543, 544 * n, [None if n > 6 else _wgmma(2, 2) if n > 3 else _wgmma(n, 1, rows=136), _wgmma(n, 1, rows=136)]) for n in range(3, 9)),
    ],
    (256, 7168, 256): [
        (288, 703, [_SHORT]),
        (704, 1279, [_wgmma(1, 1, 16, True, 72), _wgmma(2, 1, 16, True)]),
        (1280, 1536, [None, _wgmma(2, 1, 16, True)]),
        (1537, 3072, [None, _wgmma(2, 1)]),
        (3073, _MANY, [_wgmma(2, 1)]),
    ],
    (32, 2880, 2880): [
        (97, 175, [None, None, _SHORT]),
        (176, 256, [None, None, _wgmma(1, 1, 16, True, 72)]),
        (417, 448, [None, _wgmma(1, 1)]),
        (449, 1536, [_wgmma(1, 1)]),
        (1537, _MANY, [_wgmma(1, 2), _wgmma(4, 2, 128)]),
    ],
}
