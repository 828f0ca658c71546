"""Quantized weights for tests."""

from __future__ import annotations

import torch

from sglang_lora_moe.quantization.wna16 import WNA16Weight, pack


def quantize(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool = True, scale_dtype: torch.dtype | None = None) -> WNA16Weight:
    """Round-to-nearest quantization of a float weight [.., O, I], not a calibrated method."""
    groups = weight.float().unflatten(-1, (-1, group_size))
    levels = (1 << bits) - 1
    if symmetric:
        scale = groups.abs().amax(-1) / ((1 << (bits - 1)) - 0.5)
        zero = torch.full_like(scale, 1 << (bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / levels
        zero = (-low / scale.clamp(min=1e-12)).round().clamp(0, levels)
    scale = scale.clamp(min=1e-8).to(scale_dtype or weight.dtype)
    codes = (groups / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, levels)
    return WNA16Weight(pack(codes.to(torch.uint8).flatten(-2), bits), scale, None if symmetric else zero.to(torch.uint8), bits, group_size)
