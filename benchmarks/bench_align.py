"""moe_lora_align_block_size alone: four real shapes, captured graphs, the peers' recorded times beside ours.

    python -m benchmarks.bench_align                 every shape, M and number of adapters
    python -m benchmarks.bench_align --plans         also each way of cutting the work, to choose where one block stops paying

64 calls in one graph, each with routing and outputs of its own; uniform routing, token t -> adapter t mod A, every token on an
adapter (A = 0: the base alignment). The peers run two kernels for what ours does in one call: with adapters compare `us` with
peer_base_us + peer_us. The floor is bytes only (ids and slots in, pairs and tiles out); a launch alone costs `launch_us`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.shapes import ACTIVE, SHAPES, TOKENS, MoEShape
from sglang_lora_moe.ops import moe_lora_align as op
from tests.moe_cases import generator, make_token_slots, make_topk_ids
from tests.ops.align_plans import Plan, align_with_plan

KEYS = ("shape", "M", "active", "plan")
COLUMNS = (*KEYS, "us", "low_us", "high_us", "peer_base_us", "peer_us", "ratio", "floor_us")
CALLS = 64
PLANS: dict[str, Plan] = {  # of tests/ops/align_plans.py; without a bin for each group slots are sorted after experts
    **{f"{n} a block": (-1, 0, n, 1, 1 << 20) for n in (256, 512, 1024)},
    "no bin a group": (512, 0, 0, 1, 0),
    "cluster": (512, 16384, 0, 1, 1 << 20),
    "no overlap": (512, 4096, 0, 0, -1),
}
PEERS = json.loads((Path(__file__).parent / "peers_align_h200.json").read_text())["rows"]


@dataclass(frozen=True)
class Inputs:
    """One call's tensors."""

    ids: torch.Tensor
    slots: torch.Tensor | None
    sizes: tuple[int, int, int, int]
    buffers: op.Alignment
    workspace: torch.Tensor

    @staticmethod
    def build(shape: MoEShape, tokens: int, active: int, seed: int, device: torch.device) -> Inputs:
        g = generator(seed)
        ids = make_topk_ids("uniform", tokens, shape.top_k, shape.experts, g).to(device)
        slots = make_token_slots("distinct", tokens, active, g).to(device) if active else None
        base_block, lora_block = PEERS[f"{shape.peer_name} {tokens}"]["block"], 16
        buffers = op.empty_alignment(ids.numel(), shape.experts, active, base_block, lora_block, device)
        workspace = torch.empty(op.workspace_elements(ids.numel(), shape.experts), dtype=torch.int32, device=device)
        return Inputs(ids, slots, (shape.experts, active, base_block, lora_block), buffers, workspace)

    def call(self) -> None:
        op.moe_lora_align_block_size(self.ids, self.slots, *self.sizes, buffers=self.buffers, workspace=self.workspace)

    def call_with(self, plan: Plan) -> None:
        align_with_plan(plan, self.ids, self.slots, self.sizes, self.buffers, self.workspace)

    def bytes_moved(self) -> int:
        _, base, lora, _ = self.buffers.counts.tolist()
        read = self.ids.numel() + (0 if self.slots is None else self.slots.numel())
        return 4 * (read + self.ids.numel() + 3 * base + 4 * lora + 4)


def measure(shape: MoEShape, tokens: int, active: int, plan: str, ceilings: timing.Ceilings) -> dict[str, Any]:
    device = torch.device("cuda")
    inputs = [Inputs.build(shape, tokens, active, seed, device) for seed in range(8)]
    calls: list[Callable[[], object]] = [i.call if plan == "default" else partial(i.call_with, PLANS[plan]) for i in inputs]
    found = timing.time_calls(calls, count=CALLS, budget_ms=15.0)
    peer = PEERS[f"{shape.peer_name} {tokens}"]
    peer_us = peer.get(f"A{active}")
    floor = ceilings.floor_us(inputs[0].bytes_moved())
    against = peer["base"] + (peer_us or 0.0)
    row = {"shape": shape.name, "backend": "cuda", "M": tokens, "active": active, "popularity": "even", "plan": plan}
    times = {"us": found.us, "low_us": found.low_us, "high_us": found.high_us, "floor_us": floor}
    return {**row, **times, "ratio": found.us / against, "peer": "vllm", "peer_us": peer_us, "peer_base_us": peer["base"], "sglang_us": None}


def launch_us() -> float:
    """The smallest kernel there is, by the same method."""
    one = torch.zeros(1, device="cuda")
    return timing.time_calls([partial(one.add_, 1.0)], count=CALLS, budget_ms=15.0).us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    timing.add_arguments(parser, "align")
    parser.add_argument("--active", nargs="*", type=int, default=list(ACTIVE), help="numbers of adapters, 0 = base alignment")
    parser.add_argument("--plans", action="store_true", help="also measure each way of cutting the work")
    args = parser.parse_args()
    deadline = timing.Deadline(args.time_limit)
    results = timing.Results(args.out, "align", KEYS, {"calls": CALLS, "lora_block": 16}, commit=args.commit, peer="vllm 0.33.0")
    ceilings = results.stored_ceilings() or timing.measure_ceilings(torch.device("cuda"))
    results.record["settings"]["launch_us"] = round(launch_us(), 3)
    results.set_ceilings(ceilings)
    for plan in ("default", *(PLANS if args.plans else ())):
        for name in args.shapes or SHAPES:
            for active in sorted(args.active, key=lambda a: (a != 16, a)):  # the targets stand on A = 16
                for tokens in args.tokens or TOKENS:
                    key = {"shape": name, "M": tokens, "active": active, "plan": plan}
                    if deadline.reached() or results.find(**key):
                        continue
                    results.add(measure(SHAPES[name], tokens, active, plan, ceilings))
    print(timing.format_table(results.rows, COLUMNS))
    print(f"a launch alone: {results.record['settings']['launch_us']} us; {len(results.rows)} rows in {args.out}")


if __name__ == "__main__":
    main()
