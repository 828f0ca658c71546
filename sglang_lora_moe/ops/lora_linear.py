"""LoRA on linears and the embedding through the stack tables: y[m, part] += scaling * B(slot, part) (A(slot, part) x[m]).

    shrink   s[split, m, part, :] = A x[m] over one split of x's columns, all parts in one launch; float32
    expand   y += scaling * B s, all parts in one launch
    embedding   y[m] += scaling * B A[:, id], one launch

Programs own tiles: blocks of tokens taken in the order of their slots (`slot_order`), so that a block has few distinct slots; it goes over those. Around a
linear neither launch may be needed: the kernel that makes x also fills s, and the kernel that reads y adds B s (`LinearAddend`). For up to ROWS_MAX tokens
those kernels own single tokens. Rows of slot -1 and slots of rank 0 cost a table read. Nothing is padded to the largest rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_lora_moe.lora.stacks import EmbeddingStacks, LinearStacks, Stack
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import pdl_wait

NO_SLOT = tl.constexpr(1 << 30)
ROWS_MAX = 32  # tokens up to which a program owns one token, with matrices of its own


@triton.jit
def matrix_of(pool_ptr, offset_ptr, entry):
    """Where the matrix of a table entry begins. Matrices lie on 16-byte boundaries; saying so lets them be read in 16-byte pieces."""
    return matrix_at(pool_ptr, tl.load(offset_ptr + entry))


@triton.jit
def matrix_at(pool_ptr, offset):
    UNIT: tl.constexpr = 128 // pool_ptr.dtype.element_ty.primitive_bitwidth
    return pool_ptr + offset // UNIT * UNIT


# ---- tables of a linear with several parts --------------------------------------------------------------------------
class PartTables:
    """The stacks of a linear's parts, in order: tables of part p lie `stride` entries behind those of part p - 1."""

    def __init__(self, parts: Sequence[tuple[LinearStacks, int, int]]) -> None:
        self.a, self.b = parts[0][0].a, parts[0][0].b
        self.num_parts, self.rows = len(parts), sum(rows for _, _, rows in parts)
        self.stride = self._distance([stacks.a for stacks, _, _ in parts])
        if self.stride != self._distance([stacks.b for stacks, _, _ in parts]):
            raise ValueError("the tables of a linear's parts must lie at equal distances, as those of one memory pool do")
        device, self.block_n = self.a.pool.device, 64
        blocks = [(p, n, first + n, rows) for p, (_, first, rows) in enumerate(parts) for n in range(0, rows, self.block_n)]
        starts = [first for _, first, _ in parts] + [self.rows]
        self.divisor = math.gcd(*starts)
        self.starts_list, self.starts = starts, torch.tensor(starts, dtype=torch.int32, device=device)  # [parts + 1] first row of y of each part
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
    order: torch.Tensor | None = None  # int32 [M], tokens by slot; None = as they come
    ordered_slots: torch.Tensor | None = None  # int32 [M], slots in that order
    grouped: bool = False  # its reader owns tiles of tokens even where there are few

    @property
    def num_slots(self) -> int:
        return self.tables.b.num_slots

    @property
    def rank_block(self) -> int:
        return min(16, triton.next_power_of_2(self.tables.b.max_rank))

    @property
    def tile_rank_block(self) -> int:
        """For matrix instructions, which take at least 16."""
        return max(16, min(32, triton.next_power_of_2(self.tables.b.max_rank)))

    def kernel_args(self) -> tuple:
        """s, slots, pool, offset, rank, scaling, distance of parts, elements of a token in s, and between splits."""
        return (self.s, self.slots, *self._table_args(self.tables.b))

    def shrink_args(self) -> tuple:
        """As `kernel_args`, for a kernel that fills s: with the tables of A."""
        return (self.s, self.slots, *self._table_args(self.tables.a))

    def tile_args(self) -> tuple:
        """s, order, slots in order, then as `kernel_args`."""
        return (self.s, self.order, self.slots_in_order, *self._table_args(self.tables.b))

    @property
    def slots_in_order(self) -> torch.Tensor:
        return self.slots if self.ordered_slots is None else self.ordered_slots

    def _table_args(self, stack: Stack) -> tuple:
        _, m, parts, width = self.s.shape
        return (stack.pool, stack.offset, stack.rank, stack.scaling, self.tables.stride, parts * width, m * parts * width)


NO_LINEAR_ADDEND = (None,) * 6 + (0, 0, 0)


# ---- tiles ----------------------------------------------------------------------------------------------------------
@triton.jit
def tile_rows(order_ptr, slots_ptr, M, block, BM: tl.constexpr):
    """(tokens, their slots, which are inside) of a block; the slots of rows outside are -1."""
    place = block * BM + tl.arange(0, BM)
    inside = place < M
    slots = tl.load(slots_ptr + place, mask=inside, other=-1)
    if order_ptr is None:
        rm = place
    else:
        rm = tl.load(order_ptr + place, mask=inside, other=0)
    return rm.to(tl.int64), slots, inside


@triton.jit
def next_slot(slots, slot):
    """The smallest of `slots` above `slot`, or NO_SLOT; begin with slot -1."""
    return tl.min(tl.where(slots > slot, slots, NO_SLOT), 0)


def tile_tokens(tokens: int) -> int:
    """Tokens of a tile: few at decode, where a block may have many slots."""
    return 16 if tokens <= 512 else 64


# ---- shrink ---------------------------------------------------------------------------------------------------------
@triton.jit
def _load_a(pool_ptr, offset_ptr, rank_ptr, entry, slot, is_part, rr, K, k, wanted):
    """(rank [Q], A[rr, k] [Q, BK]) of a slot, Q = all parts' rows side by side; zeros where there is none."""
    is_slot = slot < NO_SLOT
    place = entry + tl.where(is_slot, slot, 0)
    rank = tl.load(rank_ptr + place, mask=is_part & is_slot, other=0)
    a_ptrs = matrix_of(pool_ptr, offset_ptr, place)[:, None] + rr.to(tl.int64)[:, None] * K + k[None, :]
    return rank, tl.load(a_ptrs, mask=(rr < rank)[:, None] & wanted[None, :], other=0.0)


@triton.jit
def _shrink_kernel(
    x_ptr, s_ptr, sum_ptr, counts_ptr, order_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, M, parts, width, part_stride, K,
    SPLITS: tl.constexpr, SHARES: tl.constexpr, PARTS_PAD: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    ONCE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, rank blocks * shares of the slots, splits): s[split, tokens of the block] = A x over the split's columns, all parts at once.

    ONCE: a split is one block of BK columns. Then A of the first slot is read before the kernel before this one is complete.
    With sum_ptr the last program of a block, by a count that is zero before and after, adds up the splits, always in their order.
    """
    block, job, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rm, slots, inside = tile_rows(order_ptr, slots_ptr, M, block, BM)
    column = tl.arange(0, PARTS_PAD * BR)
    part, rr = column // BR, job // SHARES * BR + column % BR
    is_part = part < parts
    entry = tl.where(is_part, part, 0) * part_stride
    slot = next_slot(slots, -1)
    for _turn in range(job % SHARES):
        slot = next_slot(slots, slot)
    per_split = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    begin = split * per_split
    end = tl.minimum(begin + per_split, K)
    k, rows = begin + tl.arange(0, BK), rm[:, None] * K
    s_rows = s_ptr + ((split * M + rm) * parts)[:, None] * width + (part * width + rr)[None, :]
    if ONCE:
        rank, a = _load_a(pool_ptr, offset_ptr, rank_ptr, entry, slot, is_part, rr, K, k, k < end)
        pdl_wait(PDL)
        x = tl.load(x_ptr + rows + k[None, :], mask=inside[:, None] & (k < end)[None, :], other=0.0)
        while slot < NO_SLOT:
            acc = tl.dot(x, tl.trans(a.to(x.dtype)), input_precision=PRECISION)
            tl.store(s_rows, acc, mask=(slots == slot)[:, None] & (rr < rank)[None, :])
            for _step in tl.static_range(SHARES):
                slot = next_slot(slots, slot)
            rank, a = _load_a(pool_ptr, offset_ptr, rank_ptr, entry, slot, is_part, rr, K, k, k < end)
    else:
        pdl_wait(PDL)
        while slot < NO_SLOT:
            rank = tl.load(rank_ptr + entry + slot, mask=is_part, other=0)
            mine, real = slots == slot, rr < rank
            a_ptrs = matrix_of(pool_ptr, offset_ptr, entry + slot)[:, None] + rr.to(tl.int64)[:, None] * K + k[None, :]
            acc = tl.zeros((BM, PARTS_PAD * BR), dtype=tl.float32)
            for start in tl.range(0, end - begin, BK, num_stages=3):
                wanted = start + k < end
                x = tl.load(x_ptr + rows + start + k[None, :], mask=mine[:, None] & wanted[None, :], other=0.0)
                a = tl.load(a_ptrs + start, mask=real[:, None] & wanted[None, :], other=0.0)
                acc = tl.dot(x, tl.trans(a.to(x.dtype)), acc, input_precision=PRECISION)
            tl.store(s_rows, acc, mask=mine[:, None] & real[None, :])
            for _step in tl.static_range(SHARES):
                slot = next_slot(slots, slot)
    if sum_ptr is not None:
        tl.debug_barrier()
        if tl.atomic_add(counts_ptr + block * (tl.num_programs(1) // SHARES) + job // SHARES, 1) == SPLITS * SHARES - 1:
            place = (rm * parts)[:, None] * width + (part * width + rr)[None, :]
            mask = inside[:, None] & (is_part & (rr < width))[None, :]
            total = tl.zeros((BM, PARTS_PAD * BR), dtype=tl.float32)
            for i in tl.static_range(SPLITS):
                total += tl.load(s_ptr + i * M * parts * width + place, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(sum_ptr + place, total, mask=mask)
            tl.store(counts_ptr + block * (tl.num_programs(1) // SHARES) + job // SHARES, 0)


COUNTS = 1 << 7  # of blocks of 16 tokens and 16 ranks, for 512 tokens and 64 ranks


def shrink_splits(tokens: int, inputs: int, width: int = 16) -> int:
    """Splits of x's columns for a step of so many tokens: of 256 at decode, where programs are too few to fill a GPU; fewer of large s."""
    if tile_tokens(tokens) == 16:
        return max(1, min(16, triton.cdiv(inputs, 256)))
    return max(1, min(8, max(1, 128 // width), inputs // 256, 264 // triton.cdiv(tokens, tile_tokens(tokens))))


def linear_shrink(x: torch.Tensor, low: LinearAddend, unsummed: torch.Tensor | None = None, counts: torch.Tensor | None = None) -> None:
    """low.s float32 [splits, M, parts, width] = A x of x [M, in]; entries beyond a slot's rank and of slot -1 are undefined.

    `unsummed`, of that shape, and `counts`, int32 zeros, COUNTS of them: low.s is [1, ...], the sum of the splits, which lie in `unsummed` meanwhile.
    """
    into, total = (low.s, None) if unsummed is None else (unsummed, low.s)
    a, (splits, m, parts, width) = low.tables.a, into.shape
    launch.expect("linear_shrink: x", x, (low.slots.shape[0], a.dim), x.dtype, a.pool.device)  # a router's x may be wider than the pool
    br = max(16, min(64 // triton.next_power_of_2(parts), triton.next_power_of_2(width)))  # more of them spill
    # Several programs share the slots of a block while programs are few and a block may have many slots
    bm, shares, per_split = tile_tokens(m), 2 if m <= 64 else 1, triton.cdiv(a.dim, splits)
    once = bm == 16 and per_split <= 256
    _shrink_kernel[(triton.cdiv(m, bm), triton.cdiv(width, br) * shares, splits)](
        x, into, total, counts, low.order, low.slots_in_order, a.pool, a.offset, a.rank, m, parts, width, low.tables.stride, a.dim,
        SPLITS=splits, SHARES=shares, PARTS_PAD=triton.next_power_of_2(parts), BM=bm, BR=br, ONCE=once,
        BK=max(16, triton.next_power_of_2(per_split)) if once else 128 if x.dtype.itemsize == 2 else 32, PRECISION=launch.dot_precision(x.dtype),
        num_warps=4, **launch.options(x.device),
    )  # fmt: skip


# ---- expand ---------------------------------------------------------------------------------------------------------
@triton.jit
def load_tile_s(s_ptr, scale, rm, mine, column, rank, r0, s_stride, split_stride, SPLITS: tl.constexpr, BR: tl.constexpr, DTYPE: tl.constexpr):
    """s[rows of one slot, column + r0 : + BR] times `scale`, zeros elsewhere, in the dtype of the product with B."""
    rr = r0 + tl.arange(0, BR)
    ptrs = s_ptr + rm[:, None] * s_stride + (column + rr)[None, :]
    mask = mine[:, None] & (rr < rank)[None, :]
    low = tl.load(ptrs, mask=mask, other=0.0)
    for i in tl.static_range(1, SPLITS):
        low += tl.load(ptrs + i * split_stride, mask=mask, other=0.0)
    return (low * scale).to(DTYPE)


@triton.jit
def load_tile_b(b_ptr, rn, inside, rank, r0, BR: tl.constexpr, DTYPE: tl.constexpr):
    """B[rn, r0 : r0 + BR]^T as [BR, BN], zeros beyond."""
    rr = r0 + tl.arange(0, BR)
    if rank % 8 == 0:  # rows lie on 16-byte boundaries; saying so lets them be read in such pieces
        even = rank // 8 * 8
        b = tl.load(b_ptr + rn.to(tl.int64)[None, :] * even + rr[:, None], mask=inside[None, :] & (rr < even)[:, None], other=0.0)
    else:
        b = tl.load(b_ptr + rn.to(tl.int64)[None, :] * rank + rr[:, None], mask=inside[None, :] & (rr < rank)[:, None], other=0.0)
    return b.to(DTYPE)


@triton.jit
def _expand_kernel(
    y_ptr, s_ptr, order_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, blocks_ptr, M,
    y_stride, width, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, blocks of output rows)."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    block = blocks_ptr + tl.program_id(1) * 4
    part, row, first, rows = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)  # no kernel writes them
    rm, slots, _ = tile_rows(order_ptr, slots_ptr, M, tl.program_id(0), BM)
    pdl_wait(PDL)
    rn = row + tl.arange(0, BN)
    inside = rn < rows
    y_ptrs = y_ptr + rm[:, None] * y_stride + (first + tl.arange(0, BN))[None, :]
    mask = (slots >= 0)[:, None] & inside[None, :]
    acc = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    slot = next_slot(slots, -1)
    while slot < NO_SLOT:  # one pass for each distinct slot of the block
        entry = part * part_stride + slot
        rank, scaling = tl.load(rank_ptr + entry), tl.load(scaling_ptr + entry)
        b_ptr = matrix_of(pool_ptr, offset_ptr, entry)
        for r0 in tl.range(0, rank, BR, num_stages=1):
            low = load_tile_s(s_ptr, scaling, rm, slots == slot, part * width, rank, r0, s_stride, split_stride, SPLITS, BR, DTYPE)
            acc = tl.dot(low, load_tile_b(b_ptr, rn, inside, rank, r0, BR, DTYPE), acc, input_precision=PRECISION)
        slot = next_slot(slots, slot)
    tl.store(y_ptrs, acc.to(DTYPE), mask=mask)


def linear_expand(y: torch.Tensor, addend: LinearAddend) -> torch.Tensor:
    """y [M, rows] += scaling * B s in place; rows without an adapter are not touched."""
    tables, (splits, m, _, width) = addend.tables, addend.s.shape
    launch.expect("linear_expand: y", y, (m, tables.rows), y.dtype, tables.b.pool.device)
    bm = tile_tokens(m)
    _expand_kernel[(triton.cdiv(m, bm), tables.blocks.shape[0])](
        y, *addend.tile_args(), tables.blocks, m, y.stride(0), width,
        SPLITS=splits, BM=bm, BN=tables.block_n, BR=addend.tile_rank_block,
        PRECISION=launch.dot_precision(y.dtype), num_warps=4, **launch.options(y.device),
    )  # fmt: skip
    return y


# ---- one token a program --------------------------------------------------------------------------------------------
@triton.jit
def whole_pieces(rank):
    """`rank` where rows of B lie on 16-byte boundaries, else 0, in a form that lets loads of such rows take 16 bytes at a time."""
    return tl.where(rank % 8 == 0, rank, 0) // 8 * 8


@triton.jit
def load_rows(b_ptr, rows, mask, rank, r0, RANK_BLOCK: tl.constexpr):
    """B[rows, r0 : r0 + RANK_BLOCK] as [rows, RANK_BLOCK], zeros beyond the rank; b_ptr: the matrix [*, rank] of one slot."""
    rr = r0 + tl.arange(0, RANK_BLOCK)
    return tl.load(b_ptr + rows.to(tl.int64)[:, None] * rank + rr[None, :], mask=mask[:, None] & (rr < rank)[None, :], other=0.0)


@triton.jit
def of_slot(entries, slot, SLOTS_PAD: tl.constexpr):
    """The entry of `slot` in a table [SLOTS_PAD]: read whole and chosen from, a table does not wait for the slot."""
    return tl.sum(tl.where(tl.arange(0, SLOTS_PAD) == slot, entries, 0), axis=0)


@triton.jit
def load_s_sum(s_ptrs, r0, width, split_stride, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """s of one token, summed over splits: [RANK_BLOCK] from r0 on. Undefined beyond the rank."""
    rr, splits = r0 + tl.arange(0, RANK_BLOCK), tl.arange(0, triton.next_power_of_2(SPLITS))
    mask = (rr < width)[:, None] & (splits < SPLITS)[None, :]
    return tl.sum(tl.load(s_ptrs + splits[None, :] * split_stride + rr[:, None], mask=mask, other=0.0), axis=1)


@triton.jit
def _times_s(b, low, rank, r0, RANK_BLOCK: tl.constexpr):
    rr = r0 + tl.arange(0, RANK_BLOCK)
    return tl.sum(b.to(tl.float32) * tl.where(rr < rank, low, 0.0)[None, :], axis=1)


@triton.jit
def load_whole_rows(b_ptr, rows, mask, rank, r0, RANK_BLOCK: tl.constexpr):
    """As `load_rows`, in 16-byte pieces where the rank allows it."""
    if rank % 8 == 0:
        b = load_rows(b_ptr, rows, mask, whole_pieces(rank), r0, RANK_BLOCK)
    else:
        b = load_rows(b_ptr, rows, mask, rank, r0, RANK_BLOCK)
    return b


@triton.jit
def expand_rows(low, b, s_ptrs, b_ptr, rows, mask, rank, width, split_stride, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """B[rows] . s of one token, float32 in the shape of `rows` [N]. `low`, `b`: the first `load_s_sum` and `load_whole_rows`."""
    total = _times_s(b, low, rank, 0, RANK_BLOCK)
    for r0 in tl.range(RANK_BLOCK, rank, RANK_BLOCK, num_stages=1):
        low = load_s_sum(s_ptrs, r0, width, split_stride, SPLITS, RANK_BLOCK)
        total += _times_s(load_whole_rows(b_ptr, rows, mask, rank, r0, RANK_BLOCK), low, rank, r0, RANK_BLOCK)
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
