"""One MoE layer with and without adapters on the GPU: real shapes, captured graphs, floors, the peers' recorded times.

    python -m benchmarks.bench_moe_lora                         the table of RESULTS.md, in order of priority
    python -m benchmarks.bench_moe_lora --sweep --tokens 64     tile candidates of both expert GEMMs, best first

Data as in the peers' runs: random bf16 weights, uniform routing, token t -> adapter t mod A, all experts and all three
projections have LoRA with separate A for gate and up; weights rotate past L2. All rows of a shape and M have one x, routing and
base weights and are replayed in turn (`timing.time_in_turn`). The add-on is the layer with adapters less the same layer without,
replayed beside it; its floor is the bytes of the touched adapter weights. Results resume from their JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
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


TARGETS = ((16, 4), (16, 1), (64, 16))  # loads on which targets stand


def plan(shapes: list[str], tokens: list[int], ranks: list[int], active: list[int]) -> list[list[Row]]:
    """Rows that are replayed in turn, of one shape and M each, the base first. First all with the loads on which targets stand, then the others."""
    loads = sorted((r, a) for r in ranks for a in active)
    parts = ([load for load in TARGETS if load in loads], [load for load in loads if load not in TARGETS])
    groups = []
    for part, name, m in itertools.product([part for part in parts if part] or [[]], shapes, tokens):
        rows = [Row(SHAPES[name], m, 0, 0, 0)] + [Row(SHAPES[name], m, rank, a, a) for rank, a in part]
        if (16, 4) in part and name.startswith("qwen3") and m in (1, 64, 1024):  # adapters at rest
            rows += [Row(SHAPES[name], m, 16, 4, slots) for slots in (16, 64)]
        groups.append(rows)
    return groups


def setup_of(row: Row) -> Setup:
    return Setup(row.shape, row.tokens, row.rank, row.active, row.slots)


def measure(rows: list[Row], ceilings: timing.Ceilings, device: torch.device) -> list[dict[str, Any]]:
    """One record a row; the first is the base."""
    base = LayerInputs.build(setup_of(rows[0]), device)
    layers = [base.with_adapters(setup_of(row)) for row in rows]
    calls = [[functools.partial(run_layer, layer, i) for i in range(layer.sets)] for layer in layers]
    found = timing.time_in_turn(calls, count=max(4, base.sets), budget_ms=40.0)
    return [record_of(row, layer, timed, found[0].us, ceilings) for row, layer, timed in zip(rows, layers, found, strict=True)]


def record_of(row: Row, layer: LayerInputs, found: timing.Timing, base_us: float, ceilings: timing.Ceilings) -> dict[str, Any]:
    addon_bytes = adapter_bytes(layer)
    floor = ceilings.floor_us(base_bytes(layer) + addon_bytes, base_flops(layer))
    return {
        **key_of(row), "popularity": "uniform",
        "us": found.us, "low_us": found.low_us, "high_us": found.high_us, "base_us": base_us, "ratio": found.us / floor,
        "addon_us": found.us - base_us if row.rank else None,
        "addon_floor_us": ceilings.floor_us(addon_bytes) if row.rank else None, "floor_us": floor, **peer_times(row),
    }  # fmt: skip


def key_of(row: Row) -> dict[str, Any]:
    values = (row.shape.name, "triton", "bf16", row.tokens, row.rank, row.active, row.slots)
    return dict(zip(KEYS, values, strict=True))


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
    groups = plan(shapes, tokens, args.ranks, args.active)
    warm_compile(list(dict.fromkeys(itertools.chain(*groups))))
    device = torch.device("cuda")
    if args.parts:
        print_parts([setup_of(row) for row in itertools.chain(*groups) if row.rank], device, deadline)
        return
    settings = {"align": "included", "rows": "those of a shape and M in turn"}
    results = timing.Results(args.out, "moe_lora", KEYS, settings, commit=args.commit, peer="vllm 0.33.0, sglang 0.5.23")
    ceilings = results.stored_ceilings() or timing.measure_ceilings(device)
    results.set_ceilings(ceilings)
    for rows in groups:
        missing = [row for row in rows if results.find(**key_of(row)) is None]
        if missing and deadline.reached():
            break
        if missing:
            beside = rows[:1] + [row for row in missing if row.rank]  # the base again, where it is there already
            for row, record in zip(beside, measure(beside, ceilings, device), strict=True):
                if row in missing:
                    results.add(record)
    print(timing.format_table(results.rows, COLUMNS))


if __name__ == "__main__":
    main()
