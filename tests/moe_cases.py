"""The one generator of MoE LoRA cases, shared by tests and benchmarks on every device.

    case = make_case(m=17, popularity="zipf", active=4, ranks=(4, 16), layouts=("split", "shared_outer"))

Adapters lie in a real `LoRAMemoryPool`; references read them back through the tables. The axes are the constants below;
`small_cases()` varies one axis at a time around a default, which is what CPU tests run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.stacks import ExpertStacks
from sglang_lora_moe.lora.targets import ExpertTarget
from sglang_lora_moe.lora.weights import ExpertLoRA
from sglang_lora_moe.moe.runner import RunnerInput
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace

TOKENS = (1, 2, 7, 16, 17, 133)  # M
POPULARITIES = ("none", "identical", "distinct", "uniform", "zipf")
LAYOUTS = ("dense", "split", "shared_outer", "split_shared_outer", "gate_up_only", "down_only")
ROUTINGS = ("uniform", "one_expert", "few_experts", "edges", "partial")
SPECS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu_bias": {"activation": "gelu_tanh", "has_bias": True},
    "clamped": {"has_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 1.5},  # gpt-oss with a limit that binds here
    "ungated": {"gated": False, "activation": "relu2"},
}


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
        slots, num_slots = (self.token_slots, self.num_slots) if lora else (None, 0)
        return RunnerInput(self.x, self.topk_ids, self.topk_weights, slots, workspace, self.spec, num_slots)


def make_case(
    *,
    m: int = 17,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 64,
    inter: int = 32,
    spec: str = "silu",
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
    """One case. `active` adapters lie spread over `slots` slots, adapter i with ranks[i % ..] in layouts[i % ..].

    `base_share` of the tokens have no adapter (except for "identical" and "distinct"); equal arguments give equal cases.
    """
    shown = {k: v for k, v in locals().items() if k != "device"}
    device = torch.device(device)
    rng = torch.Generator(device=device).manual_seed(seed)
    moe_spec = MoESpec(experts, top_k, hidden, inter, **SPECS[spec], router_weight_on=router_weight_on)

    def noise(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=device, dtype=torch.float32 if device.type == "cpu" else dtype).mul_(std).to(dtype)

    w13, w2 = noise(experts, moe_spec.w13_rows, hidden, std=hidden**-0.5), noise(experts, hidden, inter, std=inter**-0.5)
    b13, b2 = (noise(experts, moe_spec.w13_rows, std=0.5), noise(experts, hidden, std=0.5)) if moe_spec.has_bias else (None, None)
    active = 0 if popularity == "none" else min(active, slots)
    places = [i * slots // active for i in range(active)]
    target = ExpertTarget("experts", experts, hidden, inter, moe_spec.gated)
    pool = LoRAMemoryPool([target], slots, max(ranks), dtype, device)
    for i, slot in enumerate(places):
        module = make_expert_lora(moe_spec, ranks[i % len(ranks)], layouts[i % len(layouts)], noise, scaling=(0.5, 2.0, 1.0)[i % 3])
        pool.write(slot, SimpleNamespace(modules={"experts": module}))
    ids, token_slots = _topk_ids(routing, m, top_k, experts, rng), _token_slots(popularity, m, places, base_share, rng)
    if routing == "partial":
        token_slots[m - m // 4 :] = -1  # the rows of padding
    return MoECase(
        name=" ".join(f"{k}={v}" for k, v in shown.items()),
        spec=moe_spec,
        x=noise(m, hidden),
        topk_ids=ids.to(torch.int32).contiguous(),
        topk_weights=torch.rand(m, top_k, generator=rng, device=device) + 0.1,
        token_slots=token_slots.to(torch.int32),
        w13=w13, w2=w2, b13=b13, b2=b2,
        stacks=pool.stacks_for("experts"),  # type: ignore[arg-type]
        pool=pool,
        num_slots=slots,
    )  # fmt: skip


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


def _topk_ids(routing: str, m: int, top_k: int, experts: int, rng: torch.Generator) -> torch.Tensor:
    """int64 [m, top_k]. "edges": runs one below, at and above multiples of 16; "partial": -1 here and there, last quarter all -1."""
    device = rng.device
    if routing == "one_expert":  # with top_k > 1 every token goes to the same top_k experts
        return torch.arange(top_k, device=device).repeat(m, 1) + experts - top_k
    if routing == "edges":
        sizes = [(15, 16, 17, 1, 32, 33, 0, 31)[i % 8] for i in range(experts)]
        ids = torch.repeat_interleave(torch.arange(experts), torch.tensor(sizes)).repeat(m * top_k // max(sum(sizes), 1) + 1)
        return ids[: m * top_k].view(m, top_k).to(device)
    usable = max(top_k, experts // 4) if routing == "few_experts" else experts
    ids = torch.rand(m, usable, generator=rng, device=device).argsort(dim=1)[:, :top_k]
    if routing == "partial":
        ids[torch.rand(m, top_k, generator=rng, device=device) < 0.3] = -1
        ids[m - m // 4 :] = -1
    return ids


def _token_slots(popularity: str, m: int, places: list[int], base_share: float, rng: torch.Generator) -> torch.Tensor:
    """int64 [m] of slots in `places`, or -1."""
    device = rng.device
    if popularity == "none" or not places:
        return torch.full((m,), -1, device=device)
    place = torch.tensor(places, device=device)
    if popularity == "identical":
        return place[-1].repeat(m)
    if popularity == "distinct":
        return place[torch.arange(m, device=device) % len(places)]
    weight = torch.ones(len(places), device=device)
    if popularity == "zipf":
        weight /= torch.arange(1, len(places) + 1, device=device) ** 1.5
    chosen = place[torch.multinomial(weight, m, replacement=True, generator=rng)]
    chosen[torch.rand(m, generator=rng, device=device) < base_share] = -1
    return chosen
