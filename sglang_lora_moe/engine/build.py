"""Puts an engine together from a configuration: model, KV cache, adapters, scheduler, runner."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import replace
from typing import Any

import torch

from sglang_lora_moe.config import Config
from sglang_lora_moe.core import LoadAdapter, Reply
from sglang_lora_moe.engine.cuda_graph import DecodeGraphs, ladder
from sglang_lora_moe.engine.engine_core import EngineCore
from sglang_lora_moe.engine.kv_cache import PagePool, PrefixCache
from sglang_lora_moe.engine.model_runner import ModelRunner
from sglang_lora_moe.engine.resolve import allocated_bytes, resolve, resolve_total_tokens
from sglang_lora_moe.engine.scheduler import Limits, Scheduler
from sglang_lora_moe.engine.warm_up import run_largest_step
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.adapter import read_adapter
from sglang_lora_moe.lora.manager import LoRAManager
from sglang_lora_moe.lora.targets import collect_targets
from sglang_lora_moe.models.build import ServedModel, build_model

logger = logging.getLogger(__name__)


def build_engine(config: Config) -> tuple[EngineCore, Config, dict[str, Any]]:
    """The engine with the adapters of `lora_paths` loaded, the resolved configuration, and the facts that users may ask for.

    Raises ValueError for whatever of configuration, model or adapters cannot be served.
    """
    config.validate()
    config = resolve(config)
    assert config.context_length is not None and config.max_lora_rank is not None
    begin = time.monotonic()
    ctx = StepContext(
        config.chunked_prefill_size + config.max_running_requests,  # every running request may decode beside a full chunk
        config.max_running_requests,
        -(-config.context_length // config.page_size),
        config.page_size,
        config.device,
    )
    model = build_model(
        config.model_path,
        ctx=ctx,
        dtype=getattr(torch, config.dtype),
        device=config.device,
        load_format=config.load_format,
        moe_runner_backend=config.moe_runner_backend,
        attention_backend=config.attention_backend,
        seed=config.random_seed,
    )
    config = replace(config, context_length=min(config.context_length, model.max_model_len), moe_runner_backend=model.moe_runner_backend)
    weights = allocated_bytes(config)
    memory = _measure_weights(config, model, weights)
    lora = _make_manager(config, model) if config.enable_lora else None  # before the KV cache takes what memory is left
    adapters = allocated_bytes(config) - weights
    if config.device == "cuda":
        model.allocate_kv(1)
        run_largest_step(model, config.enable_lora)
    config = replace(config, max_total_tokens=resolve_total_tokens(config, model.kv_bytes_per_token(), weights, adapters))
    core = _make_core(config, model, lora)
    logger.info("model %s is ready after %.1f s", config.served_model_name, time.monotonic() - begin)
    for name, path, pinned in config.lora_specs():
        _load(core, name, path, pinned)
    return core, config, _model_info(config, model) | {"memory": memory}


def _measure_weights(config: Config, model: ServedModel, weights: int) -> dict[str, int]:
    """Bytes of GPU memory after the build: weights with the scratch of their kernels, all parameters unquantized, the most while loading. Empty on a CPU."""
    if config.device != "cuda":
        return {}
    found = {"weights": weights, "unquantized": model.unquantized_bytes, "loading_peak": torch.cuda.max_memory_allocated()}
    in_gib = [value / 2**30 for value in found.values()]
    logger.info("weights take %.2f GiB of GPU memory (%.2f unquantized), at most %.2f while loading", *in_gib)
    return found


def _make_manager(config: Config, model: ServedModel) -> LoRAManager:
    assert config.max_lora_rank is not None
    reader = functools.partial(
        read_adapter,
        targets=collect_targets(model.hf),
        rename=model.rename_adapter_module,
        max_rank=config.max_lora_rank,
        dtype=model.dtype,
        lora_root=config.lora_root,
        base_model=config.model_path,
        refused_adapter_modules=model.refused_adapter_modules,
    )
    return LoRAManager(
        model, reader, num_slots=config.max_loras_per_batch, max_rank=config.max_lora_rank, max_loaded=config.max_loaded_loras, backend=config.lora_backend
    )


def _make_core(config: Config, model: ServedModel, lora: LoRAManager | None) -> EngineCore:
    assert config.max_total_tokens is not None and config.context_length is not None
    num_pages = config.max_total_tokens // config.page_size + 1  # and the dump page
    model.allocate_kv(num_pages)
    cache = PrefixCache(PagePool(num_pages), config.page_size, not config.disable_prefix_cache)
    limits = Limits(config.max_running_requests, config.max_queued_requests, config.chunked_prefill_size, config.context_length)
    scheduler = Scheduler(cache, lora.slots if lora is not None else None, limits)
    runner = ModelRunner(model, _capture_graphs(config, model))
    overlap = config.device == "cuda" and not config.disable_overlap
    return EngineCore(scheduler, runner, lora, vocab_size=model.vocab_size, eos_ids=model.eos_token_ids, seed=config.random_seed, overlap=overlap)


def _capture_graphs(config: Config, model: ServedModel) -> DecodeGraphs | None:
    """Graphs of decode steps where everything in them can be captured: backends that read no device data on the host."""
    backends = f"{config.moe_runner_backend} {config.attention_backend} {config.lora_backend if config.enable_lora else ''}"
    host_bound = "torch_native" in backends
    if config.device != "cuda" or config.disable_cuda_graph or host_bound:
        if config.device == "cuda" and host_bound and not config.disable_cuda_graph:
            logger.warning("decode steps run without CUDA graphs: a torch_native backend reads device data on the host")
        return None
    graphs = DecodeGraphs(model, (False, True) if config.enable_lora else (False,), ladder(config.max_running_requests))
    graphs.capture()
    return graphs


def _load(core: EngineCore, name: str, path: str, pinned: bool) -> None:
    """Load one of `lora_paths`; a bad one stops the start, with its reason."""
    messages = core.handle(LoadAdapter("start", name, path, pinned))
    while not messages:
        messages = core.step()
        time.sleep(0.001)
    for message in messages:
        if isinstance(message, Reply) and message.error is not None:
            raise ValueError(f"--lora-paths: {name}: {message.error}")


def _model_info(config: Config, model: ServedModel) -> dict[str, Any]:
    return {
        "model_path": config.model_path,
        "served_model_name": config.served_model_name,
        "architectures": list(getattr(model.hf.config, "architectures", None) or [type(model.hf).__name__]),
        "model_type": model.config.model_type,
        "max_model_len": min(config.context_length or 0, config.max_total_tokens or 0),
        "vocab_size": model.vocab_size,
        "eos_token_ids": list(model.eos_token_ids),
        "dtype": config.dtype,
        "device": config.device,
        "moe_runner_backend": config.moe_runner_backend,
        "attention_backend": config.attention_backend,
        "max_total_tokens": config.max_total_tokens,
        "enable_lora": config.enable_lora,
        "max_loras_per_batch": config.max_loras_per_batch,
        "max_lora_rank": config.max_lora_rank,
        "weight_version": "default",
    }
