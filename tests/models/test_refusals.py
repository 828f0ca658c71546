"""Models that would give wrong text are refused before any weight is read, with the layer type in the message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from sglang_lora_moe.engine.engine import Engine
from sglang_lora_moe.models.build import build_model
from sglang_lora_moe.models.recognise import UnsupportedModelError, find_experts
from tests.models.driver import Driver, Sequence, make_context
from tests.tiny_models import CONFIGS

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "pad_token_id": 0,
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gated delta net": ("qwen3_next", _SMALL | {"num_experts": 8}, "linear_attention"),
    "mamba": ("jamba", _SMALL | {"num_experts": 8}, "linear_attention"),
    "lightning attention": ("minimax", _SMALL | {"num_local_experts": 8}, "linear_attention"),
    "short convolution": ("lfm2", _SMALL, "conv|Lfm2"),
    "chunked attention": ("llama4_text", _SMALL | {"num_local_experts": 8, "intermediate_size_mlp": 96}, "chunked_attention"),
    "unknown attention": ("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 128}, "GPT2Attention"),
    "own attention table": ("gptj", {"n_layer": 1, "n_head": 2, "n_embd": 32, "rotary_dim": 8, "vocab_size": 128}, "gptj"),
    "softcapping": ("gemma2", _SMALL | {"head_dim": 16}, "softcapping"),
    "encoder": ("t5", {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32, "vocab_size": 128}, "'t5'"),
}


def build_dummy(path: Path, arch: str, fields: dict[str, Any]) -> Any:
    AutoConfig.for_model(arch, **fields).save_pretrained(path)
    return build_model(path, ctx=make_context(), dtype=torch.float32, device="cpu", load_format="dummy")


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    arch, fields, named = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=named):
        build_dummy(tmp_path, arch, fields)


def test_experts_that_do_not_declare_their_layout() -> None:
    class DenseExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(2, 2)

    block = nn.ModuleDict({"shared_experts": nn.Linear(2, 2), "experts": DenseExperts()})
    with pytest.raises(UnsupportedModelError, match="experts is a DenseExperts"):
        find_experts(nn.ModuleDict({"mlp": block}))
    with pytest.raises(UnsupportedModelError, match="ffn is a DenseExperts"):
        find_experts(nn.ModuleDict({"ffn": DenseExperts()}))


def test_attention_that_passes_by_the_cache_is_noticed(tmp_path: Path) -> None:
    driver = Driver(build_dummy(tmp_path, "diffllama", _SMALL))  # computes its scores itself, whatever attention is registered
    with pytest.raises(UnsupportedModelError, match="did not use the paged KV cache"):
        driver.run(Sequence([3, 4, 5]), 3)


def test_attention_with_its_own_mask_is_noticed(tmp_path: Path) -> None:
    driver = Driver(build_dummy(tmp_path, "doge", _SMALL))
    with pytest.raises(UnsupportedModelError, match="DogeAttention"):
        driver.run(Sequence([3, 4, 5]), 3)


def test_longrope_is_served_up_to_the_length_where_factors_are_fixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    fields = _SMALL | {"rope_parameters": rope, "max_position_embeddings": 512, "original_max_position_embeddings": 64}
    assert build_dummy(tmp_path, "llama", fields).max_model_len == 64
    options: dict[str, Any] = {"model_path": str(tmp_path), "load_format": "dummy", "max_total_tokens": 1024}
    with Engine(**options) as engine:
        assert engine.model_info["max_model_len"] == 64 and "--context-length 512: up to 64 tokens are served" in caplog.text
    with pytest.raises(ValueError, match="--context-length 65: up to 64 tokens are served"):
        Engine(**options, context_length=65)


def test_yarn_is_served_up_to_what_it_makes_of_the_trained_positions(tmp_path: Path) -> None:
    """As model cards add it to a config.json whose max_position_embeddings stays."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    build_dummy(tmp_path, "llama", _SMALL | {"rope_parameters": rope, "max_position_embeddings": 80})
    options: dict[str, Any] = {"model_path": str(tmp_path), "load_format": "dummy", "max_total_tokens": 1024}
    with Engine(**options, context_length=256) as engine:
        assert engine.model_info["max_model_len"] == 256
        assert len(engine.generate(input_ids=list(range(3, 103)), sampling_params={"max_new_tokens": 3, "ignore_eos": True})["output_ids"]) == 3
    with pytest.raises(ValueError, match="--context-length 257 exceeds the model's 256 positions"):
        Engine(**options, context_length=257)


def test_not_a_model_directory(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no config\.json"):
        build_model(tmp_path, ctx=make_context(), dtype=torch.float32, device="cpu")


def test_an_unknown_moe_backend_is_named(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3_moe", **CONFIGS["qwen3_moe"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nosuch.*torch_native"):
        build_model(tmp_path, ctx=make_context(), dtype=torch.float32, device="cpu", load_format="dummy", moe_runner_backend="nosuch")
