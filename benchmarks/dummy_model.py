"""Models and adapters without files: real shapes, random weights made on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sglang_lora_moe.lora.packed import PackedAdapter, PoolLayout
from sglang_lora_moe.lora.targets import EmbeddingTarget, ExpertTarget, LinearTarget, Target
from sglang_lora_moe.lora.weights import ExpertLoRA, LinearLoRA, ModuleLoRA

_STD = 0.01

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "eos_token_id": 151645, "dtype": "bfloat16",
    },
}  # fmt: skip

# What a compressed-tensors checkpoint says that llmcompressor wrote with the scheme W4A16: all linears but the head and the routers.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int4-g128": {
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
            "config_groups": {"group_0": {
                "targets": ["Linear"], "format": "pack-quantized",
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
            }},
        },
    },
}  # fmt: skip
WEIGHT_BYTES = {"bf16": 2.0, "int4-g128": 0.5 + 2.0 / 128}  # of one weight of a linear, with its share of a scale


def write_config(shape: str, folder: Path, **overrides: Any) -> Path:
    """A model directory with a config.json alone, for --load-format dummy."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[shape] | overrides))
    return folder


def is_adapted(name: str, target: Target) -> bool:
    """All linears of the layers and the experts; not routers, the embedding and the head."""
    return not isinstance(target, EmbeddingTarget) and not name.endswith(("lm_head", "mlp.gate", "router"))


def make_adapters(layout: PoolLayout, rank: int, count: int, device: torch.device | str) -> list[PackedAdapter]:
    """`count` adapters of random weights. They share one image, so that memory holds the pool and little else."""
    modules: dict[str, ModuleLoRA] = {}

    def shape(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, device="meta")

    for target in layout.targets.values():
        if not is_adapted(target.name, target):
            continue
        if isinstance(target, LinearTarget):
            modules[target.name] = LinearLoRA(shape(rank, target.in_features), shape(target.out_features, rank), 1.0)
        elif isinstance(target, ExpertTarget):
            e, h, i = target.num_experts, target.hidden, target.intermediate
            modules[target.name] = ExpertLoRA(shape(e, 2 * rank, h), shape(e, target.w13_rows, rank), True, 1.0, shape(e, rank, i), shape(e, h, rank), 1.0)
    nothing, stacks = layout.pack_modules(modules)
    image = torch.empty(nothing.numel(), dtype=layout.dtype, device=device).normal_(0.0, _STD)
    return [PackedAdapter("dummy", f"dummy-{rank}-{i}", rank, image, stacks, frozenset(modules)) for i in range(count)]
