"""The one configuration of the server. Flags, defaults, --help and the README table are derived from this class.

A field's metadata holds its help text; `resolve()` turns every "auto" into a decision, once, and logs it. Parts of the
system are given the few values they need, never the whole object.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from sglang_lora_moe import __version__

# Flags of SGLang and vLLM that users bring along, and what to do here instead
_ELSEWHERE = {
    "--max-loras": "use --max-loras-per-batch",
    "--max-cpu-loras": "use --max-loaded-loras",
    "--lora-modules": "use --lora-paths NAME=PATH ...",
    "--max-lora-chunk-size": "leave it out: the kernels choose their tiles by the step",
    "--enable-lora-overlap-loading": "leave it out: adapters are always loaded beside running steps",
    "--lora-use-virtual-experts": "leave it out: adapters on experts need no flag",
    **dict.fromkeys(("--experts-shared-outer-loras", "--no-experts-shared-outer-loras"), "leave it out: the layout is read from the adapter's files"),
    "--lora-strict-loading": "leave it out: every tensor of an adapter must be understood, always",
    "--no-lora-strict-loading": "there is no such choice: every tensor of an adapter must be understood",
    "--lora-drain-wait-threshold": "leave it out: an adapter that waits too long always gets a slot",
    **dict.fromkeys(("--fully-sharded-loras", "--tp-size", "--tp", "--tensor-parallel-size", "-tp"), "leave it out: one device is served"),
    "--model": "use --model-path",
    "--max-model-len": "use --context-length",
    "--max-num-seqs": "use --max-running-requests",
    "--gpu-memory-utilization": "use --mem-fraction-static",
    "--quantization": "leave it out: config.json says how a checkpoint is quantized",
    "--trust-remote-code": "leave it out: code of a checkpoint is never run",
}


def _flag(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    meta = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """Everything a user can set. Field `max_loras_per_batch` is flag `--max-loras-per-batch`, and so on."""

    # model
    model_path: str = _flag("", "directory of the base model (config.json, *.safetensors, tokenizer files)")
    tokenizer_path: str | None = _flag(None, "directory of the tokenizer, if not the model's")
    served_model_name: str | None = _flag(None, "name of the base model in the API; the directory's name if not given")
    chat_template: str | None = _flag(None, "Jinja file that replaces the tokenizer's chat template")
    load_format: str = _flag("auto", "where weights come from: safetensors files, or random (dummy)", ("auto", "dummy"))
    dtype: str = _flag("auto", "dtype of weights and activations; auto = the checkpoint's, float32 on a CPU", ("auto", "float32", "bfloat16", "float16"))
    device: str = _flag("auto", "where the model runs; auto = cuda if there is one", ("auto", "cpu", "cuda"))
    context_length: int | None = _flag(None, "longest prompt + output in tokens; the model's limit if not given")
    random_seed: int = _flag(0, "seed of sampling for requests that give none, and of dummy weights")
    # backends
    moe_runner_backend: str = _flag("auto", "expert GEMMs; auto = torch_native on a CPU, else by the checkpoint", ("auto", "torch_native", "triton", "marlin"))
    attention_backend: str = _flag("auto", "attention over the paged KV cache; auto = triton on a GPU", ("auto", "torch_native", "triton"))
    lora_backend: str = _flag(
        "auto",
        "adapters on linears and the embedding; auto = triton on a GPU; csgmv = triton, tokens grouped by adapter in every step",
        ("auto", "torch_native", "triton", "csgmv"),
    )
    kv_cache_dtype: str = _flag(
        "auto", "keys and values in the cache; auto = --dtype; fp8_e4m3 = float8 without scales, half of bfloat16's memory", ("auto", "bfloat16", "fp8_e4m3")
    )
    disable_cuda_graph: bool = _flag(False, "launch the kernels of decode steps one by one instead of as captured graphs")
    disable_overlap: bool = _flag(False, "wait for the tokens of each step before the next one is prepared")
    # adapters
    enable_lora: bool = _flag(False, "serve LoRA adapters; implied by --lora-paths")
    lora_paths: list[str] = _flag([], "adapters to load at start: PATH, NAME=PATH, or JSON with lora_name, lora_path, pinned")
    lora_root: str | None = _flag(None, "if set, adapters may be loaded only from below this directory")
    max_loras_per_batch: int = _flag(8, "adapter slots resident on the device, so distinct adapters in one step; on a GPU at most 256")
    max_lora_rank: int | None = _flag(None, "largest adapter rank accepted; the largest of --lora-paths, or 64, if not given")
    max_loaded_loras: int | None = _flag(None, "most adapters kept in host memory; others are read from their files again when a request names them")
    lora_target_modules: list[str] = _flag([], "modules that adapters may touch, such as q_proj or experts; all if not given")
    lora_eviction_policy: str = _flag("lru", "which idle adapter makes room in the slots: least recently used, or longest resident", ("lru", "fifo"))
    # engine
    max_running_requests: int = _flag(256, "most requests decoded together")
    max_queued_requests: int = _flag(4096, "requests waiting beyond this many are answered 503")
    max_total_tokens: int | None = _flag(None, "tokens that the KV cache holds; chosen from free memory if not given")
    mem_fraction_static: float = _flag(0.85, "share of device memory, on a CPU of what is free, for weights, adapters and KV cache together")
    page_size: int = _flag(16, "tokens per KV cache page, and the granularity of prefix sharing")
    chunked_prefill_size: int = _flag(2048, "most prompt tokens computed in one step; longer prompts are split")
    disable_prefix_cache: bool = _flag(False, "do not share the KV cache of equal prompt prefixes")
    # server
    host: str = _flag("127.0.0.1", "address to listen on")
    port: int = _flag(30000, "port to listen on")
    api_key: str | None = _flag(None, "key that clients must send as 'Authorization: Bearer KEY'")
    admin_api_key: str | None = _flag(None, "key required to load or unload adapters, flush the cache or abort others' requests")
    allowed_origins: list[str] = _flag([], "web pages that may call the server from a browser, such as https://chat.example, or *; none if not given")
    log_level: str = _flag("info", "what is logged", ("debug", "info", "warning", "error"))

    def validate(self) -> None:
        """Raise ValueError, naming the flag, for values that can never work."""
        for f in dataclasses.fields(self):
            flag, value = f"--{f.name.replace('_', '-')}", getattr(self, f.name)
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise ValueError(f"{flag} must be one of {', '.join(f.metadata['choices'])}, got {value!r}")
            if "lora" in f.name and value and value != f.default and not (self.enable_lora or self.lora_paths):
                raise ValueError(f"{flag} does nothing without --enable-lora or --lora-paths")
            if f.name in ("api_key", "admin_api_key") and value == "":
                raise ValueError(f"{flag} must not be empty, as an unset variable is: every request would have it")
        positive = ("max_loras_per_batch", "max_running_requests", "max_queued_requests", "page_size", "chunked_prefill_size")
        for name in (*positive, "max_lora_rank", "max_loaded_loras", "max_total_tokens", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not 0.0 < self.mem_fraction_static < 1.0:
            raise ValueError(f"--mem-fraction-static must be between 0 and 1, got {self.mem_fraction_static}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be between 0 and 65535, got {self.port}")
        if not self.model_path:
            raise ValueError("--model-path is required: the directory of the base model")
        if self.served_model_name and ":" in self.served_model_name:
            raise ValueError(f"--served-model-name must not contain ':', got {self.served_model_name!r}: 'base:adapter' names an adapter")

    @property
    def base_name(self) -> str:
        """What requests call the base model."""
        return self.served_model_name or Path(self.model_path).resolve().name

    def lora_specs(self) -> list[tuple[str, str, bool]]:
        """`lora_paths` as (name, path, pinned); raises ValueError naming the entry at fault."""
        specs = []
        for entry in self.lora_paths:
            if entry.lstrip().startswith("{"):
                try:
                    specs.append(_spec(**json.loads(entry)))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"--lora-paths: {entry!r} is not JSON with lora_name, lora_path and at most pinned ({error})") from error
            else:
                name, sep, path = entry.partition("=")
                specs.append((name, path, False) if sep else (entry.rstrip("/").rpartition("/")[2], entry, False))
        names = [name for name, _, _ in specs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"--lora-paths: the name {name!r} is given twice; write NAME=PATH to tell them apart")
        return specs


def _spec(lora_name: str, lora_path: str, pinned: bool = False) -> tuple[str, str, bool]:
    if not (isinstance(lora_name, str) and isinstance(lora_path, str) and isinstance(pinned, bool)):
        raise TypeError(f"lora_name is {lora_name!r}, lora_path {lora_path!r}, pinned {pinned!r}")
    return lora_name, lora_path, pinned


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `Config`, with its default and help."""
    for f in dataclasses.fields(Config):
        name, meta = "--" + f.name.replace("_", "-"), f.metadata
        if f.type is bool:
            parser.add_argument(name, action="store_true", default=f.default, help=meta["help"])
        elif f.type == list[str]:
            parser.add_argument(name, nargs="*", action="extend", default=[], metavar="ADAPTER" if f.name == "lora_paths" else "NAME", help=meta["help"])
        else:
            kind = (*get_args(f.type), f.type)[0]  # int of `int | None`
            shown = "" if f.default in (None, "") else f" (default: {f.default})"
            parser.add_argument(name, type=kind, default=f.default, choices=meta["choices"], help=meta["help"] + shown)


def parse_config(argv: list[str] | None = None) -> Config:
    """Read flags into a validated Config; a wrong value exits with status 2 and one sentence."""
    parser = argparse.ArgumentParser(prog="sglang-lora-moe", allow_abbrev=False, description="Serve one MoE model and many LoRA adapters on its experts.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_flags(parser)
    given, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        name = flag.partition("=")[0]
        if name in _ELSEWHERE:
            parser.error(f"{name}: {_ELSEWHERE[name]}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    config = Config(**vars(given))
    if config.lora_paths:
        config = dataclasses.replace(config, enable_lora=True)
    try:
        config.validate()
        config.lora_specs()
    except ValueError as error:
        parser.error(str(error))
    return config
