"""The one generator of routings, adapter assignments and whole MoE layers with adapters, shared by tests and benchmarks on every device.

    case = make_case(m=17, popularity="zipf", active=4, ranks=(4, 16), layouts=("split", "shared_outer"))

Adapters lie in a real `LoRAMemoryPool` whose unused parts are NaN; references read them back through the tables. The axes are
the constants below; `small_cases()` varies one axis at a time around a default, which is what CPU tests run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.stacks import ExpertStacks
from sglang_lora_moe.lora.targets import ExpertTarget
from sglang_lora_moe.lora.weights import ExpertLoRA
from sglang_lora_moe.moe.runner import RunnerInput
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from tests.slots import write_slot

TOKENS = (1, 2, 7, 16, 17, 133)  # M
POPULARITIES = ("none", "identical", "distinct", "uniform", "zipf")
LAYOUTS = ("dense", "split", "shared_outer", "split_shared_outer", "gate_up_only", "down_only")
ROUTINGS = ("uniform", "zipf", "one_expert", "few_experts", "edges", "some_invalid", "all_invalid", "partial")
SPECS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu_bias": {"activation": "gelu_tanh", "has_bias": True},
    "clamped": {"has_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 1.5},  # gpt-oss with a limit that binds here
    "ungated": {"gated": False, "activation": "relu2"},
}


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def make_topk_ids(routing: str, tokens: int, top_k: int, experts: int, g: torch.Generator, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """[M, K] on the generator's device: the K best of random scores, or the extremes a kernel may meet.

    zipf: scores fall with the expert's number; one_expert: every pair to the last; few_experts: a quarter of them, the others are empty;
    edges: runs one below, at and above multiples of 16; some_invalid: 20 % are -1 and 10 % beyond the last expert; partial: 30 % are -1,
    and all of the last quarter of the tokens, which is what padding looks like.
    """
    device = g.device
    if routing in ("one_expert", "all_invalid"):
        return torch.full((tokens, top_k), -1 if routing == "all_invalid" else experts - 1, dtype=dtype, device=device)
    if routing == "edges":
        sizes = [(15, 16, 17, 1, 32, 33, 0, 31)[i % 8] for i in range(experts)]
        ids = torch.repeat_interleave(torch.arange(experts), torch.tensor(sizes)).repeat(tokens * top_k // max(sum(sizes), 1) + 1)
        return ids[: tokens * top_k].view(tokens, top_k).to(device=device, dtype=dtype)
    usable = min(experts, max(top_k, experts // 4)) if routing == "few_experts" else experts
    scores = torch.rand((tokens, usable), generator=g, device=device)
    if routing == "zipf":
        scores = scores.clamp_min(1e-6).log() / (1.0 / torch.arange(1, usable + 1, device=device))  # weighted sampling without replacement
    ids = scores.topk(min(top_k, usable), dim=1).indices
    if top_k > usable:
        ids = torch.cat([ids, torch.randint(0, usable, (tokens, top_k - usable), generator=g, device=device)], dim=1)
    drop = torch.rand((tokens, top_k), generator=g, device=device)
    if routing == "some_invalid":
        ids = torch.where(drop < 0.2, -1, torch.where(drop > 0.9, experts, ids))
    if routing == "partial":
        ids = torch.where(drop < 0.3, -1, ids)
        ids[tokens - tokens // 4 :] = -1
    return ids.to(dtype).contiguous()


def make_token_slots(popularity: str, tokens: int, places: int | Sequence[int], g: torch.Generator, base_share: float = 0.0) -> torch.Tensor:
    """int32 [M] on the generator's device: -1, or one of the slots `places` (a number means the first ones).

    none: base only; identical: all on the last; distinct: token t on the (t mod A)-th; uniform and zipf (weights falling as i^-1.5): random,
    and `base_share` of the tokens on the base.
    """
    device = g.device
    place = torch.tensor(list(range(places) if isinstance(places, int) else places), device=device, dtype=torch.int32)
    if popularity == "none" or not place.numel():
        return torch.full((tokens,), -1, dtype=torch.int32, device=device)
    if popularity == "identical":
        return place[-1].repeat(tokens)
    if popularity == "distinct":
        return place[torch.arange(tokens, device=device) % place.numel()]
    weights = torch.arange(1, place.numel() + 1, device=device) ** (-1.5 if popularity == "zipf" else 0.0)
    slots = place[torch.multinomial(weights.expand(max(tokens, 1), -1), 1, generator=g)[:tokens, 0]]
    slots[torch.rand(tokens, generator=g, device=device) < base_share] = -1
    return slots


@dataclass
class MoECase:
    """Inputs of one layer and one step. Slots without an adapter have rank 0; token_slots -1 = base."""

    name: str
    spec: MoESpec
    x: torch.Tensor  # [M, H]
    topk_ids: torch.Tensor  # int32 [M, K]
    topk_weights: torch.Tensor  # float32 [M, K]
    token_slots: torch.Tensor  # int32 [M]
    w13: torch.Tensor  # [E, 2I, H]
    w2: torch.Tensor  # [E, H, I]
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    stacks: ExpertStacks
    pool: LoRAMemoryPool
    num_slots: int

    def runner_input(self, workspace: Workspace, lora: bool = True) -> RunnerInput:
        adapters = (self.token_slots, self.num_slots, self.stacks.a13.max_rank) if lora else (None, 0, 0)
        return RunnerInput(self.x, self.topk_ids, self.topk_weights, adapters[0], workspace, self.spec, *adapters[1:])


def make_case(
    *,
    m: int = 17,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 64,
    inter: int = 32,
    spec: str | MoESpec = "silu",
    popularity: str = "uniform",
    active: int = 4,
    slots: int = 5,
    base_share: float = 0.25,
    ranks: tuple[int, ...] = (4, 16, 1, 7),
    layouts: tuple[str, ...] = ("split", "dense", "shared_outer", "split_shared_outer"),
    routing: str = "uniform",
    router_weight_on: str = "output",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> MoECase:
    """One case. `active` adapters lie spread over `slots` slots, adapter i with ranks[i % ..] (0: tokens, but no weights) in layouts[i % ..].

    `base_share` of the tokens have no adapter (except for "identical" and "distinct"); equal arguments give equal cases.
    A whole MoESpec given as `spec` replaces experts, top_k, hidden, inter and router_weight_on.
    """
    shown = {k: v for k, v in locals().items() if k != "device"}
    g = generator(seed, device)
    if not isinstance(spec, MoESpec):
        spec = MoESpec(experts, top_k, hidden, inter, **SPECS[spec], router_weight_on=router_weight_on)
    noise = Noise(g, dtype)
    w13, w2 = make_expert_weights(spec, noise)
    b13, b2 = (noise(spec.num_experts, rows, std=0.5) for rows in (spec.w13_rows, spec.hidden_size)) if spec.has_bias else (None, None)
    active = 0 if popularity == "none" else min(active, slots)
    places = [i * slots // active for i in range(active)]
    pool = make_pool(spec, slots, {slot: (ranks[i % len(ranks)], layouts[i % len(layouts)]) for i, slot in enumerate(places)}, noise)
    token_slots = make_token_slots(popularity, m, places, g, base_share)
    if routing == "partial":
        token_slots[m - m // 4 :] = -1  # the rows of padding
    return MoECase(
        name=" ".join(f"{k}={v}" for k, v in shown.items()),
        spec=spec,
        x=noise(m, spec.hidden_size),
        topk_ids=make_topk_ids(routing, m, spec.top_k, spec.num_experts, g),
        topk_weights=torch.rand(m, spec.top_k, generator=g, device=g.device) + 0.1,
        token_slots=token_slots,
        w13=w13, w2=w2, b13=b13, b2=b2,
        stacks=pool.stacks_for("experts"),  # type: ignore[arg-type]
        pool=pool,
        num_slots=slots,
    )  # fmt: skip


@dataclass
class Noise:
    """Normally distributed tensors: noise(*shape, std=..). On a CPU drawn in float32, so that equal seeds give equal cases in every dtype."""

    generator: torch.Generator | None
    dtype: torch.dtype
    device: torch.device | None = None  # for benchmarks' "meta", which has no generator

    def __call__(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        device = self.generator.device if self.generator is not None else self.device
        drawn = torch.float32 if device is not None and device.type == "cpu" else self.dtype
        return torch.randn(shape, generator=self.generator, device=device, dtype=drawn).mul_(std).to(self.dtype)


def make_expert_weights(spec: MoESpec, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 [E, 2I, H] and w2 [E, H, I], scaled so that activations keep their size."""
    e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
    return noise(e, spec.w13_rows, h, std=h**-0.5), noise(e, h, i, std=i**-0.5)


def make_pool(spec: MoESpec, slots: int, adapters: dict[int, tuple[int, str]], noise: Noise) -> LoRAMemoryPool:
    """A pool for one layer's experts ("experts") holding adapters {slot: (rank, layout)}; what no adapter occupies is NaN."""
    target = ExpertTarget("experts", spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.gated)
    device = noise.generator.device if noise.generator is not None else noise.device
    assert device is not None
    pool = LoRAMemoryPool([target], slots, max([1, *(rank for rank, _ in adapters.values())]), noise.dtype, device)
    pool.pool.fill_(float("nan"))
    for i, (slot, (rank, layout)) in enumerate(adapters.items()):
        if rank:
            module = make_expert_lora(spec, rank, layout, noise, scaling=(0.5, 2.0, 1.0)[i % 3])
            write_slot(pool, slot, {"experts": module})
    return pool


def make_expert_lora(spec: MoESpec, rank: int, layout: str, noise: Any, scaling: float = 1.0) -> ExpertLoRA:
    """Random weights; `noise(*shape, std)` makes them."""
    e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
    split, outer = layout.startswith("split") and spec.gated, 1 if layout.endswith("shared_outer") else e
    a13 = b13 = a2 = b2 = None
    if layout != "down_only":
        a13, b13 = noise(outer, rank * (2 if split else 1), h, std=h**-0.5), noise(e, spec.w13_rows, rank, std=rank**-0.5)
    if layout != "gate_up_only":
        a2, b2 = noise(e, rank, i, std=i**-0.5), noise(outer, h, rank, std=rank**-0.5)
    return ExpertLoRA(a13, b13, split, scaling, a2, b2, 1.5 * scaling)


def small_cases(**overrides: Any) -> Iterator[dict[str, Any]]:
    """Arguments of `make_case`, one axis at a time around the default, then the axes that interact."""
    yield from ({"m": m} | overrides for m in TOKENS)
    yield from ({"popularity": p, "m": 33} | overrides for p in POPULARITIES)
    yield from ({"layouts": (layout,), "m": 7} | overrides for layout in LAYOUTS)
    yield from ({"routing": r, "m": m} | overrides for r in ROUTINGS for m in (1, 24))
    yield from ({"spec": s, "layouts": LAYOUTS, "active": 6, "slots": 7, "base_share": 0.1, "m": 48} | overrides for s in SPECS)
    yield {"top_k": 1, "router_weight_on": "input"} | overrides
    yield {"active": 1, "slots": 1, "ranks": (64,), "base_share": 0.0} | overrides
    yield {"experts": 33, "top_k": 5, "hidden": 72, "inter": 40, "m": 19} | overrides


def full_grid(**overrides: Any) -> Iterator[dict[str, Any]]:
    """Arguments of `make_case` at one number of tokens: popularity by routing, layouts by rank, and 1 to 64 slots, all of them taken."""
    for popularity, routing in itertools.product(POPULARITIES, ROUTINGS):
        yield {"popularity": popularity, "routing": routing, "ranks": (16,), "layouts": ("split",), "active": 3, "slots": 4} | overrides
    for layout, rank in itertools.product(LAYOUTS, (1, 16, 64)):
        yield {"layouts": (layout,), "ranks": (rank,)} | overrides
    for slots in (1, 2, 16, 64):
        yield {"active": slots, "slots": slots, "ranks": (4, 16, 8), "popularity": "distinct", "base_share": 0.0} | overrides
