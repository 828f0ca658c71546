"""LoRA functions of the triton backend (`lora.hooks.AddendOps`).

The shrink is launched before a GEMM, whose kernel starts beside it (programmatic dependent launch) and adds B s at its end.
"""

from __future__ import annotations

import torch

from sglang_lora_moe.lora.stacks import Stack
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import RunnerInput
from sglang_lora_moe.ops.fused_moe_lora import moe_shrink
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.moe_wgmma_gemm import WgmmaTile


def addend(inp: RunnerInput, rows: torch.Tensor, stack_a: Stack, stack_b: Stack, routing: Routing, rows_from: str) -> LowRank:
    """What a triton core adds to its GEMM. NOTE: the GEMM must be the very next launch; it waits for the shrink alone."""
    gather = rows_from == "tokens"
    wgmma = routing.base_block % WgmmaTile().tokens == 0  # beside Triton's GEMMs the layer ends 1 % later with the CUDA shrink
    return moe_shrink(rows, stack_a, stack_b, routing, inp.workspace, gather=gather, name="lora.13" if gather else "lora.2", by_cuda=wgmma)
