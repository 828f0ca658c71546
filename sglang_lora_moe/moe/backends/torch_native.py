"""The MoE backend in plain torch: the default without a GPU, and the reference elsewhere.

One matmul per non-empty expert over rows gathered once into sorted order. It reads the routing on the host, so on a GPU
it synchronises and cannot be captured. Intermediates have a row per pair with an expert; pairs without one have none.
"""

from collections.abc import Callable

import torch
from torch import nn

from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import MoeRunnerCore, RunnerInput
from sglang_lora_moe.moe.spec import apply_activation
from sglang_lora_moe.quantization.base import QuantMethod, TorchQuantInfo


class TorchNativeCore(MoeRunnerCore):
    """MoeRunnerCore over `TorchQuantInfo`. Rows of gate_up, act and down are `routing.order`."""

    name = "torch_native"

    def quant_info(self, quant_method: QuantMethod, layer: nn.Module) -> TorchQuantInfo:
        return quant_method.get_torch_quant_info(layer)

    def make_routing(self, inp: RunnerInput) -> Routing:
        return Routing(inp.topk_ids, inp.token_slots, inp.spec.num_experts, inp.num_slots)

    def gate_up(self, inp: RunnerInput, routing: Routing, quant_info: TorchQuantInfo) -> torch.Tensor:
        return _grouped_matmul(routing.gather(inp.x), routing.base_runs, quant_info.w13, quant_info.b13, inp.spec.w13_rows)

    def activation(self, inp: RunnerInput, gate_up: torch.Tensor, routing: Routing) -> torch.Tensor:
        return apply_activation(gate_up.float(), inp.spec).to(gate_up.dtype)

    def down(self, inp: RunnerInput, act: torch.Tensor, routing: Routing, quant_info: TorchQuantInfo) -> torch.Tensor:
        return _grouped_matmul(act, routing.base_runs, quant_info.w2, quant_info.b2, inp.spec.hidden_size)

    def combine(self, inp: RunnerInput, down: torch.Tensor, routing: Routing) -> torch.Tensor:
        return combine(inp, down, routing)


def combine(inp: RunnerInput, down: torch.Tensor, routing: Routing) -> torch.Tensor:
    """out[m] = sum over k of topk_weights[m, k] * down[row of (m, k)], in float32, in the order of k; then x's dtype."""
    m, top_k = inp.topk_weights.shape
    pairs, hidden = routing.num_pairs, down.shape[1]
    make = torch.empty if down.shape[0] == pairs else torch.zeros  # a pair without an expert contributes 0
    by_pair = make(pairs, hidden, dtype=torch.float32, device=down.device).index_copy_(0, routing.order, down.float())
    return torch.bmm(inp.topk_weights.unsqueeze(1), by_pair.view(m, top_k, hidden)).squeeze(1).to(inp.x.dtype)


def _grouped_matmul(
    rows: torch.Tensor, runs: list[tuple[int, int]], weights: Callable[[int], torch.Tensor], biases: tuple[torch.Tensor, ...] | None, out_features: int
) -> torch.Tensor:
    """out[run] = rows[run] @ weights(expert) + biases[expert]; the runs cover all rows in order."""
    out = rows.new_empty(rows.shape[0], out_features)
    sizes = [size for _, size in runs]
    for (expert, _), source, target in zip(runs, rows.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True):
        if biases is None:
            torch.mm(source, weights(expert), out=target)
        else:
            torch.addmm(biases[expert], source, weights(expert), out=target)
    return out
