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
from sglang_lora_moe.ops.lora_linear import NO_LINEAR_ADDEND, LinearAddend, expand_rows
from sglang_lora_moe.ops.low_rank import pdl_wait


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, H,
    s_ptr, slots_ptr, pool_ptr, offset_ptr, rank_ptr, scaling_ptr, part_stride, s_stride, split_stride,
    HAS_RESIDUAL: tl.constexpr, ADDEND: tl.constexpr, SPLITS: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token; the row is held in registers."""
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # no kernel writes it, so it may be read early
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = token * H
    x = tl.load(x_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
    if ADDEND:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            rank = tl.load(rank_ptr + slot)
            b_ptr = pool_ptr + tl.load(offset_ptr + slot)
            delta = expand_rows(s_ptr, token * s_stride, 0, b_ptr, cols, mask, rank, split_stride, SPLITS, RANK_BLOCK)
            x = (x + tl.load(scaling_ptr + slot) * delta).to(x_ptr.dtype.element_ty).to(tl.float32)  # as the linear would have rounded it
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
        stored = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row + cols, stored, mask=mask)
        x = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    tl.store(out_ptr + row + cols, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    addend: LinearAddend | None = None,
) -> torch.Tensor:
    """Return the norm of x [M, H] (or of residual + x, which is written back to residual). Raises ValueError on strided rows."""
    if not x.is_contiguous() or (residual is not None and (residual.shape != x.shape or not residual.is_contiguous())):
        raise ValueError(f"rms_norm: x {tuple(x.shape)} and residual must be contiguous and of one shape")
    h = x.shape[-1]
    out = torch.empty_like(x) if out is None else out
    block = triton.next_power_of_2(h)
    extra = NO_LINEAR_ADDEND if addend is None else addend.kernel_args()
    _rms_norm_kernel[(x.numel() // h,)](
        x, residual, weight, out, eps, h, *extra, HAS_RESIDUAL=residual is not None, ADDEND=addend is not None,
        SPLITS=1 if addend is None else addend.s.shape[0], RANK_BLOCK=16 if addend is None else addend.rank_block, BLOCK=block,
        num_warps=min(16, max(1, block // (512 if addend is None else 128))), **(launch.options(x.device) if addend is None else {"PDL": False}),
    )  # fmt: skip
    return out
