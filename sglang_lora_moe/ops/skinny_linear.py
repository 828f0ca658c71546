"""A linear with 16-bit weights, together with the adapters' part of its output, which the kernels before it began.

    y[t] = x[t] W^T + bias + scaling * B(slot(t), part) s[t, part]      for the rows of every part; accumulated in float32

On Hopper one kernel does all of it (csrc/skinny_linear.cu) for few tokens, if one wave of its blocks holds the whole weight in shared
memory: `shape_for` is the rule. Otherwise the library's GEMM multiplies, and the kernel that reads y next adds the adapters' part.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import LIBRARY
from sglang_lora_moe.ops.lora_linear import LinearAddend

MOST_TOKENS = 32  # at 64 the GEMM of the library is as fast, and adding adapters behind it faster
DTYPES = (torch.bfloat16, torch.float16)
SPLITS = 2  # blocks that share the columns of w: clusters of two fill all multiprocessors, larger ones leave some idle
MOST_BYTES = 160 << 10  # of weights in a block, which leaves room for tokens and adapters
MOST_SIXTEENS = 256  # of adapters' columns in a step

LIBRARY.define(
    "skinny_linear(Tensor x, Tensor w, Tensor? bias, Tensor? s, Tensor? row_scale, Tensor? slots, Tensor? ordered, Tensor? pool, Tensor? offset, Tensor? rank, "
    "Tensor? scaling, Tensor? starts, Tensor(a!) out, int part_stride, int max_rank, int rows, int splits, int group, bool overlap) -> ()"
)


@lru_cache(maxsize=64)
def shape_of(rows: int, columns: int, multiprocessors: int) -> tuple[int, int, int] | None:
    """(rows of w in a block, blocks that share its columns, chunks of 64 columns in a copy) with which one wave of blocks holds w
    [rows, columns] of 2 bytes; None where none does."""
    height = -(-rows // (multiprocessors // SPLITS * 8)) * 8
    chunks = -(-columns // (64 * SPLITS))
    if rows % 8 or columns % 64 or chunks < 2 or height > 144 or height * chunks * 128 > MOST_BYTES:
        return None
    return height, SPLITS, max(2, -(-chunks // 4))


def skinny_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, addend: LinearAddend | None, shape: tuple[int, int, int]) -> torch.Tensor:
    """x [M, K], w [N, K] -> [M, N] by the kernel, in the given shape."""
    if x.is_cuda:
        build.load()
    low: tuple = (None,) * 9
    stride = max_rank = 0
    if addend is not None:
        b, ordered = addend.tables.b, addend.slots if addend.ordered_slots is None else addend.ordered_slots
        low = (addend.s, addend.row_scale, addend.slots, ordered, b.pool, b.offset, b.rank, b.scaling, addend.tables.starts)
        stride, max_rank = addend.tables.stride, b.max_rank
    out = x.new_empty(x.shape[0], w.shape[0])
    torch.ops.sglang_lora_moe.skinny_linear(x, w, bias, *low, out, stride, max_rank, *shape, True)
    return out


def shape_for(x: torch.Tensor, w: torch.Tensor, addend: LinearAddend | None) -> tuple[int, int, int] | None:
    """How to multiply x [M, K] and w [N, K], or None where the kernel cannot, or is no faster: the rule in one place."""
    if not launch.has_wgmma(x.device) or not 0 < x.shape[0] <= MOST_TOKENS or x.dtype not in DTYPES or w.dtype != x.dtype:
        return None
    if addend is not None:
        b = addend.tables.b
        if b.pool.dtype != x.dtype or min(x.shape[0], b.num_slots) * addend.tables.num_parts * -(-b.max_rank // 16) > MOST_SIXTEENS:
            return None
    return shape_of(*w.shape, launch.multiprocessors(x.device))


def _nothing(*args: object) -> None:
    """Only writes into the caller's buffers: nothing to infer."""


torch.library.register_fake("sglang_lora_moe::skinny_linear", _nothing, lib=LIBRARY)
