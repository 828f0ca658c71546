"""Turns every "auto" of the configuration into a decision, in one place (the build decides the experts' backend), and sizes the KV cache from free memory."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sglang_lora_moe.config import Config
from sglang_lora_moe.lora.adapter_config import read_config

logger = logging.getLogger(__name__)

DEFAULT_MAX_LORA_RANK = 64
CPU_CONTEXT = 4096  # tokens per running request that the KV cache of a CPU is sized for


def resolve(config: Config) -> Config:
    """The configuration with everything decided that the files and the machine decide; `max_total_tokens` follows after the build."""
    model = _model_config(config)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available")
    resolved = replace(
        config,
        device=device,
        dtype=config.dtype if config.dtype != "auto" else "float32" if device == "cpu" else _checkpoint_dtype(model),
        attention_backend=config.attention_backend if config.attention_backend != "auto" else "torch_native" if device == "cpu" else "triton",
        lora_backend=config.lora_backend if config.lora_backend != "auto" else "torch_native" if device == "cpu" else "triton",
        context_length=_context_length(config, model),
        served_model_name=config.served_model_name or Path(config.model_path).resolve().name,
        tokenizer_path=config.tokenizer_path or config.model_path,
        enable_lora=config.enable_lora or bool(config.lora_paths),
        max_lora_rank=config.max_lora_rank or _largest_rank(config),
    )
    changed = {name: value for name, value in asdict(resolved).items() if value != getattr(config, name)}
    logger.info("decided: %s", ", ".join(f"{name} = {value}" for name, value in changed.items()) or "nothing")
    return resolved


def allocated_bytes(config: Config) -> int:
    """Device memory that tensors take now; 0 on a CPU."""
    return torch.cuda.memory_allocated() if config.device == "cuda" else 0


def resolve_total_tokens(config: Config, bytes_per_token: int, weights: int = 0, adapters: int = 0) -> int:
    """Tokens of the KV cache, a multiple of the page size: as given, else what free memory and the running requests suggest.

    On a GPU it comes after a step of the largest size, so that scratch memory is taken already. `weights` and `adapters`: their bytes, for the log.
    """
    assert config.context_length is not None, "resolve() comes first"
    page = config.page_size
    if config.max_total_tokens is not None:
        if config.max_total_tokens < page:
            raise ValueError(f"--max-total-tokens {config.max_total_tokens} is less than one page (--page-size {page})")
        tokens = config.max_total_tokens
    elif config.device == "cpu":
        wanted = config.max_running_requests * min(config.context_length, CPU_CONTEXT)
        tokens = min(max(wanted, config.context_length), free_memory_bytes() // 4 // bytes_per_token)
    else:
        tokens = _tokens_on_gpu(config, bytes_per_token, weights, adapters)
    if tokens < 2 * page:
        raise ValueError(f"no memory for a KV cache: {tokens} tokens of {bytes_per_token} bytes fit; use a smaller model, or set --max-total-tokens")
    tokens = tokens // page * page
    logger.info("KV cache: %d tokens, %d pages of %d, %.1f MiB", tokens, tokens // page, page, tokens * bytes_per_token / 2**20)
    return tokens


def _tokens_on_gpu(config: Config, bytes_per_token: int, weights: int, adapters: int) -> int:
    """What --mem-fraction-static leaves beside weights, adapters and scratch memory; ValueError with the arithmetic if that is nothing."""
    gib = float(2**30)
    free, total = torch.cuda.mem_get_info()
    usable = int(free - total * (1.0 - config.mem_fraction_static))
    scratch = torch.cuda.memory_reserved() - weights - adapters
    tokens = usable // bytes_per_token
    text = (
        f"GPU memory {total / gib:.1f} GiB, --mem-fraction-static {config.mem_fraction_static}: weights {weights / gib:.1f}, adapters {adapters / gib:.1f} "
        f"({config.max_loras_per_batch} slots of rank {config.max_lora_rank}), scratch {scratch / gib:.1f}, left for the KV cache {usable / gib:.1f} GiB "
        f"= {max(tokens, 0)} tokens of {bytes_per_token} bytes"
    )
    logger.info(text)
    if tokens < 2 * config.page_size:
        raise ValueError(
            f"the model does not fit. {text}. Raise --mem-fraction-static, or lower --max-loras-per-batch, --max-lora-rank or --chunked-prefill-size"
        )
    return tokens


def free_memory_bytes() -> int:
    """Main memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _model_config(config: Config) -> dict[str, Any]:
    path = Path(config.model_path) / "config.json"
    if not path.is_file():
        raise ValueError(f"--model-path {config.model_path}: there is no config.json in it")
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
    limit = model.get("max_position_embeddings")
    if config.context_length is None:
        return int(limit) if limit else CPU_CONTEXT
    if limit and config.context_length > int(limit):
        raise ValueError(f"--context-length {config.context_length} exceeds the model's {limit} positions")
    return config.context_length


def _largest_rank(config: Config) -> int:
    """The largest rank of the adapters given at start. One that cannot be read is reported when it is loaded."""
    ranks = []
    for _, path, _ in config.lora_specs():
        try:
            adapter = read_config(Path(path))
        except ValueError:
            continue
        ranks.append(max([adapter.r, *adapter.rank_pattern.values()]))
    return max(ranks, default=DEFAULT_MAX_LORA_RANK)
