"""Short float32 references for the MoE and LoRA operators: loops over groups, no cleverness, any device.

They read adapters back through the stack tables, as kernels do. TF32 must be off where these run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

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


def ref_delta(x: torch.Tensor, a: Stack, b: Stack, slot: int, expert: int = 0) -> torch.Tensor | float:
    """scaling * B (A x) for rows x [n, in] -> [n, out]; 0 for slot -1 or rank 0."""
    matrix_a = stack_matrix(a, slot, expert, True) if slot >= 0 else None
    if matrix_a is None:
        return 0.0
    matrix_b, s, scaling = stack_matrix(b, slot, expert, False), x @ matrix_a.T, float(b.scaling[slot])
    if not int(b.split_a[slot]):
        return scaling * (s @ matrix_b.T)
    half, rank = b.dim // 2, int(b.rank[slot])
    return scaling * torch.cat([s[:, :rank] @ matrix_b[:half].T, s[:, rank:] @ matrix_b[half:].T], dim=1)


@dataclass
class RefMoE:
    """All in float32; rows of the first three are pairs m * K + k, with the deltas added; 0 for pairs without an expert."""

    gate_up: torch.Tensor  # [P, 2I]
    act: torch.Tensor  # [P, I]
    down: torch.Tensor  # [P, H]
    out: torch.Tensor  # [M, H]


def ref_moe(case: Any, lora: bool = True) -> RefMoE:
    """The layer of a tests.moe_cases.MoECase by loops over (expert, slot)."""
    spec, (m, top_k) = case.spec, case.topk_ids.shape
    x, weights = case.x.float().repeat_interleave(top_k, dim=0), case.topk_weights.reshape(-1, 1)
    if spec.router_weight_on == "input":
        x, weights = (x * weights).to(case.x.dtype).float(), torch.ones_like(weights)
    ids, slots = case.topk_ids.reshape(-1), case.token_slots.repeat_interleave(top_k)
    gate_up, act, down = (x.new_zeros(m * top_k, width) for width in (spec.w13_rows, spec.intermediate_size, spec.hidden_size))
    for expert in [e for e in ids.unique().tolist() if 0 <= e < spec.num_experts]:
        rows = torch.nonzero(ids == expert).flatten()
        slots_here = slots[rows]
        groups = [(slot, rows[slots_here == slot]) for slot in slots_here.unique().tolist() if lora and slot >= 0]
        gate_up[rows] = x[rows] @ case.w13[expert].float().T + (0.0 if case.b13 is None else case.b13[expert].float())
        for slot, some in groups:
            gate_up[some] += ref_delta(x[some], case.stacks.a13, case.stacks.b13, slot, expert)
        act[rows] = ref_activation(gate_up[rows], spec)
        down[rows] = act[rows] @ case.w2[expert].float().T + (0.0 if case.b2 is None else case.b2[expert].float())
        for slot, some in groups:
            down[some] += ref_delta(act[some], case.stacks.a2, case.stacks.b2, slot, expert)
    return RefMoE(gate_up, act, down, (down * weights).view(m, top_k, -1).sum(1))


def ref_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: list[LinearStacks], slots: torch.Tensor) -> torch.Tensor:
    """x [M, in] -> [M, sum of parts' rows] by a loop over rows, float32."""
    rows = []
    for row, slot in zip(x.float(), slots.tolist(), strict=True):
        y = F.linear(row, weight.float(), None if bias is None else bias.float())
        deltas = [ref_delta(row[None], part.a, part.b, slot) + torch.zeros(1, part.b.dim, device=x.device) for part in parts]
        rows.append(y + torch.cat(deltas, dim=1)[0])
    return torch.stack(rows)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm, float32."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm().clamp(min=1e-30))


# What kernels are held to against float32 references: one rounding to bfloat16 is a relative norm error of 1.7e-3, a layer makes two or three.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
largest_errors: dict[str, float] = {}  # by "kernel, dtype", since the last look; conftest prints and writes them


def assert_near(found: torch.Tensor, expected: torch.Tensor, kernel: str, case: object = "") -> None:
    """Relative norm error within TOLERANCE of `found`'s dtype; the largest of each kernel is kept."""
    error = relative_error(found, expected)
    key = f"{kernel}, {str(found.dtype).removeprefix('torch.')}"
    largest_errors[key] = max(error, largest_errors.get(key, 0.0))
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
