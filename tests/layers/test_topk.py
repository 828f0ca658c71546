"""Router by spec against transformers' own router modules, bit for bit in float32 wherever the formula is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.topk import Router, RouterSpec, select_experts
from sglang_lora_moe.models.recognise import router_spec
from tests.tiny_models import CONFIGS, randomise

M = 200
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe not renormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen2_moe": ("qwen2_moe", {"num_experts_per_tok": 4}),
    "olmoe": ("olmoe", {}),
    "mixtral": ("mixtral", {}),
    "gpt_oss": ("gpt_oss", {"num_experts_per_tok": 4}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 one group": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "glm4_moe": ("glm4_moe", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.0}),
    "dots1": ("dots1", {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "routed_scaling_factor": 2.0}),
    "deepseek_v2 grouped": ("deepseek_v2", {"n_routed_experts": 8, "n_group": 4, "topk_group": 1, "topk_method": "group_limited_greedy"}),
    "deepseek_v2 greedy": ("deepseek_v2", {"n_routed_experts": 8, "topk_method": "greedy", "num_experts_per_tok": 3}),
}


def stock_router(case: str) -> Any:
    arch, fields = CASES[case]
    small = CONFIGS["qwen3"] | {"moe_intermediate_size": 32, "first_k_dense_replace": 0, "num_experts_per_tok": 2, "n_shared_experts": 1}
    config = AutoConfig.for_model(arch, **(CONFIGS.get(arch, small) | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed=3)
    mlp = model.model.layers[-1].mlp
    return mlp.router if hasattr(mlp, "router") else mlp.gate


@pytest.mark.parametrize("case", CASES)
def test_equals_stock(case: str) -> None:
    stock = stock_router(case)
    spec = router_spec(stock)
    assert spec is not None
    bias = getattr(stock, "bias", None)
    linear = Linear((("gate", spec.num_experts),), 64, biased_parts=("gate",) if bias is not None else (), dtype=torch.float32, device="cpu")
    linear.weight.copy_(stock.weight)
    if bias is not None:
        linear.bias.copy_(bias)
    router = Router(linear, spec)
    if spec.correction_bias:
        router.e_score_correction_bias.copy_(stock.e_score_correction_bias)
    x = torch.randn(M, 64, generator=torch.Generator().manual_seed(0))
    logits, weights, ids = router(x)
    with torch.no_grad():
        stock_logits, stock_weights, stock_ids = stock(x)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (M, spec.top_k)
    torch.testing.assert_close(logits, stock_logits, rtol=0, atol=1e-6)
    order, stock_order = ids.argsort(dim=1), stock_ids.argsort(dim=1)  # stock's order of the chosen is not specified
    assert torch.equal(ids.gather(1, order).long(), stock_ids.gather(1, stock_order))
    torch.testing.assert_close(weights.gather(1, order), stock_weights.gather(1, stock_order), rtol=0, atol=1e-6)


def test_float32_weights_from_bfloat16_logits() -> None:
    logits = torch.randn(M, 8).bfloat16()
    weights, _ = select_experts(logits, RouterSpec(8, 2, renormalise=True))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(M))
    assert (weights.bfloat16().float() != weights).any(), "weights must not have been rounded to the model's dtype"
    router = Router(Linear((("gate", 8),), 64, dtype=torch.float32, device="cpu"), RouterSpec(8, 2, float32_logits=True))
    assert router(torch.randn(M, 64).bfloat16())[0].dtype == torch.float32


def test_weights_of_experts_that_are_all_refused_are_no_nan() -> None:
    logits = torch.full((1, 4), -200.0)  # sigmoid 0
    assert select_experts(logits, RouterSpec(4, 2, score="sigmoid", renormalise=True, epsilon=1e-20))[0].tolist() == [[0.0, 0.0]]


def test_shared_experts_come_last() -> None:
    logits = torch.tensor([[1.0, 2, 3, 0]])
    weights, ids = select_experts(logits, RouterSpec(3, 1, shared=2))
    assert ids.tolist() == [[2, 3, 4]] and weights[0, 1:].tolist() == [0.5, 0.5], "logit 3 is the gate of both parts"
    assert select_experts(logits[:, :3], RouterSpec(3, 1, shared=2))[0][0, 1:].tolist() == [1.0, 1.0]


def test_groups_limit_the_choice() -> None:
    logits = torch.tensor([[9.0, -9, -9, -9, 1, 1, -9, -9]])  # the best expert sits in a group that is poor as a whole
    spec = RouterSpec(8, 2, score="sigmoid", num_groups=2, topk_groups=1)
    assert set(select_experts(logits, spec)[1][0].tolist()) == {4, 5}
    assert 0 in select_experts(logits, RouterSpec(8, 2, score="sigmoid"))[1][0].tolist()


def test_correction_bias_chooses_but_does_not_weigh() -> None:
    bias = torch.tensor([0.0, 0, 0, 5])
    weights, ids = select_experts(torch.zeros(1, 4), RouterSpec(4, 1, score="sigmoid", correction_bias=True), bias)
    assert ids.tolist() == [[3]] and weights.tolist() == [[0.5]]


def test_wrong_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown router score 'tanh'"):
        RouterSpec(8, 2, score="tanh")
    with pytest.raises(ValueError, match="8 experts do not fit 3 groups"):
        RouterSpec(8, 2, num_groups=3)
    with pytest.raises(ValueError, match="2 groups of which 3 are chosen"):
        RouterSpec(8, 2, num_groups=2, topk_groups=3)
