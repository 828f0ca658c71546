"""One MoE layer with int4 or int8 experts on the GPU, with and without adapters, against the byte floor, vLLM's recorded Marlin and our bf16 layer.

    python -m benchmarks.bench_marlin                           the table of RESULTS.md, in order of priority
    python -m benchmarks.bench_marlin --sweep --tokens 1 16     every shape of tiles of both GEMMs, best first

Data as in the peers' runs (`bench_moe_lora`), codes and scales random. `us` is the layer with its alignment; `gemm_us` the two
expert GEMMs alone (the activation is part of the first), `share` the packed bytes of the distinct experts over that time, as a
share of the copy bandwidth of this run; `bf16_us` the same layer with 16-bit weights (triton backend), in this run. gpt-oss in
groups of 128 is padded to 2,944, as the peer pads it; its floor is not. The layers of a shape and M with and without adapters have
one x, routing and weights and are replayed in turn (`timing.time_in_turn`).
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
from benchmarks.moe_inputs import LayerInputs, Setup, ids, make_stacks, run_layer
from benchmarks.shapes import SHAPES, MoEShape
from sglang_lora_moe.lora.hooks import build_lora_hooks
from sglang_lora_moe.moe.backends import marlin_lora
from sglang_lora_moe.moe.backends.marlin import MarlinPlan, MarlinQuantInfo, MarlinRunnerCore, scratch_of
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import LoRAHooks, MoeRunner, RunnerInput
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import marlin_moe
from sglang_lora_moe.quantization.wna16 import WNA16Weight

FORMATS = {"int4-g128": (4, 128), "int4-g32": (4, 32), "int8-g128": (8, 128)}
KEYS = ("shape", "backend", "weights", "M", "rank", "active")
COLUMNS = (
    *("shape", "weights", "M", "rank", "active", "us", "floor_us", "ratio", "gemm_us", "share"),
    *("base_us", "addon_us", "peer_us", "over_peer", "bf16_us", "over_bf16"),
)


@dataclass(frozen=True)
class Row:
    shape: MoEShape
    weights: str
    tokens: int
    rank: int = 0
    active: int = 0


@dataclass
class Layer:
    """Inputs of a layer, rotated so that a pass leaves L2 behind; `routings` are aligned ahead for the GEMMs alone."""

    row: Row
    core: MarlinRunnerCore
    inputs: list[RunnerInput]
    weights: list[MarlinQuantInfo]
    hooks: list[LoRAHooks | None]

    @classmethod
    def build(cls, row: Row, device: torch.device, plan: MarlinPlan | None = None) -> Layer:
        """x and routing depend on shape and number of tokens alone."""
        torch.manual_seed(row.tokens * 1000)
        spec, m = padded_spec(row), row.tokens
        scratch_of(device)
        workspace = Workspace(device)
        inputs = [
            RunnerInput(
                torch.randn(m, spec.hidden_size, device=device, dtype=torch.bfloat16), ids(m, spec, device), torch.rand(m, spec.top_k, device=device),
                None, workspace, spec,
            )
            for _ in range(max(4, min(16, 256 // m)))
        ]  # fmt: skip
        return cls(row, MarlinRunnerCore(plan), inputs, random_weights(row.weights, spec, device), [None]).with_adapters(row)

    def with_adapters(self, row: Row) -> Layer:
        """The same x, routing and weights with the adapters of `row`; without where it has none."""
        assert replace(row, rank=0, active=0) == replace(self.row, rank=0, active=0), "another layer"
        if not row.rank:
            return self
        device = self.inputs[0].x.device
        slots = (torch.arange(row.tokens, dtype=torch.int32) % row.active).to(device)
        hooks: list[LoRAHooks | None] = [build_lora_hooks(make_stacks(padded_spec(row), row.rank, row.active, device), marlin_lora) for _ in range(2)]
        return replace(self, row=row, inputs=[replace(inp, token_slots=slots, num_slots=row.active) for inp in self.inputs], hooks=hooks)

    def run(self, index: int) -> torch.Tensor:
        return MoeRunner(self.core).run(self.inputs[index], self.weights[index % len(self.weights)], self.hooks[index % len(self.hooks)])

    def gemm_calls(self, gate_up: bool = True, down: bool = True) -> list[Callable[[], object]]:
        """The two GEMMs alone, alignment made before and the input of down random."""
        calls = []
        for i, inp in enumerate(self.inputs):
            routing, act = self.core.make_routing(inp), torch.randn(inp.topk_ids.numel(), inp.spec.intermediate_size, device=inp.x.device, dtype=inp.x.dtype)
            if routing.rows == "sorted":
                routing.workspace = None  # buffers of its own
                routing.alignment  # noqa: B018
            calls.append(functools.partial(self._gemms, inp, routing, act, self.weights[i % len(self.weights)], gate_up, down))
        return calls

    def _gemms(self, inp: RunnerInput, routing: Routing, act: torch.Tensor, weights: MarlinQuantInfo, gate_up: bool, down: bool) -> None:
        if gate_up:
            self.core.gate_up_activation(inp, routing, weights)
        if down:
            (self.core.down_combine if routing.rows == "pair" else self.core.down)(inp, act, routing, weights)

    @property
    def expert_bytes(self) -> float:
        """Packed bytes of the distinct experts at their logical widths: mean over the sets."""
        bits, group = FORMATS[self.row.weights]
        touched = sum(inp.topk_ids.unique().numel() for inp in self.inputs) / len(self.inputs)
        return touched * 3 * self.row.shape.hidden * self.row.shape.inter * (bits / 8 + 2 / group)


def padded_spec(row: Row) -> MoESpec:
    group, shape = FORMATS[row.weights][1], row.shape
    hidden, inter = (-(-width // group) * group for width in (shape.hidden, shape.inter))
    return MoESpec(shape.experts, shape.top_k, hidden, inter)


@functools.lru_cache(maxsize=1)
def random_weights(weights: str, spec: MoESpec, device: torch.device) -> list[MarlinQuantInfo]:
    bits, group = FORMATS[weights]

    def weight(rows: int, k: int) -> WNA16Weight:
        codes = torch.randint(-(2**31), 2**31 - 1, (spec.num_experts, rows, k * bits // 32), device=device, dtype=torch.int32)
        scales = (torch.rand(spec.num_experts, rows, k // group, device=device) + 0.5).mul_(k**-0.5 / (1 << bits - 2)).to(torch.bfloat16)
        return WNA16Weight(codes, scales, None, bits, group)

    h, i = spec.hidden_size, spec.intermediate_size
    return [MarlinQuantInfo(marlin_moe.marlin_moe_repack(weight(2 * i, h), 2), marlin_moe.marlin_moe_repack(weight(h, i))) for _ in range(2)]


def measure_bf16(row: Row, device: torch.device) -> float:
    """Microseconds of our own layer with 16-bit weights, the triton backend."""
    inputs = LayerInputs.build(Setup(row.shape, row.tokens), device)
    calls = [functools.partial(run_layer, inputs, i) for i in range(inputs.sets)]
    return timing.time_calls(calls, count=max(4, inputs.sets), budget_ms=20.0).us


def measure(rows: list[Row], ceilings: timing.Ceilings, device: torch.device) -> list[dict[str, Any]]:
    """One record a row; the first is the base."""
    base = Layer.build(rows[0], device)
    count = len(base.inputs)
    calls = [[functools.partial(layer.run, i) for i in range(count)] for layer in map(base.with_adapters, rows)]
    found = timing.time_in_turn(calls, count=max(4, count), budget_ms=30.0)
    gemm = timing.time_calls(base.gemm_calls(), count=max(4, count), budget_ms=20.0).us
    expert_bytes = base.expert_bytes
    del base, calls
    bf16 = measure_bf16(rows[0], device) if rows[0].weights == "int4-g128" else None
    return [
        record_of(row, timed, found[0].us, None if row.rank else gemm, None if row.rank else bf16, expert_bytes, ceilings)
        for row, timed in zip(rows, found, strict=True)
    ]


def record_of(
    row: Row, found: timing.Timing, base_us: float, gemm: float | None, bf16: float | None, expert_bytes: float, ceilings: timing.Ceilings
) -> dict[str, Any]:  # fmt: skip
    tokens, shape, peer = row.tokens, row.shape, peer_us(row)
    floor = ceilings.floor_us(expert_bytes + 4 * tokens * shape.hidden, 6.0 * tokens * shape.top_k * shape.hidden * shape.inter)
    return {
        **key_of(row), "popularity": "uniform",
        "us": found.us, "low_us": found.low_us, "high_us": found.high_us, "floor_us": floor, "ratio": found.us / floor,
        "gemm_us": gemm, "share": expert_bytes / gemm * 1e6 / ceilings.copy_bytes_per_s if gemm else None,
        "base_us": base_us, "addon_us": found.us - base_us if row.rank else None,
        "peer": "vllm", "peer_us": peer, "over_peer": found.us / peer if peer else None,
        "bf16_us": bf16, "over_bf16": found.us / bf16 if bf16 else None,
    }  # fmt: skip


def key_of(row: Row) -> dict[str, Any]:
    return dict(zip(KEYS, (row.shape.name, "marlin", row.weights, row.tokens, row.rank, row.active), strict=True))


@functools.lru_cache(maxsize=1)
def _peers() -> dict[str, float]:
    return json.loads((Path(__file__).parent / "peers_marlin_h200.json").read_text())["us"]


def peer_us(row: Row) -> float | None:
    """vLLM's Marlin layer; it was measured with int4 in groups of 128 only."""
    if row.weights != "int4-g128":
        return None
    return _peers().get(f"{row.shape.peer_name} {row.tokens} " + (f"r{row.rank} A{row.active}" if row.rank else "base"))


def sweep(shapes: list[str], tokens: list[int], weights: str, device: torch.device, out: Path) -> None:
    """Microseconds of gate_up and of down by shape of tiles; `pairs`: by the kernels of single pairs."""
    lines = []
    for name in shapes:
        for m in tokens:
            row, found = Row(SHAPES[name], weights, m), {}
            plans = {
                str(i): MarlinPlan(i, i)
                for i, s in enumerate(marlin_moe.SHAPES)
                if s.block_tokens <= 16 or m * row.shape.top_k * 8 >= s.block_tokens * row.shape.experts
            }
            for label, chosen in (({"pairs": MarlinPlan(1, 1, by_pair=True)} if m <= 8 else {}) | plans).items():
                layer = Layer.build(row, device, chosen)
                times = [timing.time_calls(layer.gemm_calls(g, not g), count=max(4, len(layer.inputs)), budget_ms=8.0).us for g in (True, False)]
                found[label] = times
            bytes_us = layer.expert_bytes / 4.28e6
            lines.append(f"{name:16} M={m:<5} copy {bytes_us:7.1f} | " + "  ".join(f"{c}: {g:.1f}+{d:.1f}" for c, (g, d) in found.items()))
            print(lines[-1], flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.with_suffix(".sweep.txt").write_text("\n".join(lines) + "\n")


def plan(shapes: list[str], formats: list[str], tokens: list[int], loads: list[tuple[int, int]]) -> list[list[Row]]:
    """Rows that are replayed in turn, of one shape and M each, the base first; with adapters in the first format alone."""
    return [
        [Row(SHAPES[s], w, m)] + [Row(SHAPES[s], w, m, r, a) for r, a in loads if w == formats[0]]
        for w, s, m in itertools.product(formats, shapes, tokens)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    timing.add_arguments(parser, "marlin")
    parser.add_argument("--sweep", action="store_true", help="time shapes of tiles instead of layers")
    parser.add_argument("--weights", nargs="*", default=list(FORMATS))
    parser.add_argument("--no-adapters", action="store_true")
    args = parser.parse_args()
    shapes, tokens, device = args.shapes or list(SHAPES), args.tokens or [1, 4, 16, 64, 256, 1024, 4096], torch.device("cuda")
    if args.sweep:
        sweep(shapes, tokens, args.weights[0], device, args.out)
        return
    deadline = timing.Deadline(args.time_limit)
    results = timing.Results(args.out, "marlin", KEYS, {"align": "included", "rows": "those of a shape and M in turn"}, commit=args.commit, peer="vllm 0.33.0")
    ceilings = results.stored_ceilings() or timing.measure_ceilings(device)
    results.set_ceilings(ceilings)
    for rows in plan(shapes, args.weights, tokens, [] if args.no_adapters else [(16, 4), (16, 1)]):
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
