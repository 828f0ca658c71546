"""An adapter's weights in the one form that the memory pool stores, whatever layout its file had."""

from dataclasses import dataclass

from torch import Tensor

from sglang_lora_moe.lora.adapter_config import AdapterConfig


@dataclass(frozen=True)
class LinearLoRA:
    """y += scaling * b (a x)."""

    a: Tensor  # [R, in]
    b: Tensor  # [out, R]
    scaling: float

    def tensors(self) -> list[Tensor]:
        return [self.a, self.b]


@dataclass(frozen=True)
class EmbeddingLoRA(LinearLoRA):
    """e(t) += scaling * b a[:, t]; a [R, V], b [H, R]."""


@dataclass(frozen=True)
class ExpertLoRA:
    """gate_up += scaling13 * b13[e] (a13[e] x), down += scaling2 * b2[e] (a2[e] act); either half may be absent.

    A dimension of 1 in place of E is shared by all experts. Rows of b13 are gate, then up. With split_a a13 holds R rows for gate, then R for up,
    and the gate rows of b13 multiply the first, the up rows the second; else c = 1 and b13 is dense over one A.
    """

    a13: Tensor | None = None  # [E or 1, c * R, H], c = 2 if split_a else 1
    b13: Tensor | None = None  # [E or 1, 2I, R]
    split_a: bool = False
    scaling13: float = 0.0
    a2: Tensor | None = None  # [E or 1, R, I]
    b2: Tensor | None = None  # [E or 1, H, R]
    scaling2: float = 0.0

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.a13, self.b13, self.a2, self.b2) if tensor is not None]


ModuleLoRA = LinearLoRA | ExpertLoRA


@dataclass(frozen=True)
class AdapterWeights:
    """A whole adapter on the host. `revision` identifies its content; `warnings` are what a user should know of it."""

    path: str
    revision: str
    config: AdapterConfig
    modules: dict[str, ModuleLoRA]  # by target name
    warnings: list[str]
