"""The `triton` attention backend: one kernel reads the paged cache through the page table, for prefill and decode alike.

Nothing is gathered and no list of the host is read, so a captured graph replays with new page tables and lengths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.ops.paged_attention import num_splits, paged_attention, scratch_elements

if TYPE_CHECKING:
    from sglang_lora_moe.layers.attention import PagedAttention
    from sglang_lora_moe.ops.lora_linear import LinearAddend


class TritonAttention:
    """Reads the step's device tensors only; the scratch of decode is shared by all layers."""

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx
        self._scratch = torch.empty(0, dtype=torch.float32, device=ctx.device)
        self._tickets = torch.zeros(2, dtype=torch.int32, device=ctx.device)

    def begin_step(self) -> None:
        """Nothing to prepare: the kernels read the step context."""

    def merges(self, layer: PagedAttention) -> bool:
        """Whether the step's attention ends in a merge of splits, which can also start what adapters add to the next linear."""
        return self.ctx.num_tokens == self.ctx.num_requests and num_splits(self.ctx.num_requests, layer.spec.kv.num_heads) > 1

    def attend(self, q: torch.Tensor, layer: PagedAttention, sinks: torch.Tensor | None, low: LinearAddend | None = None, apart: bool = False) -> Any:
        """q [T, Hq, Dk] -> [T, Hq, value_dim]; rows of padding tokens are undefined. `low`, if `merges`: its s is filled. `apart`: of `paged_attention`."""
        ctx, spec, requests = self.ctx, layer.spec, self.ctx.num_requests
        decode = ctx.num_tokens == requests  # every request has one token
        return paged_attention(
            q.contiguous(), layer.k_cache, layer.v_cache, ctx.page_table[:requests], ctx.query_starts[: requests + 1], ctx.seq_lens[:requests],
            page_size=ctx.page_size, scale=spec.scaling, decode=decode, window=spec.window, sinks=sinks,
            scratch=self._decode_scratch(layer) if decode else None, low=low, tickets=self._tickets, apart=apart,
        )  # fmt: skip

    def _decode_scratch(self, layer: PagedAttention) -> torch.Tensor:
        """Sized once for the largest decode step of any layer so far: the first step of a model is the largest, before graphs are captured."""
        spec = layer.spec
        needed = scratch_elements(self.ctx.max_requests, spec.num_heads, spec.kv.num_heads, spec.value_dim)
        if needed > self._scratch.numel():
            self._scratch = torch.empty(needed, dtype=torch.float32, device=self.ctx.device)
        return self._scratch
