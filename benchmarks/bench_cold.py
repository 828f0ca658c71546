"""More adapters than slots, in the in-process engine: what it costs to load one while others decode, and how a skewed load is served.

    python -m benchmarks.bench_cold                       on a GPU: Qwen3-30B-A3B shape, random weights, 64 adapters of rank 16 over 8 slots
    ./run bench cold --layers 1 --experts 8 --rank 4      anywhere, to try it

1. Steady decoding on resident adapters: the gaps between a request's tokens (ITL), first left alone, then while slots are filled
   from host memory one after the other, then while a whole adapter is read from its files and put into a slot.
2. A closed loop of requests over as many adapters as there are slots, and over all of them by Zipf's law.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import timing
from benchmarks.dummy_model import CONFIGS, is_adapted, make_adapters, write_config
from benchmarks.serving_load import Planned, Record, assign_adapters, make_load, percentile, summarize
from sglang_lora_moe.config import Config
from sglang_lora_moe.core import LoadAdapter, Reply, SamplingParams, Submit, TokenOutput
from sglang_lora_moe.engine.build import build_engine
from sglang_lora_moe.engine.engine_core import EngineCore
from sglang_lora_moe.lora.targets import ExpertTarget, LinearTarget, Target
from tests.books import check_core

KEYS = ("phase", "adapters", "slots", "rank")
COLUMNS = ("phase", "adapters", "slots", "mean_itl_ms", "median_itl_ms", "p99_itl_ms", "ratio", "loads", "mean_ttft_ms", "p99_ttft_ms", "output_throughput")


def write_adapter(targets: dict[str, Target], rank: int, folder: Path) -> Path:
    """An adapter directory on all linears and experts, one tensor per expert and projection: the layout that takes longest to read."""
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}

    def pair(module: str, inputs: int, outputs: int) -> None:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(rank, inputs, dtype=torch.bfloat16)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(outputs, rank, dtype=torch.bfloat16)

    for name, target in targets.items():
        if not is_adapted(name, target):
            continue
        if isinstance(target, LinearTarget):
            pair(name, target.in_features, target.out_features)
        elif isinstance(target, ExpertTarget):
            for expert in range(target.num_experts):
                for projection in ("gate_proj", "up_proj"):
                    pair(f"{name}.{expert}.{projection}", target.hidden, target.intermediate)
                pair(f"{name}.{expert}.down_proj", target.intermediate, target.hidden)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["all-linear"], "base_model_name_or_path": "dummy"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Bench:
    """The engine, its adapters in host memory, and the clock."""

    def __init__(self, args: argparse.Namespace, path: Path) -> None:
        self.args, self.random = args, random.Random(0)
        config = Config(
            model_path=str(path), load_format="dummy", enable_lora=True, max_lora_rank=args.rank, max_loras_per_batch=args.slots,
            max_running_requests=args.concurrency, context_length=4096, max_total_tokens=65536, disable_prefix_cache=True,
        )  # fmt: skip
        begin = time.monotonic()
        self.core: EngineCore
        self.core, self.config, info = build_engine(config)
        self.vocab = info["vocab_size"]
        assert self.core.lora is not None
        self.lora = self.core.lora
        self.names = [f"a{i}" for i in range(args.adapters)]
        adapters = make_adapters(self.lora.pool.layout, args.rank, args.adapters, self.config.device)
        image = adapters[0].image.cpu()
        for name, adapter in zip(self.names, adapters, strict=True):
            self.lora.register(name, replace(adapter, image=image))
        self.nbytes = image.nbytes
        self.step_until(lambda: not self.core.is_loading)
        print(f"engine ready after {time.monotonic() - begin:.1f} s; an adapter has {self.nbytes / 2**20:.0f} MiB", flush=True)

    def step_until(self, over: Callable[[], bool]) -> None:
        while not over():
            self.core.step()
            if self.core.is_stalled:
                time.sleep(0.0005)  # as the engine's loop does: a busy one would keep the interpreter from the thread that copies

    # ---- 1: decoding while adapters are loaded ----------------------------------------------------------------------
    def start_decoding(self, count: int, names: list[str]) -> None:
        """`count` requests that decode for the rest of this part."""
        for i in range(count):
            ids = [self.random.randrange(3, self.vocab) for _ in range(32)]
            self.core.handle(Submit(f"d{i}", ids, SamplingParams(temperature=0.0, max_new_tokens=3900, ignore_eos=True), names[i % len(names)]))
        running = self.core.scheduler.running
        self.step_until(lambda: len(running) == count and min(request.num_output for request in running) > 8)

    def gaps(self, seconds: float, each_step: Callable[[list[Any]], bool]) -> list[float]:
        """ITL in ms of all requests for so many seconds, or until `each_step` of what was said returns True."""
        gaps: list[float] = []
        last: dict[str, float] = {}
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            said = self.core.step()
            now = time.perf_counter()
            for message in said:
                if isinstance(message, TokenOutput) and message.token_ids:
                    if message.rid in last:
                        gaps.append(1e3 * (now - last[message.rid]))
                    last[message.rid] = now
            if each_step(said):
                break
        return gaps

    def row(self, phase: str, gaps: list[float], loads: int, alone: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
        p99 = percentile(gaps, 0.99)
        row = self.common(phase) | {
            "mean_itl_ms": statistics.fmean(gaps), "median_itl_ms": statistics.median(gaps), "p99_itl_ms": p99, "max_itl_ms": max(gaps), "gaps": len(gaps),
            "loads": loads, "ratio": p99 / alone["p99_itl_ms"] if alone else 1.0, **more,
        }  # fmt: skip
        return row

    def common(self, phase: str) -> dict[str, Any]:
        return {"phase": phase, "adapters": self.args.adapters, "slots": self.args.slots, "rank": self.args.rank, "adapter_bytes": self.nbytes}

    def decode_while_loading(self, add: Callable[[dict[str, Any]], None], folder: Path | None) -> None:
        resident = [record["name"] for record in self.lora.adapters() if record["resident"]]
        half = len(resident) // 2
        self.start_decoding(self.args.decoding, resident[:half])
        alone = self.row("decode, nothing else", self.gaps(self.args.seconds, lambda said: False), 0, None)
        add(alone)
        cold = [entry.revision for entry in self.lora.registry.loaded.values() if self.lora.slots.slot_of(entry.revision) is None]
        loads, begin = 0, time.perf_counter()

        def refill(said: list[Any]) -> bool:
            nonlocal loads
            if not self.core.is_loading:  # the last one has arrived: the next takes the place of an idle one
                loads += 1
                revision = next(revision for revision in cold[loads % len(cold) :] + cold if self.lora.slots.slot_of(revision) is None)
                self.lora.slots.reserve(revision)
                self.lora.start_fills()
            return False

        gaps = self.gaps(self.args.seconds, refill)
        per_load = (time.perf_counter() - begin) / max(loads, 1)
        add(self.row("decode, slots filled", gaps, loads, alone, load_ms=1e3 * per_load, load_gb_s=self.nbytes / per_load / 1e9))
        self.step_until(lambda: not self.lora.is_loading)
        if folder is not None:
            self.lora.reader.start()
            self.core.handle(LoadAdapter("file", "from-files", str(folder), pinned=True))  # pinned: it takes an idle slot
            replies: list[Reply] = []

            def answered(said: list[Any]) -> bool:
                replies.extend(message for message in said if isinstance(message, Reply))
                return bool(replies)

            gaps = self.gaps(60.0, answered)
            for reply in replies:
                reply.raise_error()
            add(self.row("decode, adapter read from files", gaps, 1, alone, load_ms=1e3 * replies[0].data["seconds"]))
        for request in list(self.core.scheduler.requests):
            self.core.scheduler.abort(request)
        self.step_until(lambda: not self.core.has_work)

    # ---- 2: a load ---------------------------------------------------------------------------------------------------
    def serve(self, load: list[Planned]) -> tuple[list[Record], float]:
        """A closed loop: as many requests as may run, until all have been served."""
        records, sent = [Record(one.adapter, len(one.input_ids)) for one in load], {}
        todo, active, begin = iter(enumerate(load)), 0, time.perf_counter()
        done = 0
        while done < len(load):
            while active < self.args.concurrency and (item := next(todo, None)) is not None:
                number, one = item
                sent[number] = time.perf_counter()
                sampling = SamplingParams(temperature=0.0, max_new_tokens=one.output_len, ignore_eos=True)
                self.core.handle(Submit(f"s{number}", one.input_ids, sampling, one.adapter))
                active += 1
            said = self.core.step()
            if self.core.is_stalled:
                time.sleep(0.0005)
            now = time.perf_counter()
            for message in said:
                if isinstance(message, TokenOutput) and message.rid[0] == "s":
                    number = int(message.rid[1:])
                    records[number].output_len += len(message.token_ids)
                    records[number].arrived(now - sent[number])
                    if message.finish_reason is not None:
                        active, done = active - 1, done + 1
        return records, time.perf_counter() - begin

    def serve_zipf(self, add: Callable[[dict[str, Any]], None]) -> None:
        resident: list[str | None] = [record["name"] for record in self.lora.adapters() if record["resident"]][: self.args.slots]
        for phase, names in (("load, resident adapters", resident), ("load, all adapters", list(self.names))):
            adapters = assign_adapters(self.args.requests, names, "zipf", 1.0, self.random)
            load = make_load(adapters, self.args.input, self.args.output, self.vocab, self.random)
            records, seconds = self.serve(load)
            add(self.common(phase) | {"adapters": len(names), "loads": None, "ratio": None, "concurrency": self.args.concurrency} | summarize(records, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.default_path("cold"), help="JSON file; must not exist")
    parser.add_argument("--commit", default=None, help="commit to record when run from a copy without .git")
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=sorted(CONFIGS))
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, to try the benchmark itself")
    parser.add_argument("--experts", type=int, default=None, help="fewer experts, likewise")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--decoding", type=int, default=16, help="requests that decode while adapters are loaded")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each of these measurements")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256, help="of each load")
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--no-files", action="store_true", help="leave out the adapter that is read from files")
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(name)s: %(message)s")
    overrides = {name: value for name, value in {"num_hidden_layers": args.layers, "num_experts": args.experts}.items() if value}
    results = timing.Results(args.out, "cold", KEYS, {name: str(value) for name, value in vars(args).items() if name != "out"}, commit=args.commit)

    def add(row: dict[str, Any]) -> None:
        results.add({"shape": args.shape} | row)
        print(timing.format_table([row], [column for column in COLUMNS if column in row]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, write_config(args.shape, Path(folder) / args.shape, **overrides))
        begin = time.monotonic()
        files = None if args.no_files else write_adapter(bench.lora.pool.layout.targets, args.rank, Path(folder) / "adapter")
        print(f"wrote an adapter's files in {time.monotonic() - begin:.1f} s", flush=True)
        bench.decode_while_loading(add, files)
        bench.serve_zipf(add)
        check_core(bench.core)
        bench.core.close()
    print(timing.format_table(results.rows, COLUMNS))


if __name__ == "__main__":
    main()
