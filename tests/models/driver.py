"""Runs packed steps of a served model as the engine does: pages handed out in a scrambled order, several requests a step."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.adapter import AdapterRules
from sglang_lora_moe.lora.manager import LoRAManager
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.reader import AdapterReader
from sglang_lora_moe.lora.targets import choose_targets
from sglang_lora_moe.models.served import ServedModel
from tests.references import order_slots


@dataclass
class Sequence:
    tokens: list[int]
    done: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)
    slot: int = -1


class Driver:
    """`step([(sequence, n), ...])` computes the next n tokens of each and returns their logits [n, V], one tensor each."""

    def __init__(self, model: ServedModel, num_pages: int = 64, seed: int = 0) -> None:
        self.model, self.ctx = model, model.ctx
        model.allocate_kv(num_pages)
        self.free = list(range(1, num_pages))
        random.Random(seed).shuffle(self.free)

    def step(self, work: list[tuple[Sequence, int]], padding: int = 0) -> list[torch.Tensor]:
        ctx, start = self.ctx, 0
        ctx.query_lens, ctx.seq_lens_host, ctx.num_requests = [], [], len(work)
        for b, (seq, n) in enumerate(work):
            end = seq.done + n
            while len(seq.pages) * ctx.page_size < end:
                seq.pages.append(self.free.pop())
            positions = torch.arange(seq.done, end)
            pages = torch.tensor(seq.pages)
            rows = slice(start, start + n)
            ctx.input_ids[rows], ctx.positions[rows] = torch.tensor(seq.tokens[seq.done : end]), positions
            ctx.kv_slots[rows] = pages[positions // ctx.page_size] * ctx.page_size + positions % ctx.page_size
            ctx.token_slots[rows] = seq.slot
            ctx.page_table[b, : len(seq.pages)] = pages.to(torch.int32)
            ctx.query_starts[b + 1], ctx.seq_lens[b] = start + n, end
            ctx.query_lens.append(n)
            ctx.seq_lens_host.append(end)
            seq.done, start = end, start + n
        ctx.num_tokens = start + padding
        ctx.kv_slots[start : start + padding] = 0  # the dump page
        ctx.token_slots[start : start + padding] = -1
        order_slots(ctx, start + padding)
        ctx.num_logits = start
        ctx.logit_rows[:start] = torch.arange(start)
        ctx.logit_slots[:start] = ctx.token_slots[:start]
        logits = self.model.forward_logits().float()
        return list(logits.split(ctx.query_lens))

    def run(self, seq: Sequence, n: int) -> torch.Tensor:
        return self.step([(seq, n)])[0]


def put_in_slot(model: ServedModel, adapter: Path, max_rank: int = 64) -> int:
    """Wrap the layers of `model` (once) and read the adapter; its slot."""
    targets = choose_targets(model.hf)[0]
    pool = LoRAMemoryPool(list(targets.values()), 2, max_rank, model.dtype)
    rules = AdapterRules(targets, model.rename_adapter_module, max_rank, model.dtype, refused=model.refused_adapter_modules)
    manager = LoRAManager(model, AdapterReader(rules, pool.layout), pool)
    entry, _ = manager.register("a", manager.reader.read(str(adapter)), pinned=True)
    while manager.is_loading:
        manager.poll()
    model.ctx.lora_active = True
    slot = manager.slots.slot_of(entry.revision)
    assert slot is not None
    return slot


def make_context(max_tokens: int = 96, max_requests: int = 8, max_pages: int = 32, page_size: int = 4) -> StepContext:
    return StepContext(max_tokens, max_requests, max_pages, page_size)
