"""Decode and prefill of the whole engine on a GPU, with and without adapters, at real shapes with random weights.

    python -m benchmarks.bench_engine                                  Qwen3-30B-A3B, batch 1 to 256, 0/1/4/16 adapters of rank 16
    python -m benchmarks.bench_engine --batches 16 --active 4 --rank 64 --popularity zipf
    python -m benchmarks.bench_engine --weights int4-g128              the same model as a compressed-tensors W4A16 checkpoint has it
    python -m benchmarks.bench_engine --one-engine --active 4 --rank 64    in seconds: one start, graphs of the measured sizes alone

Method (that of the recorded peer): prompts of 32 tokens, time of 64 decode steps in the running engine, median of 3; prefill is
the wall time of one request of one token. The base engine is a server without --enable-lora, the other one a server with it, in
one run. Printed beside each step: what the targets allow, the floor (bytes of weights that a step must read), the peer's time,
`busy` = the share of the loop in which a step's graph runs (events around each replay), `host_us` = what the host does in a step
beside waiting for tokens. A run that was cut goes on with the same --out: rows that are there are not measured again. With --one-engine
the base's rows are steps without adapters of the server that has them, whose kernels and arguments are the same (a test compares them).
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.dummy_model import CONFIGS, QUANTIZATIONS, WEIGHT_BYTES, is_adapted, make_adapters, write_config
from sglang_lora_moe.config import Config
from sglang_lora_moe.core import SamplingParams, Submit
from sglang_lora_moe.engine import build
from sglang_lora_moe.lora.targets import LinearTarget

KEYS = ("shape", "backend", "weights", "phase", "batch", "input", "rank", "active", "popularity")
COLUMNS = (
    "phase", "batch", "input", "rank", "active", "step_us", "base_step_us", "retention", "allowed_step_us", "floor_us", "peer_step_us", "gpu_us", "busy",
    "host_us", "experts", "tok_s",
)  # fmt: skip
READ_BYTES_PER_S = 4.49e12
PEER_STEP_US = {1: 4090.0, 16: 12220.0, 64: 17210.0, 256: 20680.0}  # vLLM 0.33.0, compiled, without adapters
PEER_PREFILL_US = {1: 49580.0, 4: 118850.0}
ALLOWED_PREFILL_US = {1: 42000.0, 4: 119000.0}
PEER_LORA_STEP_US = {1: 7140.0, 16: 17230.0, 64: 23620.0, 256: 28700.0}  # four adapters of rank 16
PROMPT, SKIPPED, STEPS, PREFILL = 32, 8, 64, 2048


@dataclass
class Probe:
    """What one decode step touched, means over layers."""

    experts: float  # distinct
    groups: float  # distinct (adapter, expert)
    adapters: int  # distinct


class Meter:
    """Waits of the host, and events around graphs, while `steps` of an engine's decode loop run."""

    def __init__(self, core: Any) -> None:
        self.runner = core.runner
        self.waited = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def steps(self, step: Callable[[], object], count: int) -> tuple[float, float, float]:
        """(wall us, host us beside waiting, us in which a graph ran), each per step."""
        runner, collect = self.runner, self.runner.collect
        replay = runner.graphs.replay if runner.graphs is not None else None
        self.waited, self.events = 0.0, []

        def timed_collect(launched: Any) -> Any:
            begin = time.perf_counter()
            result = collect(launched)
            self.waited += time.perf_counter() - begin
            return result

        def timed_replay(size: int, lora: bool) -> Any:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            out = replay(size, lora)
            last.record()
            self.events.append((first, last))
            return out

        runner.collect = timed_collect
        if replay is not None:
            runner.graphs.replay = timed_replay
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            step()
        host = time.perf_counter() - begin - self.waited
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
        del runner.collect
        if replay is not None:
            del runner.graphs.replay
        graphs = sum(first.elapsed_time(last) for first, last in self.events) * 1e3 if replay is not None else float("nan")
        return wall * 1e6 / count, host * 1e6 / count, graphs / count


class Bench:
    """One engine. `rank` 0 = a server without adapters."""

    def __init__(self, args: argparse.Namespace, path: Path, rank: int, slots: int) -> None:
        begin = time.monotonic()
        config = Config(
            model_path=str(path), load_format="dummy", **({"enable_lora": True, "max_lora_rank": rank, "max_loras_per_batch": max(slots, 1)} if rank else {}),
            max_running_requests=max(args.batches), chunked_prefill_size=4 * PREFILL, context_length=8192, max_total_tokens=65536,
            disable_prefix_cache=True, disable_cuda_graph=args.eager, disable_overlap=args.no_overlap,
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        if args.one_engine:
            build.ladder, build.prefill_ladder = lambda most: sorted(args.batches), lambda tokens, most: [(PREFILL, min(most, 16))]
        self.core, self.config, info = build.build_engine(config)
        self.memory = info["memory"] | {"start_s": round(time.monotonic() - begin, 1), "reserved": torch.cuda.memory_reserved()}
        self.model: Any = self.core.runner.model  # type: ignore[attr-defined]
        self.rank, self.profiled = rank, args.profile
        self.targets: dict[str, Any] = {}
        if self.core.lora is not None:
            self.targets = self.core.lora.pool.layout.targets
            for i, adapter in enumerate(make_adapters(self.core.lora.pool.layout, rank, slots, self.model.device)):
                self.core.lora.register(f"a{i}", adapter)
            while self.core.is_loading:
                self.core.step()
                time.sleep(0.0005)  # else this loop keeps the interpreter from the thread that copies: seconds for large adapters
        torch.cuda.synchronize()
        print(f"engine (rank {rank}, {slots} slots) ready after {self.memory['start_s']} s; bytes: {self.memory}", flush=True)
        self.random = random.Random(0)

    def submit(self, count: int, tokens: int, new: int, adapters: list[str | None]) -> None:
        vocab = self.model.vocab_size
        for i in range(count):
            ids = [self.random.randrange(vocab) for _ in range(tokens)]
            self.core.handle(Submit(f"r{self.random.getrandbits(60)}", ids, SamplingParams(temperature=0.0, max_new_tokens=new, ignore_eos=True), adapters[i]))

    def decode(self, batch: int, adapters: list[str | None]) -> tuple[dict[str, float], Probe]:
        """(times of a step in us: wall, host, gpu = its graph alone, busy share of the loop; what the last step touched)."""
        runs: list[tuple[float, float, float]] = []
        meter = Meter(self.core)
        for _ in range(3):
            self.submit(batch, PROMPT, SKIPPED + STEPS + 8, adapters)
            running = self.core.scheduler.running
            while len(running) < batch or min(request.num_output for request in running) < SKIPPED:
                self.core.step()
            runs.append(meter.steps(self.core.step, STEPS))
            probe, gpu = self.probe(), self.gpu_us(batch, adapters[0] is not None)
            if self.profiled and len(runs) == 3:
                self.profile(f"decode of {batch}, adapters {adapters[0] is not None}", functools.partial(self.replay, batch, adapters[0] is not None))
            self.drain()
        wall, host, graphs = sorted(runs)[1]
        return {"step_us": wall, "host_us": host, "gpu_us": gpu, "busy": graphs / wall}, probe

    def gpu_us(self, batch: int, lora: bool) -> float:
        """A graph's replay by itself, in the buffers as they are."""
        if self.core.runner.graphs is None:  # type: ignore[attr-defined]
            return float("nan")
        saved = self.model.ctx.sampled.clone()
        found = timing.time_replays(functools.partial(self.replay, batch, lora), 1, budget_ms=100.0, most=20).us
        self.model.ctx.sampled.copy_(saved)
        return found

    @torch.inference_mode()
    def probe(self) -> Probe:
        """Run the last step once more, eagerly, and count what it routes to."""
        decoder, ctx = self.model._decoder, self.model.ctx
        route, found = decoder._route, []
        slots = ctx.token_slots[: ctx.num_tokens].long()

        def counted(router: Any, x: torch.Tensor, logits: Any) -> Any:
            weights, ids = route(router, x, logits)
            real = ids[:, 0] >= 0
            ids = ids.long()
            keys = (ids * 1024 + slots[:, None])[real & (slots >= 0)] if ctx.lora_active else ids[:0]
            found.append((ids[real].unique().numel(), keys.unique().numel()))
            return weights, ids.int()

        decoder._route = counted
        saved = ctx.sampled.clone()
        try:
            self.model.forward_logits()
        finally:
            decoder._route = route
            ctx.sampled.copy_(saved)
        adapters = int(slots[slots >= 0].unique().numel()) if ctx.lora_active else 0
        return Probe(statistics.fmean(e for e, _ in found), statistics.fmean(g for _, g in found), adapters)

    def prefill(self, count: int, adapters: list[str | None]) -> tuple[float, float]:
        """(wall us, GPU us) until `count` prompts have their first token, in one step."""
        walls, gpus = [], []
        for _ in range(4):
            self.submit(count, PREFILL, 1, adapters)
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            first.record()
            self.drain()
            last.record()
            torch.cuda.synchronize()
            walls.append((time.perf_counter() - begin) * 1e6)
            if self.profiled and len(walls) == 4:
                self.submit(count, PREFILL, 1, adapters)
                self.profile(f"prefill of {count}, adapters {adapters[0] is not None}", self.drain)
            gpus.append(first.elapsed_time(last) * 1e3)
        return statistics.median(walls[1:]), statistics.median(gpus[1:])

    def replay(self, batch: int, lora: bool) -> None:
        graphs = self.core.runner.graphs  # type: ignore[attr-defined]
        graphs.replay(graphs._by_count[batch], lora)

    def profile(self, label: str, run: Callable[[], object]) -> None:
        """Print the time of each kernel in `run`, per step and per layer."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        layers = self.model.config.num_hidden_layers
        table: dict[str, list[float]] = {}
        begin, end, busy = float("inf"), 0.0, 0.0
        for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
            table.setdefault(event.name[:60], []).append(event.device_time)
            span = event.time_range
            busy += max(0.0, span.end - max(span.start, end))
            begin, end = min(begin, span.start), max(end, span.end)
        print(f"profile of {label}: {end - begin:.1f} us, of which a kernel or copy runs {busy:.1f}; kernel, launches, us in all, us a launch, us a layer")
        for name, times in sorted(table.items(), key=lambda item: -sum(item[1]))[:30]:
            print(f"  {name:60} {len(times):5} {sum(times):9.1f} {sum(times) / len(times):8.2f} {sum(times) / layers:8.2f}", flush=True)

    def drain(self) -> None:
        while self.core.has_work:
            self.core.step()

    def close(self) -> None:
        self.core.close()
        del self.core, self.model
        gc.collect()
        torch.cuda.empty_cache()


def assign(batch: int, active: int, popularity: str) -> list[str | None]:
    """An adapter for each request of a batch."""
    if not active:
        return [None] * batch
    if popularity == "zipf":
        weights = [1.0 / (k + 1) for k in range(active)]
        return [f"a{k}" for k in random.Random(batch).choices(range(active), weights, k=batch)]
    return [f"a{i % active}" for i in range(batch)]


def floors(shape: str, weights: str, probe: Probe, batch: int) -> float:
    """Bytes of weights that a decode step reads, base part."""
    c, quantized = CONFIGS[shape], WEIGHT_BYTES[weights]
    h, d = c["hidden_size"], c["head_dim"]
    attention = h * d * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    layer = quantized * (probe.experts * 3 * h * c["moe_intermediate_size"] + attention) + 2.0 * h * c["num_experts"]
    return c["num_hidden_layers"] * layer + 2.0 * (h * c["vocab_size"] + batch * h)


def adapter_bytes(bench: Bench, shape: str, probe: Probe) -> float:
    """Bytes of adapter weights that a decode step reads: routed groups of the experts, and the dense stacks of the active adapters."""
    c = CONFIGS[shape]
    dense = sum(t.in_features + t.out_features for t in bench.targets.values() if isinstance(t, LinearTarget) and is_adapted(t.name, t))
    expert = 3 * c["hidden_size"] + 3 * c["moe_intermediate_size"]
    return 2.0 * bench.rank * (c["num_hidden_layers"] * probe.groups * expert + probe.adapters * dense)


def allowed(batch: int, base: float, addon: float) -> float:
    """The target of a decode step with adapters, us."""
    if batch == 1:
        return base / 0.92
    return base / 0.95 if addon <= 0.025 * base else base * 1.02 + 1.25 * addon


def steps_of(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(phase, batch, input) of the rows of one load."""
    return [("decode", batch, PROMPT) for batch in args.batches] + [("prefill", count, PREFILL) for count in args.prefills]


def measured(results: timing.Results, args: argparse.Namespace, rank: int, active: int, popularity: str) -> set[tuple[str, int, int]]:
    """Which of these are there already."""
    load = {"shape": args.shape, "weights": args.weights, "rank": rank, "active": active, "popularity": popularity}
    return {(row["phase"], row["batch"], row["input"]) for row in results.rows if all(row[field] == value for field, value in load.items())}


def measure(bench: Bench, args: argparse.Namespace, results: timing.Results, active: int, popularity: str, deadline: timing.Deadline) -> None:
    """All batches and prefills of one engine and one load that `results` lacks, as its rows."""
    rank = bench.rank if active else 0
    there = measured(results, args, rank, active, popularity)
    common = {
        "shape": args.shape,
        "backend": bench.model.moe_runner_backend,
        "weights": args.weights,
        "rank": rank,
        "active": active,
        "popularity": popularity,
    }

    def base_of(phase: str, batch: int, inputs: int) -> dict[str, Any] | None:
        return results.find(**(common | {"phase": phase, "batch": batch, "input": inputs, "rank": 0, "active": 0, "popularity": "none"}))

    for batch in args.batches:
        if ("decode", batch, PROMPT) in there or deadline.reached():
            continue
        adapters = assign(batch, active, popularity)
        times, probe = bench.decode(batch, adapters)
        step = times["step_us"]
        base = base_of("decode", batch, PROMPT)
        addon = adapter_bytes(bench, args.shape, probe) / READ_BYTES_PER_S * 1e6 if active else 0.0
        floor = floors(args.shape, args.weights, probe, batch) / READ_BYTES_PER_S * 1e6 + addon
        base_us = base["step_us"] if base else step
        peer = {} if args.weights != "bf16" else PEER_LORA_STEP_US if active == 4 and bench.rank == 16 else {} if active else PEER_STEP_US
        row = {
            "phase": "decode", "batch": batch, "input": PROMPT, "output": STEPS, "tok_s": batch / step * 1e6, "base_tok_s": batch / base_us * 1e6,
            "retention": base_us / step, **times, "base_step_us": base_us, "floor_us": floor,
            "allowed_step_us": allowed(batch, base_us, addon) if active else peer.get(batch), "peer_step_us": peer.get(batch),
            "experts": probe.experts, "groups": probe.groups, "adapter_us": addon,
        }  # fmt: skip
        results.add(common | row)
        print(timing.format_table([row | common], COLUMNS), flush=True)
    bf16 = args.weights == "bf16"
    for count in args.prefills:
        if ("prefill", count, PREFILL) in there or deadline.reached():
            continue
        wall, gpu = bench.prefill(count, assign(count, active, popularity))
        base = base_of("prefill", count, PREFILL)
        base_gpu = base["gpu_us"] if base else gpu
        row = {
            "phase": "prefill", "batch": count, "input": PREFILL, "output": 1, "tok_s": count * PREFILL / wall * 1e6,
            "base_tok_s": base["tok_s"] if base else count * PREFILL / wall * 1e6, "retention": base_gpu / gpu, "step_us": wall,
            "base_step_us": base["step_us"] if base else wall, "floor_us": None, "gpu_us": gpu, "busy": gpu / wall, "host_us": None,
            "allowed_step_us": base_gpu / 0.9 if active else ALLOWED_PREFILL_US.get(count) if bf16 else None,
            "peer_step_us": PEER_PREFILL_US.get(count) if bf16 and not active else None,
            "experts": None, "groups": None, "adapter_us": None,
        }  # fmt: skip
        results.add(common | row)
        print(timing.format_table([row | common], COLUMNS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=timing.default_path("engine"), help="JSON file; rows already in it are kept and not measured again")
    parser.add_argument("--commit", default=None, help="commit to record when run from a copy without .git")
    parser.add_argument("--time-limit", type=float, default=None, help="seconds after which no further row is started")
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=sorted(CONFIGS))
    parser.add_argument("--weights", default="bf16", choices=sorted(QUANTIZATIONS))
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, to try the benchmark itself")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 32, 64, 256])
    parser.add_argument("--prefills", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--active", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--popularity", nargs="*", default=["uniform"], choices=["uniform", "zipf", "distinct"])
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--one-engine", action="store_true", help="the base's rows from the server with adapters; graphs of the measured sizes alone")
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(name)s: %(message)s")
    deadline = timing.Deadline(args.time_limit)
    overrides: dict[str, Any] = {"num_hidden_layers": args.layers} if args.layers else {}
    CONFIGS[args.shape] |= overrides
    settings = {"steps": STEPS, "prompt": PROMPT, "graphs": not args.eager, "overlap": not args.no_overlap, "one_engine": args.one_engine, **overrides}
    results = timing.Results(args.out, "engine", KEYS, settings, commit=args.commit, peer="vllm 0.33.0")
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(args.shape, Path(folder) / args.shape, **QUANTIZATIONS[args.weights])
        base, adapted = [(0, "none")], list(itertools.product(args.active, args.popularity))
        engines = [(0, base), (args.rank, adapted)]  # the server without adapters, then the one with
        for rank, loads in [(args.rank, base + adapted)] if args.one_engine else engines:
            slots = max(active for active, _ in loads)
            missing = [load for load in loads if set(steps_of(args)) - measured(results, args, rank if load[0] else 0, *load)]
            if not missing or deadline.reached():
                continue
            bench = Bench(args, path, rank, slots)
            results.record["settings"].setdefault("memory", bench.memory)
            for load in missing:
                measure(bench, args, results, *load, deadline)
            bench.close()
    print(timing.format_table(results.rows, COLUMNS))


if __name__ == "__main__":
    main()
