"""A linear with 16-bit weights of 65 tokens and more that adds what adapters add: B s is more columns of its product (csrc/middle_linear.cu).

s = A x comes from the kernel before it, as for the kernels around the library's GEMM (`ops/lora_linear.py`), which `shape_for` leaves the rest to.
"""

from functools import lru_cache

import torch

from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import define
from sglang_lora_moe.ops.lora_linear import LinearAddend

TOKENS = range(65, 385)  # for which it was measured: one wave of blocks has no place for many more
TILE = 128  # most tokens of a block
MOST_RANK, MOST_PARTS = 64, 4

define(
    "middle_linear(Tensor x, Tensor w, Tensor? bias, Tensor(a!) out, Tensor s, Tensor slots, Tensor pool, Tensor offset, Tensor rank, "
    "Tensor scaling, int[] starts, int part_stride, int max_rank, int tokens, int rows, int splits, bool overlap) -> ()"
)


def takes(tokens: int, width: int) -> bool:
    """Whether linears of so many tokens with s so wide may be this kernel's, which reads s as one sum."""
    return tokens in TOKENS and width <= MOST_RANK


def middle_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, low: LinearAddend, shape: tuple[int, int, int]) -> torch.Tensor:
    """x [M, K], w [N, K] -> [M, N], with scaling * B low.s; shape: tokens and rows of a block, blocks that share the columns of w."""
    if x.is_cuda:
        build.load()
    b, out = low.tables.b, x.new_empty(x.shape[0], w.shape[0])
    tables = (low.slots, b.pool, b.offset, b.rank, b.scaling, low.tables.starts_list, low.tables.stride, b.max_rank)
    torch.ops.sglang_lora_moe.middle_linear(x, w, bias, out, low.s, *tables, *shape, True)
    return out


def shape_for(x: torch.Tensor, w: torch.Tensor, low: LinearAddend) -> tuple[int, int, int] | None:
    """How to multiply x [M, K] and w [N, K], or None where the kernel cannot, or is no faster."""
    b, parts, (splits, tokens, _, width) = low.tables.b, low.tables.num_parts, low.s.shape
    fits = takes(tokens, width) and w.dtype == x.dtype == b.pool.dtype and x.dtype.itemsize == 2 and splits == 1 and width % 4 == 0 and parts <= MOST_PARTS
    if not fits or not launch.has_wgmma(x.device):
        return None
    return _shape_of(x.shape[0], w.shape[1], tuple(low.tables.starts_list), launch.multiprocessors(x.device))


@lru_cache(maxsize=256)
def _shape_of(tokens: int, columns: int, starts: tuple[int, ...], multiprocessors: int) -> tuple[int, int, int] | None:
    """One wave of blocks, each with rows of one part."""
    parts = [end - first for first, end in zip(starts[:-1], starts[1:], strict=True)]
    tiles = -(-tokens // TILE)
    if columns % 64 or any(rows % 8 for rows in parts):
        return None
    for splits, least in ((1, 48), (2, 32)):
        for rows in range(16, 129, 16):
            if sum(-(-part // rows) for part in parts) * tiles * splits <= multiprocessors:
                if rows >= least and columns >= 1024 * splits:
                    return -(-tokens // (8 * tiles)) * 8, rows, splits
                break
    return None
