"""The MoE backend for int4 and int8 experts on NVIDIA GPUs from sm_80 on: the two GEMMs in CUDA (`ops/marlin_moe.py`).

Everything around them is the triton backend's: its alignment, activation, combine and shrinks. A gated activation is part of the first GEMM, adapters of both;
down scatters to pair order. Up to `MAX_PAIR_TOKENS` tokens nothing is sorted, and two kernels of their own (`ops/marlin_moe_pairs.py`) are the whole layer.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import MoeRunnerCore, RunnerInput
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.marlin_moe import EVERYWHERE, SHAPES, UNIT, GemmScratch, MarlinWeight, fuses_activation, marlin_moe_gemm, marlin_moe_repack
from sglang_lora_moe.ops.marlin_moe_pairs import MEMORY, MOST_CHOSEN, PairAdapters, marlin_moe_pairs
from sglang_lora_moe.ops.moe_activation import moe_activation
from sglang_lora_moe.ops.moe_combine import moe_combine
from sglang_lora_moe.quantization.base import QuantMethod

FEW_LORA_ROWS = 24  # of an adapter and expert on average, up to which tiles of 32 leave room for all shrinks at once: 4 us of 270 at 1,024 tokens
MMA_ROWS = ((16, 24), (128, 20), (1 << 30, 23))  # by most experts: mean rows of one up to which Hopper, too, takes tiles of 32 by mma.sync: measured
MAX_PAIR_TOKENS = 4  # up to here two tokens rarely meet in an expert, and a sort costs more than reading it twice


@dataclass(frozen=True)
class MarlinPlan:
    """Shapes of tiles (indices of `SHAPES`) of the two GEMMs, which share their token block; rows of a LoRA tile."""

    gate_up: int
    down: int
    by_pair: bool = False
    lora_block: int = 16
    overlap: bool = True

    @property
    def base_block(self) -> int:
        return SHAPES[self.gate_up].block_tokens


@dataclass(frozen=True)
class MarlinQuantInfo:
    w13: MarlinWeight
    w2: MarlinWeight


@lru_cache(maxsize=64)
def choose_plan(spec: MoESpec, tokens: int, hopper: bool, pairs: bool = True) -> MarlinPlan:
    """By the mean rows of an expert: a tile should hold most experts' rows, so that their weights are read once. `hopper`: sm_90, has wgmma.

    `pairs`: the kernels of single pairs fit the GPU's shared memory.
    """
    rows = tokens * spec.top_k / spec.num_experts
    if pairs and fuses_activation(spec) and spec.top_k <= MOST_CHOSEN and (tokens == 1 or (tokens <= MAX_PAIR_TOKENS and 2 * rows <= 1)):
        # per pair where two pairs rarely meet in an expert, whose weights would be read twice
        return MarlinPlan(1, 1, by_pair=True)
    if rows <= (next(most for experts, most in MMA_ROWS if spec.num_experts <= experts) if hopper else 24):
        return MarlinPlan(1, 1) if rows <= 12 else MarlinPlan(2, 2)
    if hopper:
        return MarlinPlan(4, 4, lora_block=32 if rows <= 48 else 64)
    return MarlinPlan(3, 3, lora_block=32 if rows <= 64 else 64)


@lru_cache(maxsize=16)
def scratch_of(device: torch.device) -> GemmScratch:
    """One a device, like the workspace: GEMMs follow each other on the main stream. Made when weights are converted, never while capturing."""
    return GemmScratch.allocate(launch.multiprocessors(device), device)


class MarlinRunnerCore(MoeRunnerCore):
    """MoeRunnerCore over `MarlinQuantInfo`. `plan` fixes the launch shapes (benchmarks); None chooses by size."""

    name = "marlin"
    converts_weights = True

    def __init__(self, plan: MarlinPlan | None = None) -> None:
        self.plan = plan

    def quant_info(self, quant_method: QuantMethod, layer: nn.Module) -> MarlinQuantInfo:
        canonical = quant_method.get_marlin_quant_info(layer)
        device = canonical.w13.packed.device
        if device.type != "cuda":
            raise ValueError(f"the marlin MoE backend runs on NVIDIA GPUs, the weights are on {device}; use --moe-runner-backend torch_native")
        scratch_of(device)
        halves = 2 if canonical.w13.out_features == 2 * canonical.w2.in_features else 1
        return MarlinQuantInfo(marlin_moe_repack(canonical.w13, halves, canonical.b13), marlin_moe_repack(canonical.w2, 1, canonical.b2))

    def make_routing(self, inp: RunnerInput) -> Routing:
        plan = self._plan(inp)
        lora_block = min(plan.lora_block, 32 if inp.topk_ids.numel() <= FEW_LORA_ROWS * inp.spec.num_experts * min(inp.num_slots, 4) else 64)
        return Routing(
            inp.topk_ids, inp.token_slots, inp.spec.num_experts, inp.num_slots,
            base_block=plan.base_block, lora_block=lora_block, rows="pair" if plan.by_pair else "sorted", workspace=inp.workspace,
        )  # fmt: skip

    def gate_up_activation(self, inp: RunnerInput, routing: Routing, quant_info: MarlinQuantInfo, addend: LowRank | PairAdapters | None = None) -> torch.Tensor:
        act = inp.workspace.get("moe.act", (routing.num_pairs, inp.spec.intermediate_size), inp.x.dtype)
        if routing.rows == "pair":
            assert not isinstance(addend, LowRank), "single pairs have adapters of their own form"
            return marlin_moe_pairs(inp.x, quant_info.w13, inp.topk_ids, None, act, activation=inp.spec, adapters=addend)
        assert not isinstance(addend, PairAdapters), "sorted rows have an addend"
        if fuses_activation(inp.spec):
            return self._gemm(inp, inp.x, quant_info.w13, routing, act, addend, gather=True, activation=inp.spec)
        out = inp.workspace.get("moe.gate_up", (routing.num_pairs, inp.spec.w13_rows), inp.x.dtype)
        return moe_activation(self._gemm(inp, inp.x, quant_info.w13, routing, out, addend, gather=True), inp.spec, routing, act)

    def down(self, inp: RunnerInput, act: torch.Tensor, routing: Routing, quant_info: MarlinQuantInfo, addend: LowRank | None = None) -> torch.Tensor:
        """[P, H] in pair order whatever the routing."""
        out = inp.workspace.get("moe.down", (routing.num_pairs, inp.spec.hidden_size), inp.x.dtype)
        return self._gemm(inp, act, quant_info.w2, routing, out, addend, gather=False)

    def combine(self, inp: RunnerInput, down: torch.Tensor, routing: Routing, addend: LowRank | None = None) -> torch.Tensor:
        return moe_combine(down, inp.topk_ids, inp.topk_weights, inp.spec.num_experts, torch.empty_like(inp.x), addend)

    def down_combine(
        self, inp: RunnerInput, act: torch.Tensor, routing: Routing, quant_info: MarlinQuantInfo, addend: LowRank | PairAdapters | None = None
    ) -> torch.Tensor:
        if routing.rows == "pair":
            assert not isinstance(addend, LowRank), "single pairs have adapters of their own form"
            return marlin_moe_pairs(act, quant_info.w2, inp.topk_ids, inp.topk_weights, torch.empty_like(inp.x), adapters=addend)
        assert not isinstance(addend, PairAdapters), "sorted rows have an addend"
        return self.combine(inp, self.down(inp, act, routing, quant_info, addend), routing, addend and addend.of_combine)

    def _gemm(
        self, inp: RunnerInput, x: torch.Tensor, weight: MarlinWeight, routing: Routing, out: torch.Tensor, addend: LowRank | None, *,
        gather: bool, activation: MoESpec | None = None,
    ) -> torch.Tensor:  # fmt: skip
        plan, added = self._plan(inp), None if addend is None or addend.of_combine else addend
        shape, following = SHAPES[plan.gate_up], added is not None and added.following is not None
        # A gate_up of whole tiles says which it has stored, so that a down with no shrink before it need not wait for the last.
        report = activation is not None and (added is None or following) and plan.gate_up >= EVERYWHERE and weight.k > shape.stages * shape.block_k
        behind = 0 if gather else routing.reports
        routing.reports = -(-weight.packed.shape[1] * UNIT // shape.block_rows) + following if report else 0
        makes_s = addend is not None and addend.records is None and addend.a is not None
        after_gate_up = not gather and (addend is None or makes_s or behind > 0)
        early = 1 if after_gate_up else 0 if addend is None else 2  # what the launch before may have written: 0 anything, 1 x alone, 2 s alone
        return marlin_moe_gemm(
            x, weight, routing.alignment, routing.top_k, out, scratch_of(x.device),
            config=plan.gate_up if gather else plan.down, sms=launch.multiprocessors(x.device), gather=gather, scatter=not gather, activation=activation,
            addend=added, overlap=plan.overlap, early=early, report=report, behind=behind, told=None if gather else routing.told,
        )  # fmt: skip

    def _plan(self, inp: RunnerInput) -> MarlinPlan:
        device = inp.x.device
        return self.plan or choose_plan(inp.spec, inp.x.shape[0], launch.has_wgmma(device), launch.shared_memory(device) >= MEMORY)
