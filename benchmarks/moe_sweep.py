"""Time launch shapes of the two expert GEMMs alone, to fill `ops/moe_tiles.py`. Candidates that do not compile, spill or need
too much shared memory are dropped by ahead-of-time compiles before they use the GPU."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.compile_ahead import SHARED_LIMIT, compile_all
from benchmarks.moe_inputs import LayerInputs, Setup, align_on_host
from benchmarks.shapes import MoEShape
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.moe_grouped_gemm import GemmTile
from sglang_lora_moe.ops.moe_pair_gemv import GemvTile
from sglang_lora_moe.ops.moe_tiles import LayerTiles

Tile = GemmTile | GemvTile


def candidates(shape: MoEShape, tokens: int, gated: bool) -> Iterator[Tile]:
    """Launch shapes worth a try. A gated tile of n columns reads 2 n rows of w."""
    rows = tokens * shape.top_k / shape.experts
    if tokens <= 4:
        for n, k, warps, stages in itertools.product((4, 8, 16), (256, 512, 1024), (4, 8), (2, 3, 4)):
            if 16 <= n * k // (32 * warps) <= 64:
                yield GemvTile(n, k, warps, stages)
    if 4 <= tokens and rows <= 24:
        for m, n, k, stages, tma in itertools.product((16, 32), (32, 64, 128), (64, 128, 256), (3, 4, 6), (True, False)):
            stage = (2 * n if gated else n) * k * 2 + m * k * 2
            if (m == 16 or rows > 6) and 24 << 10 <= stage * stages <= 220 << 10 and (tma or stages < 6):
                yield GemmTile(m, n, k, 4, stages, max(1, min(4, (226 << 10) // (stage * stages + 1024))), 1, tma)
    if rows > 24 or (tokens >= 256 and rows > 12):
        for m, n, k, warps, stages, group, tma in itertools.product((64, 128), (64, 128, 256), (64, 128), (4, 8), (3, 4), (1, 8), (True, False)):
            stage = (2 * n if gated else n) * k * 2 + m * k * 2
            registers = m * n * (2 if gated else 1) // (32 * warps)
            if (m == 64 or rows > 40) and registers <= 128 and stage * stages <= 220 << 10 and (k == 64 or m == 64) and (tma or stages == 3):
                if (group == 1) == (rows <= 96 or shape.experts > 64):
                    yield GemmTile(
                        m, n, k, warps, stages, max(1, min(2, (226 << 10) // (stage * stages + 1024), 65536 // (registers + 56) // (32 * warps))), group, tma
                    )


def run_gemm(inputs: LayerInputs, gated: bool, tile: Tile, routings: list[Routing], acts: list[torch.Tensor], index: int) -> None:
    """One expert GEMM of one set; with adapters in the set-up, with a ready addend."""
    core, inp = inputs.runner.core, inputs.inputs[index]
    core.tiles = LayerTiles(tile, tile)
    weights, low = inputs.weights[index % len(inputs.weights)], None
    if inputs.stacks:
        stacks = inputs.stacks[index % len(inputs.stacks)]
        b = stacks.b13 if gated else stacks.b2
        by_pair = isinstance(tile, GemvTile)
        dtype, width = torch.float32 if by_pair else inp.x.dtype, (stacks.a13 if gated else stacks.a2).shrink_width
        low = LowRank(inp.workspace.get("sweep.s", (1, routings[index].num_pairs, width), dtype), b, inp.token_slots)
    if gated:
        core.gate_up_activation(inp, routings[index], weights, low)
    elif isinstance(tile, GemvTile):
        core.down_combine(inp, acts[index], routings[index], weights, low)
    else:
        core.down(inp, acts[index], routings[index], weights, low)


def prepare(shape: MoEShape, tokens: int, device: torch.device, load: tuple[int, int], sets: int = 0) -> tuple[LayerInputs, list[torch.Tensor]]:
    inputs = LayerInputs.build(Setup(shape, tokens, *load, sets=sets), device)
    acts = [torch.randn(tokens * shape.top_k, shape.inter, device=device, dtype=torch.bfloat16) for _ in inputs.inputs]
    return inputs, acts


def routings_for(inputs: LayerInputs, block: int, by_pair: bool) -> list[Routing]:
    made = []
    for inp in inputs.inputs:
        routing = Routing(inp.topk_ids, inp.token_slots, inp.spec.num_experts, inp.num_slots, base_block=block, rows="pair" if by_pair else "sorted")
        made.append(routing if by_pair else align_on_host(routing))  # outside the timed graph
    return made


def _compile(load: tuple[int, int], shape: MoEShape, tokens: int, gated: bool, tile: Tile) -> None:
    inputs, acts = prepare(shape, tokens, torch.device("meta"), load, 1)
    by_pair = isinstance(tile, GemvTile)
    run_gemm(inputs, gated, tile, routings_for(inputs, 16 if by_pair else tile.m, by_pair), acts, 0)


def sweep(shapes: list[MoEShape], tokens: list[int], load: tuple[int, int], out: Path, deadline: timing.Deadline) -> None:
    """Write [shape, M, gemm, rank, active, us, tile] rows to `out`, best first per GEMM, and print the best. load = (rank, active), 0 without."""
    todo = [(shape, m, gated, tile) for shape in shapes for m in tokens for gated in (True, False) for tile in candidates(shape, m, gated)]
    compiled = compile_all([functools.partial(_compile, load, *job) for job in todo])
    device, rows = torch.device("cuda"), []
    good = {}
    for job, result in zip(todo, compiled, strict=True):
        if not isinstance(result, str) and all(c.shared <= SHARED_LIMIT[90] for c in result):
            good.setdefault(job[:3], []).append(job[3])
    print(f"{len(todo)} candidates, {sum(map(len, good.values()))} left after compiling", flush=True)
    for (shape, m, gated), tiles in good.items():
        if deadline.reached():
            break
        inputs, acts = prepare(shape, m, device, load)
        routings: dict[tuple[int, bool], list[Routing]] = {}
        found = []
        for tile in tiles:
            key = (16 if isinstance(tile, GemvTile) else tile.m, isinstance(tile, GemvTile))
            if key not in routings:
                routings[key] = routings_for(inputs, *key)
            calls = [functools.partial(run_gemm, inputs, gated, tile, routings[key], acts, i) for i in range(inputs.sets)]
            try:
                found.append((timing.time_calls(calls, budget_ms=12.0).us, tile))
            except (RuntimeError, ValueError) as error:
                print(f"{shape.name} M={m}: {tile}: {error}", flush=True)
        found.sort(key=lambda pair: pair[0])
        rows += [[shape.name, m, "gate_up" if gated else "down", *load, round(us, 2), repr(tile)] for us, tile in found]
        weight_bytes = inputs.inputs[0].topk_ids.unique().numel() * shape.hidden * shape.inter * (4 if gated else 2)
        print(f"{shape.name} M={m} {'gate_up' if gated else 'down'}: weights alone {weight_bytes / 4.45e6:.1f} us", flush=True)
        for us, tile in found[:4]:
            print(f"    {us:9.2f}  {tile}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=0))
        del inputs, acts, routings
        torch.cuda.empty_cache()
