"""Turns every "auto" of the configuration into a decision, in one place (the build decides the experts' backend)."""

import contextlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sglang_lora_moe.config import Config
from sglang_lora_moe.lora.adapter_config import read_config
from sglang_lora_moe.models.recognise import positions_of
from sglang_lora_moe.ops.moe_lora_align import MAX_SLOTS

logger = logging.getLogger(__name__)

DEFAULT_MAX_LORA_RANK = 64
DEFAULT_CONTEXT = 4096  # of a model whose config.json says none


def resolve(config: Config) -> Config:
    """The configuration with everything decided that the files and the machine decide; `max_total_tokens` follows after the build."""
    model = _model_config(config)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available")
    for flag in ("attention_backend", "lora_backend"):
        if device == "cpu" and getattr(config, flag) in ("triton", "csgmv") and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(config, flag)} needs a CUDA device, and the model is on cpu; use auto")
    if device == "cuda" and config.max_loras_per_batch > MAX_SLOTS:
        raise ValueError(f"--max-loras-per-batch {config.max_loras_per_batch}: on a GPU at most {MAX_SLOTS} are resident, others wait in host memory")
    resolved = replace(
        config,
        device=device,
        dtype=config.dtype if config.dtype != "auto" else "float32" if device == "cpu" else _checkpoint_dtype(model),
        attention_backend=config.attention_backend if config.attention_backend != "auto" else "torch_native" if device == "cpu" else "triton",
        lora_backend=config.lora_backend if config.lora_backend != "auto" else "torch_native" if device == "cpu" else "triton",
        context_length=_context_length(config, model),
        served_model_name=config.base_name,
        tokenizer_path=config.tokenizer_path or config.model_path,
        enable_lora=config.enable_lora or bool(config.lora_paths),
        max_lora_rank=config.max_lora_rank or _largest_rank(config),
    )
    changed = {name: value for name, value in asdict(resolved).items() if value != getattr(config, name)}
    logger.info("decided: %s", ", ".join(f"{name} = {value}" for name, value in changed.items()) or "nothing")
    return resolved


def _model_config(config: Config) -> dict[str, Any]:
    path = Path(config.model_path) / "config.json"
    if not path.is_file():
        raise ValueError(f"--model-path {config.model_path}: there is no config.json in it (for a model of the hub: hf download NAME --local-dir DIR)")
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    text = model.get("text_config")
    return model | text if isinstance(text, dict) else model


def _checkpoint_dtype(model: dict[str, Any]) -> str:
    name = str(model.get("dtype") or model.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "bfloat16"


def _context_length(config: Config, model: dict[str, Any]) -> int:
    limit = positions_of(model)
    if config.context_length is None:
        return int(limit) if limit else DEFAULT_CONTEXT
    if limit and config.context_length > int(limit):
        raise ValueError(f"--context-length {config.context_length} exceeds the model's {limit} positions")
    return config.context_length


def _largest_rank(config: Config) -> int:
    """The largest rank of the adapters given at start. One that cannot be read is reported when it is loaded."""
    ranks = []
    for _, path, _ in config.lora_specs():
        with contextlib.suppress(ValueError):
            adapter = read_config(Path(path))
            ranks.append(max([adapter.r, *adapter.rank_pattern.values()]))
    return max(ranks, default=DEFAULT_MAX_LORA_RANK)
