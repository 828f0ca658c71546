"""The first step of a model on a GPU: the largest there can be, so that scratch memory has its final size afterwards.

Comes before free memory is measured for the KV cache and before graphs are captured. Every token is padding: it is written
to the dump page and reads no expert.
"""

from __future__ import annotations

import torch

from sglang_lora_moe.engine.model_runner import Model


@torch.inference_mode()
def run_largest_step(model: Model, with_adapters: bool) -> None:
    """One step of `ctx.max_tokens` tokens over all requests, for each family."""
    ctx = model.ctx
    requests = ctx.max_requests
    length = min(ctx.max_tokens // requests, ctx.page_table.shape[1] * ctx.page_size)
    first = min(ctx.max_tokens - length * (requests - 1), ctx.page_table.shape[1] * ctx.page_size)
    lens = [first] + [length] * (requests - 1)
    ctx.inputs.copy_(ctx.make_inputs(ctx.device)[0])
    ctx.num_tokens, ctx.num_requests, ctx.num_logits = sum(lens), requests, requests
    ctx.query_lens = ctx.seq_lens_host = lens
    sizes = torch.tensor(lens, dtype=torch.int32, device=ctx.device)
    ctx.seq_lens.copy_(sizes)
    ctx.query_starts[1:].copy_(sizes.cumsum(0))
    for ctx.lora_active in (False, True) if with_adapters else (False,):
        model.forward_logits()
    ctx.lora_active = False
    torch.cuda.synchronize()
