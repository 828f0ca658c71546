"""Root-mean-square norm as one call, in place of transformers' five."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019); float32 inside, x's dtype outside."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H]."""
        wide = x.to(self.weight.dtype)  # some models keep norm weights in float32 beside float16 activations
        return F.rms_norm(wide, self.weight.shape, self.weight, self.variance_epsilon).to(x.dtype)
