"""What adapters add to a step, by part: decode graphs of one engine with all adapters, with those of linears alone and of experts alone.

    python -m benchmarks.bench_engine_parts                    Qwen3-30B-A3B, batch 1, 16, 64, 256, four adapters of rank 16
    python -m benchmarks.bench_engine_parts --weights int4-g128 --layers 16

Base = the graphs without adapters of the same engine, whose kernels are those of a server without them; us a step by graph replay
in the buffers of a running batch (prompts of 32, eight tokens later). `dense_us` and `experts_us` are what a layer takes more with
one kind alone, `rest_us` what it takes more with both than these two. `error` compares the step's logits with those of plain torch
for the linears: median over rows of the relative norm. Prefill is the wall time of prompts of equal length until their first tokens.
`arrivals`: steps while requests keep coming, and `idle_us`, for how long of each the GPU has nothing to do.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.bench_engine import Bench, assign
from benchmarks.dummy_model import CONFIGS, QUANTIZATIONS, write_config
from sglang_lora_moe.engine import build
from sglang_lora_moe.lora.dense import TorchDense
from sglang_lora_moe.lora.hooks import FusedMoEWithLoRA
from sglang_lora_moe.lora.layers import LinearWithLoRA

KEYS = ("shape", "weights", "phase", "batch", "input", "rank", "active")
COLUMNS = (*KEYS[1:], "step_us", "base_step_us", "retention", "dense_us", "experts_us", "rest_us", "idle_us", "base_idle_us", "error")
PREFILLS = ((1, 300), (1, 2048), (4, 2048))
STATE = ("num_tokens", "num_requests", "num_logits", "query_lens", "seq_lens_host", "lora_active")


def _graphs(bench: Bench, which: str = "graphs") -> Any:
    return getattr(bench.core.runner, which)


def linears_of(bench: Bench) -> list[LinearWithLoRA]:
    return [module for module in bench.model.hf.modules() if isinstance(module, LinearWithLoRA) and module.used]


@contextlib.contextmanager
def only(linears: list[LinearWithLoRA], dense: bool, experts: bool) -> Iterator[None]:
    """Steps that are run or captured inside have the adapters of linears, or of experts, or both."""
    for linear in linears:
        linear.used = dense
    with mock.patch.object(FusedMoEWithLoRA, "forward", FusedMoEWithLoRA.forward if experts else _without_adapters):
        yield
    for linear in linears:
        linear.used = True


def times(base: float, dense: float, experts: float, both: float, layers: int) -> dict[str, float]:
    shares = {"dense_us": (dense - base) / layers, "experts_us": (experts - base) / layers, "rest_us": (both - dense - experts + base) / layers}
    return {"step_us": both, "base_step_us": base, "retention": base / both} | shares


class Parts:
    """The decode step that a running batch is in, replayed with some adapters left out."""

    def __init__(self, bench: Bench, batch: int) -> None:
        self.bench, self.model, self.batch = bench, bench.model, batch
        self.ctx, self.graphs = self.model.ctx, _graphs(bench)
        self.linears = linears_of(bench)
        self.saved = self.ctx.sampled.clone(), self.ctx.inputs.clone(), {name: getattr(self.ctx, name) for name in STATE}

    def restore(self) -> None:
        sampled, inputs, state = self.saved
        self.ctx.sampled.copy_(sampled)
        self.ctx.inputs.copy_(inputs)
        for name, value in state.items():
            setattr(self.ctx, name, value)

    def replays(self, lora: bool) -> float:
        return timing.time_replays(functools.partial(self.graphs.replay, self.batch, lora), 1, budget_ms=100.0, most=20).us

    def with_only(self, dense: bool, experts: bool) -> float:
        """us of a step with only these adapters, in a graph of its own."""
        with only(self.linears, dense, experts):
            self.graphs._capture_one((self.batch, self.batch), True)
        self.restore()
        return self.replays(True)

    @torch.inference_mode()
    def error(self) -> float:
        """Of the logits, against plain torch for the adapters of linears."""
        self.restore()
        found = self.model.forward_logits().float().clone()
        deltas = [linear.delta for linear in self.linears]
        for linear in self.linears:
            linear.delta = TorchDense(self.ctx)
        want = self.model.forward_logits().float()
        for linear, delta in zip(self.linears, deltas, strict=True):
            linear.delta = delta
        self.restore()
        return ((found - want).norm(dim=1) / want.norm(dim=1)).median().item()


def _without_adapters(layer: FusedMoEWithLoRA, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return layer.base.forward(x, ids, weights)


def decode_row(bench: Bench, batch: int, active: int) -> dict[str, Any]:
    bench.submit(batch, 32, 24, assign(batch, active, "uniform"))
    running = bench.core.scheduler.running
    while len(running) < batch or min(request.num_output for request in running) < 8:
        bench.core.step()
    torch.cuda.synchronize()
    parts = Parts(bench, batch)
    base, error = parts.replays(False), parts.error()
    dense, experts, both = parts.with_only(True, False), parts.with_only(False, True), parts.with_only(True, True)
    bench.drain()
    return {"phase": "decode", "batch": batch, "input": 32, "error": error} | times(base, dense, experts, both, bench.model.config.num_hidden_layers)


def prefill_row(bench: Bench, count: int, tokens: int, active: int) -> dict[str, Any]:
    graphs = _graphs(bench, "prefill_graphs")
    linears, size = linears_of(bench), next((size for size in graphs.sizes if size[0] >= count * tokens), None)

    def timed(dense: bool, experts: bool) -> float:
        with only(linears, dense, experts):
            if size is not None:
                graphs._capture_one(size, True)
            return prefill_us(bench, count, tokens, active)

    base = prefill_us(bench, count, tokens, 0)
    found = times(base, timed(True, False), timed(False, True), timed(True, True), bench.model.config.num_hidden_layers)
    return {"phase": "prefill", "batch": count, "input": tokens, "error": None} | found


def arrivals_row(bench: Bench, batch: int, active: int) -> dict[str, Any]:
    """Steps of `batch` decoding requests (prompts of 7) while every second step one of 32 tokens arrives, and without (`base_step_us`)."""
    core: Any = bench.core
    bench.submit(batch, 7, 200, assign(batch, active, "uniform"))
    while len(core.scheduler.running) < batch or min(request.num_output for request in core.scheduler.running) < 8:
        core.step()
    (base, base_idle), (step, idle) = (_steps(bench, active if arrive else None) for arrive in (False, True))
    bench.drain()
    return {"phase": "arrivals", "batch": batch, "input": 7, "step_us": step, "base_step_us": base, "idle_us": idle, "base_idle_us": base_idle}


def _steps(bench: Bench, active: int | None, count: int = 60) -> tuple[float, float]:
    """(wall us, us between the last kernel of a step and the first of the next), each per step. `active` None: nobody arrives."""
    core: Any = bench.core
    launch, marks = core.runner.launch, []

    def marked(batch: Any) -> Any:
        marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        marks[-1][0].record()
        launched = launch(batch)
        marks[-1][1].record()
        return launched

    torch.cuda.synchronize()
    begin = time.perf_counter()
    with mock.patch.object(core.runner, "launch", marked):
        for step in range(count):
            if active is not None and step % 2:
                bench.submit(1, 32, 1, assign(1, active, "uniform"))
            core.step()
    wall = time.perf_counter() - begin
    torch.cuda.synchronize()
    idle = sum(before[1].elapsed_time(after[0]) for before, after in itertools.pairwise(marks))
    return wall * 1e6 / count, idle * 1e3 / (count - 1)


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
    parser.add_argument("--weights", default="bf16", choices=sorted(QUANTIZATIONS))
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, of which each costs the same")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--active", nargs="*", type=int, default=[4])
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    overrides: dict[str, Any] = {"num_hidden_layers": args.layers} if args.layers else {}
    results = timing.Results(args.out, "engine_parts", KEYS, {"prompt": 32, **overrides}, commit=args.commit)
    options = argparse.Namespace(**vars(args), eager=False, no_overlap=False, profile=False, one_engine=False)

    def sizes(_tokens: int, requests: int) -> list[tuple[int, int]]:
        return [(tokens, min(requests, most)) for tokens, most in ((256, 255), (512, 16), (2048, 16))]

    few_requests = min(32, max(args.batches))
    few = mock.patch.multiple(build, ladder=lambda most: sorted({*args.batches, few_requests}), prefill_ladder=sizes)
    with tempfile.TemporaryDirectory() as folder, few:
        bench = Bench(options, write_config(args.shape, Path(folder) / args.shape, **QUANTIZATIONS[args.weights], **overrides), args.rank, max(args.active))
    for active in args.active:
        common = {"shape": args.shape, "weights": args.weights, "rank": args.rank, "active": active}
        for batch in args.batches:
            results.add(common | decode_row(bench, batch, active))
            print(timing.format_table(results.rows[-1:], COLUMNS), flush=True)
        results.add(common | arrivals_row(bench, few_requests, active))
        print(timing.format_table(results.rows[-1:], COLUMNS), flush=True)
        for count, tokens in PREFILLS:
            results.add(common | prefill_row(bench, count, tokens, active))
            print(timing.format_table(results.rows[-1:], COLUMNS), flush=True)
    bench.close()


if __name__ == "__main__":
    main()
