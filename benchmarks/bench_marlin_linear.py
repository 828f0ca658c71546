"""Linears with int4 weights on a GPU: every way of `ops/marlin_linear.py` beside the library's 16-bit GEMM, by number of tokens.

    python -m benchmarks.bench_marlin_linear

Captured graphs over weights rotated past L2. `bf16_us`: the library on 16-bit weights; `dequantized_us`: the weight written out, then
the library; `marlin_us`: the best shape of tiles (`config`); `chosen_us`: what `choose_config` takes. Real shapes of attention linears.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import timing
from sglang_lora_moe.ops import marlin_linear as op
from sglang_lora_moe.ops.marlin_moe import EVERYWHERE, SHAPES
from sglang_lora_moe.quantization.wna16 import WNA16Weight

LINEARS = {"qwen3-30b-a3b.qkv": (5120, 2048), "qwen3-30b-a3b.o": (2048, 4096), "mixtral-8x7b.qkv": (6144, 4096)}  # rows, inputs
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GROUP = 128
KEYS = ("linear", "weights", "M")
COLUMNS = ("linear", "M", "chosen_us", "choice", "marlin_us", "config", "dequantized_us", "bf16_us", "floor_us")


def random_weight(rows: int, k: int) -> WNA16Weight:
    packed = torch.randint(-(1 << 31), 1 << 31, (rows, k // 8), dtype=torch.int32, device="cuda")
    return WNA16Weight(packed, torch.rand(rows, k // GROUP, device="cuda").bfloat16(), None, 4, GROUP)


def time_all(calls: list[Callable[[], Any]]) -> float:
    return timing.time_calls(calls, count=32, budget_ms=8.0).us


def measure(linear: str, tokens: int) -> dict[str, Any]:
    rows, k = LINEARS[linear]
    weights = [op.repack_linear(random_weight(rows, k)) for _ in range(timing.rotations(rows * k // 2, most=32))]
    plain = [torch.randn(rows, k, device="cuda").bfloat16() for _ in range(timing.rotations(rows * k * 2))]
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    hopper = torch.cuda.get_device_capability() == (9, 0)

    def us(config: int) -> float:
        return time_all([functools.partial(op.marlin_linear, x, weight, config) for weight in weights])

    # A tile of fewer tokens than half the step's reads the weight too often to be of interest.
    tried = [i for i, shape in enumerate(SHAPES) if (hopper or i < EVERYWHERE) and (shape.block_tokens >= 64 or 2 * shape.block_tokens >= tokens)]
    times = {i: us(i) for i in [*tried, -1]}
    best, choice = min(tried, key=lambda i: times[i]), op.choose_config(tokens, weights[0])
    return {
        "linear": linear, "weights": "int4-g128", "M": tokens, "chosen_us": times.get(choice, us(choice)), "choice": choice, "marlin_us": times[best],
        "config": best, "dequantized_us": times[-1], "bf16_us": time_all([functools.partial(F.linear, x, w) for w in plain]),
        "by_config": {str(i): round(value, 2) for i, value in times.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=timing.default_path("marlin_linear"), help="JSON file; resumed if it exists")
    parser.add_argument("--commit", default=None, help="commit to record when run from a copy without .git")
    parser.add_argument("--time-limit", type=float, default=None)
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--linears", nargs="*", default=list(LINEARS), choices=LINEARS)
    args = parser.parse_args()
    deadline = timing.Deadline(args.time_limit)
    results = timing.Results(args.out, "marlin_linear", KEYS, {"group": GROUP}, commit=args.commit)
    ceilings = timing.measure_ceilings(torch.device("cuda"))
    results.set_ceilings(ceilings)
    for linear in args.linears:
        for tokens in args.tokens:
            if deadline.reached() or results.find(linear=linear, weights="int4-g128", M=tokens):
                continue
            rows, k = LINEARS[linear]
            row = measure(linear, tokens)
            row["floor_us"] = ceilings.floor_us(rows * k * (0.5 + 2 / GROUP) + 2.0 * tokens * (rows + k), 2.0 * tokens * rows * k)
            results.add(row)
            print(timing.format_table([row], COLUMNS), row["by_config"], flush=True)
    print(timing.format_table(results.rows, COLUMNS))


if __name__ == "__main__":
    main()
