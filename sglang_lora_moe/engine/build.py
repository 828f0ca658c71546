"""Puts an engine together from a configuration: model, KV cache, adapters, scheduler, runner."""

import logging
import time
from dataclasses import replace
from typing import Any

import torch

from sglang_lora_moe.config import Config
from sglang_lora_moe.core import LoadAdapter, Reply
from sglang_lora_moe.engine.cuda_graph import DecodeGraphs, PrefillGraphs, ladder, prefill_ladder
from sglang_lora_moe.engine.engine_core import EngineCore
from sglang_lora_moe.engine.kv_cache import PagePool, PrefixCache
from sglang_lora_moe.engine.memory import MemoryBudget
from sglang_lora_moe.engine.model_runner import ModelRunner
from sglang_lora_moe.engine.resolve import resolve
from sglang_lora_moe.engine.scheduler import Limits, Scheduler
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora.adapter import AdapterRules
from sglang_lora_moe.lora.manager import LoRAManager
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.packed import PoolLayout
from sglang_lora_moe.lora.reader import AdapterReader
from sglang_lora_moe.lora.targets import choose_targets
from sglang_lora_moe.models.build import build_model
from sglang_lora_moe.models.served import ServedModel

logger = logging.getLogger(__name__)

# Of the configuration, as it was resolved: what users may ask for
_TOLD: tuple[str, ...] = ("model_path", "served_model_name", "dtype", "device", "moe_runner_backend", "attention_backend")
_TOLD += ("max_total_tokens", "enable_lora", "max_loras_per_batch", "max_lora_rank")


def build_engine(config: Config) -> tuple[EngineCore, Config, dict[str, Any]]:
    """The engine with the adapters of `lora_paths` loaded, the resolved configuration, and the facts that users may ask for.

    Raises ValueError for whatever of configuration, model or adapters cannot be served.
    """
    config.validate()
    asked, config = config.context_length, resolve(config)
    assert config.context_length is not None and config.max_lora_rank is not None
    begin, budget = time.monotonic(), MemoryBudget(config)
    with budget.guard("loading the model's weights"):
        model = _make_model(config)
    if model.max_model_len < config.context_length:
        text = f"--context-length {config.context_length}: up to {model.max_model_len} tokens are served; beyond, requests of a step would be rotated otherwise"
        if asked is not None:
            raise ValueError(text)
        logger.warning(text)
    model.kv_dtype = _kv_dtype(config, model)
    config = replace(config, context_length=min(config.context_length, model.max_model_len), moe_runner_backend=model.moe_runner_backend)
    measured = _measure_weights(config, model)
    budget.note("weights", measured["weights"])
    lora = None  # before the KV cache takes what memory is left
    if config.enable_lora:
        with budget.guard("making the adapter pool", "a smaller --max-loras-per-batch or --max-lora-rank"):
            lora = _make_manager(config, model, budget)
    if config.device == "cuda":
        with budget.guard("running the largest step", "a smaller --chunked-prefill-size", "a smaller --max-running-requests"):
            model.allocate_kv(1)
            _run_largest_step(model, config.enable_lora)
    budget.measure_workspace()
    tokens = budget.plan_kv_cache(model.kv_bytes_per_token())
    config = replace(config, max_total_tokens=tokens)
    with budget.guard("making the KV cache", "a smaller --max-total-tokens"):
        model.allocate_kv(tokens // config.page_size + 1)  # and the dump page
    with budget.guard("capturing graphs", "a smaller --mem-fraction-static", "a smaller --max-running-requests", "--disable-cuda-graph"):
        graphs = _capture_graphs(config, model)
    budget.log(sum(captured.nbytes for captured in graphs if captured is not None))
    core = _make_core(config, model, lora, ModelRunner(model, *graphs))
    logger.info("model %s is ready after %.1f s", config.served_model_name, time.monotonic() - begin)
    for name, path, pinned in config.lora_specs():
        _load(core, name, path, pinned)
    if lora is not None:
        lora.reader.read_beside()
    return core, config, _model_info(config, model) | {"memory": measured | budget.parts}


def _make_model(config: Config) -> ServedModel:
    assert config.context_length is not None
    tokens = config.chunked_prefill_size + config.max_running_requests  # every running request may decode beside a full chunk
    ctx = StepContext(tokens, config.max_running_requests, -(-config.context_length // config.page_size), config.page_size, config.device)
    return build_model(
        config.model_path, ctx=ctx, dtype=getattr(torch, config.dtype), device=config.device, load_format=config.load_format,
        moe_runner_backend=config.moe_runner_backend, attention_backend=config.attention_backend, seed=config.random_seed,
    )  # fmt: skip


def _measure_weights(config: Config, model: ServedModel) -> dict[str, int]:
    """Bytes after the build: weights, and on a GPU with the scratch of their kernels, all parameters unquantized, the most while loading."""
    if config.device != "cuda":
        return {"weights": sum(tensor.nbytes for tensor in (*model.hf.parameters(), *model.hf.buffers()))}
    found = {"weights": torch.cuda.memory_allocated(), "unquantized": model.unquantized_bytes, "loading_peak": torch.cuda.max_memory_allocated()}
    in_gib = [value / 2**30 for value in found.values()]
    logger.info("weights take %.2f GiB of GPU memory (%.2f unquantized), at most %.2f while loading", *in_gib)
    return found


def _kv_dtype(config: Config, model: ServedModel) -> torch.dtype:
    if config.kv_cache_dtype == "fp8_e4m3":
        if config.device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
            raise ValueError("--kv-cache-dtype fp8_e4m3 needs a GPU of compute capability 8.9 or newer")
        return torch.float8_e4m3fn
    return torch.bfloat16 if config.kv_cache_dtype == "bfloat16" else model.dtype


@torch.inference_mode()
def _run_largest_step(model: ServedModel, with_adapters: bool) -> None:
    """One step of `ctx.max_tokens` tokens over all requests, for each family, so that scratch memory has, but for what only smaller steps use, its final size.

    Every token is padding: it is written to the dump page and reads no expert.
    """
    ctx = model.ctx
    requests = ctx.max_requests
    length = min(ctx.max_tokens // requests, ctx.page_table.shape[1] * ctx.page_size)
    first = min(ctx.max_tokens - length * (requests - 1), ctx.page_table.shape[1] * ctx.page_size)
    lens = [first] + [length] * (requests - 1)
    ctx.inputs.copy_(ctx.make_inputs(ctx.device)[0])
    ctx.num_tokens, ctx.num_requests, ctx.num_logits = sum(lens), requests, requests
    ctx.query_lens = ctx.seq_lens_host = lens
    sizes = torch.tensor(lens, dtype=torch.int32, device=ctx.device)
    ctx.seq_lens.copy_(sizes)
    ctx.query_starts[1:].copy_(sizes.cumsum(0))
    for ctx.lora_active in (False, True) if with_adapters else (False,):
        model.forward_logits()
    ctx.lora_active = False
    torch.cuda.synchronize()


def _make_manager(config: Config, model: ServedModel, budget: MemoryBudget) -> LoRAManager:
    assert config.max_lora_rank is not None
    targets, left_out = choose_targets(model.hf, config.lora_target_modules)
    refused = model.refused_adapter_modules
    rules = AdapterRules(targets, model.rename_adapter_module, config.max_lora_rank, model.dtype, config.lora_root, config.model_path, refused, left_out)
    budget.plan_adapters(PoolLayout(list(targets.values()), config.max_lora_rank, model.dtype))
    pool = LoRAMemoryPool(list(targets.values()), config.max_loras_per_batch, config.max_lora_rank, model.dtype, model.device)
    reader = AdapterReader(rules, pool.layout)
    return LoRAManager(model, reader, pool, max_loaded=config.max_loaded_loras, policy=config.lora_eviction_policy, backend=config.lora_backend)


def _make_core(config: Config, model: ServedModel, lora: LoRAManager | None, runner: ModelRunner) -> EngineCore:
    assert config.max_total_tokens is not None and config.context_length is not None
    cache = PrefixCache(PagePool(config.max_total_tokens // config.page_size + 1), config.page_size, not config.disable_prefix_cache)
    limits = Limits(config.max_running_requests, config.max_queued_requests, config.chunked_prefill_size, config.context_length)
    scheduler = Scheduler(cache, lora.slots if lora is not None else None, limits)
    overlap = config.device == "cuda" and not config.disable_overlap
    return EngineCore(scheduler, runner, lora, vocab_size=model.vocab_size, eos_ids=model.eos_token_ids, seed=config.random_seed, overlap=overlap)


def _capture_graphs(config: Config, model: ServedModel) -> tuple[DecodeGraphs | None, PrefillGraphs | None]:
    """Graphs of steps where everything in them can be captured: backends that read no device data on the host."""
    backends = f"{config.moe_runner_backend} {config.attention_backend} {config.lora_backend if config.enable_lora else ''}"
    host_bound = "torch_native" in backends
    if config.device != "cuda" or config.disable_cuda_graph or host_bound:
        if config.device == "cuda" and host_bound and not config.disable_cuda_graph:
            logger.warning("steps run without CUDA graphs: a torch_native backend reads device data on the host")
        return None, None
    families = (False, True) if config.enable_lora else (False,)
    graphs = DecodeGraphs(model, families, ladder(config.max_running_requests))
    graphs.capture()
    if not model.is_split:
        return graphs, None
    prefill = PrefillGraphs(model, families, prefill_ladder(model.ctx.max_tokens, model.ctx.max_requests))
    prefill.capture()
    return graphs, prefill


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
    return {name: getattr(config, name) for name in _TOLD} | {
        "architectures": list(getattr(model.hf.config, "architectures", None) or [type(model.hf).__name__]),
        "model_type": model.config.model_type,
        "max_model_len": min(config.context_length or 0, config.max_total_tokens or 0),
        "vocab_size": model.vocab_size,
        "eos_token_ids": list(model.eos_token_ids),
        "weight_version": "default",
    }
