"""Short float32 references for the MoE and LoRA operators: loops over groups, no cleverness, any device.

They read adapters back through the stack tables, as kernels do. TF32 must be off where these run on a GPU.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.stacks import LinearStacks, Stack
from sglang_lora_moe.moe.spec import MoESpec

_ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def ref_sorted_pairs(topk_ids: torch.Tensor, token_slots: torch.Tensor | None, num_experts: int, num_slots: int) -> list[tuple[int, int, int]]:
    """(expert, slot, pair) of every pair in the order of moe_lora_align_block_size; expert num_experts = none, listed last."""
    top_k = topk_ids.shape[1]
    slots = [-1] * topk_ids.shape[0] if token_slots is None else [s if 0 <= s < num_slots else -1 for s in token_slots.tolist()]
    keyed = []
    for pair, expert in enumerate(topk_ids.flatten().tolist()):
        valid = 0 <= expert < num_experts
        keyed.append((expert, slots[pair // top_k], pair) if valid else (num_experts, -1, pair))
    return sorted(keyed)


def ref_activation(gate_up: torch.Tensor, spec: MoESpec) -> torch.Tensor:
    """The formulas of MoESpec's docstring."""
    if not spec.gated:
        return _ACTS[spec.activation](gate_up)
    gate, up = gate_up[..., : spec.intermediate_size], gate_up[..., spec.intermediate_size :]
    if spec.swiglu_limit is None:
        return _ACTS[spec.activation](gate) * up
    gate, up = torch.clamp(gate, max=spec.swiglu_limit), torch.clamp(up, -spec.swiglu_limit, spec.swiglu_limit)
    return (up + 1) * gate * torch.sigmoid(spec.swiglu_alpha * gate)


def stack_matrix(stack: Stack, slot: int, expert: int, is_a: bool) -> torch.Tensor | None:
    """matrix(slot, expert) of an A stack [c * rank, dim] or a B stack [dim, rank] in float32; None where rank is 0."""
    rank = int(stack.rank[slot])
    if rank == 0:
        return None
    shape = ((2 if int(stack.split_a[slot]) else 1) * rank, stack.dim) if is_a else (stack.dim, rank)
    start = int(stack.offset[slot]) + expert * int(stack.expert_stride[slot])
    return stack.pool[start : start + shape[0] * shape[1]].view(shape).float()


def ref_delta(x: torch.Tensor, a: Stack, b: Stack, slot: int, expert: int = 0, low_dtype: torch.dtype = torch.float32) -> torch.Tensor | float:
    """scaling * B (A x) for rows x [n, in] -> [n, out]; 0 for slot -1 or rank 0. scaling * A x is rounded to `low_dtype`."""
    matrix_a = stack_matrix(a, slot, expert, True) if slot >= 0 else None
    if matrix_a is None:
        return 0.0
    matrix_b, s = stack_matrix(b, slot, expert, False), (x @ matrix_a.T * float(b.scaling[slot])).to(low_dtype).float()
    if not int(b.split_a[slot]):
        return s @ matrix_b.T
    half, rank = b.dim // 2, int(b.rank[slot])
    return torch.cat([s[:, :rank] @ matrix_b[:half].T, s[:, rank:] @ matrix_b[half:].T], dim=1)


@dataclass
class RefMoE:
    """All in float32; rows of the first three are pairs m * K + k, with the deltas added; 0 for pairs without an expert."""

    gate_up: torch.Tensor  # [P, 2I]
    act: torch.Tensor  # [P, I]
    down: torch.Tensor  # [P, H]
    out: torch.Tensor  # [M, H]


def ref_moe(case: Any, lora: bool = True, rounded: Container[str] = ()) -> RefMoE:
    """The layer of a tests.moe_cases.MoECase by loops over (expert, slot), on pairs sorted by both so that a GPU is never waited for.

    `rounded`: which intermediates are stored in x's dtype, of "s" (scaling * A x, which tensor cores take in that dtype), "gate_up", "act" and
    "down", adapters included: GEMMs add them before they store. A chain of GEMMs must store them, and at rank 1 the rounding of s is one common
    error of a whole row, which the adapter doubles in gate times up: up to 7e-3 of a layer in bfloat16. Against a reference that rounds at the
    same places, what is left is what the kernels do otherwise.
    """
    spec, (m, top_k), dtype = case.spec, case.topk_ids.shape, case.x.dtype
    x, weights = case.x.float().repeat_interleave(top_k, dim=0), case.topk_weights.reshape(-1, 1)
    if spec.router_weight_on == "input":
        x, weights = (x * weights).to(dtype).float(), torch.ones_like(weights)

    def stored(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype).float() if name in rounded else value

    a13, b13, a2, b2 = (on_host(stack) for stack in (case.stacks.a13, case.stacks.b13, case.stacks.a2, case.stacks.b2))
    low_dtype = dtype if "s" in rounded else torch.float32
    order, runs = _expert_runs(case.topk_ids, case.token_slots, spec.num_experts, case.num_slots)
    x = x[order]
    gate_up, act, down = (x.new_zeros(m * top_k, width) for width in (spec.w13_rows, spec.intermediate_size, spec.hidden_size))
    for expert, rows, groups in runs:
        gate_up[rows] = x[rows] @ case.w13[expert].float().T + (0.0 if case.b13 is None else case.b13[expert].float())
        for slot, some in groups if lora else ():
            gate_up[some] += ref_delta(x[some], a13, b13, slot, expert, low_dtype)
        gate_up[rows] = stored("gate_up", gate_up[rows])
        act[rows] = stored("act", ref_activation(gate_up[rows], spec))
        down[rows] = act[rows] @ case.w2[expert].float().T + (0.0 if case.b2 is None else case.b2[expert].float())
        for slot, some in groups if lora else ():
            down[some] += ref_delta(act[some], a2, b2, slot, expert, low_dtype)
        down[rows] = stored("down", down[rows])
    back = order.argsort()
    gate_up, act, down = gate_up[back], act[back], down[back]
    return RefMoE(gate_up, act, down, (down * weights).view(m, top_k, -1).sum(1))


def _expert_runs(ids: torch.Tensor, slots: torch.Tensor, experts: int, num_slots: int) -> tuple[torch.Tensor, list[tuple[int, slice, list[tuple[int, slice]]]]]:
    """An order of the pairs, and what lies where in it: (expert, its rows, [(slot, its rows)]) of the experts and of their adapters."""
    ids, slots = ids.flatten().long(), slots.repeat_interleave(ids.shape[1]).long()
    keys = torch.where((ids >= 0) & (ids < experts), ids, experts) * (num_slots + 1) + slots + 1
    ordered, order = keys.sort(stable=True)
    runs: list[tuple[int, slice, list[tuple[int, slice]]]] = []
    start = 0
    for key, count in zip(*(t.tolist() for t in ordered.unique_consecutive(return_counts=True)), strict=True):
        expert, slot = key // (num_slots + 1), key % (num_slots + 1) - 1
        rows = slice(start, start + count)
        start = rows.stop
        if expert == experts:
            break
        if runs and runs[-1][0] == expert:
            runs[-1] = (expert, slice(runs[-1][1].start, rows.stop), runs[-1][2])
        else:
            runs.append((expert, rows, []))
        if slot >= 0:
            runs[-1][2].append((slot, rows))
    return order, runs


def on_host(stack: Stack) -> Stack:
    """The stack with its tables on the CPU, so that reading an entry waits for nothing."""
    names = ("offset", "expert_stride", "rank", "scaling", "split_a")
    return replace(stack, **{name: getattr(stack, name).cpu() for name in names})


def ref_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: list[LinearStacks], slots: torch.Tensor) -> torch.Tensor:
    """x [M, in] -> [M, sum of parts' rows] by a loop over slots, float32."""
    x = x.float()
    y = F.linear(x, weight.float(), None if bias is None else bias.float())
    stacks = [(on_host(part.a), on_host(part.b)) for part in parts]
    for slot in slots.unique().tolist():
        rows, start = torch.nonzero(slots == slot).flatten(), 0
        for a, b in stacks:
            y[rows, start : start + b.dim] += ref_delta(x[rows], a, b, slot)
            start += b.dim
    return y


def order_slots(ctx: StepContext, tokens: int) -> None:
    """Set slot_order and ordered_slots by the first `tokens` token_slots, which were set by hand."""
    slots, order = ctx.token_slots[:tokens].sort(stable=True)
    ctx.ordered_slots[:tokens], ctx.slot_order[:tokens] = slots, order.int()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm, float32."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm().clamp(min=1e-30))


# What kernels are held to against float32 references: one rounding to bfloat16 is a relative norm error of 1.7e-3, a layer makes two or three.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
largest_errors: dict[str, float] = {}  # since the last look, by what was measured; conftest prints and writes them


def keep_error(what: str, error: float) -> float:
    """`error`, after noting it if it is the largest of `what`."""
    largest_errors[what] = max(error, largest_errors.get(what, 0.0))
    return error


def assert_near(found: torch.Tensor, expected: torch.Tensor, kernel: str, case: object = "") -> None:
    """Relative norm error within TOLERANCE of `found`'s dtype; the largest of each kernel is kept."""
    error = keep_error(f"{kernel}, {str(found.dtype).removeprefix('torch.')}", relative_error(found, expected))
    assert error <= TOLERANCE[found.dtype], f"{kernel}: relative error {error:.2e}, allowed {TOLERANCE[found.dtype]:.0e} {case}"


def assert_alignment(
    alignment: Any, topk_ids: torch.Tensor, token_slots: torch.Tensor | None, experts: int, slots: int, base_block: int, lora_block: int
) -> None:
    """Every promise of ops/moe_lora_align.py, checked against the plain sort."""
    slots = 0 if token_slots is None else slots
    expected = ref_sorted_pairs(topk_ids, token_slots, experts, slots)
    assert alignment.sorted_pairs.tolist() == [pair for _, _, pair in expected], "order by (expert, slot, pair)"
    valid = [item for item in expected if item[0] < experts]
    num_valid, num_base, num_lora, num_groups = alignment.counts.tolist()
    assert num_valid == len(valid)
    place = 0
    for expert, start, rows in alignment.base_tiles[:num_base].tolist():
        assert start == place and 1 <= rows <= base_block, f"base tile ({expert}, {start}, {rows}) after {place} rows"
        assert {valid[i][0] for i in range(start, start + rows)} == {expert}
        assert rows == base_block or place + rows == num_valid or valid[place + rows][0] != expert, "only the last tile of a run is partial"
        place += rows
    assert place == num_valid, "base tiles cover every valid pair once"
    wanted = [i for i, (_, slot, _) in enumerate(valid) if slot >= 0]
    covered: list[int] = []
    groups = set()
    for expert, slot, start, rows in alignment.lora_tiles[:num_lora].tolist():
        assert 1 <= rows <= lora_block
        assert {valid[i][:2] for i in range(start, start + rows)} == {(expert, slot)}
        end = start + rows
        assert rows == lora_block or end == num_valid or valid[end][:2] != (expert, slot), "only the last tile of a group is partial"
        covered += range(start, end)
        groups.add((expert, slot))
    assert covered == wanted, "LoRA tiles cover every pair with an adapter once, in order"
    assert num_groups == len(groups)
