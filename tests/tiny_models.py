"""Tiny random checkpoints of every supported architecture, with a per-character tokenizer.

`make_tiny_model("qwen3_moe", tmp_path)` writes a directory as transformers' `save_pretrained` does. Weights are random but
scaled so that logits, routing and attention are far from flat; every special tensor (biases, sinks, score corrections,
norm weights) is different from its neutral value, so that a forgotten one shows.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 128
EOS_ID = 2
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS_ID,
}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": _BASE | _EXPERTS | {"head_dim": 32, "intermediate_size": 96, "norm_topk_prob": True},
    "qwen3": _BASE | {"head_dim": 32, "intermediate_size": 96},
    "mixtral": _BASE | _LOCAL_EXPERTS | {"intermediate_size": 32, "sliding_window": None},
    "qwen2_moe": _BASE | _EXPERTS | {"intermediate_size": 96, "shared_expert_intermediate_size": 64, "norm_topk_prob": False, "qkv_bias": True},
    "olmoe": _BASE | {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32, "norm_topk_prob": False},
    "gpt_oss": _BASE
    | _LOCAL_EXPERTS
    | {
        "head_dim": 32,
        "intermediate_size": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 8.0,
            "rope_theta": 10000.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "deepseek_v3": _BASE
    | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 24,
        "v_head_dim": 20,
        "rope_interleave": True,
    },
}

_cache: dict[str, tempfile.TemporaryDirectory[str]] = {}  # removed at exit


def make_tiny_model(arch: str, directory: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny model of architecture `arch` (a key of CONFIGS, or any model_type with full `overrides`) and return its path.

    `overrides` replace config fields. Equal (arch, seed, overrides) are built once per process and copied afterwards.
    """
    key = repr((arch, seed, sorted(overrides.items(), key=lambda item: item[0])))
    suffix = "-" + hashlib.sha256(key.encode()).hexdigest()[:8] if overrides else ""
    target = Path(directory) / f"{arch}-{seed}{suffix}"
    if key not in _cache:
        _cache[key] = tempfile.TemporaryDirectory(prefix="tiny-model-")
        _write_model(arch, Path(_cache[key].name), seed, overrides)
    shutil.copytree(_cache[key].name, target, dirs_exist_ok=True)
    return target


def _write_model(arch: str, path: Path, seed: int, overrides: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(arch, **(CONFIGS.get(arch, _BASE) | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    model.generation_config.eos_token_id, model.generation_config.bos_token_id, model.generation_config.pad_token_id = EOS_ID, 1, 0
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter and persistent buffer with random values of a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if "bias" in leaf or leaf == "sinks":
            parameter.copy_(noise(parameter, 0.3))
        elif parameter.dim() == 1:  # norm weights
            parameter.copy_(1 + noise(parameter, 0.1))
        elif "embed_tokens" in name:
            parameter.copy_(noise(parameter, 1.0))
        else:  # [.., out, in]; for transposed experts in and out differ by little
            parameter.copy_(noise(parameter, 1.5 * parameter.shape[-1] ** -0.5))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(noise(buffer, 0.2))


def make_tokenizer() -> Any:
    """Per-character tokenizer: <pad> <bos> <eos>, then ASCII 32..126 (98 ids). Encoding puts <bos> first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>"] + [chr(c) for c in range(32, 127)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="?", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
