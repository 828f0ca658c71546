"""Random layers, routings and adapters for the Triton MoE kernels, and their float32 reference. Tests and benchmarks share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_lora_moe.lora.stacks import ExpertStacks, Stack
from sglang_lora_moe.moe.activation import apply_activation
from sglang_lora_moe.moe.spec import MoESpec


@dataclass
class Case:
    spec: MoESpec
    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    token_slots: torch.Tensor | None
    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    stacks: ExpertStacks | None = None


def make_stack(
    rank_of: list[int], dim: int, experts: int, *, is_a: bool, shared: list[bool], split: list[bool], may_split: bool, dtype: torch.dtype, device, scale: float
) -> Stack:
    """One projection over len(rank_of) slots in a pool of random values; unused gaps are poisoned with NaN."""
    offsets, strides, cursor, gap = [], [], 0, 24
    for rank, is_shared, is_split in zip(rank_of, shared, split, strict=True):
        size = rank * dim * (2 if is_a and is_split else 1)
        size = -(-size // 8) * 8
        offsets.append(cursor)
        strides.append(0 if is_shared else size)
        cursor += size * (1 if is_shared else experts) + gap
    pool = torch.randn(max(cursor, 1), device=device, dtype=torch.float32 if dtype == torch.float32 else dtype).mul_(scale)
    for offset in offsets[1:]:
        pool[offset - gap : offset] = float("nan")
    scaling = [0.5 + 0.25 * (i % 5) for i in range(len(rank_of))]

    def table(values, kind):
        return torch.tensor(values, dtype=kind, device=device)

    return Stack(
        pool, table(offsets, torch.int64), table(strides, torch.int64), table(rank_of, torch.int32), table(scaling, torch.float32),
        table([int(v) for v in split], torch.int32), dim, max(max(rank_of), 1), may_split,
    )  # fmt: skip


def make_stacks(
    spec: MoESpec, ranks: list[int], dtype: torch.dtype, device, *, split: list[bool] | None = None, shared: list[bool] | None = None
) -> ExpertStacks:
    slots = len(ranks)
    split = [spec.gated] * slots if split is None else split
    shared = [False] * slots if shared is None else shared
    none = [False] * slots
    hidden, inter, experts = spec.hidden_size, spec.intermediate_size, spec.num_experts
    common = {"dtype": dtype, "device": device}
    return ExpertStacks(
        make_stack(ranks, hidden, experts, is_a=True, shared=shared, split=split, may_split=any(split), scale=hidden**-0.5, **common),
        make_stack(ranks, spec.w13_rows, experts, is_a=False, shared=none, split=split, may_split=any(split), scale=0.3, **common),
        make_stack(ranks, inter, experts, is_a=True, shared=none, split=none, may_split=False, scale=inter**-0.5, **common),
        make_stack(ranks, hidden, experts, is_a=False, shared=shared, split=none, may_split=False, scale=0.3, **common),
    )


def make_routing(tokens: int, spec: MoESpec, device, kind: str = "uniform") -> torch.Tensor:
    """topk_ids int32 [M, K]: "uniform", "one" (all tokens to the same experts), "few" (half of the experts empty), "holes" (some -1)."""
    experts = spec.num_experts if kind != "few" else max(spec.top_k, spec.num_experts // 2)
    scores = torch.rand(1 if kind == "one" else tokens, experts, device=device)
    ids = scores.topk(spec.top_k, dim=1).indices.to(torch.int32).expand(tokens, spec.top_k).contiguous()
    if kind == "holes":
        ids[torch.rand(tokens, spec.top_k, device=device) < 0.3] = -1
        ids[-1] = -1
    return ids


def make_slots(tokens: int, slots: int, device, kind: str = "uniform") -> torch.Tensor:
    """token_slots int32 [M]: "none", "identical", "uniform" (with base tokens), "distinct", "zipf"."""
    if kind == "none":
        found = torch.full((tokens,), -1)
    elif kind == "identical":
        found = torch.full((tokens,), slots - 1)
    elif kind == "distinct":
        found = torch.arange(tokens) % slots
    elif kind == "zipf":
        found = (1.0 / torch.rand(tokens)).long().clamp(max=slots) - 1
    else:
        found = torch.randint(-1, slots, (tokens,))
    return found.to(torch.int32).to(device)


def make_case(
    spec: MoESpec, tokens: int, dtype: torch.dtype, device, *, ranks: list[int] | None = None, routing: str = "uniform", popularity: str = "uniform", **layout
) -> Case:
    def random(*shape, scale=1.0):
        return torch.randn(*shape, device=device, dtype=dtype).mul_(scale)

    experts, hidden, inter = spec.num_experts, spec.hidden_size, spec.intermediate_size
    weights = torch.rand(tokens, spec.top_k, device=device)
    case = Case(
        spec, random(tokens, hidden), make_routing(tokens, spec, device, routing), weights / weights.sum(1, keepdim=True), None,
        random(experts, spec.w13_rows, hidden, scale=hidden**-0.5), random(experts, hidden, inter, scale=inter**-0.5),
    )  # fmt: skip
    if spec.has_bias:
        case.b13, case.b2 = random(experts, spec.w13_rows), random(experts, hidden)
    if ranks is not None:
        case.stacks = make_stacks(spec, ranks, dtype, device, **layout)
        case.token_slots = make_slots(tokens, len(ranks), device, popularity)
    return case


def matrix(stack: Stack, slot: int, expert: int, rows: int, cols: int) -> torch.Tensor:
    start = int(stack.offset[slot] + expert * stack.expert_stride[slot])
    return stack.pool[start : start + rows * cols].view(rows, cols).float()


def delta(a: Stack, b: Stack, slot: int, expert: int, x: torch.Tensor) -> torch.Tensor:
    """scaling * B (A x) in float32."""
    rank, split = int(a.rank[slot]), int(a.split_a[slot])
    if rank == 0:
        return torch.zeros(x.shape[0], b.dim, device=x.device)
    s = x.float() @ matrix(a, slot, expert, rank * (1 + split), a.dim).T
    weight = matrix(b, slot, expert, b.dim, rank).T
    half = b.dim // 2
    y = torch.cat([s[:, :rank] @ weight[:, :half], s[:, rank:] @ weight[:, half:]], 1) if split else s @ weight
    return y * float(b.scaling[slot])


def reference(case: Case) -> torch.Tensor:
    """The layer's output [M, H] in float32."""
    out = torch.zeros(case.x.shape, dtype=torch.float32, device=case.x.device)
    for expert in case.topk_ids.unique().tolist():
        if not 0 <= expert < case.spec.num_experts:
            continue
        tokens, k = (case.topk_ids == expert).nonzero(as_tuple=True)
        x = case.x[tokens].float()
        gate_up = x @ case.w13[expert].float().T + (0 if case.b13 is None else case.b13[expert].float())
        slots = case.token_slots[tokens] if case.token_slots is not None else torch.full_like(tokens, -1)
        active = [s for s in slots.unique().tolist() if s >= 0]
        for slot in active:
            rows = slots == slot
            gate_up[rows] += delta(case.stacks.a13, case.stacks.b13, slot, expert, x[rows])
        act = apply_activation(gate_up, case.spec)
        down = act @ case.w2[expert].float().T + (0 if case.b2 is None else case.b2[expert].float())
        for slot in active:
            rows = slots == slot
            down[rows] += delta(case.stacks.a2, case.stacks.b2, slot, expert, act[rows])
        out.index_add_(0, tokens, down * case.topk_weights[tokens, k][:, None])
    return out


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm().clamp_min(1e-20))
