"""Which launch shape a layer gets. That they compute the right thing is tests/moe/test_triton.py's and tests/ops/test_moe_wgmma_gemm.py's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import moe_tiles
from sglang_lora_moe.ops.moe_grouped_gemm import GemmTile
from sglang_lora_moe.ops.moe_pair_gemv import GemvTile
from sglang_lora_moe.ops.moe_tiles import LOW_RANK, MEASURED_MEMORY, LayerTiles, choose_tiles, fitting
from sglang_lora_moe.ops.moe_wgmma_gemm import WgmmaTile

SIZES = [1, 4, 5, 16, 64, 128, 192, 256, 352, 512, 768, 1024, 1536, 2048, 4096, 8192]
QWEN = MoESpec(128, 8, 2048, 768)


def layers(spec: MoESpec, max_rank: int) -> list[LayerTiles]:
    return [choose_tiles(spec, tokens, 2, max_rank, wgmma=True) for tokens in SIZES]


@pytest.mark.parametrize("shape", list(moe_tiles._WGMMA), ids=str)
def test_tables_are_in_order_and_name_what_is_compiled(shape: tuple[int, int, int]) -> None:
    rows = moe_tiles._WGMMA[shape]
    assert all(least <= most for least, most, _ in rows) and all(a[1] < b[0] for a, b in pairwise(rows))
    for _, _, tiles in rows:
        for layer in (layer for layer in tiles if layer is not None):
            tile = layer.gate_up
            assert isinstance(tile, WgmmaTile) and layer.lora_block % 16 == 0 and layer.lora_block <= 128
            mixed = layer is moe_tiles._DOWN_BY_TRITON and tile.m == 128  # both share one alignment
            assert layer.down == (GemmTile(128, 128, 64, 4, 3, 2, 1, True) if mixed else tile)
            assert (tile.tokens, tile.cluster) in [(144, 1), (144, 2), (72, 1), (32, 1)] and tile.rows <= tile.tokens * tile.cluster, tile


def test_a_row_of_a_table_holds_for_its_last_number_of_tokens_too() -> None:
    for shape, measured in moe_tiles._MEASURED.items():
        spec = MoESpec(shape[0], 2, *shape[1:])
        assert all(choose_tiles(spec, most, 2, 0) is tiles[0] for most, tiles in measured)
        for least, most, tiles in moe_tiles._WGMMA[shape]:
            assert tiles[0] is None or choose_tiles(spec, least, 2, 0, wgmma=True) is choose_tiles(spec, most, 2, 0, wgmma=True) is tiles[0]
    plain = MoESpec(24, 4, 512, 256)  # of no table: by pair while pairs are no more than half of the experts
    assert [isinstance(choose_tiles(plain, tokens, 2, 0).gate_up, GemvTile) for tokens in (3, 4)] == [True, False]


def test_ranks_choose_where_adapters_of_low_rank_have_tiles_of_their_own() -> None:
    low, high = layers(QWEN, LOW_RANK), layers(QWEN, LOW_RANK + 1)
    assert low != high and low == layers(QWEN, 1) and high == layers(QWEN, 256)
    plain = MoESpec(24, 4, 512, 256)  # of no table
    assert layers(plain, 1) == layers(plain, 256)


def test_only_hopper_runs_wgmma() -> None:
    found = [choose_tiles(QWEN, tokens, 2, rank).gate_up for tokens in SIZES for rank in (0, 16, 64)]
    assert not any(isinstance(tile, WgmmaTile) for tile in found)


@pytest.mark.parametrize("shape", [*moe_tiles._MEASURED, (64, 2048, 1408)], ids=str)
def test_gpus_of_less_shared_memory_have_fewer_stages(shape: tuple[int, int, int]) -> None:
    """What the stages take is what the compile gates find; where all fit, nothing changes."""
    spec = MoESpec(shape[0], 4, *shape[1:])
    for tokens in SIZES:
        for rank in (0, 16, 64):
            tiles = choose_tiles(spec, tokens, 2, rank)
            whole = fitting(tiles, True, MEASURED_MEMORY)
            assert (whole.gate_up.stages, whole.down.stages) == (tiles.gate_up.stages, tiles.down.stages)  # type: ignore[union-attr]
            small = fitting(tiles, True, 99 * 1024)
            for was, tile, halves in ((tiles.gate_up, small.gate_up, 2), (tiles.down, small.down, 1)):
                assert not isinstance(tile, WgmmaTile) and not isinstance(was, WgmmaTile) and 2 <= tile.stages <= was.stages
                assert tile.n in (was.n, was.n // 2) and replace(tile, stages=was.stages, n=was.n) == was
                assert isinstance(tile, GemvTile) or tile.n >= 16 and tile.m * halves * tile.n <= 64 * 32 * tile.warps
                assert 2 * (tile.stages - 1) * ((tile.m if isinstance(tile, GemmTile) else 1) + halves * tile.n) * tile.k <= 98 * 1024
