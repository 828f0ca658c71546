"""Logits of an engine that is fed given tokens and given expert ids: what ARCHITECTURE.md, "Numerics" compares lower precisions by.

    base = run_reference(transformers_model, tokens)                     # float32 logits, and which experts it chose
    forced = ForcedEngine(engine)                                        # made with disable_cuda_graph=True
    for (adapter, rows) in forced.logits({None: base, "sql": merged}, prompt=12, copies=8): ...

Which of two nearly equal experts is chosen is a coin toss that rounding decides, and it moves a whole row; with the ids given,
what is left is the arithmetic. Expert weights still come from the engine's own router logits. Everything else is the engine's
own path: chunked prefill, mixed batches, adapters, and decode in captured graphs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from sglang_lora_moe.engine.cuda_graph import DecodeGraphs, ladder
from sglang_lora_moe.engine.engine import Engine
from sglang_lora_moe.engine.request import Request
from sglang_lora_moe.layers.topk import Router, RouterSpec, with_shared


@dataclass
class Reference:
    """One sequence through a model in float32."""

    tokens: list[int]
    logits: torch.Tensor  # [n, V]
    experts: list[torch.Tensor]  # int64 [n, K], one per layer with experts, in order


@torch.no_grad()
def run_reference(model: Any, tokens: list[int]) -> Reference:
    """`model`: transformers' (or PEFT's around it), whose `experts` modules are called with the ids that its routers chose."""
    chosen: list[torch.Tensor] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and not value.is_floating_point()]
        assert len(ids) == 1, "expected an experts module to be called with hidden states, expert ids and their weights"
        chosen.append(ids[0].reshape(len(tokens), -1).long().cpu())

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for name, module in model.named_modules() if name.endswith("mlp.experts")]
    try:
        logits = model(input_ids=torch.tensor([tokens], device=next(model.parameters()).device)).logits[0].float().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return Reference(tokens, logits, chosen)


def expert_weights(logits: torch.Tensor, ids: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Router logits [M, E] -> weights float32 [M, K] of given experts, by the formulas of RouterSpec."""
    logits = logits.float()
    if spec.score == "topk_softmax":
        return logits.gather(1, ids).softmax(dim=-1) * spec.scale
    weights = (logits.sigmoid() if spec.score == "sigmoid" else logits.softmax(dim=-1)).gather(1, ids)
    return (weights / (weights.sum(dim=-1, keepdim=True) + spec.epsilon) if spec.renormalise else weights) * spec.scale


class ForcedEngine:
    """Takes over the routers and the sampler of an engine that was made without graphs, and captures its decode graphs anew.

    One sequence of tokens at a time, under any number of adapters at once: experts are looked up by (slot, position).
    """

    def __init__(self, engine: Engine, *, graphs: bool = True) -> None:
        self.engine, self.runner = engine, engine.core.runner
        model: Any = self.runner.model
        self.model, self.ctx = model, model.ctx
        routers = [module for module in model.hf.modules() if isinstance(module, Router)]
        slots = 1 if engine.core.lora is None else 1 + engine.core.lora.pool.num_slots
        # [slot + 1, position, K]; -1 = no expert
        self.tables = [torch.full((slots, self.model.max_model_len, r.spec.top_k), -1, dtype=torch.int64, device=self.ctx.device) for r in routers]
        by_router = dict(zip(routers, self.tables, strict=True))

        def route(router: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x = x.reshape(-1, x.shape[-1])
            count, spec = x.shape[0], router.spec
            logits = router.linear(x.float() if spec.float32_logits else x)
            ids = by_router[router][self.ctx.token_slots[:count].long() + 1, self.ctx.positions[:count]]
            ids = torch.where((self.ctx.kv_slots[:count] < self.ctx.page_size)[:, None], -1, ids)  # padding writes to the dump page
            weights = expert_weights(logits[:, : spec.num_experts], ids.clamp(min=0), spec)
            return logits, *with_shared(weights, ids.to(torch.int32), logits, spec)

        for router in routers:
            router.forward = lambda x, router=router: route(router, x)  # type: ignore[method-assign, misc, assignment]
        if model._decoder is not None:
            model._decoder._route = lambda router, x, logits: route(router, x)[1:]
        if graphs:
            sizes = ladder(self.ctx.max_requests)
            self.runner.graphs = DecodeGraphs(model, (False,) if engine.core.lora is None else (False, True), sizes)
            self.runner.graphs.capture(show_progress=False)
        self.runner.sampler.choose = self._choose  # type: ignore[method-assign]
        self._tokens: list[int] = []
        self._rows: dict[str, dict[int, torch.Tensor]] = {}
        self._adapter_of: dict[str, str | None] = {}

    def logits(self, references: dict[str | None, Reference], *, prompt: int, copies: int = 1) -> list[tuple[str | None, torch.Tensor]]:
        """(adapter, float32 [n - prompt, V]) of `copies` requests under each adapter, all in one batch: rows prompt - 1 .. n - 2 of the sequence."""
        self._tokens = next(iter(references.values())).tokens
        assert all(reference.tokens == self._tokens for reference in references.values()), "one sequence at a time"
        for adapter, reference in references.items():
            assert len(reference.experts) == len(self.tables), f"{len(reference.experts)} layers with experts in the reference, {len(self.tables)} here"
            slot = -1 if adapter is None else self._slot(adapter)
            for table, ids in zip(self.tables, reference.experts, strict=True):
                table[slot + 1, : len(ids)] = ids.to(table.device)
        self._rows, self._adapter_of = defaultdict(dict), {}
        adapters = list(references) * copies
        params = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": len(self._tokens) - prompt}
        loras = {} if self.engine.core.lora is None else {"lora_path": adapters}
        self.engine.generate(input_ids=[self._tokens[:prompt]] * len(adapters), sampling_params=params, **loras)  # type: ignore[arg-type]
        self.engine.flush_cache()
        assert len(self._rows) == len(adapters)
        return [(self._adapter_of[rid], torch.stack([rows[i] for i in sorted(rows)]).cpu()) for rid, rows in self._rows.items()]

    def _slot(self, adapter: str) -> int:
        assert self.engine.core.lora is not None
        slot = self.engine.core.lora.slots.slot_of(self.engine.core.lora.registry.get(adapter).revision)
        assert slot is not None, f"{adapter} has no slot: load no more adapters than max_loras_per_batch"
        return slot

    def _choose(self, logits: torch.Tensor, requests: list[Request], *_: Any) -> torch.Tensor:
        """In the sampler's place: the next token of the sequence, whatever the logits say, which are kept."""
        for request, row in zip(requests, logits.float().clone(), strict=True):
            self._rows[request.rid][request.num_output] = row
            self._adapter_of[request.rid] = request.adapter
        return torch.tensor([self._tokens[request.prompt_len + request.num_output] for request in requests], device=logits.device)
