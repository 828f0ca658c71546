"""Inputs of one MoE layer at a real shape, several sets of them, and the layer called on one set."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from benchmarks.shapes import MoEShape
from sglang_lora_moe.lora.hooks import build_lora_hooks
from sglang_lora_moe.lora.stacks import ExpertStacks
from sglang_lora_moe.moe.backends import triton_lora
from sglang_lora_moe.moe.backends.triton import TritonRunnerCore
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import LoRAHooks, MoeRunner, RunnerInput
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import build
from sglang_lora_moe.ops.moe_lora_align import Alignment, moe_lora_align_block_size
from sglang_lora_moe.ops.moe_tiles import LayerTiles
from sglang_lora_moe.quantization.base import TritonQuantInfo
from tests.moe_cases import Noise, generator, make_expert_weights, make_pool, make_topk_ids


@dataclass(frozen=True)
class Setup:
    """What to build. `slots` resident adapters of one rank, the first `active` of them used; `sets` 0 = enough to leave L2 behind."""

    shape: MoEShape
    tokens: int
    rank: int = 0
    active: int = 0
    slots: int = 0  # 0 = active
    sets: int = 0
    tiles: LayerTiles | None = None

    @property
    def spec(self) -> MoESpec:
        return MoESpec(self.shape.experts, self.shape.top_k, self.shape.hidden, self.shape.inter)


class AlignedAhead(TritonRunnerCore):
    """The core with every routing's alignment made once, outside the timed graph; where the alignment op has no CUDA implementation."""

    def __init__(self, tiles: LayerTiles | None) -> None:
        super().__init__(tiles)
        self.routings: dict[int, Routing] = {}

    def make_routing(self, inp: RunnerInput) -> Routing:
        if id(inp) not in self.routings:
            self.routings[id(inp)] = align_on_host(super().make_routing(inp))
        return self.routings[id(inp)]


@lru_cache(maxsize=1)
def has_cuda_align() -> bool:
    """Whether the alignment op runs on this machine's GPU; without it alignments are made ahead on the host."""
    if not torch.cuda.is_available() or os.environ.get("ALIGN_AHEAD"):
        return False
    try:
        build.load()
    except build.BuildError as error:
        print(f"alignment is made on the host and not timed: {error}")
        return False
    return True


def align_on_host(routing: Routing) -> Routing:
    """Fill in the alignment of a CUDA routing from the CPU implementation of the op."""
    if routing.rows == "sorted" and routing.topk_ids.is_cuda:
        slots = None if routing.token_slots is None else routing.token_slots.cpu()
        made = moe_lora_align_block_size(routing.topk_ids.cpu(), slots, routing.num_experts, routing.num_slots, routing.base_block, routing.lora_block)
        device = routing.topk_ids.device
        routing.__dict__["alignment"] = Alignment(*(t.to(device) for t in (made.sorted_pairs, made.base_tiles, made.lora_tiles, made.counts)))
    return routing


@dataclass
class LayerInputs:
    """`sets` independent inputs: weights and adapters rotate over two sets, routing and x over all."""

    setup: Setup
    runner: MoeRunner
    inputs: list[RunnerInput]
    weights: list[TritonQuantInfo]
    hooks: list[LoRAHooks | None]
    stacks: list[ExpertStacks]

    @property
    def sets(self) -> int:
        return len(self.inputs)

    @classmethod
    def build(cls, setup: Setup, device: torch.device) -> LayerInputs:
        """x and routing depend on shape and number of tokens alone."""
        spec, m = setup.spec, setup.tokens
        sets = setup.sets or max(4, min(16, 256 // m))
        weights = make_weights(spec, min(2, sets), device)
        torch.manual_seed(m * 1000)
        noise, workspace = Noise(None, torch.bfloat16, device), Workspace(device)
        inputs = [
            RunnerInput(noise(m, spec.hidden_size), ids(m, spec, device), torch.rand(m, spec.top_k, device=device), None, workspace, spec) for _ in range(sets)
        ]
        base = cls(setup, MoeRunner(make_core(setup, device)), inputs, weights, [None], [])
        return base.with_adapters(setup) if setup.rank else base

    def with_adapters(self, setup: Setup) -> LayerInputs:
        """The same x, routing and weights with the adapters of `setup`, whose shape and tokens are these; without where it has none."""
        assert (setup.shape, setup.tokens) == (self.setup.shape, self.setup.tokens), "another layer"
        if not setup.rank:
            return self
        device, resident = self.inputs[0].x.device, setup.slots or setup.active
        slots = (torch.arange(setup.tokens, dtype=torch.int32) % setup.active).to(device)
        inputs = [replace(inp, token_slots=slots, num_slots=resident, max_rank=setup.rank) for inp in self.inputs]
        stacks = [make_stacks(setup.spec, setup.rank, resident, device) for _ in self.weights]
        hooks: list[LoRAHooks | None] = [build_lora_hooks(s, triton_lora) for s in stacks]
        return LayerInputs(setup, MoeRunner(make_core(setup, device)), inputs, self.weights, hooks, stacks)


@lru_cache(maxsize=1)
def make_weights(spec: MoESpec, sets: int, device: torch.device) -> list[TritonQuantInfo]:
    """Random bf16 weights, the same for every number of tokens."""
    noise = Noise(None, torch.bfloat16, device)
    return [TritonQuantInfo(*make_expert_weights(spec, noise), None, None) for _ in range(sets)]


def make_core(setup: Setup, device: torch.device) -> TritonRunnerCore:
    return TritonRunnerCore(setup.tiles) if device.type == "meta" or has_cuda_align() else AlignedAhead(setup.tiles)


def run_layer(inputs: LayerInputs, index: int) -> torch.Tensor:
    hooks = inputs.hooks[index % len(inputs.hooks)]
    return inputs.runner.run(inputs.inputs[index], inputs.weights[index % len(inputs.weights)], hooks)


def ids(tokens: int, spec: MoESpec, device: torch.device) -> torch.Tensor:
    """Top-k of uniform scores, int32 [M, K]."""
    if device.type == "meta":
        return torch.empty(tokens, spec.top_k, dtype=torch.int32, device=device)
    return make_topk_ids("uniform", tokens, spec.top_k, spec.num_experts, generator(int(torch.randint(1 << 30, ())), device))


def make_stacks(spec: MoESpec, rank: int, slots: int, device: torch.device) -> ExpertStacks:
    """`slots` adapters of one rank on all experts, gate and up with their own A."""
    return make_pool(spec, slots, dict.fromkeys(range(slots), (rank, "split")), Noise(None, torch.bfloat16, device)).stacks_for("experts")  # type: ignore[return-value]


def base_bytes(inputs: LayerInputs) -> float:
    """Distinct experts' weights, x in and out: mean over the sets."""
    spec = inputs.setup.spec
    touched = sum(inp.topk_ids.unique().numel() for inp in inputs.inputs) / inputs.sets
    return touched * 3 * spec.hidden_size * spec.intermediate_size * 2 + 4 * inputs.setup.tokens * spec.hidden_size


def adapter_bytes(inputs: LayerInputs) -> float:
    """Weights of the distinct (adapter, expert) groups: mean over the sets."""
    spec, rank = inputs.setup.spec, inputs.setup.rank
    if not rank:
        return 0.0
    keys = [(inp.topk_ids * 1024 + inp.token_slots[:, None]).unique().numel() for inp in inputs.inputs]
    return sum(keys) / len(keys) * rank * 2 * (3 * spec.hidden_size + 3 * spec.intermediate_size)


def base_flops(inputs: LayerInputs) -> float:
    spec = inputs.setup.spec
    return 6.0 * inputs.setup.tokens * spec.top_k * spec.hidden_size * spec.intermediate_size
