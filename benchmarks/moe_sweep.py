"""Time launch shapes of the two expert GEMMs alone, to fill `ops/moe_tiles.py`. Candidates that do not compile, spill or need
too much shared memory are dropped by ahead-of-time compiles before they use the GPU."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.compile_ahead import SHARED_LIMIT, compile_all
from benchmarks.moe_inputs import AlignedAhead, LayerInputs, Setup, align_on_host, run_layer
from benchmarks.shapes import MoEShape
from sglang_lora_moe.moe.backends import triton_lora
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.ops import fused_moe_lora
from sglang_lora_moe.ops.fused_moe_lora import ShrinkTile
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.moe_grouped_gemm import GemmTile
from sglang_lora_moe.ops.moe_pair_gemv import GemvTile
from sglang_lora_moe.ops.moe_tiles import LayerTiles
from sglang_lora_moe.ops.moe_wgmma_gemm import WgmmaTile

Tile = GemmTile | WgmmaTile | GemvTile


def candidates(shape: MoEShape, tokens: int, gated: bool) -> Iterator[Tile]:
    """Launch shapes worth a try, after wider sweeps on qwen3-30b-a3b. A gated tile of n columns reads 2 n rows of w."""
    rows = tokens * shape.top_k / shape.experts
    if tokens <= 4:
        pairs = ((4, 512, 4, 3), (8, 256, 4, 2), (8, 256, 4, 4), (8, 512, 4, 3), (8, 1024, 4, 3), (16, 256, 4, 3), (16, 512, 4, 4), (16, 1024, 8, 4))
        yield from (GemvTile(*pair) for pair in pairs)
    halves = 2 if gated else 1
    for n, k, stages, m in itertools.product((32, 64, 128), (64, 128, 256), (3, 4), (16, 32)):
        shared = (halves * n + m) * k * 2 * stages
        if tokens >= 4 and rows <= 40 and (m == 16 and rows <= 20 or m == 32 and rows > 6) and 32 << 10 <= shared <= 120 << 10:
            yield GemmTile(m, n, k, 4, stages, 0)
    if rows > 12:
        group = 1 if shape.experts > 64 or rows <= 96 else 8
        for m, n, warps, stages, ctas in (
            (64, 64, 4, 4, 0),
            (64, 128, 8, 4, 0),
            (64, 128, 4, 3, 0),
            (64, 128, 4, 4, 2),
            (64, 256, 8, 3, 0),
            (64, 256, 8, 3, 1),
        ):
            if rows <= 200 and not (gated and warps == 4 and n == 128):
                yield GemmTile(m, n, 64, warps, stages, ctas, group)
    if rows > 40:
        for n, warps, stages, ctas in ((64, 4, 3, 2), (128, 8, 3, 1), (128, 8, 4, 1), (128, 4, 3, 2), (128, 4, 3, 0), (256, 8, 3, 1), (256, 8, 4, 1)):
            if 128 * n * halves // (32 * warps) <= 128 and not (gated and n == 256):
                yield from (GemmTile(128, n, 64, warps, stages, ctas, group, tail) for tail in ((False, True) if rows <= 600 else (False,)))
        yield from (WgmmaTile(walk, cluster) for cluster in (1, 2) for walk in (1, 2, 4, 8))


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
        routing = routings[index]
        s = inp.workspace.get("sweep.s", (1, routing.num_pairs, width), dtype)
        low = LowRank(s, b, inp.token_slots)
        if not by_pair:  # only compiled, never run: records and ranges of the right kind
            records = inp.workspace.get("sweep.records", (routing.num_pairs, 5), torch.int64)
            low = LowRank(s, b, inp.token_slots, records, routing.alignment.base_tiles[:, :2])
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


def layer_time(inputs: LayerInputs, tiles: LayerTiles) -> float:
    core = inputs.runner.core
    core.tiles = tiles
    if isinstance(core, AlignedAhead):
        core.routings.clear()
    calls = [functools.partial(run_layer, inputs, i) for i in range(inputs.sets)]
    return timing.time_calls(calls, budget_ms=15.0).us


def sweep(shapes: list[MoEShape], tokens: list[int], loads: list[tuple[int, int]], out: Path, deadline: timing.Deadline) -> None:
    """Layers over tile candidates, one GEMM varied at a time; the other has the family's best so far.

    Kernels timed alone mislead: programmatic launches overlap them with their neighbours. Writes rows
    [shape, M, rank, active, us, gate_up tile, down tile] to `out` and prints the best of each load (rank, active).
    """
    groups = itertools.product(loads, shapes, tokens, (True, False))
    jobs = [(load, shape, m, gated, tile) for load, shape, m, gated in groups for tile in candidates(shape, m, gated)]
    good: dict[tuple, list[Tile]] = {}
    for job, result in zip(jobs, compile_all([functools.partial(_compile, *job) for job in jobs]), strict=True):
        if not isinstance(result, str) and all(c.shared <= SHARED_LIMIT[90] for c in result):
            good.setdefault((*job[:4], _family(job[4])), []).append(job[4])
    print(f"{len(jobs)} candidates, {sum(map(len, good.values()))} left after compiling", flush=True)
    device, rows = torch.device("cuda"), []
    for shape, m, load in itertools.product(shapes, tokens, loads):
        if deadline.reached():
            break
        inputs = LayerInputs.build(Setup(shape, m, *load), device)
        found: list[tuple[float, LayerTiles]] = []
        for family in sorted({key[4] for key in good if key[:3] == (load, shape, m)}):
            ups, downs = (good.get((load, shape, m, gated, family), []) for gated in (True, False))
            if ups and downs:
                found += _descend(inputs, ups, downs, deadline)
        found.sort(key=lambda pair: pair[0])
        rows += [[shape.name, m, *load, round(us, 2), repr(tiles.gate_up), repr(tiles.down)] for us, tiles in found]
        print(f"{shape.name} M={m} r{load[0]} A{load[1]}", flush=True)
        shown: dict[str, int] = {}
        for us, tiles in found:
            family = _family(tiles.gate_up)
            shown[family] = shown.get(family, 0) + 1
            if shown[family] <= 3:
                print(f"  {us:9.2f}  {_short(tiles.gate_up)}  {_short(tiles.down)}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=0))
        del inputs
        torch.cuda.empty_cache()


def _descend(inputs: LayerInputs, ups: list[Tile], downs: list[Tile], deadline: timing.Deadline) -> list[tuple[float, LayerTiles]]:
    found: list[tuple[float, LayerTiles]] = []
    up, down = ups[len(ups) // 2], downs[len(downs) // 2]
    for gated in (True, False, True):  # gate_up is most of the bytes: it goes first, and once more against the best down
        done = {repr(tiles): us for us, tiles in found}
        for tile in ups if gated else downs:
            lora_block = {16: 16, 32: 16, 64: 32}.get(getattr(tile, "m", 16), 64)
            tiles = LayerTiles(tile, down, lora_block) if gated else LayerTiles(up, tile, lora_block)
            if repr(tiles) in done or deadline.reached():
                continue
            try:
                found.append((layer_time(inputs, tiles), tiles))
            except (RuntimeError, ValueError) as error:
                print(f"{tiles}: {error}", flush=True)
        found.sort(key=lambda pair: pair[0])
        up, down = found[0][1].gate_up, found[0][1].down
        ups = [tiles.gate_up for _, tiles in found if tiles.down == down or gated][:8]
    return found


def _family(tile: Tile) -> str:
    return "pair" if isinstance(tile, GemvTile) else f"m{tile.m}"


def _short(tile: Tile) -> str:
    return "(" + ", ".join(str(getattr(tile, name)) for name in tile.__dataclass_fields__) + ")"


def shrink_candidates(shape: MoEShape, tokens: int, load: tuple[int, int]) -> Iterator[ShrinkTile]:
    rank, active = load
    if tokens <= 4:
        for r, k, stages, split, warps in itertools.product((16, 32), (128, 256, 512), (2, 3), (1, 2, 4, 8), (2, 4)):
            yield ShrinkTile(16, r, k, warps, stages, split)
        return
    rows = tokens * shape.top_k / shape.experts / active
    for m, r, k, stages, ctas, warps in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (64, 128, 256), (2, 3, 4), (8, 16), (4, 8)):
        shared = (m + r) * k * 2 * stages
        if r <= 2 * rank and m <= max(16, 2 * rows) and 16 << 10 <= shared <= 112 << 10 and (warps == 4 or m * r >= 4096) and m * r <= 8192:
            yield ShrinkTile(m, r, k, warps, stages, 1, ctas)


def _compile_shrink(load: tuple[int, int], shape: MoEShape, tokens: int, tile: ShrinkTile) -> None:
    inputs = LayerInputs.build(Setup(shape, tokens, *load, sets=1), torch.device("meta"))
    for call in shrink_calls(inputs, tile).values():
        call[0]()


def shrink_calls(inputs: LayerInputs, tile: ShrinkTile) -> dict[str, list[Callable[[], object]]]:
    """Calls of both shrinks with one launch shape, a call per input set."""
    by_pair = inputs.setup.tokens <= 4
    calls: dict[str, list[Callable[[], object]]] = {"shrink13": [], "shrink2": []}
    for i, inp in enumerate(inputs.inputs):
        stacks = inputs.stacks[i % len(inputs.stacks)]
        routing = align_on_host(
            Routing(inp.topk_ids, inp.token_slots, inp.spec.num_experts, inp.num_slots, lora_block=tile.m, rows="pair" if by_pair else "sorted")
        )
        act = torch.randn(routing.num_pairs, inp.spec.intermediate_size, device=inp.x.device, dtype=inp.x.dtype)
        calls["shrink13"].append(functools.partial(_shrink, tile, inp, inp.x, stacks, routing, "tokens"))
        calls["shrink2"].append(functools.partial(_shrink, tile, inp, act, stacks, routing, "pairs"))
    return calls


def _shrink(tile: ShrinkTile, *args: object) -> object:
    with mock.patch.object(fused_moe_lora, "shrink_tile", lambda *sizes: tile):
        return triton_lora.addend(*args)


def sweep_shrinks(shapes: list[MoEShape], tokens: list[int], loads: list[tuple[int, int]], out: Path, deadline: timing.Deadline) -> None:
    jobs = [(load, shape, m, tile) for shape, m, load in itertools.product(shapes, tokens, loads) for tile in shrink_candidates(shape, m, load)]
    compiled = compile_all([functools.partial(_compile_shrink, *job) for job in jobs])
    device, rows = torch.device("cuda"), []
    for key, group in itertools.groupby(zip(jobs, compiled, strict=True), key=lambda pair: pair[0][:3]):
        load, shape, m = key
        inputs = LayerInputs.build(Setup(shape, m, *load), device)
        found: dict[str, list[tuple[float, ShrinkTile]]] = {"shrink13": [], "shrink2": []}
        for (_, _, _, tile), result in group:
            if isinstance(result, str) or deadline.reached():
                continue
            for name, calls in shrink_calls(inputs, tile).items():
                found[name].append((timing.time_calls(calls, budget_ms=8.0).us, tile))
        for name, timed in found.items():
            timed.sort(key=lambda pair: pair[0])
            rows += [[shape.name, m, *load, name, round(us, 2), repr(tile)] for us, tile in timed]
            print(f"{shape.name} M={m} r{load[0]} A{load[1]} {name}: " + "  ".join(f"{us:.1f} {_short(tile)}" for us, tile in timed[:5]), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=0))
