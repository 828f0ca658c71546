"""The one operator library of the package: schemas are defined here from Python, CUDA implementations come from `csrc/`."""

import torch

LIBRARY = torch.library.Library("sglang_lora_moe", "FRAGMENT")


def define(schema: str) -> None:
    """An operator that only writes into the caller's buffers, so that there is nothing to infer for it."""
    LIBRARY.define(schema)
    torch.library.register_fake(f"sglang_lora_moe::{schema.split('(')[0]}", lambda *args: None, lib=LIBRARY)
