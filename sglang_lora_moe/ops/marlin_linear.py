"""Linears with int4 and int8 weights on a GPU: the grouped Marlin GEMM with one expert, and for many tokens a 16-bit GEMM.

    y = x W^T + b        W[o, i] = (q - z) * s, rounded once to the activation dtype

One expert's tiles are known without looking at the tokens, so that there is nothing to align: token blocks in order. From `DEQUANTIZE_FROM` tokens on, the
weight is written out in 16 bit by a kernel of its own and multiplied by the library, whose GEMM is then faster by more than that costs (measured by
`benchmarks/bench_marlin_linear.py`). Both read the same layout and multiply by the same values.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.lora_linear import LinearAddend
from sglang_lora_moe.ops.low_rank import pdl_wait
from sglang_lora_moe.ops.marlin_moe import DTYPES, GROUP_SIZES, SHAPES, GemmScratch, MarlinWeight, marlin_moe_gemm, marlin_moe_repack
from sglang_lora_moe.ops.marlin_moe_pairs import MEMORY, can_add, marlin_linear_pairs
from sglang_lora_moe.ops.moe_lora_align import Alignment
from sglang_lora_moe.quantization.wna16 import WNA16Weight

DEQUANTIZE_FROM = 33  # tokens
PAIR_TOKENS = 1  # up to which a linear is as a single pair of experts; more would read the weight again: 1 us a layer slower at 4 tokens
SMALL_WEIGHT = 16 << 20  # values; too few 128-row tiles for all multiprocessors, and few enough blocks of single pairs


def why_unreadable(weight: WNA16Weight) -> str | None:
    """What of a weight [rows, k] these kernels cannot read; None = nothing."""
    if weight.scales.dtype not in DTYPES:
        return f"the activations are {weight.scales.dtype}, not bfloat16 or float16"
    if weight.scales.shape[-1] > 1 and weight.group_size not in GROUP_SIZES:
        return f"groups have {weight.group_size} inputs, not one of {', '.join(map(str, GROUP_SIZES))} or all"
    if weight.in_features % 8 or weight.out_features % 8:
        return f"{weight.out_features} x {weight.in_features} does not divide by 8"
    return None


def repack_linear(weight: WNA16Weight, bias: torch.Tensor | None = None) -> MarlinWeight:
    """A weight [rows, k] on a GPU, with its bias [rows], as one expert in the layout of `ops/marlin_moe.py`."""
    scratch_of(weight.packed.device)
    return marlin_moe_repack(weight[None], 1, None if bias is None else bias[None])


def marlin_linear(
    x: torch.Tensor, weight: MarlinWeight, config: int | None = None, wide: torch.Tensor | None = None, addend: LinearAddend | None = None
) -> torch.Tensor:
    """x [M, k] -> [M, rows] in x's dtype. `config` fixes a shape of tiles (an index of SHAPES), -1 the 16-bit GEMM; None chooses by size.

    `wide` [rows, k]: the same weight, written out once.
    """
    tokens = x.shape[0]
    if config is None and _as_pairs(tokens, weight):
        return marlin_linear_pairs(x.contiguous(), weight, addend)
    assert addend is None, "only single pairs add"
    chosen = choose_config(tokens, weight) if config is None else config
    if chosen < 0:
        return F.linear(x, dequantize_linear(weight) if wide is None else wide, None if weight.bias is None else weight.bias[0])
    out = x.new_empty(tokens, weight.rows)
    if tokens == 0:
        return out
    tiles, sms = _tiles(x.device, tokens, SHAPES[chosen].block_tokens), launch.multiprocessors(x.device)
    return marlin_moe_gemm(x.contiguous(), weight, tiles, 1, out, scratch_of(x.device), config=chosen, sms=sms, gather=False, scatter=False, overlap=True)


def _as_pairs(tokens: int, weight: MarlinWeight) -> bool:
    fits = weight.rows % 16 == 0 and weight.rows * weight.k <= SMALL_WEIGHT and launch.shared_memory(weight.packed.device) >= MEMORY
    return 0 < tokens <= PAIR_TOKENS and fits


def adds(x: torch.Tensor, weight: MarlinWeight, addend: LinearAddend) -> bool:
    """Whether `marlin_linear` takes the addend."""
    return _as_pairs(x.shape[0], weight) and can_add(addend, x)


def choose_config(tokens: int, weight: MarlinWeight) -> int:
    """An index of SHAPES; -1 = the 16-bit GEMM. Tiles of 16 tokens also for up to 32, whose blocks read the weight from L2 the second time."""
    if tokens >= DEQUANTIZE_FROM:
        return -1
    if tokens > 8:
        return _smallest(128, 16)
    fits = weight.bits == 4 or launch.shared_memory(weight.packed.device) >= MEMORY
    return _smallest(32, 8) if fits and weight.rows * weight.k <= SMALL_WEIGHT else _smallest(128, 8)


@lru_cache(maxsize=8)
def _smallest(block_rows: int, tokens: int) -> int:
    """The shape of so many rows with the fewest tokens that hold `tokens`."""
    fits = [i for i, shape in enumerate(SHAPES) if shape.block_rows == block_rows and shape.block_tokens >= tokens]
    return min(fits, key=lambda i: SHAPES[i].block_tokens)


@lru_cache(maxsize=16)
def scratch_of(device: torch.device) -> GemmScratch:
    """One a device: GEMMs follow each other on the main stream. Made when weights are converted, never while capturing."""
    return GemmScratch.allocate(launch.multiprocessors(device), device)


_ORDER: dict[torch.device, torch.Tensor] = {}
_TILES: dict[tuple[torch.device, int, int], Alignment] = {}


def _tiles(device: torch.device, tokens: int, block: int) -> Alignment:
    """Tiles of the tokens in order, for one expert. Kept for ever: captured graphs read them.

    There is one of each number of tokens of a step that was seen, which `StepContext.max_tokens` bounds.
    """
    key = (device, tokens, block)
    if key not in _TILES:
        order = _ORDER.get(device)
        if order is None or order.numel() < tokens:
            order = _ORDER[device] = torch.arange(max(4096, triton.next_power_of_2(tokens)), dtype=torch.int32).to(device)
        count = -(-tokens // block)
        table = [tokens, count, 0, 0, *(value for i in range(count) for value in (0, i * block, min(block, tokens - i * block)))]
        flat = torch.tensor(table, dtype=torch.int32).to(device)
        tiles = flat[4:].view(-1, 3)
        _TILES[key] = Alignment(order[:tokens], tiles, tiles[:0], flat[:4])
    return _TILES[key]


@triton.jit
def _dequantize_kernel(
    packed_ptr, scales_ptr, zeros_ptr, out_ptr, ROWS, K, K_UNITS, GROUPS, GROUP_SIZE,
    BITS: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (row units, blocks of UNITS units of 32 inputs). Words are read in their order; the compiler's transposition makes rows of them.

    The order is that of `ops/marlin_moe.fragment_order`; a program that read it from a table, code by code, took three times as long.
    """
    unit, u0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * UNITS
    base = packed_ptr + (unit * K_UNITS + u0) * (32 * BITS)
    if BITS == 4:
        at = tl.arange(0, UNITS * 128)
        words = tl.load(base + at, mask=at < (K_UNITS - u0) * 128, other=0)
        codes = (words[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 15
        # unit, lane // 4, lane % 4, step, fragment | element, upper, half -> lane // 4, fragment, half | unit, step, upper, lane % 4, element
        codes = codes.reshape(UNITS, 8, 4, 2, 2, 2, 2, 2).permute(1, 4, 7, 0, 3, 6, 2, 5).reshape(32, UNITS, 32)
    else:
        at = tl.arange(0, UNITS * 256)
        words = tl.load(base + at, mask=at < (K_UNITS - u0) * 256, other=0)
        codes = (words[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255
        # unit, step, lane // 4, lane % 4, fragment, upper | half, element
        codes = codes.reshape(UNITS, 2, 8, 4, 2, 2, 2, 2).permute(2, 4, 6, 0, 1, 5, 3, 7).reshape(32, UNITS, 32)
    r, u = unit * 32 + tl.arange(0, 32), u0 + tl.arange(0, UNITS)
    group = (unit * GROUPS + u * 32 // GROUP_SIZE)[None, :] * 32 + tl.arange(0, 32)[:, None]  # a unit lies in one group
    known = (r < ROWS)[:, None] & (u * 32 < K)[None, :]
    scale = tl.load(scales_ptr + group, mask=known, other=0.0).to(tl.float32)
    zero = tl.full((32, UNITS), 1 << (BITS - 1), dtype=tl.int32)
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + group, mask=known, other=0).to(tl.int32)
    # Exact in float32, so that the one rounding is to the activation dtype.
    values = ((codes - zero[:, :, None]).to(tl.float32) * scale[:, :, None]).to(out_ptr.dtype.element_ty).reshape(32, UNITS * 32)
    k = u0 * 32 + tl.arange(0, UNITS * 32)
    pdl_wait(PDL)  # weights are there before any kernel; the memory of `out` may still be read
    tl.store(out_ptr + r[:, None] * K + k[None, :], values, mask=(r < ROWS)[:, None] & (k < K)[None, :])


def dequantize_linear(weight: MarlinWeight) -> torch.Tensor:
    """The weight [rows, k] in the activation dtype."""
    row_units, k_units = weight.packed.shape[1:3]
    out = weight.scales.new_empty(weight.rows, weight.k)
    units = 4
    _dequantize_kernel[(row_units, triton.cdiv(k_units, units))](
        weight.packed, weight.scales, weight.zeros, out, weight.rows, weight.k, k_units, weight.scales.shape[2], weight.group_size or weight.k,
        BITS=weight.bits, UNITS=units, num_warps=4, **launch.options(out.device),
    )  # fmt: skip
    return out
