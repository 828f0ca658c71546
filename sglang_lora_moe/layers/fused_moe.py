"""FusedMoE: the experts of one decoder layer, called as transformers calls its experts modules."""

from typing import Any

import torch
from torch import nn

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.layers.topk import Router
from sglang_lora_moe.moe.runner import LoRAHooks, MoeRunner, RunnerInput
from sglang_lora_moe.moe.spec import MoESpec, SharedExpert
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.quantization.base import QuantMethod


class FusedMoE(nn.Module):
    """out[m] = sum over k of weight[m, k] * expert(topk_ids[m, k])(x[m]), this rank's partial sum; formulas in `MoESpec`.

    Parameters are the quantization method's: w13 [E, 2I, H] as halves, w2 [E, H, I], b13 / b2 (None without bias).
    `interleaved_gate_up` and `is_transposed` describe the checkpoint's own parameters, for those who read adapter files; the last experts may be `shared`.
    """

    def __init__(
        self,
        name: str,
        spec: MoESpec,
        quant_method: QuantMethod,
        ctx: StepContext,
        workspace: Workspace,
        runner: MoeRunner,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.name, self.spec, self.quant_method = name, spec, quant_method
        self.ctx, self.workspace, self.runner = ctx, workspace, runner
        self.interleaved_gate_up = self.is_transposed = False
        self.shared: SharedExpert | None = None
        quant_method.create_weights(self, spec, dtype, device)
        self._quant_info: Any = None

    def finalize(self) -> None:
        """Derive the backend's form of the weights. Call after loading; the first forward does it otherwise."""
        self._quant_info = self.runner.core.quant_info(self.quant_method, self)

    def forward(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        hooks: LoRAHooks | None = None,
        token_slots: torch.Tensor | None = None,
        num_slots: int = 0,
        max_rank: int = 0,
    ) -> torch.Tensor:
        """x [M, H], topk_ids int [M, K] (-1 = none here), topk_weights float [M, K] -> [M, H] in x's dtype.

        With adapters: `hooks`, token_slots int32 [M], `num_slots` S and the `max_rank` of these come together. ValueError for shapes that are not the layer's.
        """
        if x.shape != (topk_ids.shape[0], self.spec.hidden_size) or topk_ids.shape != topk_weights.shape or topk_ids.shape[1] != self.spec.top_k:
            raise ValueError(
                f"{self.name}: expected x [M, {self.spec.hidden_size}] and topk_ids, topk_weights [M, {self.spec.top_k}], "
                f"got {tuple(x.shape)}, {tuple(topk_ids.shape)}, {tuple(topk_weights.shape)}"
            )
        if self._quant_info is None:
            self.finalize()
        ids, weights = topk_ids.to(torch.int32), topk_weights.to(torch.float32)
        inp = RunnerInput(x, ids.contiguous(), weights.contiguous(), token_slots, self.workspace, self.spec, num_slots, max_rank)
        return self.runner.run(inp, self._quant_info, hooks)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.spec}, {self.quant_method.name}"


class MoEBlock(nn.Module):
    """Stands in for transformers' MoE block where a shared expert is among the experts."""

    def __init__(self, gate: Router, experts: FusedMoE) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(x)
        return self.experts(x, ids, weights).view_as(hidden_states)
