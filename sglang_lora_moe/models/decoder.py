"""The forward of standard pre-norm decoders in a handful of launches per layer, over transformers' own module tree.

    residual += attention(norm(residual));  residual += mlp(norm(residual))        for each layer
    logits = lm_head(norm(residual)[wanted rows])

Used on GPUs (with the `triton` attention backend) for classes known to compute exactly this; all others run transformers' forward.
Each residual addition is part of the norm after it; norm, rotation and cache write of q and k are one kernel; cos and sin are
read from a table made once. Modules are looked up when they run, so layers that were wrapped for adapters are used.
"""

from typing import Any

import torch
from torch import nn

from sglang_lora_moe.layers.attention import Attention
from sglang_lora_moe.layers.attention_triton import TritonAttention
from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.norm import RMSNorm
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.layers.topk import Router
from sglang_lora_moe.models.overrides.mla import AbsorbedMLA
from sglang_lora_moe.ops import skinny_linear
from sglang_lora_moe.ops.latent_attention import latent_queries, latent_values, values_merge
from sglang_lora_moe.ops.lora_linear import ROWS_MAX, linear_expand
from sglang_lora_moe.ops.qk_norm_rope import qk_norm_rope
from sglang_lora_moe.ops.rms_norm import rms_norm, rms_norm_shrink
from sglang_lora_moe.ops.router_topk import FEW_TOKENS, beside_norm, normed_logits, router_logits, router_topk

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss", "DeepseekV2", "DeepseekV3")
_CAUSAL_MODELS = frozenset(f"{family}ForCausalLM" for family in FAMILIES)
_LAYERS = frozenset(f"{family}DecoderLayer" for family in FAMILIES)
_LAYER_PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_MODEL_PARTS = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
_MOE_BLOCKS = frozenset({"Qwen3MoeSparseMoeBlock", "MixtralSparseMoeBlock", "OlmoeSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "GptOssMLP", "MoEBlock"})


def is_standard(hf: nn.Module) -> bool:
    """Whether `hf` (with our layers swapped in) is one of the known classes, nothing added, on the `triton` attention backend."""
    model: Any = getattr(hf, "model", None)
    if type(hf).__name__ not in _CAUSAL_MODELS or model is None or not _has_parts(model, _MODEL_PARTS):
        return False
    return isinstance(model.norm, RMSNorm) and all(_is_standard_layer(layer) for layer in model.layers)


def _is_standard_layer(layer: Any) -> bool:
    return (
        type(layer).__name__ in _LAYERS
        and _has_parts(layer, _LAYER_PARTS)
        and isinstance(layer.self_attn, Attention | AbsorbedMLA)
        and isinstance(layer.self_attn.paged.backend, TritonAttention)
        and all(isinstance(child, RMSNorm) for name, child in layer.self_attn.named_children() if name.endswith("norm"))
        and isinstance(layer.input_layernorm, RMSNorm)
        and isinstance(layer.post_attention_layernorm, RMSNorm)
    )


def _has_parts(module: nn.Module, names: frozenset[str]) -> bool:
    return {name for name, _ in module.named_children()} == names


class FusedDecoder:
    """`hidden()`, then `logits_of` it, run the step that `ctx` describes. Call after the weights and buffers of `hf` are in place."""

    def __init__(self, hf: Any, ctx: StepContext, max_positions: int) -> None:
        self.hf, self.ctx = hf, ctx
        positions = torch.arange(max_positions, device=ctx.device).unsqueeze(0)
        sample = torch.empty(0, dtype=torch.float32, device=ctx.device)  # tables stay float32; rotation is in float32
        cos, sin = hf.model.layers[0].self_attn.tables(hf.model.rotary_emb(sample, positions))
        self.cos, self.sin = cos.contiguous(), sin.contiguous()  # [positions, R/2]

    def hidden(self) -> torch.Tensor:
        """What the language-model head reads, for all tokens: [T, H]."""
        ctx, model = self.ctx, self.hf.model
        x, residual = model.embed_tokens(ctx.input_ids[: ctx.num_tokens]), None
        for layer in model.layers:
            x, residual, low = self._input_norm(layer, x, residual)
            x, addend = (self._latent_attention if isinstance(layer.self_attn, AbsorbedMLA) else self._attention)(layer.self_attn, x, low)
            x, residual, logits = self._post_norm(layer, x, residual, addend)
            x = self._mlp(layer.mlp, x, logits)
        return rms_norm(x, *_norm(model.norm), residual)

    def logits_of(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [num_logits, V] of the wanted rows of `hidden`."""
        ctx = self.ctx
        if ctx.num_logits != ctx.num_tokens:  # else every row is wanted, in order
            x = x.index_select(0, ctx.logit_rows[: ctx.num_logits])
        return self.hf.lm_head(x)

    def _input_norm(self, layer: Any, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """x and residual [T, H] -> (norm of their sum, the sum, what the norm has begun for the adapters of the qkv linear or None)."""
        low = _plan(layer.self_attn.qkv, x)
        if low is not None:
            return *rms_norm_shrink(x, *_norm(layer.input_layernorm), residual, low), low
        normed = rms_norm(x, *_norm(layer.input_layernorm), residual)
        return normed, x if residual is None else residual, _begin(layer.self_attn.qkv, normed)

    def _attention(self, attention: Attention, x: torch.Tensor, low: Any) -> tuple[torch.Tensor, Any]:
        """x [T, H] -> ([T, H], what the next kernel has yet to add to it or None). `low`: of `_input_norm`."""
        ctx, paged, t = self.ctx, attention.paged, x.shape[0]
        backend: Any = paged.backend
        (q_weight, eps), (k_weight, _) = (_norm(norm) for norm in (attention.q_norm, attention.k_norm))
        qkv, low = _multiply(attention.qkv, x, low)
        if low is not None and not attention.norm_per_head:  # the norm needs all of a row
            qkv, low = linear_expand(qkv, low), None
        q = qk_norm_rope(
            qkv, paged.k_cache, paged.v_cache, ctx.kv_slots[:t], ctx.positions[:t], (self.cos, self.sin),
            num_heads=paged.spec.num_heads, q_weight=q_weight, k_weight=k_weight, eps=eps, addend=low,
        )  # fmt: skip
        paged.calls += 1
        o_proj, q_rows = attention.o_proj, q.flatten(1)  # attention's output is as large and as wide
        low = _plan(o_proj, q_rows, paged.spec.num_heads) if backend.merges(paged) and t <= ROWS_MAX else None
        out = backend.attend(q, paged, attention.sinks, low).flatten(1)
        return _multiply(o_proj, out, _begin(o_proj, out) if low is None else low)

    def _latent_attention(self, attention: AbsorbedMLA, x: torch.Tensor, low: Any) -> tuple[torch.Tensor, Any]:
        """As `_attention`, over latents."""
        ctx, paged, o_proj, t = self.ctx, attention.paged, attention.o_proj, x.shape[0]
        backend: Any = paged.backend
        qkv, low = _multiply(attention.qkv, x, low)
        if low is not None:
            qkv = linear_expand(qkv, low)
        q = qkv
        if attention.q_b is not None:
            q = _multiply(attention.q_b, rms_norm(qkv[:, : attention.q_width], *_norm(attention.q_a_layernorm)), None)[0]
        queries = latent_queries(
            q, qkv[:, attention.q_width :], attention.kv_b_proj.weight, _norm(attention.kv_a_layernorm), paged.k_cache,
            (ctx.kv_slots[:t], ctx.positions[:t]), (self.cos, self.sin),
            heads=paged.spec.num_heads, nope_dim=attention.nope_dim, interleaved=attention.interleaved,
        )  # fmt: skip
        paged.calls += 1
        weight, v_dim = attention.kv_b_proj.weight, attention.v_dim
        out = latent_values(backend.attend(queries, paged, None, apart=values_merge(weight, v_dim, t)), weight, v_dim)
        return _multiply(o_proj, out, _begin(o_proj, out))

    def _post_norm(self, layer: Any, x: torch.Tensor, residual: torch.Tensor, addend: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """(norm of their sum [T, H], the sum, the router's logits of that norm where one kernel makes both, else None)."""
        norm, router = _norm(layer.post_attention_layernorm), _router_of(layer.mlp)
        linear = None if router is None or addend is not None else _without_adapters(router.linear)
        if type(linear) is Linear and beside_norm(x, linear.weight, linear.bias):
            return normed_logits(x, *norm, residual, linear.weight)
        return rms_norm(x, *norm, residual, addend=addend), residual, None

    def _mlp(self, block: Any, x: torch.Tensor, logits: Any) -> torch.Tensor:
        """x [T, H] -> [T, H]. `logits`: of `_post_norm`."""
        router = _router_of(block)
        if router is None:
            return block(x)
        weights, ids = self._route(router, x, logits)
        out = block.experts(x, ids, weights)
        if hasattr(block, "shared_expert"):
            out = torch.addcmul(out, torch.sigmoid(block.shared_expert_gate(x)), block.shared_expert(x))
        return out

    def _route(self, router: Router, x: torch.Tensor, logits: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(topk_weights float32 [T, K], topk_ids int32 [T, K]); rows of padding get ids -1."""
        logits = _logits(router, x) if logits is None else logits
        return router_topk(logits, router.spec, router.e_score_correction_bias, self.ctx.kv_slots[: x.shape[0]], self.ctx.page_size)


def _router_of(block: Any) -> Router | None:
    """Of a block of experts whose forward is `FusedDecoder._mlp`."""
    return None if type(block).__name__ not in _MOE_BLOCKS else block.router if hasattr(block, "router") else block.gate


def _logits(router: Router, x: torch.Tensor) -> torch.Tensor:
    """Logits [T, E] of x, or [splits, T, E] that are to be summed."""
    linear, wide = _without_adapters(router.linear), router.spec.float32_logits
    if type(linear) is Linear and x.shape[0] <= FEW_TOKENS:
        return router_logits(x, linear.weight, linear.bias)
    if type(linear) is Linear and wide and linear.bias is None and linear.weight.dtype == x.dtype and x.is_cuda:
        return torch.mm(x, linear.weight.T, out_dtype=torch.float32)
    return router.linear(x.float() if wide else x)


def _without_adapters(linear: Any) -> Any:
    """The linear that computes the same in this step where no adapter touches it."""
    return linear.base if hasattr(linear, "base") and not (linear.ctx.lora_active and linear.used) else linear


def _plan(linear: Any, x: torch.Tensor, splits: int | None = None) -> Any:
    """What the kernels around a linear of x [T, in] share to do the work of its adapters; None where there is none, they cannot, or `_whole` does it alone."""
    whole = _whole(linear, x)
    able = hasattr(linear, "plan") and (whole is None or skinny_linear.takes_given(x.shape[0], *whole[2:]))
    return linear.plan(x.shape[0], splits) if able else None


def _begin(linear: Any, x: torch.Tensor) -> Any:
    """As `_plan`, with only the kernel after the linear."""
    return linear.begin(x) if hasattr(linear, "begin") and _whole(linear, x) is None else None


def _whole(linear: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, Any, tuple[int, int, int]] | None:
    """(weight, bias, adapters or None, shape) with which one kernel does all of a linear over x [T, in]; None where no kernel does."""
    base, low = _without_adapters(linear), None
    if hasattr(base, "within"):
        base, low = base.base, base.within(x.shape[0])
        if low is None:
            return None
    weight = base.weight_for(x.shape[0]) if isinstance(base, Linear) else None
    shape = None if weight is None else skinny_linear.shape_for(x, weight, low)
    return None if weight is None or shape is None else (weight, base.bias, low, shape)


def _multiply(linear: Any, x: torch.Tensor, low: Any) -> tuple[torch.Tensor, Any]:
    """x [T, in] -> ([T, out], what the next kernel has yet to add to it or None). `low`: what was begun of the adapters' part, or None."""
    whole = _whole(linear, x) if low is None else None
    if whole is not None:
        return skinny_linear.skinny_linear(x, *whole), None
    if low is None:
        return linear(x), None
    added = linear.base.adding(x, low)
    return (linear.base(x), low) if added is None else (added, None)


def _norm(norm: Any) -> tuple[Any, float]:
    """Weight and epsilon; none where there is no norm."""
    return (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
