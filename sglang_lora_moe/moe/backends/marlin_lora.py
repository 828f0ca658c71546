"""LoRA functions of the marlin backend (`lora.hooks.ExpertLoRAOps`): the triton backend's, without an addend.

The CUDA GEMMs know no adapters: B13 is added with the activation, B2 with the combine, the shrinks run beside the GEMMs.
"""

from __future__ import annotations

from sglang_lora_moe.moe.backends.triton_lora import act_with_delta, combine_with_delta, shrink

__all__ = ["act_with_delta", "addend", "combine_with_delta", "shrink"]

addend = None
