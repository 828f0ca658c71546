"""What one step of the engine needs in every layer: static buffers that layers reference from build time on.

The model runner fills it once a step; attention reads the KV fields, LoRA wrappers read the slots, the language-model
head reads the logit rows. The buffers never move, so that captured graphs read them again at replay. Rows beyond the
step's tokens are padding: slot -1, KV row of the dump page, and no work is done for them.
"""

from __future__ import annotations

from typing import Any

import torch


class StepContext:
    """Static buffers of one model runner.

    Device tensors (Mmax = `max_tokens`, Bmax = `max_requests`):
        input_ids, positions  int64 [Mmax]
        token_slots           int32 [Mmax]            adapter slot of each token, -1 = base
        kv_slots              int64 [Mmax]            row of the paged KV cache each token writes (page * page_size + offset)
        page_table            int32 [Bmax, max_pages]
        query_starts          int32 [Bmax + 1]        first token of each request in the packed step
        seq_lens              int32 [Bmax]            tokens of each request in the cache after this step
        logit_rows            int64 [Mmax]            packed token rows whose logits are wanted
        logit_slots           int32 [Mmax]            adapter slot of each of those rows
    Host values: num_tokens, num_requests, num_logits, lora_active, and `query_lens` / `seq_lens_host` (lists) for
    implementations that loop over requests.
    """

    def __init__(self, max_tokens: int, max_requests: int, max_pages: int, page_size: int, device: torch.device | str = "cpu") -> None:
        self.max_tokens, self.max_requests, self.page_size = max_tokens, max_requests, page_size
        self.device = torch.device(device)

        def buffer(*shape: int, dtype: torch.dtype, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=self.device)

        self.input_ids = buffer(max_tokens, dtype=torch.int64)
        self.positions = buffer(max_tokens, dtype=torch.int64)
        self.token_slots = buffer(max_tokens, dtype=torch.int32, fill=-1)
        self.kv_slots = buffer(max_tokens, dtype=torch.int64)
        self.page_table = buffer(max_requests, max_pages, dtype=torch.int32)
        self.query_starts = buffer(max_requests + 1, dtype=torch.int32)
        self.seq_lens = buffer(max_requests, dtype=torch.int32)
        self.logit_rows = buffer(max_tokens, dtype=torch.int64)
        self.logit_slots = buffer(max_tokens, dtype=torch.int32, fill=-1)

        self.num_tokens = self.num_requests = self.num_logits = 0
        self.lora_active = False  # host bool: some request of the step has an adapter
        self.query_lens: list[int] = []
        self.seq_lens_host: list[int] = []
        self.host_cache: dict[str, Any] = {}  # what host loops derived from the buffers, each with the content it was derived from
