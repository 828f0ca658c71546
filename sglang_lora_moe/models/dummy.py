"""Random weights for `load_format="dummy"`: no files needed, activations of sensible size, experts used about evenly."""

import torch
from torch import nn

from sglang_lora_moe.models.places import QuantizedPlace, find_places
from sglang_lora_moe.quantization.wna16 import WNA16Weight

# Layers that write into the residual stream stay small beside the embedding. So the stream keeps telling tokens apart at every
# depth, and each token finds its own experts instead of all tokens finding the same few.
_RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight", "down_proj", "fc2.weight")


def fill_dummy(hf: nn.Module, seed: int) -> None:
    """Write random weights straight into the model's storage, tensor by tensor (experts by expert)."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, place in find_places(hf).items():
        storage = place.weight.packed if isinstance(place, QuantizedPlace) else place.storage
        if storage.device not in generators:
            generators[storage.device] = torch.Generator(storage.device).manual_seed(seed)
        if storage.dim() == 1 or name.endswith("_bias"):
            storage.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        width = place.weight.in_features if isinstance(place, QuantizedPlace) else storage.shape[-1]
        std = 1.0 if "embed" in name else width**-0.5
        if name.endswith(_RESIDUAL_WRITERS):
            std *= 0.1
        if isinstance(place, QuantizedPlace):
            _fill_quantized(place.weight, std, generators[storage.device])
            continue
        for matrix in storage if storage.dim() == 3 else (storage,):
            matrix.normal_(0.0, std, generator=generators[storage.device])


def _fill_quantized(weight: WNA16Weight, std: float, generator: torch.Generator) -> None:
    """Uniform codes around the zero point, scaled to `std`. Groups have random signs: codes are half a step below their zero on
    average, which would add up to one direction that all tokens share, and so to the same few experts for all."""
    weight.packed.random_(-(1 << 31), 1 << 31, generator=generator)
    weight.scales.bernoulli_(0.5, generator=generator).sub_(0.5).mul_(2.0 * std * 12**0.5 / (1 << weight.bits))
    if weight.zeros is not None:
        weight.zeros.fill_(1 << (weight.bits - 1))
