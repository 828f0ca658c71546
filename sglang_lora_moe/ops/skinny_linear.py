"""A linear with 16-bit weights, together with the adapters' part of its output.

    y[t] = x[t] W^T + bias + scaling * B(slot(t), part) (A(slot(t), part) x[t])      for the rows of every part; accumulated in float32

On Hopper one kernel does all of it (csrc/skinny_linear.cu) for few tokens, if one wave of its blocks holds the whole weight in shared
memory: `shape_for` is the rule. Otherwise the library's GEMM multiplies, and the kernels around it do the work of the adapters.
"""

from functools import lru_cache

import torch

from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import define
from sglang_lora_moe.ops.lora_linear import LinearAddend, PartTables

MOST_TOKENS = 64
DTYPES = (torch.bfloat16, torch.float16)
SPLITS = 2  # blocks that share the columns of w: clusters of two fill all multiprocessors, larger ones leave some idle
MOST_BYTES = 160 << 10  # of weights in a block, which leaves room for tokens and adapters
MOST_SHARED, LISTS = 227 << 10, 12 << 10  # what a block may have, and what barriers and the lists of adapters take of it at most
MOST_SIXTEENS = 256  # of adapters' columns in a step
MOST_PARTS = 4  # of a linear with adapters
MOST_GIVEN, GIVEN_HEIGHT = 256, 96  # of an s that the kernel before makes: tokens times ranks (24 and 32 of rank 16 were slower so); rows of w in a block

define(
    "skinny_linear(Tensor x, Tensor w, Tensor? bias, Tensor(a!) out, Tensor(b!)? s, Tensor? slots, Tensor? order, Tensor? ordered, Tensor? pool, "
    "Tensor? a_offset, Tensor? b_offset, Tensor? rank, Tensor? scaling, Tensor? starts, int part_stride, int width, int max_rank, int rows, int splits, "
    "int group, bool overlap) -> ()"
)


@lru_cache(maxsize=64)
def shape_of(rows: int, columns: int, multiprocessors: int, tokens: int = MOST_TOKENS) -> tuple[int, int, int] | None:
    """(rows of w in a block, blocks that share its columns, chunks of 64 columns in a copy) with which one wave of blocks holds w
    [rows, columns] of 2 bytes beside two copies of so many tokens; None where none does."""
    height = -(-rows // (multiprocessors // SPLITS * 8)) * 8
    chunks = -(-columns // (64 * SPLITS))
    if rows % 8 or columns % 64 or chunks < 2 or height > 144 or height * chunks * 128 > MOST_BYTES:
        return None
    for group in range(max(2, -(-chunks // 8)), 1, -1):
        if -(-chunks // group) * group * height * 128 + 2 * group * -(-tokens // 8) * 1024 + (64 + height) * 128 + LISTS <= MOST_SHARED:
            return height, SPLITS, group
    return None


def skinny_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, addend: LinearAddend | None, shape: tuple[int, int, int]) -> torch.Tensor:
    """x [M, K], w [N, K] -> [M, N] by the kernel, in the given shape. `addend`: whose adapters; its s: `empty_halves`, or made by the kernel before."""
    if x.is_cuda:
        build.load()
    low: tuple = (None,) * 10 + (0,) * 3
    if addend is not None:
        tables, a, b = addend.tables, addend.tables.a, addend.tables.b
        if x.is_cuda and addend.s.dim() == 1 and -(-w.shape[0] // shape[0]) * shape[1] > launch.multiprocessors(x.device):
            raise ValueError(f"skinny_linear: with adapters blocks wait for each other, and w {tuple(w.shape)} in shape {shape} has more than run at once")
        low = (addend.s, addend.slots, addend.order, addend.ordered_slots, b.pool, a.offset, b.offset, b.rank, b.scaling, tables.starts)
        low += (tables.stride, a.shrink_width, b.max_rank)
    out = x.new_empty(x.shape[0], w.shape[0])
    torch.ops.sglang_lora_moe.skinny_linear(x, w, bias, out, *low, *shape, True)
    return out


def takes_given(tokens: int, addend: LinearAddend | None, shape: tuple[int, int, int] | None) -> bool:
    """Whether the kernel before should make s: tokens are few, and what `shape_of` leaves beside the weights has room for s and B of each."""
    few = addend is not None and tokens * -(-addend.tables.b.max_rank // 16) * 16 <= MOST_GIVEN and addend.tables.a.shrink_width % 4 == 0
    return few and shape is not None and shape[0] <= GIVEN_HEIGHT


def half_for(tables: PartTables, tokens: int = MOST_TOKENS) -> int:
    """Elements of what a launch's blocks hand to each other: A x in shares of 1,024 columns, [shares, tokens, parts, width]."""
    return -(-tables.a.dim // 1024) * tokens * tables.num_parts * tables.a.shrink_width


def empty_halves(half: int, device: torch.device | str) -> torch.Tensor:
    """For all linears of a model: two halves of at least so many float32, which their launches use by turns, and the int32 count that says whose turn it is."""
    return torch.cat((empty_s(-(-half // 32) * 64, device), torch.zeros(1, device=device)))


def empty_s(elements: int, device: torch.device | str) -> torch.Tensor:
    """float32 [elements] of the one value that means "not there yet"."""
    return torch.full((elements,), -1, dtype=torch.int32, device=device).view(torch.float32)


def shape_for(x: torch.Tensor, w: torch.Tensor, addend: LinearAddend | None) -> tuple[int, int, int] | None:
    """How to multiply x [M, K] and w [N, K], adapters included, or None where the kernel cannot, or is no faster: the rule in one place."""
    if not launch.has_wgmma(x.device) or not 0 < x.shape[0] <= MOST_TOKENS or x.dtype not in DTYPES or w.dtype != x.dtype:
        return None
    shape = shape_of(*w.shape, launch.multiprocessors(x.device), -(-x.shape[0] // 32) * 32)
    if addend is not None:
        b, parts = addend.tables.b, addend.tables.num_parts
        if b.pool.dtype != x.dtype or parts > MOST_PARTS or min(x.shape[0], b.num_slots) * parts * -(-b.max_rank // 16) > MOST_SIXTEENS:
            return None
        if addend.s.dim() == 4 and (addend.grouped or not takes_given(x.shape[0], addend, shape)):
            return None
    return shape
