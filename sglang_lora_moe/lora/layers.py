"""Wrappers that add adapters to linears and the embedding, and their way into a model.

A step without an active adapter runs exactly the wrapped layer's code. Nothing is defined or looked up per step that could be made when the wrapper is built;
the step's slots come from the shared `StepContext`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sglang_lora_moe.layers.embedding import Embedding
from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.layers.topk import Router
from sglang_lora_moe.lora.dense import DenseDelta, Part, TorchDense, make_dense_delta
from sglang_lora_moe.lora.hooks import FusedMoEWithLoRA
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.stacks import EmbeddingStacks, LinearStacks, check_dims


class LinearWithLoRA(nn.Module):
    """A linear, fused or not, with adapters on each of its parts (`stacks` in the order of `base.parts`)."""

    def __init__(self, base: Linear, stacks: Sequence[LinearStacks], ctx: StepContext, delta: DenseDelta | None = None) -> None:
        super().__init__()
        self.delta = delta or TorchDense(ctx)
        if len(stacks) != len(base.parts):
            raise ValueError(f"expected stacks for {len(base.parts)} parts ({', '.join(name for name, _ in base.parts)}), got {len(stacks)}")
        self.base, self.ctx = base, ctx
        self.used = True  # False: no adapter touches this layer, and no launch is spent on it
        self.parts: list[Part] = []
        first = 0
        for (name, rows), part in zip(base.parts, stacks, strict=True):
            check_dims(name, part, base.in_features, rows)
            self.parts.append((part, first, rows))
            first += rows
        self.delta.prepare(self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., sum(rows)]; the leading dims hold the step's tokens (or logit rows) in order."""
        y = self.base.forward(x)
        if self.ctx.lora_active and self.used:
            self.delta.add_linear(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.parts, self.base.slot_source)
        return y

    def plan(self, tokens: int, splits: int | None = None) -> Any:
        """For kernels around this linear that can do the adapters' work: what they share, or None. With it, call `base`, not this layer."""
        return self.delta.plan(self.parts, tokens, splits) if self.ctx.lora_active and self.used else None

    def within(self, tokens: int) -> Any:
        """As `plan`, for a kernel that does this linear and all of the adapters' work."""
        return self.delta.within(self.parts, tokens) if self.ctx.lora_active and self.used else None

    def begin(self, x: torch.Tensor) -> Any:
        """As `plan`, for the kernel after this linear alone; x [M, in] are the step's tokens."""
        return self.delta.begin(x, self.parts) if self.ctx.lora_active and self.used else None


class EmbeddingWithLoRA(nn.Module):
    """Token embedding with adapters."""

    def __init__(self, base: Embedding, stacks: EmbeddingStacks, ctx: StepContext, delta: DenseDelta | None = None) -> None:
        super().__init__()
        self.delta = delta or TorchDense(ctx)
        check_dims(base.name, stacks, base.weight.shape[0], base.weight.shape[1])
        self.base, self.stacks, self.ctx = base, stacks, ctx
        self.used = True

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids int [...] -> [..., H]."""
        y = self.base.forward(input_ids)
        if self.ctx.lora_active and self.used:
            flat = input_ids.reshape(-1)
            self.delta.add_embedding(y.view(flat.shape[0], -1), flat, self.stacks)
        return y


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
            setattr(hf.get_submodule(parent), leaf, FusedMoEWithLoRA(module, pool.stacks_for(module.name), ctx))
        elif isinstance(module, Linear) and module.parts[0][0] in served:
            linear = LinearWithLoRA(module, [pool.stacks_for(name) for name, _ in module.parts], ctx, delta)
            if module.slot_source == "logits" or isinstance(hf.get_submodule(parent), Router):
                rare |= {name: linear for name, _ in module.parts}
            setattr(hf.get_submodule(parent), leaf, linear)
        elif isinstance(module, Embedding) and module.name in served:
            rare[module.name] = EmbeddingWithLoRA(module, pool.stacks_for(module.name), ctx, delta)
            setattr(hf.get_submodule(parent), leaf, rare[module.name])
    return rare
