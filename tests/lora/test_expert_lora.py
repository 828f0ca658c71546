"""Adapters on experts (torch_native): values against loops and merged weights, mixed against solo, base steps untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_lora_moe.lora.hooks import FusedMoEWithLoRA
from sglang_lora_moe.moe.backends import make_core
from sglang_lora_moe.moe.backends.torch_native import TorchNativeCore
from sglang_lora_moe.moe.runner import MoeRunner
from tests.moe.test_fused_moe import make_layer
from tests.moe_cases import LAYOUTS, MoECase, make_case, make_expert_lora, small_cases
from tests.references import ref_activation, ref_moe, relative_error, stack_matrix
from tests.slots import write_slot


def make_wrapped(case: MoECase) -> FusedMoEWithLoRA:
    base = make_layer(case)
    set_slots(base.ctx, case.token_slots)
    return FusedMoEWithLoRA(base, case.stacks, base.ctx)


def set_slots(ctx: Any, token_slots: torch.Tensor) -> None:
    ctx.token_slots.fill_(-1)
    ctx.token_slots[: len(token_slots)] = token_slots
    ctx.lora_active = bool((token_slots >= 0).any())


@pytest.mark.parametrize("arguments", list(small_cases()), ids=str)
def test_values(arguments: dict[str, Any]) -> None:
    case = make_case(**arguments)
    layer = make_wrapped(case)
    out = layer(case.x, case.topk_ids, case.topk_weights)
    assert relative_error(out, ref_moe(case).out) < 1e-6, case.name
    assert torch.equal(out, layer(case.x, case.topk_ids, case.topk_weights)), "two runs are bit-equal"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16(layout: str) -> None:
    case = make_case(m=33, layouts=(layout,), dtype=torch.bfloat16)
    out = make_wrapped(case)(case.x, case.topk_ids, case.topk_weights)
    assert out.dtype == torch.bfloat16 and relative_error(out, ref_moe(case).out) < 5e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_merged_weights(layout: str) -> None:
    """The meaning of an adapter: W13 + scaling * B13 A13 and W2 + scaling * B2 A2, per expert."""
    case = make_case(m=20, popularity="identical", layouts=(layout,), ranks=(8,), active=1, slots=2)
    out = make_wrapped(case)(case.x, case.topk_ids, case.topk_weights)
    slot, expected = int(case.token_slots[0]), torch.zeros_like(case.x)
    for expert in range(case.spec.num_experts):
        merged = []
        for weight, a, b in ((case.w13, case.stacks.a13, case.stacks.b13), (case.w2, case.stacks.a2, case.stacks.b2)):
            matrix_a, matrix_b = stack_matrix(a, slot, expert, True), stack_matrix(b, slot, expert, False)
            delta: torch.Tensor | float = 0.0
            if matrix_a is not None and matrix_b is not None:
                if b.split_a[slot]:  # block-diagonal B
                    matrix_b = torch.block_diag(*matrix_b.chunk(2))
                delta = float(b.scaling[slot]) * matrix_b @ matrix_a
            merged.append(weight[expert] + delta)
        weights = torch.where(case.topk_ids == expert, case.topk_weights, 0.0).sum(1, keepdim=True)
        expected += weights * (ref_activation(case.x @ merged[0].T, case.spec) @ merged[1].T)
    assert relative_error(out, expected) < 1e-6
    assert relative_error(out, ref_moe(case, lora=False).out) > 0.05, "the adapter has an effect"


def test_mixed_batch_equals_solo() -> None:
    case = make_case(m=48, layouts=LAYOUTS, ranks=(4, 8, 16, 64), active=6, slots=8)
    layer = make_wrapped(case)
    mixed = layer(case.x, case.topk_ids, case.topk_weights)
    for slot in case.token_slots.unique().tolist():
        rows = torch.nonzero(case.token_slots == slot).flatten()
        set_slots(layer.ctx, case.token_slots[rows])
        assert relative_error(layer(case.x[rows], case.topk_ids[rows], case.topk_weights[rows]), mixed[rows]) < 1e-6, f"slot {slot}"
    for row in range(0, 48, 5):
        set_slots(layer.ctx, case.token_slots[row : row + 1])
        assert relative_error(layer(case.x[row, None], case.topk_ids[row, None], case.topk_weights[row, None]), mixed[row, None]) < 1e-6


class RecordingCore(TorchNativeCore):
    """Notes every call and the shapes it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any]]] = []

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in ("make_routing", "gate_up", "activation", "down", "combine"):
            return value

        def call(*args: Any) -> Any:
            self.calls.append((name, [arg.shape if isinstance(arg, torch.Tensor) else type(arg) for arg in args]))
            return value(*args)

        return call


def test_base_step_is_bit_identical_with_and_without_wrapper() -> None:
    case = make_case(m=48, popularity="none")
    plain, layer = make_layer(case), make_wrapped(case)
    assert not layer.ctx.lora_active
    expected = plain(case.x, case.topk_ids, case.topk_weights)
    assert torch.equal(layer(case.x, case.topk_ids, case.topk_weights), expected)
    core = RecordingCore()
    plain.runner = MoeRunner(core)
    plain(case.x, case.topk_ids, case.topk_weights)
    plain_calls, core.calls = core.calls, []
    assert torch.equal(FusedMoEWithLoRA(plain, case.stacks, plain.ctx)(case.x, case.topk_ids, case.topk_weights), expected)
    assert core.calls == plain_calls and len(plain_calls) == 5, "the same work of the core, and no hook"


def test_stale_slots_do_not_matter_when_inactive() -> None:
    case = make_case(m=20)
    layer = make_wrapped(case)
    layer.ctx.lora_active = False
    assert torch.equal(layer(case.x, case.topk_ids, case.topk_weights), make_layer(case)(case.x, case.topk_ids, case.topk_weights))


def test_slots_without_an_adapter_here_leave_the_base() -> None:
    """Slot 1 is empty: its tokens get the base, as do those of an adapter that touches other layers only."""
    case = make_case(m=20, active=1, slots=3, popularity="identical")
    layer = make_wrapped(case)
    set_slots(layer.ctx, torch.ones(20, dtype=torch.int32))
    assert relative_error(layer(case.x, case.topk_ids, case.topk_weights), ref_moe(case, lora=False).out) < 1e-6


def test_padding_rows_are_zero_and_harmless() -> None:
    case = make_case(m=16, routing="partial")
    layer = make_wrapped(case)
    x = case.x.clone()
    x[12:] = float("nan")
    out = layer(x, case.topk_ids, case.topk_weights)
    assert torch.equal(out[12:], torch.zeros(4, 64)) and relative_error(out[:12], ref_moe(case).out[:12]) < 1e-6


def test_rewritten_slot_takes_effect_at_once() -> None:
    """A smaller adapter over a larger one, then an empty slot: nothing of the former remains."""
    case = make_case(m=20, popularity="identical", active=1, slots=1, ranks=(16,), layouts=("split",))
    layer = make_wrapped(case)
    first = layer(case.x, case.topk_ids, case.topk_weights)
    small = make_expert_lora(case.spec, 3, "gate_up_only", lambda *shape, std: torch.randn(shape) * std)
    write_slot(case.pool, 0, {"experts": small})
    second = layer(case.x, case.topk_ids, case.topk_weights)
    assert relative_error(second, ref_moe(case).out) < 1e-6 < relative_error(second, first)
    case.pool.clear(0)
    assert relative_error(layer(case.x, case.topk_ids, case.topk_weights), ref_moe(case, lora=False).out) < 1e-6


def test_wrapper_refuses_what_does_not_fit() -> None:
    case, other = make_case(hidden=64), make_case(hidden=48)
    with pytest.raises(ValueError, match=r"experts: expected stacks of dims \(64, 64, 32, 64\), got \(48, 64, 32, 48\)"):
        FusedMoEWithLoRA(make_layer(case), other.stacks, make_layer(case).ctx)


def test_core_without_lora_functions_refuses_when_built() -> None:
    case = make_case()
    layer = make_layer(case)
    core = make_core("torch_native")
    core.name = "plain"
    layer.runner = MoeRunner(core)
    with pytest.raises(ValueError, match="the plain MoE backend cannot apply adapters to experts; use --moe-runner-backend"):
        FusedMoEWithLoRA(layer, case.stacks, layer.ctx)
