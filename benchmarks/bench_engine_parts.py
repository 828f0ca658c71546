"""What adapters add to a step, by part: decode graphs of one engine with all adapters, with those of linears alone and of experts alone.

    python -m benchmarks.bench_engine_parts                    Qwen3-30B-A3B, batch 1, 16, 64, 256, four adapters of rank 16

Base = the graphs without adapters of the same engine, whose kernels are those of a server without them; us a step by graph replay
in the buffers of a running batch (prompts of 32, eight tokens later). `dense_us` and `experts_us` are what a layer takes more with
one kind alone. `error` compares the step's logits with those of plain torch for the linears: median over rows of the relative norm.
Prefill is the wall time of prompts of equal length until their first tokens.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.bench_engine import Bench, assign
from benchmarks.dummy_model import CONFIGS, write_config
from sglang_lora_moe.engine import build
from sglang_lora_moe.lora.dense import TorchDense
from sglang_lora_moe.lora.hooks import FusedMoEWithLoRA
from sglang_lora_moe.lora.layers import LinearWithLoRA

KEYS = ("shape", "phase", "batch", "input", "rank", "active")
COLUMNS = (*KEYS[1:], "step_us", "base_step_us", "retention", "dense_us", "experts_us", "error")
PREFILLS = ((1, 300), (1, 2048), (4, 2048))
STATE = ("num_tokens", "num_requests", "num_logits", "query_lens", "seq_lens_host", "lora_active")


class Parts:
    """The decode step that a running batch is in, replayed with some adapters left out."""

    def __init__(self, bench: Bench, batch: int) -> None:
        self.bench, self.model, self.batch = bench, bench.model, batch
        self.ctx, self.graphs = self.model.ctx, bench.core.runner.graphs  # type: ignore[attr-defined]
        self.linears = [module for module in self.model.hf.modules() if isinstance(module, LinearWithLoRA) and module.used]
        self.saved = self.ctx.sampled.clone(), self.ctx.inputs.clone(), {name: getattr(self.ctx, name) for name in STATE}

    def restore(self) -> None:
        sampled, inputs, state = self.saved
        self.ctx.sampled.copy_(sampled)
        self.ctx.inputs.copy_(inputs)
        for name, value in state.items():
            setattr(self.ctx, name, value)

    def replays(self, lora: bool) -> float:
        return timing.time_replays(functools.partial(self.graphs.replay, self.batch, lora), 1, budget_ms=100.0, most=20).us

    def without(self, *, dense: bool = True, experts: bool = True) -> float:
        """us of a step with only these adapters, in a graph of its own."""
        self._use(dense)
        with mock.patch.object(FusedMoEWithLoRA, "forward", FusedMoEWithLoRA.forward if experts else _without_adapters):
            self.graphs._capture_one(self.batch, True)
        self._use(True)
        self.restore()
        return self.replays(True)

    @torch.inference_mode()
    def error(self) -> float:
        """Of the logits, against plain torch for the adapters of linears."""
        self.restore()
        found = self.model.forward_logits().float().clone()
        deltas, plain = [linear.delta for linear in self.linears], TorchDense(self.ctx)
        self._use(True, plain)
        want = self.model.forward_logits().float()
        for linear, delta in zip(self.linears, deltas, strict=True):
            linear.delta = delta
        self.restore()
        return ((found - want).norm(dim=1) / want.norm(dim=1)).median().item()

    def _use(self, used: bool, delta: Any = None) -> None:
        for linear in self.linears:
            linear.used, linear.delta = used, delta or linear.delta


def _without_adapters(layer: FusedMoEWithLoRA, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return layer.base.forward(x, ids, weights)


def decode_row(bench: Bench, batch: int, active: int) -> dict[str, Any]:
    bench.submit(batch, 32, 24, assign(batch, active, "uniform"))
    running = bench.core.scheduler.running
    while len(running) < batch or min(request.num_output for request in running) < 8:
        bench.core.step()
    torch.cuda.synchronize()
    parts, layers = Parts(bench, batch), bench.model.config.num_hidden_layers
    base, error = parts.replays(False), parts.error()
    dense, experts, both = parts.without(experts=False), parts.without(dense=False), parts.without()
    bench.drain()
    times = {"step_us": both, "base_step_us": base, "retention": base / both, "dense_us": (dense - base) / layers, "experts_us": (experts - base) / layers}
    return {"phase": "decode", "batch": batch, "input": 32, "error": error} | times


def prefill_us(bench: Bench, count: int, tokens: int, active: int) -> float:
    walls = []
    for _ in range(4):
        bench.submit(count, tokens, 1, assign(count, active, "uniform"))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        bench.drain()
        torch.cuda.synchronize()
        walls.append((time.perf_counter() - begin) * 1e6)
    return sorted(walls)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=timing.default_path("engine_parts"), help="JSON file; must not exist")
    parser.add_argument("--commit", default=None, help="commit to record when run from a copy without .git")
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=sorted(CONFIGS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--active", nargs="*", type=int, default=[4])
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    results = timing.Results(args.out, "engine_parts", KEYS, {"prompt": 32}, commit=args.commit)
    options = argparse.Namespace(**vars(args), eager=False, no_overlap=False, profile=False)
    few = mock.patch.multiple(build, ladder=lambda most: args.batches, prefill_ladder=lambda tokens, requests: [(512, 16), (2048, 16)])
    with tempfile.TemporaryDirectory() as folder, few:
        bench = Bench(options, write_config(args.shape, Path(folder) / args.shape), args.rank, max(args.active))
    for active in args.active:
        common = {"shape": args.shape, "rank": args.rank, "active": active}
        for batch in args.batches:
            results.add(common | decode_row(bench, batch, active))
            print(timing.format_table(results.rows[-1:], COLUMNS), flush=True)
        for count, tokens in PREFILLS:
            step, base = prefill_us(bench, count, tokens, active), prefill_us(bench, count, tokens, 0)
            row = {"phase": "prefill", "batch": count, "input": tokens, "step_us": step, "base_step_us": base, "retention": base / step}
            results.add(common | row | dict.fromkeys(("dense_us", "experts_us", "error")))
            print(timing.format_table(results.rows[-1:], COLUMNS), flush=True)
    bench.close()


if __name__ == "__main__":
    main()
