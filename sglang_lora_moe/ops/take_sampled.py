"""Puts the tokens that the last step sampled into this step's inputs, without a way over the host.

input_ids[t] = sampled[token_source[t]]   where token_source[t] >= 0
"""

import torch
import triton
import triton.language as tl

from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import pdl_wait


@triton.jit
def _take_sampled_kernel(input_ids_ptr, source_ptr, sampled_ptr, tokens, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl_wait(PDL)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + token, mask=token < tokens, other=-1)
    ids = tl.load(sampled_ptr + source, mask=source >= 0, other=0)
    tl.store(input_ids_ptr + token, ids, mask=source >= 0)


def take_sampled(input_ids: torch.Tensor, source: torch.Tensor, sampled: torch.Tensor) -> None:
    """input_ids int64 [M] in place; source int32 [M], -1 = keep; sampled int64 [B]."""
    tokens = input_ids.shape[0]
    _take_sampled_kernel[(triton.cdiv(tokens, 256),)](input_ids, source, sampled, tokens, BLOCK=256, num_warps=2, **launch.options(input_ids.device))
