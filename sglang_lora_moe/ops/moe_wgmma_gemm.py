"""The expert GEMMs of many tokens on sm_90 (csrc/moe_wgmma_gemm.cu): what `moe_grouped_gemm` computes, with the same arguments.

    out[row] = f(a[row] @ w[e]^T + bias[e] + low-rank addend)      e = the expert of the row's tile, accumulated in float32

Weights are the tensor cores' left operand and tokens their columns, so that a tile of an expert's last few tokens computes no
more than those; f is a gated activation of the sigmoid family over (gate, up) halves of w, or nothing.
"""

from dataclasses import dataclass

import torch
import triton

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import define
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.marlin_moe import activation_of
from sglang_lora_moe.ops.moe_lora_align import Alignment

TILE_ROWS = 256  # of w on a multiprocessor
MANY_ROWS = 128  # of an expert on average, from which down's blocks add up the parts of s, where gate_up's fall behind: measured

define(
    "moe_wgmma_gemm(Tensor x, Tensor w, Tensor? bias, Tensor(b!) tiles, Tensor counts, Tensor sorted_pairs, Tensor? s, Tensor? pool, Tensor? records, "
    "Tensor? ranges, Tensor(a!) out, Tensor? next_pool, Tensor? next_records, "
    "Tensor(c!)? next_parts, Tensor(d!)? next_s, int top_k, int halves, int max_rank, float alpha, float cubic, float limit, float shift, bool gather, "
    "bool scatter, int group, int blocks, int tokens, int cluster, bool stream, int report, int behind, bool queued, bool overlap) -> ()"
)


@dataclass(frozen=True)
class WgmmaTile:
    """Launch shape: `group` tiles of tokens walk the columns together, so that they share w in L2. cluster 2: pairs of blocks
    share a tile of twice the tokens and fetch w once. stream: w leaves L2 first, for experts of one tile. tokens: of a block's
    tile, 144, or without clusters 32, which leave room for more of w on its way, or 72, of which two blocks, with half as many rows
    of w, share a multiprocessor. rows: of a tile, if fewer than its tokens: 136 where a group of tiles is then an expert's."""

    group: int = 4
    cluster: int = 1
    stream: bool = False
    tokens: int = 144
    rows: int = 0

    @property
    def m(self) -> int:
        return self.rows or self.tokens * self.cluster

    @property
    def together(self) -> int:  # blocks on a multiprocessor
        return 2 if self.tokens == 72 else 1

    def reports(self, columns: int) -> int:
        """How often blocks report each tile of a gated product of so many columns."""
        return self.blocks(columns) * self.cluster

    def blocks(self, columns: int) -> int:
        """Tiles side by side of a gated product of so many columns."""
        return triton.cdiv(columns, TILE_ROWS // 2 // self.together)


def wgmma_gemm(
    a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, alignment: Alignment, out: torch.Tensor, tile: WgmmaTile, *,
    top_k: int, gather: bool, scatter: bool, activation: MoESpec | None = None, addend: LowRank | None = None, report: bool = False, behind: int = 0,
) -> torch.Tensor:  # fmt: skip  # budget: the tensors of one grouped product, its row orders and its addend
    """One expert GEMM into `out` [P, N], which it returns; rows of pairs without an expert stay as they are.

    a [M, K] with `gather`, else [P, K] in sorted order; w [E, N or 2N, K]; bias [E, N or 2N]. `activation` = the layer's spec
    where the epilogue activates (gate_up), None for a plain product. The alignment's base_block must be `tile.m`. Without `gather`
    and addend the first weights are asked for while the kernel before this one still runs: the alignment must be older than that.

    `report`: count beside the rows of each base tile, in its upper 16 bits, what is stored of it; `behind`: the product before this
    one reports so often and made `a`, so that a tile's rows are read when they are there, and blocks take their tiles from a queue. With an addend that
    has a `following`, s of the second product is made too, and reported as one more; who adds it up takes fewer tiles of a queue, or is that product, `late`.
    """
    halves = 1 if activation is None else 2
    columns = triton.cdiv(out.shape[1], TILE_ROWS // tile.together // halves)
    blocks = max(1, min(alignment.base_tiles.shape[0] * columns, launch.multiprocessors(a.device) * tile.together // tile.cluster)) * tile.cluster
    if a.is_cuda:
        if not launch.has_wgmma(a.device):
            raise ValueError(f"moe_wgmma_gemm: runs on compute capability 9.0 alone, got {a.device}")
        build.load()
    following = None if addend is None else addend.following
    uneven = behind > 0 or (following is not None and columns > 2)  # between two parts of s there is little to add up
    queued = uneven and tile.cluster == 1 and len(alignment.base_tiles) > 1 and len(alignment.base_tiles) * columns + 3 * blocks < 1 << 16  # what 16 bits count
    late = alignment.sorted_pairs.numel() >= MANY_ROWS * w.shape[0]
    of = following if late or not behind else None
    then = (None,) * 4 if of is None else (None if behind else of.a.pool, of.low.records, of.parts, of.low.s if late == (behind > 0) else None)
    low = (None,) * 4 if addend is None else (addend.s, addend.b.pool, addend.records, addend.ranges)
    torch.ops.sglang_lora_moe.moe_wgmma_gemm(
        a, w, bias, alignment.base_tiles, alignment.counts, alignment.sorted_pairs, *low, out, *then, top_k, halves, 0 if addend is None else addend.b.max_rank,
        *activation_of(activation)[1:], gather, scatter, tile.group, blocks, tile.tokens, tile.cluster, tile.stream,
        tile.reports(out.shape[1]) if report else 0, behind, queued, True,
    )  # fmt: skip
    return out
