"""Every architecture: packed, chunked and mixed steps over the paged cache against transformers' own model, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_lora_moe.layers.attention import Attention
from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.norm import RMSNorm
from sglang_lora_moe.layers.topk import Router
from sglang_lora_moe.models.build import build_model
from sglang_lora_moe.models.served import ServedModel
from tests.models.driver import Driver, Sequence, make_context
from tests.tiny_models import CONFIGS, make_tiny_model

TOLERANCE = 1e-4

# Architectures without a table entry of their own in tiny_models: they check that the generic code holds.
_MOE = {"num_experts_per_tok": 2, "intermediate_size": 96, "moe_intermediate_size": 32}
_GROUPED = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
_LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20, "num_key_value_heads": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "glm4_moe": _MOE | _GROUPED | {"head_dim": 32, "n_group": 2, "topk_group": 1, "use_qk_norm": True, "partial_rotary_factor": 0.5, "attention_bias": True},
    "ernie4_5_moe": _MOE | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "tie_word_embeddings": True},
    "phimoe": {"num_local_experts": 8, "intermediate_size": 32, "sliding_window": 7, "attention_bias": True, "lm_head_bias": True},
    "deepseek_v2": _MOE | _GROUPED | _LATENT | {"q_lora_rank": None, "n_group": 4, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 32, "rotary_dim": 16},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "intermediate_size": 32, "head_dim": 16},
    "dots1": _MOE | _GROUPED | {"head_dim": 32, "n_group": 1, "topk_group": 1},
    "llama": {"intermediate_size": 96, "attention_bias": True, "tie_word_embeddings": True},
    "qwen2": {"intermediate_size": 96, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}
_SHORT_AND_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 2.5] * 2, "long_factor": [4.0] * 8}
ROTATIONS: dict[str, tuple[str, dict[str, Any]]] = {  # that look at the positions of a step, or compute on the CPU
    "phimoe-longrope": ("phimoe", OTHERS["phimoe"] | {
        "rope_parameters": _SHORT_AND_LONG | {"original_max_position_embeddings": 128, "short_mscale": 1.2, "long_mscale": 1.4},
    }),
    "hunyuan-alpha": ("hunyuan_v1_moe", OTHERS["hunyuan_v1_moe"] | {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
    }),
    "qwen3-dynamic": ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, "max_position_embeddings": 32}),
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe-dense-layer-tied": ("qwen3_moe", {"mlp_only_layers": [0], "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": False}),
    "olmoe-clip": ("olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True}),
    "deepseek_v3-direct-q": ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "norm_topk_prob": False}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}}),
}
CASES = {name: (name, {}) for name in CONFIGS} | {name: (name, fields) for name, fields in OTHERS.items()} | VARIANTS | ROTATIONS


def load_stock(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def stock_logits(stock: Any, tokens: list[int]) -> torch.Tensor:
    return stock(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def build(path: Path, **kwargs: Any) -> ServedModel:
    return build_model(path, ctx=make_context(), dtype=kwargs.pop("dtype", torch.float32), device="cpu", show_progress=False, **kwargs)


def random_tokens(seed: int, n: int) -> list[int]:
    return torch.randint(3, 98, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_stock(case: str, tmp_path: Path) -> None:
    arch, overrides = CASES[case]
    path = make_tiny_model(arch, tmp_path, **overrides)
    stock = load_stock(path)
    seqs = [Sequence(random_tokens(seed, n)) for seed, n in enumerate((25, 31, 14))]
    expected = [stock_logits(stock, seq.tokens) for seq in seqs]
    got: list[list[torch.Tensor]] = [[], [], []]
    driver = Driver(build(path))

    def step(*work: tuple[int, int], padding: int = 0) -> None:
        for (i, _), logits in zip(work, driver.step([(seqs[i], n) for i, n in work], padding), strict=True):
            got[i].append(logits)

    step((0, 13), (1, 9))  # packed prefill
    step((1, 11), (2, 5), (0, 1))  # second chunk beside a new prompt and a decode
    step((0, 1), (1, 7), (2, 1))  # prefill between decodes
    for _ in range(4):
        step((2, 1), (0, 1), (1, 1))  # decode, requests in another order
    step((0, 1), (2, 1), padding=3)
    step((0, 5), (2, 3))
    for logits, reference in zip(got, expected, strict=True):
        out = torch.cat(logits)
        torch.testing.assert_close(out, reference[: out.shape[0]], rtol=0, atol=TOLERANCE)
        assert out.std() > 0.3, "the test model is too flat to show errors"


@pytest.mark.parametrize("arch", ["olmoe", "deepseek_v3", "granitemoe", "llama"])
def test_a_window_of_the_config_that_the_model_ignores(arch: str, tmp_path: Path) -> None:
    """As configurations hold that were made of another architecture's."""
    path, tokens = make_tiny_model(arch, tmp_path, **OTHERS.get(arch, {}), sliding_window=6, use_sliding_window=False), random_tokens(0, 30)
    found = Driver(build(path)).run(Sequence(tokens), 30)
    torch.testing.assert_close(found, stock_logits(load_stock(path), tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_result_does_not_depend_on_the_batch(arch: str, tmp_path: Path) -> None:
    path = make_tiny_model(arch, tmp_path)
    alone, together = Driver(build(path)), Driver(build(path), seed=1)
    prompts = [random_tokens(seed, n) for seed, n in enumerate((3, 40, 9, 20, 2))]  # lengths far apart: several decode groups
    solo = []
    for tokens in prompts:
        seq = Sequence(tokens + [5, 6, 7])
        solo.append(torch.cat([alone.run(seq, len(tokens)), *(alone.run(seq, 1) for _ in range(3))]))
    seqs = [Sequence(tokens + [5, 6, 7]) for tokens in prompts]
    steps = [together.step([(seq, len(tokens)) for seq, tokens in zip(seqs, prompts, strict=True)])]
    steps += [together.step([(seq, 1) for seq in seqs]) for _ in range(3)]
    for i, expected in enumerate(solo):
        torch.testing.assert_close(torch.cat([step[i] for step in steps]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "arch, kept", [("deepseek_v3", "gate.linear.weight gate.e_score_correction_bias"), ("ernie4_5_moe", "gate.weight gate.moe_statics.e_score_correction_bias")]
)
def test_bfloat16_beside_what_transformers_keeps_in_float32(arch: str, kept: str, tmp_path: Path) -> None:
    """`tests/engine/test_forced_logits.py` bounds the logits of architectures whose experts can be given; here they are free."""
    overrides = CASES[arch][1]
    path = make_tiny_model(arch, tmp_path, **overrides)
    model = build(path, dtype=torch.bfloat16)
    tokens = random_tokens(7, 20)
    driver = Driver(model)
    seq = Sequence(tokens)
    logits = torch.cat([driver.run(seq, 15), *(driver.run(seq, 1) for _ in range(5))])
    stock = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.bfloat16)
    expected = stock_logits(stock, tokens)
    assert logits.dtype == torch.float32
    # Routing flips between nearly equal experts are legitimate, so most tokens must agree, not all.
    error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 3e-2, error
    assert {name.partition("mlp.")[2] for name, tensor in model.hf.state_dict().items() if tensor.dtype == torch.float32} == set(kept.split())


def test_known_modules_are_replaced(tmp_path: Path) -> None:
    for arch in ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss"):
        modules = list(build(make_tiny_model(arch, tmp_path)).hf.modules())
        for kind in (Attention, FusedMoE, Router):
            assert sum(isinstance(module, kind) for module in modules) == 2, (arch, kind)
        assert not [module for module in modules if type(module).__name__.endswith("RMSNorm") and not isinstance(module, RMSNorm)], arch


def test_part_names_are_module_paths(tmp_path: Path) -> None:
    model = build(make_tiny_model("deepseek_v3", tmp_path))
    names = {name for module in model.hf.modules() if hasattr(module, "parts") for name, _ in module.parts}
    layer = "model.layers.1."
    assert {f"{layer}self_attn.{leaf}" for leaf in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")} <= names
    assert {f"{layer}mlp.gate", "model.layers.0.mlp.up_proj", "lm_head"} <= names
    assert model.hf.model.layers[1].mlp.experts.shared.name == f"{layer}mlp.shared_experts"
    assert not any("kv_b_proj" in name for name in names)
    assert "kv_b_proj" in model.refused_adapter_modules


def test_what_the_engine_reads(tmp_path: Path) -> None:
    model = build(make_tiny_model("gpt_oss", tmp_path))
    assert (model.vocab_size, model.max_model_len, model.eos_token_ids) == (128, 512, [2])
    assert model.kv_bytes_per_token() == 2 * 2 * (32 + 32) * 4
    assert build(make_tiny_model("deepseek_v3", tmp_path)).kv_bytes_per_token() == 3 * (32 + 16) * 4


def test_no_logits_wanted(tmp_path: Path) -> None:
    driver = Driver(build(make_tiny_model("qwen3_moe", tmp_path)))
    driver.run(Sequence(random_tokens(0, 5)), 5)
    driver.ctx.num_logits = 0
    assert driver.model.forward_logits().shape == (0, 128)


def test_adapter_names_of_older_files(tmp_path: Path) -> None:
    mixtral = build(make_tiny_model("mixtral", tmp_path))
    rename = mixtral.rename_adapter_module
    assert rename("model.layers.0.block_sparse_moe.experts.3.w1") == "model.layers.0.mlp.experts.3.w1"
    assert rename("model.layers.0.block_sparse_moe.gate") == "model.layers.0.mlp.gate"
    assert rename("model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert build(make_tiny_model("qwen3_moe", tmp_path)).rename_adapter_module("model.layers.1.mlp.experts.2.up_proj") == "model.layers.1.mlp.experts.2.up_proj"
