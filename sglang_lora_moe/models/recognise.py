"""Which of transformers' modules can be served, what replaces them, and what is refused.

Refusals are by what a module is, before any weight is read: a layer that keeps state this server does not store, an attention
that hides tokens in a way not handled here or experts that do not declare their layout would give wrong text without an error.
"""

import inspect
import sys
from typing import Any

from torch import nn

from sglang_lora_moe.layers.attention import AttentionSpec, KVLayerSpec
from sglang_lora_moe.layers.topk import RouterSpec
from sglang_lora_moe.moe.spec import MoESpec, SharedExpert


class UnsupportedModelError(ValueError):
    """A model that this server would serve wrongly, or not at all; the message names the layer type."""


# Attention classes whose forward is: q/k/v linears, optional q/k norm, rotation in halves layout, attention, o linear.
_STANDARD_FAMILIES = (
    *("Llama", "Mistral", "Qwen2", "Qwen3"),
    *("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss", "Glm4Moe", "Dots1", "Phimoe", "GraniteMoe", "MiniMaxM2"),
)
STANDARD_ATTENTION = frozenset(f"{family}Attention" for family in _STANDARD_FAMILIES)
RMS_NORMS = frozenset(f"{family}RMSNorm" for family in (*_STANDARD_FAMILIES, "DeepseekV2", "DeepseekV3", "Ernie4_5_Moe"))  # weight * normed, no offset
HALF_TABLE_ATTENTION = frozenset({"GptOssAttention"})  # cos and sin come without the repeated second half
LATENT_ATTENTION = frozenset({"DeepseekV2Attention", "DeepseekV3Attention", "Glm4MoeLiteAttention"})

# MoE blocks that only add up their experts' outputs and that of a shared expert -> its name, and that of the linear whose sigmoid is its weight
_SHARED_EXPERTS = {"Qwen2MoeSparseMoeBlock": ("shared_expert", "shared_expert_gate")}
_SHARED_EXPERTS |= dict.fromkeys(("DeepseekV2Moe", "DeepseekV3MoE", "Glm4MoeMoE", "Glm4MoeLiteMoE", "Dots1MoE"), ("shared_experts", ""))

_CACHE_ARGUMENTS = frozenset({"past_key_values", "past_key_value", "layer_past", "cache_params", "conv_state", "recurrent_state", "ssm_state"})
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu", "ReLUSquaredActivation": "relu2"}


# ---- refusals -------------------------------------------------------------------------------------------------------
def check_config(config: Any) -> None:
    """Refuse by the configuration alone. `config` is the text configuration."""
    for layer_type in sorted(set(getattr(config, "layer_types", None) or []) - _LAYER_TYPES):
        raise UnsupportedModelError(f"{config.model_type}: layers of type {layer_type!r} are not supported; only full and sliding-window attention is")
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(f"{config.model_type}: attention logit softcapping ({config.attn_logit_softcapping}) is not supported")


def find_attention(hf: nn.Module) -> dict[str, nn.Module]:
    """Modules that use the KV cache directly, by path; refuses kinds that are not known."""
    modules = dict(hf.named_modules())
    users = [path for path, module in modules.items() if not _CACHE_ARGUMENTS.isdisjoint(inspect.signature(type(module).forward).parameters)]
    leaves = {path: modules[path] for path in users if not any(other.startswith(f"{path}.") for other in users) and path}
    for path, module in leaves.items():
        if not (is_standard(module) or type(module).__name__ in LATENT_ATTENTION or _is_generic(module)):
            raise UnsupportedModelError(
                f"{path} is a {type(module).__name__}, which keeps earlier tokens in a way that is not supported; "
                "only attention with q_proj, k_proj, v_proj and o_proj, or known latent attention, is"
            )
        if not getattr(module, "is_causal", True):
            raise UnsupportedModelError(f"{path} ({type(module).__name__}) lets tokens see later ones, which is not supported")
        if getattr(module, "is_kv_shared_layer", False):
            raise UnsupportedModelError(f"{path} ({type(module).__name__}) shares its KV cache with another layer, which is not supported")
    for path, module in hf.named_modules():
        if isinstance(module, nn.Conv1d):
            raise UnsupportedModelError(f"{path} is a convolution over tokens ({type(module).__name__}), whose state is not supported")
    if not leaves:
        raise UnsupportedModelError(f"{type(hf).__name__} has no attention layer that takes a KV cache")
    return leaves


def find_experts(hf: nn.Module) -> dict[str, nn.Module]:
    """Experts modules that declare their layout, by path; refuses those that do not."""
    found = {}
    for path, module in hf.named_modules():
        kind = type(module).__name__
        looks_like_experts = path.rpartition(".")[2] == "experts" or ("Experts" in kind and "Shared" not in kind)
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            found[path] = module
        elif looks_like_experts and not any(path.startswith(f"{other}.") for other in found):
            raise UnsupportedModelError(f"{path} is a {kind}, experts that do not declare their weight layout to transformers")
    return found


def exact_length(hf: nn.Module, max_model_len: int) -> int:
    """The context length that is served exactly: beyond it some rotations depend on the longest request of the batch."""
    for module in hf.modules():
        rope_type = getattr(module, "rope_type", None)
        if "longrope" in (rope_type.values() if isinstance(rope_type, dict) else [rope_type]):  # factors switch for the whole batch at this length
            config: Any = module.config
            max_model_len = min(max_model_len, int(config.rope_parameters.get("original_max_position_embeddings") or max_model_len))
    return max_model_len


def positions_of(config: dict[str, Any]) -> int | None:
    """How many positions a model has by its config.json: with YaRN, what its factor makes of those that it was trained with."""
    limit, rope = config.get("max_position_embeddings"), config.get("rope_parameters") or config.get("rope_scaling") or {}
    trained = rope.get("original_max_position_embeddings") if rope.get("rope_type", rope.get("type")) == "yarn" else None
    return max(int(limit), int(trained * rope["factor"])) if limit and trained else limit


def needs_table(module: nn.Module) -> bool:
    """Whether a rotation looks at the step's positions on the host, or computes there."""
    return getattr(module, "rope_type", None) in ("longrope", "dynamic") or type(module).__name__ == "PhimoeRotaryEmbedding"


def _has_projections(module: nn.Module) -> bool:
    return all(type(getattr(module, name, None)) is nn.Linear for name in ("q_proj", "k_proj", "v_proj", "o_proj"))


def is_standard(module: nn.Module) -> bool:
    """Whether the whole attention module can be replaced by `layers.attention.Attention`."""
    extra = {name for name, _ in module.named_children()} - {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    clipped = getattr(getattr(module, "config", None), "clip_qkv", None) is not None
    return type(module).__name__ in STANDARD_ATTENTION and _has_projections(module) and not extra and not clipped


def _is_generic(module: nn.Module) -> bool:
    """Attention that keeps its forward and calls the registered attention function with rotated q, k and v."""
    flat = all(not any(True for _ in child.children()) for child in module.children())
    return _has_projections(module) and flat and hasattr(module, "head_dim") and hasattr(module, "scaling") and hasattr(module, "layer_idx")


# ---- specs ----------------------------------------------------------------------------------------------------------
def attention_spec(module: Any, config: Any) -> AttentionSpec:
    """Sizes of a q/k/v/o attention module."""
    head_dim = int(module.head_dim)
    kv_heads = module.k_proj.out_features // head_dim
    v_dim = module.v_proj.out_features // kv_heads
    heads = module.o_proj.in_features // v_dim
    return AttentionSpec(KVLayerSpec(kv_heads, head_dim, v_dim), heads, v_dim, float(module.scaling), _window(module, config))


def latent_attention_spec(module: Any, config: Any) -> AttentionSpec:
    """Absorbed latent attention: one shared key head [latent, rope] whose latent columns are the values."""
    kv = KVLayerSpec(num_heads=1, k_dim=module.kv_lora_rank + module.qk_rope_head_dim, v_dim=0)
    return AttentionSpec(kv, int(module.num_heads), int(module.kv_lora_rank), float(module.scaling), _window(module, config))


def _window(module: Any, config: Any) -> int | None:
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return int(config.sliding_window) if layer_types[module.layer_idx] == "sliding_attention" else None
    masks = hasattr(sys.modules[type(module).__module__], "create_sliding_window_causal_mask")  # else transformers' model ignores the config's
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None) if masks else None
    return int(window) if window else None


def router_spec(module: Any) -> RouterSpec | None:
    """The spec of a transformers router, or None if it is not in the table (then transformers' own module stays)."""
    name = type(module).__name__
    if name in ("Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "OlmoeTopKRouter"):
        return RouterSpec(module.num_experts, module.top_k, renormalise=bool(module.norm_topk_prob))
    if name == "MixtralTopKRouter":
        return RouterSpec(module.num_experts, module.top_k, renormalise=True)
    if name == "HunYuanMoEV1Gate":
        return RouterSpec(module.num_experts, module.top_k, float32_logits=True, renormalise=True)
    if name == "GptOssTopKRouter":
        return RouterSpec(module.num_experts, module.top_k, score="topk_softmax")
    if name in ("DeepseekV3TopkRouter", "Glm4MoeTopkRouter", "Glm4MoeLiteTopkRouter", "Dots1TopkRouter"):
        return _deepseek_router(module, score="sigmoid", correction_bias=True, renormalise=bool(module.norm_topk_prob), epsilon=1e-20)
    return _deepseek_router(module, score="softmax", group_best=1) if name == "DeepseekV2TopkRouter" else None


def _deepseek_router(module: Any, **fields: Any) -> RouterSpec:
    grouped = getattr(module, "topk_method", "group_limited_greedy") != "greedy"
    groups: dict[str, Any] = {"num_groups": module.num_group or 1, "topk_groups": module.topk_group or 1} if grouped else {}
    return RouterSpec(module.num_experts, module.top_k, float32_logits=True, scale=float(module.routed_scaling_factor), **groups, **fields)


def moe_spec(path: str, module: Any, config: Any) -> MoESpec:
    """The spec of an experts module from its declared layout and parameter shapes."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    num_experts, rows, hidden = (up.shape[0], up.shape[2], up.shape[1]) if module.is_transposed else tuple(up.shape)
    clamped: dict[str, Any] = {}
    own_gate = getattr(type(module), "_apply_gate", None)
    if own_gate is not None and own_gate.__name__ != "_default_apply_gate":
        if type(module).__name__ != "GptOssExperts":
            raise UnsupportedModelError(f"{path} is a {type(module).__name__}, whose own activation formula is not supported")
        clamped = {"swiglu_alpha": float(module.alpha), "swiglu_limit": float(module.limit)}
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(f"{path} is a {type(module).__name__}, which normalises expert outputs; that is not supported")
    activation = "SiLU" if clamped else type(module.act_fn).__name__
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(f"{path} is a {type(module).__name__} with activation {activation}, which is not supported")
    return MoESpec(
        num_experts=num_experts, top_k=_top_k(config), hidden_size=hidden, intermediate_size=rows // 2 if module.has_gate else rows,
        activation=_ACTIVATIONS[activation], gated=bool(module.has_gate), has_bias=bool(module.has_bias), **clamped,
    )  # fmt: skip


def shared_expert(path: str, block: Any, spec: MoESpec) -> SharedExpert | None:
    """The shared expert of the MoE block at `path`, if it can be some more of the block's experts."""
    leaf, gate = _SHARED_EXPERTS.get(type(block).__name__, ("", ""))
    count, rest = divmod(getattr(block, leaf).gate_proj.out_features if leaf else 0, spec.intermediate_size)
    return SharedExpert(f"{path}.{leaf}", gate and f"{path}.{gate}", count) if count and not rest else None


def _top_k(config: Any) -> int:
    for name in ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"):
        value = getattr(config, name, None)
        if value:
            return int(max(value)) if isinstance(value, list | tuple) else int(value)
    raise UnsupportedModelError(f"{config.model_type}: cannot tell how many experts a token uses")
