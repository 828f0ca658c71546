"""A tiny Qwen3-MoE, four adapters on it, and what transformers + PEFT make of them. Built once per test session."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from sglang_lora_moe.engine.engine import Engine
from tests.adapter_files import merged_reference_model, write_adapter
from tests.tiny_models import EOS_ID, make_tiny_model

ADAPTERS = {"r4": ("per_expert_2d", 4), "r8": ("target_parameters_3d", 8), "r16": ("experts_and_attention", 16), "r64": ("per_expert_2d", 64)}
_folder = tempfile.TemporaryDirectory(prefix="engine-tests-")  # removed at exit


@functools.cache
def model_path() -> Path:
    return make_tiny_model("qwen3_moe", _folder.name)


@functools.cache
def adapter_path(name: str) -> Path:
    layout, rank = ADAPTERS[name]
    return write_adapter(layout, model_path(), Path(_folder.name) / name, rank=rank, alpha=2 * rank, seed=rank)


@functools.cache
def other_adapter_path(seed: int) -> Path:
    """Further adapters of rank 4, which differ by `seed` only."""
    return write_adapter("per_expert_2d", model_path(), Path(_folder.name) / f"other{seed}", rank=4, alpha=8, seed=100 + seed)


@functools.cache
def reference_model(adapter: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    if adapter is None:
        return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    return merged_reference_model(model_path(), adapter_path(adapter))


@torch.no_grad()
def reference_greedy(adapter: str | None, ids: list[int], count: int, ignore_eos: bool = False) -> list[int]:
    """What transformers generates."""
    end = {"eos_token_id": None} if ignore_eos else {"eos_token_id": EOS_ID}
    out = reference_model(adapter).generate(input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0, **end)
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def reference_logprobs(adapter: str | None, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [len(ids), V] by transformers."""
    return torch.log_softmax(reference_model(adapter)(input_ids=torch.tensor([ids])).logits[0], -1)


def make_engine(lora: bool = True, adapters: tuple[str, ...] = tuple(ADAPTERS), **config: Any) -> Engine:
    """An engine with small pages and a small cache."""
    if lora:
        config |= {"enable_lora": True, "lora_paths": [f"{name}={adapter_path(name)}" for name in adapters]}
    defaults: dict[str, Any] = {"page_size": 4, "max_total_tokens": 4096, "max_running_requests": 32, "chunked_prefill_size": 64}
    return Engine(model_path=str(model_path()), **(defaults | config))
