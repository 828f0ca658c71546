"""FusedMoE on torch_native without adapters: values, edge cases, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.moe.backends import get_moe_runner_backend, make_core, make_lora_ops
from sglang_lora_moe.moe.runner import MoeRunner
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.quantization.base import QuantMethod
from sglang_lora_moe.quantization.unquantized import UnquantizedMethod
from tests.moe_cases import SPECS, make_case, small_cases
from tests.references import ref_moe, relative_error


def make_layer(case: Any) -> FusedMoE:
    runner = MoeRunner(make_core("torch_native"))
    layer = FusedMoE("experts", case.spec, UnquantizedMethod(), StepContext(256, 8, 4, 16), Workspace(), runner, dtype=case.x.dtype)
    for name in ("w13", "w2", "b13", "b2"):
        if getattr(case, name) is not None:
            getattr(layer, name).data.copy_(getattr(case, name))
    return layer


@pytest.mark.parametrize("arguments", list(small_cases(popularity="none")), ids=str)
def test_values(arguments: dict[str, Any]) -> None:
    case = make_case(**arguments)
    layer = make_layer(case)
    out = layer(case.x, case.topk_ids, case.topk_weights)
    assert out.dtype == case.x.dtype and relative_error(out, ref_moe(case, lora=False).out) < 1e-6, case.name
    assert torch.equal(out, layer(case.x, case.topk_ids, case.topk_weights)), "two runs are bit-equal"


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16(spec: str) -> None:
    case = make_case(m=33, spec=spec, dtype=torch.bfloat16)
    out = make_layer(case)(case.x, case.topk_ids, case.topk_weights)
    assert out.dtype == torch.bfloat16 and relative_error(out, ref_moe(case, lora=False).out) < 5e-3


def test_called_as_transformers_calls_experts() -> None:
    """int64 ids and weights in the activation dtype."""
    case = make_case(m=9, dtype=torch.bfloat16)
    layer, weights = make_layer(case), case.topk_weights.to(torch.bfloat16)
    assert torch.equal(layer(case.x, case.topk_ids.long(), weights), layer(case.x, case.topk_ids, weights.float()))


def test_ids_without_an_expert_contribute_nothing() -> None:
    case = make_case(m=6, spec="clamped")
    layer = make_layer(case)
    ids = case.topk_ids.clone()
    ids[1, 0], ids[2] = -1, -1
    out = layer(case.x, ids, case.topk_weights)
    weights = case.topk_weights.clone()
    weights[1, 0] = 0
    assert relative_error(out[1], layer(case.x, case.topk_ids, weights)[1]) < 1e-6
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    assert torch.equal(layer(case.x, torch.full_like(ids, -1), case.topk_weights), torch.zeros_like(out))
    assert layer(case.x[:0], ids[:0], case.topk_weights[:0]).shape == (0, 64)


def test_the_input_is_not_changed() -> None:
    case = make_case(m=9, top_k=1, router_weight_on="input")
    layer, x, weights = make_layer(case), case.x.clone(), case.topk_weights.clone()
    layer(case.x, case.topk_ids, case.topk_weights)
    assert torch.equal(case.x, x) and torch.equal(case.topk_weights, weights)


def test_shape_errors_name_expected_and_actual() -> None:
    case = make_case(m=3)
    layer = make_layer(case)
    with pytest.raises(ValueError, match=r"experts: expected x \[M, 64\] and topk_ids, topk_weights \[M, 2\], got \(3, 63\), \(3, 2\), \(3, 2\)"):
        layer(case.x[:, :63], case.topk_ids, case.topk_weights)
    with pytest.raises(ValueError, match=r"got \(3, 64\), \(3, 1\), \(3, 1\)"):
        layer(case.x, case.topk_ids[:, :1], case.topk_weights[:, :1])


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"activation": "swish"}, "'swish' are not supported; known: silu, gelu"),
        ({"activation": "relu2"}, "gated activation 'relu2'"),
        ({"router_weight_on": "input"}, "needs top_k 1, got top_k 2"),
        ({"router_weight_on": "both"}, "must be 'output' or 'input', got 'both'"),
        ({"top_k": 9}, r"top_k must be in 1..num_experts \(8\), got 9"),
        ({"activation": "gelu", "swiglu_limit": 7.0}, "belong to the gated silu"),
        ({"swiglu_alpha": 1.7}, "come together"),
    ],
)
def test_spec_refuses_what_it_cannot_mean(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MoESpec(**({"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32} | change))


class MarlinOnly(UnquantizedMethod):
    name, backends = "wna16", ("marlin",)
    get_torch_quant_info = QuantMethod.get_torch_quant_info


def test_backends_refuse_with_the_alternative() -> None:
    plain = UnquantizedMethod()
    assert get_moe_runner_backend("auto", "cpu", plain) == get_moe_runner_backend("torch_native", "cpu", plain) == "torch_native"
    with pytest.raises(ValueError, match="the fast MoE backend cannot run unquantized weights on cpu; usable here: .*torch_native"):
        get_moe_runner_backend("fast", "cpu", plain)
    with pytest.raises(ValueError, match="no MoE backend runs wna16 weights on cpu; they need one of marlin"):
        get_moe_runner_backend("auto", "cpu", MarlinOnly())
    with pytest.raises(ValueError, match="cannot run wna16 weights on cpu; usable here: none"):
        get_moe_runner_backend("torch_native", "cpu", MarlinOnly())
    with pytest.raises(ValueError, match="wna16 weights cannot run on the torch_native MoE backend; use --moe-runner-backend marlin"):
        make_core("torch_native").quant_info(MarlinOnly(), torch.nn.Module())
    with pytest.raises(ValueError, match="the other MoE backend cannot apply adapters to experts; use --moe-runner-backend torch_native"):
        make_lora_ops("other")
