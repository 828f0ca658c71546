"""One launch of gate_up at a real shape, for a profiler: python -m benchmarks.profile_marlin M CONFIG"""

import sys

import torch

from benchmarks.bench_marlin import Layer, Row
from benchmarks.shapes import SHAPES
from sglang_lora_moe.moe.backends.marlin import MarlinPlan

tokens, config = int(sys.argv[1]), int(sys.argv[2])
layer = Layer.build(Row(SHAPES["qwen3-30b-a3b"], "int4-g128", tokens), torch.device("cuda"), MarlinPlan(config, config))
for call in layer.gemm_calls(True, False)[:3]:
    call()
torch.cuda.synchronize()
