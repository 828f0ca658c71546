"""Grouped GEMM over experts whose weights have 4 or 8 bits, and the layout of weights that it reads.

    out[row] = act(w[e] x[row] + bias[e])        w[e][o, i] = (q - z) * s, rounded once to the activation dtype

Layout, one for every GPU and every number of tokens: units of 32 rows x 32 inputs, in the order in which tensor cores take
them as their left operand. A unit is two m16n8k16 fragments wide and two steps deep; lane l holds its rows
4 * (l // 4) + 2 * fragment + half, so that it ends with four neighbouring outputs. Of gate_up weights ("halves" 2) fragment 0
holds 16 gate rows and fragment 1 the 16 up rows that belong to them, so that the activation needs no other lane.
    packed int32 [E, row units, k units, 32 * bits]: int4 one 16-byte piece a lane (step, fragment, register), int8 one a step
    scales [E, row units, groups of the padded inputs, 32] activation dtype, zeros uint8 of that shape or None: rows of a unit in the same order
Rows are padded to 128 and inputs to 128, in here alone: the padding computes nothing that is stored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import build
from sglang_lora_moe.ops.library import LIBRARY, define
from sglang_lora_moe.ops.moe_lora_align import Alignment
from sglang_lora_moe.quantization.wna16 import WNA16Weight, pack, unpack

if TYPE_CHECKING:  # which imports Triton
    from sglang_lora_moe.ops.low_rank import LowRank

UNIT, ROW_PADDING, K_PADDING = 32, 128, 128
GROUP_SIZES = (32, 64, 128)  # and one group for each row
DTYPES = (torch.bfloat16, torch.float16)
MOST_POOL_BYTES = 1 << 36  # the kernels count places in adapters in pieces of 16 bytes, in 32 bits

define("marlin_moe_repack(Tensor codes, int k, int bits, int halves, Tensor(a!) packed) -> ()")
define(
    "marlin_moe_gemm(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, Tensor tiles, Tensor counts, Tensor sorted_pairs, "
    "int top_k, Tensor? low, Tensor? low_pool, Tensor? low_records, Tensor? low_ranges, int low_max_rank, "
    "Tensor? slots, Tensor? rank, Tensor? split, Tensor? b_offset, Tensor? b_stride, "
    "Tensor? a_pool, Tensor? a_offset, Tensor? a_stride, Tensor? scaling, Tensor? lora_tiles, "
    "Tensor? next_pool, Tensor? next_records, Tensor(d!)? next_parts, Tensor(e!)? next_s, Tensor? told, "
    "Tensor(a!) out, Tensor(b!) partials, Tensor(c!) arrivals, int rows, int group_size, int halves, bool activation, float alpha, "
    "float cubic, float limit, float shift, bool gather, bool scatter, int config, int sms, bool overlap, int early, bool report, int behind) -> ()"
)


@dataclass(frozen=True)
class TileShape:
    """One entry of the kernel's table of shapes, as marlin_moe_shape() in csrc/ has it."""

    block_rows: int
    block_tokens: int
    block_k: int
    threads: int
    blocks_per_sm: int
    stages: int


SHAPES = (
    TileShape(32, 8, 512, 128, 4, 4),
    TileShape(128, 16, 128, 128, 4, 4),
    TileShape(128, 32, 128, 128, 4, 3),
    TileShape(128, 64, 64, 128, 2, 4),
    TileShape(256, 144, 128, 256, 1, 4),
)
EVERYWHERE = 4  # the shapes before it run on every GPU from sm_80 on; the others are wgmma's, for sm_90 alone


@dataclass(frozen=True)
class MarlinWeight:
    """Weights of all experts in the layout above; `rows` and `k` are the logical widths. group_size 0 = one group a row."""

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None  # [E, rows]
    rows: int
    k: int
    bits: int
    group_size: int
    halves: int


def padded_units(rows: int, k: int, halves: int) -> tuple[int, int]:
    """(row units, k units). With halves 2 each half is padded to 64, so that both end in the same unit."""
    step = ROW_PADDING // halves
    return -(-(rows // halves) // step) * step * halves // UNIT, -(-k // K_PADDING) * K_PADDING // UNIT


def marlin_moe_repack(weight: WNA16Weight, halves: int = 1, bias: torch.Tensor | None = None) -> MarlinWeight:
    """Canonical weights [E, rows, k] -> the layout above, on the weights' own device. Raises ValueError on what the kernel cannot read."""
    experts, rows, k = weight.packed.shape[0], weight.out_features, weight.in_features
    _check(weight, rows, k, halves)
    row_units, k_units = padded_units(rows, k, halves)
    packed = weight.packed.new_empty(experts, row_units, k_units, UNIT * weight.bits)
    if packed.is_cuda:
        build.load()
    torch.ops.sglang_lora_moe.marlin_moe_repack(weight.packed.contiguous(), k, weight.bits, halves, packed)
    order = _row_order(rows, row_units, halves).to(packed.device)
    one_group = weight.scales.shape[-1] == 1
    groups = 1 if one_group else k_units * UNIT // weight.group_size
    zeros = None if weight.zeros is None else _gather_rows(weight.zeros, order, groups)
    return MarlinWeight(packed, _gather_rows(weight.scales, order, groups), zeros, bias, rows, k, weight.bits, 0 if one_group else weight.group_size, halves)


@functools.cache
def fragment_order(bits: int) -> torch.Tensor:
    """int64 [1024]: the place row * 32 + k within a unit of each stored code, low bits first."""
    step, lane, fragment, upper, half, element = torch.meshgrid(*(torch.arange(n) for n in (2, 32, 2, 2, 2, 2)), indexing="ij")
    place = (4 * (lane // 4) + 2 * fragment + half) * UNIT + 16 * step + 8 * upper + 2 * (lane % 4) + element
    if bits == 8:  # bytes of a register: (half, element)
        return place.flatten()
    return place.permute(1, 0, 2, 5, 3, 4).flatten()  # nibbles of a word: register = upper, half; the second element 16 bits up


def _row_order(rows: int, row_units: int, halves: int) -> torch.Tensor:
    """int64 [row_units * 32]: the logical row at each place; `rows` where there is none."""
    place = torch.arange(row_units * UNIT)
    if halves == 1:
        return place.clamp(max=rows)
    unit, p, half_rows = place // UNIT, place % UNIT, rows // 2
    within = 16 * unit + 2 * (p // 4) + p % 2
    return torch.where(within < half_rows, p // 2 % 2 * half_rows + within, rows)


def _gather_rows(values: torch.Tensor, order: torch.Tensor, groups: int) -> torch.Tensor:
    """[E, rows, .] -> [E, row units, groups, 32], zero where there is no row or input."""
    padded = torch.nn.functional.pad(values, (0, groups - values.shape[-1], 0, 1))
    return padded[:, order].unflatten(1, (-1, UNIT)).transpose(2, 3).contiguous()


def _check(weight: WNA16Weight, rows: int, k: int, halves: int) -> None:
    name = "marlin_moe_repack"
    if weight.bits not in (4, 8):
        raise ValueError(f"{name}: {weight.bits}-bit weights; the marlin backend reads 4 and 8 bits")
    if weight.scales.dtype not in DTYPES:
        raise ValueError(f"{name}: scales of {weight.scales.dtype}; the marlin backend runs in bfloat16 or float16, use --dtype")
    if weight.scales.shape[-1] > 1 and weight.group_size not in GROUP_SIZES:
        raise ValueError(
            f"{name}: groups of {weight.group_size}; the marlin backend reads groups of 32, 64 and 128 and whole rows, use --moe-runner-backend torch_native"
        )
    if k % 8 or rows % (8 * halves):
        raise ValueError(f"{name}: a weight of {rows} x {k}; the marlin backend needs widths that divide by 8, use --moe-runner-backend torch_native")


_NO_LIMIT = 3.0e38
# g * sigmoid(alpha * (g + cubic * g^3)) * (u + shift), g = min(gate, limit), u = up within +-limit: (alpha, cubic, limit, shift)
_SIGMOID_FAMILY = {"silu": (1.0, 0.0, _NO_LIMIT, 0.0), "gelu_tanh": (1.5957691216057308, 0.044715, _NO_LIMIT, 0.0)}


def fuses_activation(spec: MoESpec) -> bool:
    """Whether the GEMM's end can apply the activation."""
    return spec.gated and spec.activation in _SIGMOID_FAMILY and (spec.swiglu_limit is None) == (spec.swiglu_alpha is None)


def activation_of(spec: MoESpec | None) -> tuple[bool, float, float, float, float]:
    """(whether there is one, alpha, cubic, limit, shift); None = none."""
    if spec is None:
        return False, 0.0, 0.0, 0.0, 0.0
    if not fuses_activation(spec):
        raise ValueError(f"marlin_moe_gemm: only gated silu, gelu_tanh and clamped SwiGLU are part of the GEMM, got {spec}")
    if spec.swiglu_limit is not None and spec.swiglu_alpha is not None:
        return True, spec.swiglu_alpha, 0.0, spec.swiglu_limit, 1.0
    return True, *_SIGMOID_FAMILY[spec.activation]


@dataclass(frozen=True)
class GemmScratch:
    """Sums of shared tiles, and counters, of blocks that have left theirs and of tiles that are taken: zero before and after every launch."""

    partials: torch.Tensor  # float32
    arrivals: torch.Tensor  # int32

    @classmethod
    def allocate(cls, sms: int, device: torch.device) -> GemmScratch:
        floats = max(2 * sms * s.blocks_per_sm * s.block_rows * s.block_tokens for s in SHAPES)
        counters = max(sms * s.blocks_per_sm for s in SHAPES) + 8  # adapters by slot: csrc/marlin_moe_lora.cuh
        return cls(torch.empty(floats, dtype=torch.float32, device=device), torch.zeros(counters, dtype=torch.int32, device=device))


def marlin_moe_gemm(
    x: torch.Tensor,
    weight: MarlinWeight,
    alignment: Alignment,
    top_k: int,
    out: torch.Tensor,
    scratch: GemmScratch,
    *,
    config: int,
    sms: int,
    gather: bool,
    scatter: bool,
    activation: MoESpec | None = None,
    addend: LowRank | None = None,
    overlap: bool = False,
    early: int = 0,
    report: bool = False,
    behind: int = 0,
    told: torch.Tensor | None = None,
) -> torch.Tensor:  # budget: the tensors of one grouped product and its launch
    """x [M, k] with `gather`, else [P, k] in routing order -> out, which it returns: [P, rows], or [P, rows / 2] with an activation.

    out lies in routing order, with `scatter` in pair order. The alignment's base block is SHAPES[config].block_tokens. Rows of pairs without an expert are not
    written. `addend`: of a shrink over the same alignment; B s is added before the activation. With A it is found by slot, for tiles of 32 tokens, or without
    records, where the kernel computes s itself: without `gather`, tiles of 16 tokens, LoRA tiles of up to 16. With `overlap` the kernel starts beside the end
    of the one before it; `early`: what that one may have written, 0 anything, 1 x alone (the alignment is older), 2 the addend alone. `told`, with 2 and
    without an addend: a word, 1 once x is complete. By wgmma, `report`: count beside the rows of each base tile, in its upper 16 bits, the tiles of rows that
    are stored (more than four stages of k); `behind`: the GEMM before this one, which made x, reports so often, and only that is waited for. An addend with a
    `following`, of up to 16 ranks: with `activation` and `report` s of the second product is made too, and reported as one more; without one it takes no
    report.
    """
    torch.ops.sglang_lora_moe.marlin_moe_gemm(
        x, weight.packed, weight.scales, weight.zeros, weight.bias,
        alignment.base_tiles, alignment.counts, alignment.sorted_pairs, top_k, *_addend_args(addend, alignment.lora_tiles), told,
        out, scratch.partials, scratch.arrivals, weight.rows, weight.group_size, weight.halves,
        *activation_of(activation), gather, scatter, config, sms, overlap, early, report, behind,
    )  # fmt: skip
    return out


def _addend_args(addend: LowRank | None, lora_tiles: torch.Tensor) -> tuple[torch.Tensor | int | None, ...]:
    if addend is None:
        return *(None,) * 4, 0, *(None,) * 14
    a, b = addend.a, addend.b
    assert addend.records is not None or a is not None, "the GEMM needs an addend with records, or with A"
    if b.pool.nbytes > MOST_POOL_BYTES:
        found = b.pool.nbytes / 2**30
        raise ValueError(f"marlin_moe_gemm: the adapter pool has {found:.0f} GiB of at most 64: lower --max-loras-per-batch or --max-lora-rank")
    slots = (None,) * 5 if a is None else (addend.token_slots, b.rank, b.split_a, b.offset, b.expert_stride)
    own = (None,) * 5 if a is None or addend.records is not None else (a.pool, a.offset, a.expert_stride, b.scaling, lora_tiles)
    then = addend.following
    following = (None,) * 4 if then is None else (then.a.pool, then.low.records, then.parts, then.low.s)
    return addend.s, b.pool, addend.records, addend.ranges, b.max_rank, *slots, *own, *following


def _repack_cpu(codes: torch.Tensor, k: int, bits: int, halves: int, packed: torch.Tensor) -> None:
    experts, rows, _ = codes.shape
    row_units, k_units = packed.shape[1:3]
    values = torch.nn.functional.pad(unpack(codes, bits)[..., :k], (0, k_units * UNIT - k, 0, 1))[:, _row_order(rows, row_units, halves)]
    units = values.unflatten(2, (-1, UNIT)).unflatten(1, (-1, UNIT)).transpose(2, 3).flatten(-2)  # [E, row units, k units, 1024]
    packed.copy_(pack(units[..., fragment_order(bits)], bits))


LIBRARY.impl("marlin_moe_repack", _repack_cpu, "CPU")
