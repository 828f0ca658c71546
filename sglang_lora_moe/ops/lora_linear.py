"""LoRA on linears and the embedding through the stack tables: y[m, part] += scaling * B(slot, part) (A(slot, part) x[m]).

    shrink   s[split, m, part, :] = A x[m] over one split of x's columns, all parts in one launch; float32
    expand   y += scaling * B s, all parts in one launch
    embedding   y[m] += scaling * B A[:, id], one launch

Two families: *rows* (decode), where a program owns one token, and *tiles* (prefill), where a program owns a block of tokens
and goes over the distinct slots in it (tokens of one request lie side by side, so there are few). For a few tokens neither launch is
needed: the kernel that makes x also fills s, and the kernel that reads y adds B s (`LinearAddend`). Rows of slot -1 and slots
of rank 0 cost a table read. Nothing is padded to the largest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_lora_moe.lora.stacks import EmbeddingStacks, LinearStacks, Stack
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import pdl_wait

NO_SLOT = tl.constexpr(1 << 30)
ROWS_MAX = 64  # tokens up to which the rows family is used


@triton.jit
def matrix_of(pool_ptr, offset_ptr, entry):
    """Where the matrix of a table entry begins. Matrices lie on 16-byte boundaries; saying so lets them be read in 16-byte pieces."""
    UNIT: tl.constexpr = 128 // pool_ptr.dtype.element_ty.primitive_bitwidth
    return pool_ptr + tl.load(offset_ptr + entry) // UNIT * UNIT


# ---- tables of a linear with several parts --------------------------------------------------------------------------
class PartTables:
    """The stacks of a linear's parts, in order: tables of part p lie `stride` entries behind those of part p - 1."""

    def __init__(self, parts: Sequence[tuple[LinearStacks, int, int]]) -> None:
        self.a, self.b = parts[0][0].a, parts[0][0].b
        self.num_parts, self.rows = len(parts), sum(rows for _, _, rows in parts)
        self.stride = self._distance([stacks.a for stacks, _, _ in parts])
        if self.stride != self._distance([stacks.b for stacks, _, _ in parts]):
            raise ValueError("the tables of a linear's parts must lie at equal distances, as those of one memory pool do")
        device, block = self.a.pool.device, 64
        blocks = [(p, n, first + n, rows) for p, (_, first, rows) in enumerate(parts) for n in range(0, rows, block)]
        self.block_n = block
        self.blocks = torch.tensor(blocks, dtype=torch.int32, device=device)  # [blocks, (part, row in it, row of y, rows of the part)]

    @staticmethod
    def _distance(stacks: list[Stack]) -> int:
        """Entries between the tables of neighbours, equal for all of them."""
        found = set()
        for before, after in zip(stacks[:-1], stacks[1:], strict=True):
            for name in ("offset", "rank", "scaling"):
                first, second = getattr(before, name), getattr(after, name)
                found.add((second.data_ptr() - first.data_ptr()) // first.element_size())
        if len(found) > 1:
            raise ValueError("the tables of a linear's parts must lie at equal distances, as those of one memory pool do")
        return found.pop() if found else 0


@dataclass(frozen=True)
class LinearAddend:
    """What is still to be added to a linear's output: scaling * B s, for the kernel that reads the output next."""

    s: torch.Tensor  # float32 [splits, M, parts, width]
    tables: PartTables
    slots: torch.Tensor  # int32 [M]

    @property
    def rank_block(self) -> int:
        return min(16, triton.next_power_of_2(self.tables.b.max_rank))

    def kernel_args(self) -> tuple:
        """s, slots, pool, offset, rank, scaling, distance of parts, elements of a token in s, and between splits."""
        return self._args(self.tables.b)

    def shrink_args(self) -> tuple:
        """As `kernel_args`, for a kernel that fills s: with the tables of A."""
        return self._args(self.tables.a)

    def _args(self, stack: Stack) -> tuple:
        _, m, parts, width = self.s.shape
        return (self.s, self.slots, stack.pool, stack.offset, stack.rank, stack.scaling, self.tables.stride, parts * width, m * parts * width)


NO_LINEAR_ADDEND = (None,) * 6 + (0, 0, 0)


# ---- shrink ---------------------------------------------------------------------------------------------------------
@triton.jit
def _shrink_rows_kernel(
    x_ptr, s_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, K, M, width, part_stride, PARTS: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, parts * rank blocks, splits)."""
    pdl_wait(PDL)
    token, part, r0 = tl.program_id(0), tl.program_id(1) // RANK_BLOCKS, tl.program_id(1) % RANK_BLOCKS * BR
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        rank = tl.load(rank_ptr + part * part_stride + slot)
        if r0 < rank:
            rr, rk = r0 + tl.arange(0, BR), tl.arange(0, BK)
            a_ptr = matrix_of(pool_ptr, offset_ptr, part * part_stride + slot) + rr.to(tl.int64)[:, None] * K + rk[None, :]
            x_row = x_ptr + token.to(tl.int64) * K + rk
            per_split = tl.cdiv(tl.cdiv(K, BK), tl.num_programs(2)) * BK
            begin = tl.program_id(2) * per_split
            end = tl.minimum(begin + per_split, K)
            acc = tl.zeros((BR, BK), dtype=tl.float32)
            for k in tl.range(begin, end, BK, num_stages=2):
                x = tl.load(x_row + k, mask=k + rk < end, other=0.0).to(tl.float32)
                a = tl.load(a_ptr + k, mask=(rr < rank)[:, None] & (k + rk < end)[None, :], other=0.0).to(tl.float32)
                acc += a * x[None, :]
            place = (tl.program_id(2) * M + token) * PARTS + part
            tl.store(s_ptr + place.to(tl.int64) * width + rr, tl.sum(acc, axis=1), mask=rr < rank)


@triton.jit
def _shrink_tiles_kernel(
    x_ptr, s_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, K, M, width, part_stride, PARTS: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, parts * rank blocks, splits): one pass over x for each distinct slot of the block."""
    pdl_wait(PDL)
    per_split = tl.cdiv(tl.cdiv(K, BK), tl.num_programs(2)) * BK
    begin = tl.program_id(2) * per_split
    end = tl.minimum(begin + per_split, K)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    part, r0 = tl.program_id(1) // RANK_BLOCKS, tl.program_id(1) % RANK_BLOCKS * BR
    rr, rk = r0 + tl.arange(0, BR), tl.arange(0, BK)
    slots = tl.load(slots_ptr + rm, mask=rm < M, other=-1)
    slot = tl.min(tl.where(slots >= 0, slots, NO_SLOT), 0)
    while slot < NO_SLOT:
        rank = tl.load(rank_ptr + part * part_stride + slot)
        mine = slots == slot
        if r0 < rank:
            a_ptr = matrix_of(pool_ptr, offset_ptr, part * part_stride + slot) + rr.to(tl.int64)[None, :] * K + rk[:, None]
            x_rows = x_ptr + rm.to(tl.int64)[:, None] * K + rk[None, :]
            acc = tl.zeros((BM, BR), dtype=tl.float32)
            for k in tl.range(begin, end, BK, num_stages=3):
                x = tl.load(x_rows + k, mask=mine[:, None] & (k + rk < end)[None, :], other=0.0)
                a = tl.load(a_ptr + k, mask=(rr < rank)[None, :] & (k + rk < end)[:, None], other=0.0)
                acc = tl.dot(x, a.to(x.dtype), acc, input_precision=PRECISION)
            s_rows = s_ptr + ((tl.program_id(2) * M + rm).to(tl.int64) * PARTS + part)[:, None] * width + rr[None, :]
            tl.store(s_rows, acc, mask=mine[:, None] & (rr < rank)[None, :])
        slot = tl.min(tl.where(slots > slot, slots, NO_SLOT), 0)


def shrink_splits(tokens: int, inputs: int) -> int:
    """Splits of x's columns for a step of so many tokens: more while programs are too few to fill a GPU."""
    if tokens <= ROWS_MAX:
        return max(1, min(4, inputs // 512))
    return max(1, min(8, inputs // 256, 264 // triton.cdiv(tokens, _tile_rows(tokens))))


def _tile_rows(tokens: int) -> int:
    """Tokens of a tile: small ones where a block of tokens has many slots (decode)."""
    return 16 if tokens <= 512 else 64


def linear_shrink(x: torch.Tensor, tables: PartTables, slots: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """s float32 [splits, M, parts, width] = A x of x [M, in]; entries beyond a slot's rank and of slot -1 are undefined."""
    (splits, m, parts, width), k, a = s.shape, x.shape[1], tables.a
    launch.expect("linear_shrink: x", x, (slots.shape[0], a.dim), x.dtype, a.pool.device)  # a router's x may be wider than the pool
    options = launch.options(x.device)
    br = max(16, min(64 if m > ROWS_MAX else 16, triton.next_power_of_2(width)))
    rank_blocks = triton.cdiv(width, br)
    sizes = (k, m, width, tables.stride)
    if m <= ROWS_MAX:
        _shrink_rows_kernel[(m, parts * rank_blocks, splits)](
            x, s, slots, a.pool, a.offset, a.rank, *sizes, PARTS=parts, RANK_BLOCKS=rank_blocks, BR=br, BK=512, num_warps=4, **options
        )
    else:
        bm = _tile_rows(m)
        _shrink_tiles_kernel[(triton.cdiv(m, bm), parts * rank_blocks, splits)](
            x, s, slots, a.pool, a.offset, a.rank, *sizes, PARTS=parts, RANK_BLOCKS=rank_blocks, BM=bm, BR=br, BK=128 if x.element_size() == 2 else 32,
            PRECISION=launch.dot_precision(x.dtype), num_warps=4, **options,
        )  # fmt: skip
    return s


# ---- expand ---------------------------------------------------------------------------------------------------------
@triton.jit
def _add_slot(
    acc, s_ptr, b_ptr, rm, rn, mine, inside, part_column, rank, scaling, s_stride, split_stride, SPLITS: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + scaling * s[rows of one slot] B[rn]^T."""
    for r0 in tl.range(0, rank, BR, num_stages=1):
        rr = r0 + tl.arange(0, BR)
        s_ptrs = s_ptr + rm.to(tl.int64)[:, None] * s_stride + (part_column + rr)[None, :]
        s_mask = mine[:, None] & (rr < rank)[None, :]
        low = tl.load(s_ptrs, mask=s_mask, other=0.0)
        for i in tl.static_range(1, SPLITS):
            low += tl.load(s_ptrs + i * split_stride, mask=s_mask, other=0.0)
        b = tl.load(b_ptr + rn.to(tl.int64)[None, :] * rank + rr[:, None], mask=inside[None, :] & (rr < rank)[:, None], other=0.0)
        acc = tl.dot((low * scaling).to(DTYPE), b.to(DTYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _expand_kernel(
    y_ptr, s_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, blocks_ptr, M, y_stride, width,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, blocks of output rows): one pass for each distinct slot of the block."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    block = blocks_ptr + tl.program_id(1) * 4
    part, row, first, rows = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)  # no kernel writes them
    pdl_wait(PDL)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = row + tl.arange(0, BN)
    inside = rn < rows
    slots = tl.load(slots_ptr + rm, mask=rm < M, other=-1)
    y_ptrs = y_ptr + rm.to(tl.int64)[:, None] * y_stride + (first + tl.arange(0, BN))[None, :]
    mask = (slots >= 0)[:, None] & inside[None, :]
    acc = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    slot = tl.min(tl.where(slots >= 0, slots, NO_SLOT), 0)
    while slot < NO_SLOT:
        entry = part * part_stride + slot
        rank, scaling = tl.load(rank_ptr + entry), tl.load(scaling_ptr + entry)
        b_ptr = matrix_of(pool_ptr, offset_ptr, entry)
        if rank % 8 == 0:
            acc = _add_slot(
                acc, s_ptr, b_ptr, rm, rn, slots == slot, inside, part * width, rank // 8 * 8, scaling, s_stride, split_stride, SPLITS, BR, PRECISION, DTYPE
            )
        else:
            acc = _add_slot(acc, s_ptr, b_ptr, rm, rn, slots == slot, inside, part * width, rank, scaling, s_stride, split_stride, SPLITS, BR, PRECISION, DTYPE)
        slot = tl.min(tl.where(slots > slot, slots, NO_SLOT), 0)
    tl.store(y_ptrs, acc.to(DTYPE), mask=mask)


def linear_expand(y: torch.Tensor, addend: LinearAddend) -> torch.Tensor:
    """y [M, rows] += scaling * B s in place; rows without an adapter are not touched."""
    tables, (splits, m, _, width) = addend.tables, addend.s.shape
    launch.expect("linear_expand: y", y, (m, tables.rows), y.dtype, tables.b.pool.device)
    bm = _tile_rows(m)
    _expand_kernel[(triton.cdiv(m, bm), tables.blocks.shape[0])](
        y, *addend.kernel_args(), tables.blocks, m, y.stride(0), width,
        SPLITS=splits, BM=bm, BN=tables.block_n, BR=max(16, min(32, triton.next_power_of_2(width))),
        PRECISION=launch.dot_precision(y.dtype), num_warps=4, **launch.options(y.device),
    )  # fmt: skip
    return y


@triton.jit
def _expand_rows(s_ptrs, b_ptrs, mask, rank, split_stride, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr):
    total = tl.zeros(mask.shape, dtype=tl.float32)
    for r0 in tl.range(0, rank, RANK_BLOCK, num_stages=1):
        rr = r0 + tl.arange(0, RANK_BLOCK)
        b = tl.load(b_ptrs[:, None] + rr[None, :], mask=mask[:, None] & (rr < rank)[None, :], other=0.0)
        low = tl.load(s_ptrs + rr, mask=rr < rank, other=0.0)
        for i in tl.static_range(1, SPLITS):
            low += tl.load(s_ptrs + i * split_stride + rr, mask=rr < rank, other=0.0)
        total += tl.sum(b.to(tl.float32) * low[None, :], axis=1)
    return total


@triton.jit
def expand_rows(s_ptr, row, b_ptr, out_rows, mask, rank, split_stride, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """B[out_rows] . s[row] of one token, float32 in the shape of `out_rows` [N]; b_ptr: the matrix of its slot."""
    if rank % 8 == 0:
        total = _expand_rows(s_ptr + row, b_ptr + out_rows.to(tl.int64) * (rank // 8 * 8), mask, rank // 8 * 8, split_stride, SPLITS, RANK_BLOCK)
    else:
        total = _expand_rows(s_ptr + row, b_ptr + out_rows.to(tl.int64) * rank, mask, rank, split_stride, SPLITS, RANK_BLOCK)
    return total


# ---- embedding ------------------------------------------------------------------------------------------------------
@triton.jit
def _embedding_kernel(
    y_ptr, ids_ptr, slots_ptr, pool_ptr, a_offset_ptr, b_offset_ptr, rank_ptr, scaling_ptr, H, BH: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr
):
    """Grid (tokens, blocks of H)."""
    pdl_wait(PDL)
    token = tl.program_id(0)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        rank = tl.load(rank_ptr + slot)
        if rank > 0:
            rh = tl.program_id(1) * BH + tl.arange(0, BH)
            a_row = pool_ptr + tl.load(a_offset_ptr + slot) + tl.load(ids_ptr + token) * rank
            b_ptr = pool_ptr + tl.load(b_offset_ptr + slot) + rh.to(tl.int64)[:, None] * rank
            total = tl.zeros((BH,), dtype=tl.float32)
            for r0 in tl.range(0, rank, BR, num_stages=1):
                rr = r0 + tl.arange(0, BR)
                a = tl.load(a_row + rr, mask=rr < rank, other=0.0).to(tl.float32)
                b = tl.load(b_ptr + rr[None, :], mask=(rh < H)[:, None] & (rr < rank)[None, :], other=0.0).to(tl.float32)
                total += tl.sum(b * a[None, :], axis=1)
            y_ptrs = y_ptr + token.to(tl.int64) * H + rh
            y = tl.load(y_ptrs, mask=rh < H, other=0.0).to(tl.float32) + tl.load(scaling_ptr + slot) * total
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=rh < H)


def embedding_delta(y: torch.Tensor, ids: torch.Tensor, stacks: EmbeddingStacks, slots: torch.Tensor) -> torch.Tensor:
    """y [M, H] += scaling * B A[:, ids] in place; ids int64 [M], slots int32 [M]."""
    m, h = y.shape
    launch.expect("embedding_delta: y", y, (slots.shape[0], stacks.b.dim), stacks.b.pool.dtype, stacks.b.pool.device)
    _embedding_kernel[(m, triton.cdiv(h, 256))](
        y, ids, slots, stacks.b.pool, stacks.a.offset, stacks.b.offset, stacks.b.rank, stacks.b.scaling, h, BH=256, BR=16, num_warps=4,
        **launch.options(y.device),
    )  # fmt: skip
    return y
