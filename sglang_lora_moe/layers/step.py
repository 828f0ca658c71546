"""What one step of the engine needs in every layer: static buffers that layers reference from build time on.

The model runner fills it once a step; attention reads the KV fields, LoRA wrappers read the slots, the language-model
head reads the logit rows. The buffers never move, so that captured graphs read them again at replay. Rows beyond the
step's tokens are padding: slot -1, KV row of the dump page, and no work is done for them.
"""

from typing import Any

import torch

PAGE_WRITES = 4096  # changes of the page table that travel with a step's other inputs; more go in a transfer of their own


class StepContext:
    """Static buffers of one model runner.

    Device tensors (Mmax = `max_tokens`, Bmax = `max_requests`):
        input_ids, positions  int64 [Mmax]
        token_slots           int32 [Mmax]            adapter slot of each token, -1 = base
        slot_order            int32 [Mmax]            the step's tokens sorted by slot, so that kernels find tokens of one adapter together
        ordered_slots         int32 [Mmax]            the slots in that order
        token_source          int32 [Mmax]            row of `sampled` that holds the token's id, -1 = input_ids holds it
        kv_slots              int64 [Mmax]            row of the paged KV cache each token writes (page * page_size + offset)
        page_table            int32 [Bmax, max_pages]
        query_starts          int32 [Bmax + 1]        first token of each request in the packed step
        seq_lens              int32 [Bmax]            tokens of each request in the cache after this step
        logit_rows            int64 [Mmax]            packed token rows whose logits are wanted
        logit_slots           int32 [Mmax]            adapter slot of each of those rows
        page_at, page_values  int64, int32 [PAGE_WRITES]  entries of the flattened page_table to change before the step
        sampled               int64 [Bmax]            what the last step sampled, in its order; the next step may read it from here
    All but page_table and sampled are views of `inputs`, so that one transfer sets them.
    Host values: num_tokens, num_requests, num_logits, lora_active, and `query_lens` / `seq_lens_host` (lists) for
    implementations that loop over requests.
    """

    def __init__(self, max_tokens: int, max_requests: int, max_pages: int, page_size: int, device: torch.device | str = "cpu") -> None:
        self.max_tokens, self.max_requests, self.page_size = max_tokens, max_requests, page_size
        self.device = torch.device(device)
        self.inputs, views = self.make_inputs(self.device)
        self.input_ids, self.positions, self.kv_slots = views["input_ids"], views["positions"], views["kv_slots"]
        self.token_slots, self.token_source = views["token_slots"], views["token_source"]
        self.slot_order, self.ordered_slots = views["slot_order"], views["ordered_slots"]
        self.query_starts, self.seq_lens = views["query_starts"], views["seq_lens"]
        self.logit_rows, self.logit_slots = views["logit_rows"], views["logit_slots"]
        self.page_at, self.page_values = views["page_at"], views["page_values"]
        self.page_table = torch.zeros(max_requests, max_pages, dtype=torch.int32, device=self.device)
        self.sampled = torch.zeros(max_requests, dtype=torch.int64, device=self.device)

        self.num_tokens = self.num_requests = self.num_logits = 0
        self.lora_layout = 0  # changes when adapters begin to touch layers that none touched before
        self.lora_active = False  # host bool: some request of the step has an adapter
        self.query_lens: list[int] = []
        self.seq_lens_host: list[int] = []
        self.host_cache: dict[str, Any] = {}  # what host loops derived from the buffers, each with the content it was derived from

    def make_inputs(self, device: torch.device | str, pin_memory: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A flat buffer with the inputs of a step and its views by name; the staging buffers of the host have the same form."""
        m, b = self.max_tokens, self.max_requests
        wide = {"input_ids": m, "positions": m, "kv_slots": m, "logit_rows": m, "page_at": PAGE_WRITES}
        narrow = dict.fromkeys(("token_slots", "slot_order", "ordered_slots", "logit_slots", "token_source"), m)
        narrow |= {"query_starts": b + 1, "seq_lens": b, "page_values": PAGE_WRITES}
        flat = torch.zeros(8 * sum(wide.values()) + 4 * sum(narrow.values()), dtype=torch.uint8, device=device, pin_memory=pin_memory)
        views: dict[str, torch.Tensor] = {}
        start = 0
        for sizes, dtype in ((wide, torch.int64), (narrow, torch.int32)):
            for name, count in sizes.items():
                views[name] = flat[start : start + count * dtype.itemsize].view(dtype)
                start += count * dtype.itemsize
        for name in ("token_slots", "ordered_slots", "logit_slots", "token_source"):
            views[name].fill_(-1)
        views["slot_order"].copy_(torch.arange(m))
        return flat, views
