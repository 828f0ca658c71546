"""Replaces the layers of a model that adapters may touch by their wrappers over a memory pool."""

from __future__ import annotations

from typing import Any

from torch import nn

from sglang_lora_moe.layers.embedding import Embedding
from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.layers.topk import Router
from sglang_lora_moe.lora.dense import make_dense_delta
from sglang_lora_moe.lora.hooks import FusedMoEWithLoRA
from sglang_lora_moe.lora.layers import EmbeddingWithLoRA, LinearWithLoRA
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.stacks import EmbeddingStacks, ExpertStacks, LinearStacks


def wrap_layers(hf: nn.Module, pool: LoRAMemoryPool, ctx: StepContext, backend: str) -> dict[str, LinearWithLoRA | EmbeddingWithLoRA]:
    """Replace each layer of `hf` that is a target of `pool` by its wrapper. `backend` computes linears and embeddings.

    Returns, by target, the layers that few adapters touch: routers, the embedding, the language-model head.
    """
    delta = make_dense_delta(backend, ctx)
    served = pool.layout.targets
    rare: dict[str, LinearWithLoRA | EmbeddingWithLoRA] = {}
    for path, module in list(hf.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, FusedMoE) and module.name in served:
            setattr(hf.get_submodule(parent), leaf, FusedMoEWithLoRA(module, _stacks(pool, module.name, ExpertStacks), ctx))
        elif isinstance(module, Linear) and module.parts[0][0] in served:
            linear = LinearWithLoRA(module, [_stacks(pool, name, LinearStacks) for name, _ in module.parts], ctx, delta)
            if module.slot_source == "logits" or isinstance(hf.get_submodule(parent), Router):
                rare |= {name: linear for name, _ in module.parts}
            setattr(hf.get_submodule(parent), leaf, linear)
        elif isinstance(module, Embedding) and module.name in served:
            rare[module.name] = EmbeddingWithLoRA(module, _stacks(pool, module.name, EmbeddingStacks), ctx, delta)
            setattr(hf.get_submodule(parent), leaf, rare[module.name])
    return rare


def _stacks(pool: LoRAMemoryPool, name: str, kind: type[Any]) -> Any:
    stacks = pool.stacks_for(name)
    assert isinstance(stacks, kind), f"{name}: the pool has {type(stacks).__name__}, its layer needs {kind.__name__}"
    return stacks
