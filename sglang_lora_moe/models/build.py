"""Builds any model from transformers' own class: on the meta device, with our layers swapped in, then loaded.

transformers keeps the wiring (blocks, norms, rotary tables, shared experts); attention, linears, embedding, routers and experts
become the layers of this package, which read what a step needs from the `StepContext`. Nothing here knows adapters.
All uses of transformers' internals are in this file and in `loader.py`.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers import initialization as hf_initialization

from sglang_lora_moe.layers.attention import ATTENTION_BACKENDS, Attention, PagedAttention
from sglang_lora_moe.layers.embedding import Embedding
from sglang_lora_moe.layers.fused_moe import FusedMoE, MoEBlock
from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.norm import RMSNorm
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.layers.topk import Router, RouterSpec
from sglang_lora_moe.models import recognise
from sglang_lora_moe.models.dummy import fill_dummy
from sglang_lora_moe.models.loader import NameTable, list_files, load_weights
from sglang_lora_moe.models.overrides.mla import KV_B_REASON, AbsorbedMLA
from sglang_lora_moe.models.quantized import ExpertsScheme, WeightFormats
from sglang_lora_moe.models.served import ServedModel
from sglang_lora_moe.moe.backends import get_moe_runner_backend, make_core
from sglang_lora_moe.moe.runner import MoeRunner
from sglang_lora_moe.moe.spec import SharedExpert
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.quantization.base import QuantMethod
from sglang_lora_moe.quantization.config import parse_quantization_config
from sglang_lora_moe.quantization.linear import QuantizedLinear
from sglang_lora_moe.quantization.unquantized import UnquantizedMethod
from sglang_lora_moe.quantization.wna16_method import WNA16Method

# Name of our attention function in transformers' registry. No mask function is registered under it, so no mask is built.
_ATTENTION = "sglang_lora_moe_paged"


def build_model(
    path: str | Path,  # budget: the choices of `Config` that decide a build
    *,
    ctx: StepContext,
    dtype: torch.dtype,
    device: torch.device | str,
    load_format: str = "auto",
    moe_runner_backend: str = "torch_native",
    attention_backend: str = "torch_native",
    seed: int = 0,
    show_progress: bool = True,
) -> ServedModel:
    """Build and load the model in directory `path`; with load_format "dummy" only config.json is read and weights are random.

    Raises UnsupportedModelError for a model that cannot be served rightly, LoadError for files that do not fit it.
    """
    path, device = Path(path), torch.device(device)
    hf = _build_on_meta(path, dtype)
    formats = _weight_formats(hf, path if load_format != "dummy" else None)
    unquantized_bytes = sum(parameter.numel() * parameter.element_size() for parameter in hf.parameters())
    swap = _Swap(hf, ctx, dtype, device, formats, moe_runner_backend, attention_backend)
    swap.run()
    _materialise(hf, device)
    hf.tie_weights()
    model = ServedModel(hf, ctx, dtype, device, list(swap.attention.values()))
    for place, rotary in [(place, rotary) for place, rotary in hf.named_modules() if recognise.needs_table(rotary)]:
        swap.replace(place, _RotaryTable(rotary, model.max_model_len, device))
    model.moe_runner_backend = "+".join(sorted(swap.moe_backends)) or moe_runner_backend  # a model without experts decides nothing
    model.unquantized_bytes = unquantized_bytes
    model.refused_adapter_modules = swap.refused_adapter_modules
    model.eos_token_ids = _eos_token_ids(path, model.config)
    if load_format == "dummy":
        fill_dummy(hf, seed)
    else:
        load_weights(hf, path, model._names, formats, show_progress)
    wide = _kept_wide(hf, device) if swap.moe_backends else set()
    for module in hf.modules():
        if isinstance(module, QuantizedLinear):
            module.finalize(keep_wide=module in wide)
        elif isinstance(module, FusedMoE):
            module.finalize()
            if module.runner.core.converts_weights:
                module.quant_method.release_weights(module)
        elif isinstance(module, Router) and attention_backend == "triton":
            module.linear.narrow(dtype)
    if attention_backend == "triton":
        from sglang_lora_moe.models.decoder import FusedDecoder, is_standard  # triton is not installed everywhere

        if is_standard(hf):
            model._decoder = FusedDecoder(hf, ctx, model.max_model_len)
    return model


def _kept_wide(hf: Any, device: torch.device) -> set[QuantizedLinear]:
    """The quantized linears of attention, where 16-bit copies of all of them take little of the GPU's memory, as beside experts they do."""
    if device.type != "cuda":
        return set()
    pairs = [(module.qkv, module.o_proj) for module in hf.modules() if isinstance(module, Attention)]
    found = {linear for pair in pairs for linear in pair if isinstance(linear, QuantizedLinear)}
    nbytes = sum(2 * linear.in_features * sum(rows for _, rows in linear.parts) for linear in found)
    return found if nbytes <= torch.cuda.get_device_properties(device).total_memory // 32 else set()


# ---- steps of the build ---------------------------------------------------------------------------------------------
def _build_on_meta(path: Path, dtype: torch.dtype) -> Any:
    """transformers' model without storage, checked, its parameters declared in the dtypes they will have."""
    if not (path / "config.json").is_file():
        raise recognise.UnsupportedModelError(f"{path} has no config.json, so it is not the directory of a model")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # code in a model directory is never run
    text_config = config.get_text_config()
    recognise.check_config(text_config)
    if getattr(text_config, "output_router_logits", False):
        text_config.output_router_logits = False  # only of use in training
    with torch.device("meta"), hf_initialization.no_init_weights():
        try:
            hf = AutoModelForCausalLM.from_config(config, attn_implementation=_ATTENTION, experts_implementation="eager", dtype=dtype, trust_remote_code=False)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise recognise.UnsupportedModelError(f"{path}: transformers has no causal language model for model_type {config.model_type!r}") from error
        except KeyError as error:  # classes that choose their attention from a table of their own
            if _ATTENTION not in str(error):
                raise
            raise recognise.UnsupportedModelError(f"{path}: attention of model_type {config.model_type!r} cannot be replaced in transformers") from error
    plan = {pattern.replace("*", ".*"): kept for pattern, kept in hf._get_dtype_plan(dtype).items()}  # what transformers keeps in another dtype
    for module_path, module in hf.named_modules():
        for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            planned = next((kept for pattern, kept in plan.items() if re.search(pattern, f"{module_path}.{leaf}")), None)
            if planned is not None:
                _set_tensor(module, leaf, tensor.to(planned))
    return hf.eval().requires_grad_(False)


def _weight_formats(hf: Any, path: Path | None) -> WeightFormats:
    """What of the model (on meta) is quantized, by its configuration and the files in `path` (None = no files)."""
    configs = (hf.config, hf.config.get_text_config())
    quantization, older = (next((vars(c)[name] for c in configs if vars(c).get(name)), None) for name in ("quantization_config", "compression_config"))
    if not quantization and older:  # as compressed-tensors once wrote it
        quantization = {"quant_method": "compressed-tensors", **older}
    if not quantization:
        return WeightFormats(None, None, lambda key: (key, None))
    config = parse_quantization_config(quantization if isinstance(quantization, dict) else quantization.to_dict())
    table, names = NameTable(hf), dict([*hf.named_parameters(), *hf.named_buffers()])
    tensors = None if path is None else [key for keys in list_files(path).values() for key in keys]
    return WeightFormats(config, tensors, lambda key: table.place_of(key, names))


class _Swap:
    """Replaces modules of a model on meta by empty layers of ours on the device."""

    def __init__(
        self, hf: Any, ctx: StepContext, dtype: torch.dtype, device: torch.device, formats: WeightFormats, moe_backend: str, attention_backend: str
    ) -> None:
        self.hf, self.ctx, self.dtype, self.device, self.formats, self._moe_backend = hf, ctx, dtype, device, formats, moe_backend
        self.config = hf.config.get_text_config()
        self.attention: dict[str, PagedAttention] = {}
        self.refused_adapter_modules: dict[str, str] = {}
        self._backend = ATTENTION_BACKENDS[attention_backend](ctx)
        self.moe_backends: set[str] = set()
        self._methods: dict[ExpertsScheme | None, tuple[QuantMethod, MoeRunner]] = {}
        self._workspace = Workspace(device)

    def run(self) -> None:
        attention, experts = recognise.find_attention(self.hf), recognise.find_experts(self.hf)
        for path, module in attention.items():
            self._swap_attention(path, module)
        for path, module in experts.items():
            self._swap_experts(path, module)
        head = self.hf.get_output_embeddings()
        for path, module in list(self.hf.named_modules()):
            inside_latent = isinstance(self.hf.get_submodule(path.rpartition(".")[0]), AbsorbedMLA) if path else True
            if type(module) is nn.Linear and not inside_latent:
                source = "logits" if module is head else "tokens"
                self.replace(path, self.formats.make_linear({path: module}, device=self.device, slot_source=source))
            elif type(module) is nn.Embedding:
                vocab, hidden = module.weight.shape
                self.replace(path, Embedding(path, vocab, hidden, dtype=module.weight.dtype, device=self.device))
            elif type(module).__name__ in recognise.RMS_NORMS:
                self.replace(path, RMSNorm(module.weight, float(module.variance_epsilon)))

    def replace(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(self.hf.get_submodule(parent), leaf, module)

    def _linear(self, path: str, owner: Any, *names: str) -> Linear:
        return self.formats.make_linear({f"{path}.{name}": getattr(owner, name) for name in names}, device=self.device)

    def _swap_attention(self, path: str, module: Any) -> None:
        latent = type(module).__name__ in recognise.LATENT_ATTENTION
        spec = (recognise.latent_attention_spec if latent else recognise.attention_spec)(module, self.config)
        paged = self.attention[path] = PagedAttention(self.ctx, spec, self._backend)
        if latent:
            self.replace(path, self._make_latent(path, module, paged))
            self.refused_adapter_modules["kv_b_proj"] = KV_B_REASON
        elif recognise.is_standard(module):
            self.replace(path, self._make_attention(path, module, paged))
        else:
            module.paged_attention = paged  # its own forward stays and calls `_paged_attention`

    def _make_attention(self, path: str, module: Any, paged: PagedAttention) -> Attention:
        q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        return Attention(
            self._linear(path, module, "q_proj", "k_proj", "v_proj"), self._linear(path, module, "o_proj"), paged,
            q_norm=q_norm, k_norm=k_norm, norm_per_head=q_norm is None or q_norm.weight.shape[0] == paged.spec.kv.k_dim,
            sinks=getattr(module, "sinks", None), half_tables=type(module).__name__ in recognise.HALF_TABLE_ATTENTION,
        )  # fmt: skip

    def _make_latent(self, path: str, module: Any, paged: PagedAttention) -> AbsorbedMLA:
        direct = module.q_lora_rank is None
        return AbsorbedMLA(
            self._linear(path, module, "q_proj" if direct else "q_a_proj", "kv_a_proj_with_mqa"), None if direct else module.q_a_layernorm,
            None if direct else self._linear(path, module, "q_b_proj"), module.kv_a_layernorm, module.kv_b_proj, self._linear(path, module, "o_proj"), paged,
            nope_dim=module.qk_nope_head_dim, v_dim=module.v_head_dim, interleaved=bool(getattr(self.config, "rope_interleave", True)),
        )  # fmt: skip

    def _swap_experts(self, path: str, module: Any) -> None:
        """Replace experts and router, and the whole block where its shared expert becomes one of the experts."""
        spec, block = recognise.moe_spec(path, module, self.config), path.rpartition(".")[0]
        scheme, shared = self.formats.experts_scheme(path, spec), recognise.shared_expert(block, self.hf.get_submodule(block), spec)
        method, runner = self._method(path, scheme)
        if shared is not None and not self.formats.is_stored_as(scheme, shared.name):
            shared = None
        if shared is not None:
            spec = replace(spec, num_experts=spec.num_experts + shared.parts, top_k=spec.top_k + shared.parts)
        experts = FusedMoE(path, spec, method, self.ctx, self._workspace, runner, dtype=self.dtype, device=self.device)
        experts.interleaved_gate_up, experts.is_transposed, experts.shared = not module.is_concatenated, bool(module.is_transposed), shared
        self.replace(path, experts)
        self._swap_router(block, shared)
        if shared is not None:
            self.replace(block, MoEBlock(self.hf.get_submodule(block).gate, experts))

    def _method(self, path: str, scheme: ExpertsScheme | None) -> tuple[QuantMethod, MoeRunner]:
        """How the experts at `path` are stored, and what runs them; one of each per scheme."""
        if scheme not in self._methods:
            method = UnquantizedMethod() if scheme is None else WNA16Method(*scheme, self.dtype)
            try:
                backend = get_moe_runner_backend(self._moe_backend, self.device, method)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            self.moe_backends.add(backend)
            self._methods[scheme] = method, MoeRunner(make_core(backend))
        return self._methods[scheme]

    def _swap_router(self, block: str, shared: SharedExpert | None) -> None:
        """Replace the router of the MoE block at path `block`, if its formula is known."""
        for leaf, module in list(self.hf.get_submodule(block).named_children()):
            path = f"{block}.{leaf}"
            spec = recognise.router_spec(module)
            if spec is not None:
                inner = f"{path}.wg" if hasattr(module, "wg") else path  # HunYuan's weight lies one module further in
                self.replace(path, self._make_router(inner, self.hf.get_submodule(inner), spec, shared))
                continue
            kind = type(module).__name__
            if getattr(module, "weight", None) is not None and ("Router" in kind or "Gate" in kind):
                self.refused_adapter_modules[f"{block.rpartition('.')[2]}.{leaf}"] = f"{kind} is not in the table of routers that take adapters"

    def _make_router(self, path: str, module: Any, spec: RouterSpec, shared: SharedExpert | None) -> Router:
        weight = module.weight
        parts: tuple[tuple[str, int], ...] = ((path, weight.shape[0]),)
        if shared is not None:
            spec, parts = replace(spec, shared=shared.parts), parts + ((shared.gate, 1),) * bool(shared.gate)
        biased = (path,) if getattr(module, "bias", None) is not None else ()
        dtype = torch.float32 if spec.float32_logits else weight.dtype
        return Router(Linear(parts, weight.shape[1], biased_parts=biased, dtype=dtype, device=self.device), spec)


def _paged_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """transformers' attention function for modules that keep their forward: query, key, value [1, heads, T, D] -> [1, T, heads, D]."""
    paged: PagedAttention = module.paged_attention
    scaling = kwargs.get("scaling")
    unexpected = [name for name in ("softcap", "position_bias", "score_mod", "block_indices") if kwargs.get(name) is not None]
    if attention_mask is not None or unexpected or scaling not in (None, paged.spec.scaling):
        found = f"mask {attention_mask is not None}, {unexpected}, scaling {scaling}, expected {paged.spec.scaling}"
        raise recognise.UnsupportedModelError(f"{type(module).__name__} asks for attention that is not supported: {found}")
    out = paged(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), kwargs.get("s_aux"))
    return out[None], None


AttentionInterface.register(_ATTENTION, _paged_attention)


def _materialise(hf: Any, device: torch.device) -> None:
    """Give storage to what is still on meta. Buffers that no file holds (rotary tables) are computed as transformers does."""
    for module in hf.modules():
        computed = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None and module._buffers[name].is_meta]
        for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta:
                _set_tensor(module, leaf, torch.empty_like(tensor, device=device))
        if computed:
            with torch.device(device):
                hf._init_weights(module)


class _RotaryTable(nn.Module):
    """cos and sin of all positions, in place of a module of transformers' that looks at the step's on the host or computes on the CPU, as no graph may."""

    def __init__(self, rotary: nn.Module, positions: int, device: torch.device) -> None:
        super().__init__()
        self.cos, self.sin = (table[0] for table in rotary(torch.empty(0, device=device), torch.arange(positions, device=device)[None]))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


def _set_tensor(module: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor.detach(), requires_grad=False)


def _eos_token_ids(path: Path, config: Any) -> list[int]:
    """Ids that end a text: generation_config.json's, else config.json's."""
    ids = config.eos_token_id
    if (path / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(path)
        ids = generation.eos_token_id if generation.eos_token_id is not None else ids
    return [] if ids is None else [int(i) for i in ids] if isinstance(ids, list | tuple) else [int(ids)]
