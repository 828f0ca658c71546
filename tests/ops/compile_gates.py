"""Compile the MoE kernels ahead of time and print what came out, one JSON line a kernel. Run by test_triton_compile.py.

A process of its own: the tests' one has Triton's interpreter switched on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from unittest import mock

import torch

from benchmarks.compile_ahead import compiling
from benchmarks.moe_inputs import LayerInputs, Setup, run_layer
from benchmarks.shapes import SHAPES
from sglang_lora_moe.ops import launch

# (shape, arch, tokens, rank, active): a whole layer, with the launch shapes it has at that size where no wgmma kernel takes over
QWEN3, GPT_OSS = "qwen3-30b-a3b", "gpt-oss-20b"
LAYERS = (
    (GPT_OSS, 90, 16, 16, 4),
    (QWEN3, 90, 1, 16, 4),
    (QWEN3, 90, 16, 16, 4),
    (QWEN3, 90, 64, 16, 4),
    (QWEN3, 90, 256, 0, 0),
    (QWEN3, 90, 1024, 0, 0),
    (QWEN3, 90, 1024, 16, 4),
    (QWEN3, 90, 4096, 16, 4),
    (QWEN3, 80, 64, 16, 4),
    (QWEN3, 100, 64, 0, 0),
    (QWEN3, 89, 512, 16, 4),
    (QWEN3, 89, 1024, 0, 0),
    (QWEN3, 120, 1, 0, 0),
)


def main() -> None:
    for shape, arch, tokens, rank, active in LAYERS:
        with compiling(arch, inspect=True) as found, mock.patch.object(launch, "has_wgmma", lambda device: False):
            run_layer(LayerInputs.build(Setup(SHAPES[shape], tokens, rank, active, sets=1), torch.device("meta")), 0)
        for kernel in found:
            print(json.dumps({"arch": arch, "tokens": tokens, "rank": rank, **asdict(kernel)}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
