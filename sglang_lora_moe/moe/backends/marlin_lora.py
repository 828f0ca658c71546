"""LoRA functions of the marlin backend (`lora.hooks.ExpertLoRAOps`): the triton backend's.

Grouped, the CUDA GEMMs add B s before their store. Per pair they know no adapters: the core adds B13 with the activation
and B2 with the combine.
"""

from sglang_lora_moe.moe.backends.triton_lora import act_with_delta, addend, combine_with_delta, shrink

__all__ = ["act_with_delta", "addend", "combine_with_delta", "shrink"]
