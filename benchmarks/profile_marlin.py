"""One launch of gate_up at a real shape, for a profiler: python -m benchmarks.profile_marlin M CONFIG"""

import argparse

import torch

from benchmarks.bench_marlin import Layer, Row
from benchmarks.shapes import SHAPES
from sglang_lora_moe.moe.backends.marlin import MarlinPlan

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("tokens", type=int)
parser.add_argument("config", type=int, help="a MarlinPlan's shape of both GEMMs")
args = parser.parse_args()
layer = Layer.build(Row(SHAPES["qwen3-30b-a3b"], "int4-g128", args.tokens), torch.device("cuda"), MarlinPlan(args.config, args.config))
for call in layer.gemm_calls(True, False)[:3]:
    call()
torch.cuda.synchronize()
