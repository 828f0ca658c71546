"""RMSNorm, with the residual addition that precedes it in a decoder layer.

residual' = residual + x          (stored in the activation dtype, as transformers does)
out = weight * (residual' / sqrt(mean(residual'^2) + eps))      Zhang & Sennrich 2019; float32 inside

x may come with the adapters' part of it still to be added (`LinearAddend` of the linear that made x).
"""

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch, norm_rope
from sglang_lora_moe.ops.lora_linear import (
    NO_LINEAR_ADDEND,
    LinearAddend,
    expand_rows,
    linear_expand,
    load_s_sum,
    load_whole_rows,
    matrix_at,
    matrix_of,
    of_slot,
)
from sglang_lora_moe.ops.low_rank import pdl_early, pdl_wait

NARROW_MIN = 133  # tokens from which a norm that adds what adapters add is csrc/norm_rope.cu's if it can, or takes few registers, for two programs
#                   on a multiprocessor (132 on an H200)
ADD_ROWS_MAX = 256  # tokens up to which such a norm here owns one token a program


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, eps, H, x_stride,
    s_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, width, num_slots,
    HAS_RESIDUAL: tl.constexpr, ADDEND: tl.constexpr, SHRINK: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, SLOTS_PAD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (t, 0) norms token t, held in registers. With SHRINK programs (t, 1 + j) norm it too, each for one block of ranks of one part."""
    pdl_early(PDL)
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    token, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = token * H
    # What no kernel of a step writes is read before the kernel before this one is complete: weights, adapters, the step's slots.
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if ADDEND or SHRINK:
        slot = tl.load(slots_ptr + token)
    if ADDEND:  # the kernel before is a library's, so that what follows starts late: as few loads as can be wait for each other
        slots = tl.arange(0, SLOTS_PAD)
        ranks = tl.load(rank_ptr + slots, mask=slots < num_slots, other=0)
        offsets = tl.load(offset_ptr + slots, mask=slots < num_slots, other=0)
        scalings = tl.load(scaling_ptr + slots, mask=slots < num_slots, other=0.0)
        rank, b_ptr = of_slot(ranks, slot, SLOTS_PAD), matrix_at(pool_ptr, of_slot(offsets, slot, SLOTS_PAD))
        b = load_whole_rows(b_ptr, cols, mask, rank, 0, RANK_BLOCK)
    if SHRINK:
        part = tl.maximum(job - 1, 0) // RANK_BLOCKS
        rr = tl.maximum(job - 1, 0) % RANK_BLOCKS * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
        entry = part * part_stride + tl.maximum(slot, 0)
        real = rr < tl.load(rank_ptr + entry, mask=(slot >= 0) & (job > 0), other=0)
        a_ptr = matrix_of(pool_ptr, offset_ptr, entry)
        a = tl.load(a_ptr + rr.to(tl.int64)[:, None] * H + cols[None, :], mask=real[:, None] & mask[None, :], other=0.0)
    pdl_wait(PDL)
    x = tl.load(x_ptr + token * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row + cols, mask=mask, other=0.0)
    if ADDEND:
        low = load_s_sum(s_ptr + token * s_stride, 0, width, split_stride, SPLITS, RANK_BLOCK)
        if rank > 0:
            delta = expand_rows(low, b, s_ptr + token * s_stride, b_ptr, cols, mask, rank, width, split_stride, SPLITS, RANK_BLOCK)
            x = (x + of_slot(scalings, slot, SLOTS_PAD) * delta).to(x_ptr.dtype.element_ty).to(tl.float32)  # as the linear would have rounded it
    if HAS_RESIDUAL:
        x += residual.to(tl.float32)
        stored = x.to(residual_ptr.dtype.element_ty)
        if job == 0:
            tl.store(sum_ptr + row + cols, stored, mask=mask)
        x = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    out = (x * scale * weight).to(out_ptr.dtype.element_ty)
    if job == 0:
        tl.store(out_ptr + row + cols, out, mask=mask)
    elif SHRINK:
        low = tl.sum(a.to(tl.float32) * out.to(tl.float32)[None, :], axis=1)
        tl.store(s_ptr + token * s_stride + part * width + rr, low, mask=real)


@triton.jit
def norm_row(x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, scale_ptr, eps, M, H, token, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One token's norm, if it is below M, and what it is scaled by."""
    cols = tl.arange(0, BLOCK)
    mask = (cols < H) & (token < M)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    row = token.to(tl.int64) * H
    pdl_wait(PDL)
    x = tl.load(x_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
        stored = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row + cols, stored, mask=mask)
        x = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    tl.store(scale_ptr + token, scale, mask=token < M)
    tl.store(out_ptr + row + cols, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None, addend: LinearAddend | None = None) -> torch.Tensor:
    """The norm of x [M, H] (or of residual + x, which is written back to residual; with an addend x may be too). Only x alone may have gaps between rows."""
    if addend is not None and residual is not None:
        if (addend.grouped or x.shape[0] >= NARROW_MIN) and norm_rope.norms(x, addend):
            _check(x, residual)
            return norm_rope.norm_rows(x, residual, weight, torch.empty_like(x), eps, addend)
        if addend.grouped or x.shape[0] > ADD_ROWS_MAX:
            x, addend = linear_expand(x, addend), None
    return _launch(x, weight, eps, residual, residual, addend, None)


def rms_norm_shrink(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, low: LinearAddend) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm n of x [M, H] (or of residual + x), and the sum; fills low.s [1, M, parts, width] with A n of the linear that reads n next.

    One launch, in which several programs norm the same token, each for other rows of A.
    """
    total = x if residual is None else torch.empty_like(x)
    return _launch(x, weight, eps, residual, total, None, low), total


def _check(x: torch.Tensor, residual: torch.Tensor | None) -> None:
    packed = x.is_contiguous() or (residual is None and x.dim() == 2 and x.stride(1) == 1)
    if not packed or (residual is not None and (residual.shape != x.shape or not residual.is_contiguous())):
        raise ValueError(f"rms_norm: x {tuple(x.shape)} and residual must be contiguous and of one shape")


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    total: torch.Tensor | None,
    addend: LinearAddend | None,
    low: LinearAddend | None,
) -> torch.Tensor:
    _check(x, residual)
    h = x.shape[-1]
    out = x.new_empty(x.shape)
    block, extra, jobs, splits, rank_block, rank_blocks = triton.next_power_of_2(h), (*NO_LINEAR_ADDEND, 0, 1), 1, 1, 16, 1
    options: dict[str, int] = {}
    if addend is not None:
        extra, splits, rank_block = (*addend.kernel_args(), addend.s.shape[3], addend.num_slots), addend.s.shape[0], addend.rank_block
        narrow = x.is_cuda and x.shape[0] >= NARROW_MIN
        options, rank_block = {"maxnreg": 64} if narrow else {}, min(8, rank_block) if narrow else rank_block
    if low is not None:
        splits, _, parts, width = low.s.shape
        assert splits == 1, splits
        rank_block = min(4, triton.next_power_of_2(width))
        rank_blocks = triton.cdiv(width, rank_block)
        extra, jobs = (*low.shrink_args(), width, 1), 1 + parts * rank_blocks
    plain = addend is None and low is None
    _rms_norm_kernel[(x.numel() // h, jobs)](
        x, residual, weight, out, total, eps, h, x.stride(-2), *extra, HAS_RESIDUAL=residual is not None, ADDEND=addend is not None, SHRINK=low is not None,
        SPLITS=splits, RANK_BLOCK=rank_block, RANK_BLOCKS=rank_blocks, BLOCK=block, SLOTS_PAD=triton.next_power_of_2(extra[-1]),
        num_warps=min(16, max(1, block // (512 if plain else 256 if low is not None else 128))), **options, **launch.options(x.device),
    )  # fmt: skip
    return out
