"""Token embedding under the name by which adapters address it."""

import torch
import torch.nn.functional as F
from torch import nn


class Embedding(nn.Module):
    """Rows of weight [V, H] by token id."""

    def __init__(self, name: str, vocab: int, hidden: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(vocab, hidden, dtype=dtype, device=device), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids int [...] -> [..., H]."""
        return F.embedding(input_ids, self.weight)
