"""RMSNorm, with the residual addition that precedes it in a decoder layer.

residual' = residual + x          (stored in the activation dtype, as transformers does)
out = weight * (residual' / sqrt(mean(residual'^2) + eps))      Zhang & Sennrich 2019; float32 inside

x may come with the adapters' part of it still to be added (`LinearAddend` of the linear that made x).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.lora_linear import NO_LINEAR_ADDEND, LinearAddend, expand_rows, matrix_of
from sglang_lora_moe.ops.low_rank import pdl_wait


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, eps, H,
    s_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride, width,
    HAS_RESIDUAL: tl.constexpr, ADDEND: tl.constexpr, SHRINK: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (t, 0) norms token t, held in registers. With SHRINK programs (t, 1 + j) norm it too, each for one block of ranks of one part."""
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # no kernel writes it, so it may be read early
    pdl_wait(PDL)
    token, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = token * H
    x = tl.load(x_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
    if ADDEND:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            rank = tl.load(rank_ptr + slot)
            b_ptr = matrix_of(pool_ptr, offset_ptr, slot)
            delta = expand_rows(s_ptr, token * s_stride, b_ptr, cols, mask, rank, split_stride, SPLITS, RANK_BLOCK)
            x = (x + tl.load(scaling_ptr + slot) * delta).to(x_ptr.dtype.element_ty).to(tl.float32)  # as the linear would have rounded it
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
        stored = x.to(residual_ptr.dtype.element_ty)
        if job == 0:
            tl.store(sum_ptr + row + cols, stored, mask=mask)
        x = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    out = (x * scale * weight).to(out_ptr.dtype.element_ty)
    if job == 0:
        tl.store(out_ptr + row + cols, out, mask=mask)
    elif SHRINK:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            part = (job - 1) // RANK_BLOCKS
            rr = (job - 1) % RANK_BLOCKS * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
            real = rr < tl.load(rank_ptr + part * part_stride + slot)
            a_ptr = matrix_of(pool_ptr, offset_ptr, part * part_stride + slot)
            a = tl.load(a_ptr + rr.to(tl.int64)[:, None] * H + cols[None, :], mask=real[:, None] & mask[None, :], other=0.0)
            low = tl.sum(a.to(tl.float32) * out.to(tl.float32)[None, :], axis=1)
            tl.store(s_ptr + token * s_stride + part * width + rr, low, mask=real)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    addend: LinearAddend | None = None,
) -> torch.Tensor:
    """Return the norm of x [M, H] (or of residual + x, which is written back to residual). Raises ValueError on strided rows."""
    return _launch(x, weight, eps, residual, residual, out, addend, None)


def rms_norm_shrink(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, low: LinearAddend) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm n of x [M, H] (or of residual + x), and the sum; fills low.s [1, M, parts, width] with A n of the linear that reads n next.

    One launch: several programs norm the same token, each for other rows of A, so nothing waits for a norm.
    """
    total = x if residual is None else torch.empty_like(x)
    return _launch(x, weight, eps, residual, total, None, None, low), total


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    total: torch.Tensor | None,
    out: torch.Tensor | None,
    addend: LinearAddend | None,
    low: LinearAddend | None,
) -> torch.Tensor:
    if not x.is_contiguous() or (residual is not None and (residual.shape != x.shape or not residual.is_contiguous())):
        raise ValueError(f"rms_norm: x {tuple(x.shape)} and residual must be contiguous and of one shape")
    h = x.shape[-1]
    out = torch.empty_like(x) if out is None else out
    block, extra, jobs, splits, rank_block, rank_blocks = triton.next_power_of_2(h), (*NO_LINEAR_ADDEND, 0), 1, 1, 16, 1
    if addend is not None:
        extra, splits, rank_block = (*addend.kernel_args(), addend.s.shape[3]), addend.s.shape[0], addend.rank_block
    if low is not None:
        splits, _, parts, width = low.s.shape
        assert splits == 1, splits
        rank_block = min(4, triton.next_power_of_2(width))
        rank_blocks = triton.cdiv(width, rank_block)
        extra, jobs = (*low.shrink_args(), width), 1 + parts * rank_blocks
    plain = addend is None and low is None
    _rms_norm_kernel[(x.numel() // h, jobs)](
        x, residual, weight, out, total, eps, h, *extra, HAS_RESIDUAL=residual is not None, ADDEND=addend is not None, SHRINK=low is not None,
        SPLITS=splits, RANK_BLOCK=rank_block, RANK_BLOCKS=rank_blocks, BLOCK=block,
        num_warps=min(16, max(1, block // (512 if plain else 256 if low is not None else 128))), **launch.options(x.device),
    )  # fmt: skip
    return out
