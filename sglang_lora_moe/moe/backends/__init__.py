"""Which MoE backend runs, and how it is made. A backend registers a core here and, if it serves adapters, its LoRA functions."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from sglang_lora_moe.moe.runner import MoeRunnerCore
from sglang_lora_moe.quantization.base import QuantMethod

if TYPE_CHECKING:
    from sglang_lora_moe.lora.hooks import ExpertLoRAOps

# name, also of its module here -> (its core there, the module of its LoRA functions); imported when asked for: not every machine has Triton
BACKENDS = {"marlin": ("MarlinRunnerCore", "marlin_lora"), "triton": ("TritonRunnerCore", "triton_lora"), "torch_native": ("TorchNativeCore", "torch_lora")}
# Without a GPU, Triton kernels run in its interpreter, for tests.
_ON_CPU = ("torch_native", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("torch_native",)


def get_moe_runner_backend(name: str, device: torch.device | str, quant_method: QuantMethod) -> str:
    """Resolve "auto" and refuse, with the alternative, a backend that cannot run these weights on this device."""
    device_type = torch.device(device).type
    if name == "marlin" and "marlin" not in quant_method.backends:
        reads = "int4 and int8 weights in groups of 32, 64 or 128 or whole rows, with bfloat16 or float16 activations"
        raise ValueError(f"the marlin MoE backend runs {reads}, and these are {quant_method.name}; use --moe-runner-backend auto")
    if name == "marlin" and device_type != "cuda":
        raise ValueError(f"the marlin MoE backend needs a CUDA device, and the model is on {device_type}; use --moe-runner-backend auto")
    usable = [b for b in quant_method.backends if b in BACKENDS and (device_type == "cuda" or b in _ON_CPU)]
    if name == "auto":
        if not usable:
            raise ValueError(f"no MoE backend runs {quant_method.name} weights on {device_type}; they need one of {', '.join(quant_method.backends)}")
        return usable[0] if device_type == "cuda" or "torch_native" not in usable else "torch_native"
    if name not in usable:
        raise ValueError(f"the {name} MoE backend cannot run {quant_method.name} weights on {device_type}; usable here: {', '.join(usable) or 'none'}")
    return name


def make_core(name: str) -> MoeRunnerCore:
    """The core of a backend that `get_moe_runner_backend` returned."""
    return getattr(import_module(f"{__name__}.{name}"), BACKENDS[name][0])()


def make_lora_ops(name: str) -> "ExpertLoRAOps":
    """The LoRA functions of a backend; a backend without them refuses adapters here, when the layer is built."""
    if name not in BACKENDS:
        raise ValueError(f"the {name} MoE backend cannot apply adapters to experts; use --moe-runner-backend torch_native")
    ops: Any = import_module(f"{__name__}.{BACKENDS[name][1]}")
    return ops
