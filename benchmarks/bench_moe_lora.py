"""One MoE layer with and without adapters on the GPU: real shapes, captured graphs, floors, the peers' recorded times.

    python -m benchmarks.bench_moe_lora                         the table of RESULTS.md, in order of priority
    python -m benchmarks.bench_moe_lora --sweep --tokens 64     tile candidates of both expert GEMMs, best first

Data as in the peers' runs: random bf16 weights, uniform routing, token t -> adapter t mod A, all experts and all three
projections have LoRA with separate A for gate and up; weights rotate past L2. The add-on is the layer with adapters less the
same layer without, in this run; its floor is the bytes of the touched adapter weights. Results resume from their JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.compile_ahead import compile_all
from benchmarks.moe_inputs import LayerInputs, Setup, adapter_bytes, base_bytes, base_flops, run_layer
from benchmarks.moe_parts import print_parts
from benchmarks.moe_sweep import sweep, sweep_shrinks
from benchmarks.shapes import SHAPES, MoEShape

KEYS = ("shape", "backend", "weights", "M", "rank", "active", "slots")
COLUMNS = ("shape", "M", "rank", "active", "slots", "us", "floor_us", "ratio", "base_us", "addon_us", "addon_floor_us", "peer_us", "sglang_us")


@dataclass(frozen=True)
class Row:
    shape: MoEShape
    tokens: int
    rank: int  # 0 = no adapters
    active: int
    slots: int  # resident adapters, of which `active` are used


def plan(shapes: list[str], tokens: list[int], ranks: list[int], active: list[int]) -> list[Row]:
    """First, size by size, base, rank 16 with 1 and 4 adapters and rank 64 with 16, on which the targets stand; then the rest.

    The rows of one size stand together, because the chip's power state moves figures of large sizes by some percent.
    """
    rows: list[Row] = []
    for name in shapes:
        rows += [Row(SHAPES[name], m, 0, 0, 0) for m in tokens]
        loads = sorted(((r, a) for r in ranks for a in active), key=lambda load: (load not in ((16, 4), (16, 1), (64, 16)), load))
        rows += [Row(SHAPES[name], m, rank, a, a) for rank, a in loads for m in tokens]
    urgent = [row for row in rows if (row.rank, row.active) in ((0, 0), (16, 4), (16, 1), (64, 16))]
    urgent.sort(key=lambda row: (shapes.index(row.shape.name), row.tokens, row.rank))
    resident = [Row(row.shape, row.tokens, row.rank, row.active, s) for row in urgent if (row.rank, row.active) == (16, 4) for s in (16, 64)]
    resident = [row for row in resident if row.shape.name.startswith("qwen3") and row.tokens in (1, 64, 1024)]
    return urgent + resident + [row for row in rows if row not in urgent]


def setup_of(row: Row) -> Setup:
    return Setup(row.shape, row.tokens, row.rank, row.active, row.slots)


def measure(row: Row, ceilings: timing.Ceilings, bases: dict[tuple[str, int], float], device: torch.device) -> dict[str, Any]:
    inputs = LayerInputs.build(setup_of(row), device)
    calls = [functools.partial(run_layer, inputs, i) for i in range(inputs.sets)]
    found = timing.time_calls(calls, count=max(4, inputs.sets), budget_ms=40.0)
    expert_bytes, addon_bytes = base_bytes(inputs), adapter_bytes(inputs)
    floor = ceilings.floor_us(expert_bytes + addon_bytes, base_flops(inputs))
    base = bases.get((row.shape.name, row.tokens))
    peers = peer_times(row)
    return {
        "shape": row.shape.name, "backend": "triton", "weights": "bf16", "M": row.tokens, "rank": row.rank, "active": row.active, "slots": row.slots,
        "popularity": "uniform",
        "us": found.us, "low_us": found.low_us, "high_us": found.high_us, "base_us": base if row.rank else found.us,
        "ratio": found.us / floor, "addon_us": found.us - base if row.rank and base else None,
        "addon_floor_us": ceilings.floor_us(addon_bytes) if row.rank else None, "floor_us": floor, **peers,
    }  # fmt: skip


@functools.lru_cache(maxsize=1)
def _peers() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "peers_h200.json").read_text())


def peer_times(row: Row) -> dict[str, Any]:
    key = f"{row.shape.peer_name} {row.tokens} " + (f"r{row.rank} A{row.active}" if row.rank else "base")
    found = _peers()["rows"].get(key, {})
    return {"peer": "vllm", "peer_us": found.get("vllm"), "sglang_us": found.get("sglang")}


def warm_compile(rows: list[Row]) -> None:
    """Compile every row's kernels on all cores before CUDA starts."""
    calls: list[Callable[[], object]] = [functools.partial(_launch_meta, setup_of(row)) for row in rows]
    for row, result in zip(rows, compile_all(calls), strict=True):
        if isinstance(result, str):
            print(f"does not compile: {row}: {result}", flush=True)


def _launch_meta(setup: Setup) -> None:
    run_layer(LayerInputs.build(replace(setup, sets=1), torch.device("meta")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    timing.add_arguments(parser, "moe_lora")
    parser.add_argument("--sweep", action="store_true", help="time tile candidates instead of layers")
    parser.add_argument("--with-adapters", action="store_true", help="sweep layers with the first of --ranks and of --active instead of base layers")
    parser.add_argument("--shrinks", action="store_true", help="time launch shapes of the two shrinks alone, for all --ranks and --active")
    parser.add_argument("--parts", action="store_true", help="time every kernel of a layer alone")
    parser.add_argument("--ranks", nargs="*", type=int, default=[16, 64])
    parser.add_argument("--active", nargs="*", type=int, default=[1, 4, 16])
    args = parser.parse_args()
    shapes, tokens = args.shapes or list(SHAPES), args.tokens or [1, 4, 16, 64, 256, 1024, 4096]
    deadline = timing.Deadline(args.time_limit)
    if args.shrinks:
        sweep_shrinks([SHAPES[name] for name in shapes], tokens, [(r, a) for r in args.ranks for a in args.active], args.out, deadline)
        return
    if args.sweep:
        loads = [(args.ranks[0], args.active[0]) if args.with_adapters else (0, 0)]
        sweep([SHAPES[name] for name in shapes], tokens, loads, args.out, deadline)
        return
    rows = plan(shapes, tokens, args.ranks, args.active)
    warm_compile(rows)
    device = torch.device("cuda")
    if args.parts:
        print_parts([setup_of(row) for row in rows if row.rank], device, deadline)
        return
    results = timing.Results(args.out, "moe_lora", KEYS, {"align": "included"}, commit=args.commit, peer="vllm 0.33.0, sglang 0.5.23")
    ceilings = results.stored_ceilings() or timing.measure_ceilings(device)
    results.set_ceilings(ceilings)
    bases = {(row["shape"], row["M"]): row["us"] for row in results.rows if row["rank"] == 0}
    for row in rows:
        if deadline.reached():
            break
        if results.find(shape=row.shape.name, backend="triton", weights="bf16", M=row.tokens, rank=row.rank, active=row.active, slots=row.slots) is None:
            record = measure(row, ceilings, bases, device)
            results.add(record)
            if row.rank == 0:
                bases[(row.shape.name, row.tokens)] = record["us"]
    print(timing.format_table(results.rows, COLUMNS))


if __name__ == "__main__":
    main()
