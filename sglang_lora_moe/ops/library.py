"""The one operator library of the package: schemas are defined here from Python, CUDA implementations come from `csrc/`."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("sglang_lora_moe", "FRAGMENT")
