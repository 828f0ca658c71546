"""One router for every architecture whose choice of experts fits `RouterSpec`; others keep transformers' own."""

from dataclasses import dataclass

import torch
from torch import nn

from sglang_lora_moe.layers.linear import Linear


@dataclass(frozen=True)
class RouterSpec:
    """How K of E experts are chosen and weighted. All scores are float32.

    score "softmax"      s = softmax(logits) over all experts        choose by s        weight s
          "topk_softmax" choose by the logits                                           weight softmax over the K chosen
          "sigmoid"      s = sigmoid(logits)                         choose by s + correction bias, weight s
    With `num_groups` > 1 only experts of the `topk_groups` best groups may be chosen; a group's score is the sum of its
    `group_best` best choice scores. `renormalise` divides the weights by (their sum + `epsilon`); `scale` multiplies them at the end.
    `float32_logits`: the gate's matrix product itself is in float32. After the K come `shared` experts more, E, E + 1, .., all of weight 1, or
    sigmoid(logit E) where there is one.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    float32_logits: bool = False
    correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_best: int = 2
    renormalise: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    shared: int = 0

    def __post_init__(self) -> None:
        if self.score not in ("softmax", "topk_softmax", "sigmoid"):
            raise ValueError(f"unknown router score {self.score!r}")
        if self.num_experts % self.num_groups or not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(f"{self.num_experts} experts do not fit {self.num_groups} groups of which {self.topk_groups} are chosen")


class Router(nn.Module):
    """Stands in for transformers' router module: returns (logits, weights, ids)."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, linear: Linear, spec: RouterSpec) -> None:
        super().__init__()
        self.linear, self.spec = linear, spec
        bias = torch.zeros(spec.num_experts, dtype=torch.float32, device=linear.weight.device) if spec.correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [..., H] -> (logits [M, E], topk_weights float32 [M, K], topk_ids int32 [M, K]); shared experts count in K, a gate of theirs in E."""
        x = x.reshape(-1, x.shape[-1])
        logits = self.linear(x.float() if self.spec.float32_logits else x)
        weights, ids = select_experts(logits, self.spec, self.e_score_correction_bias)
        return logits, weights, ids


def select_experts(logits: torch.Tensor, spec: RouterSpec, correction_bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [M, E] -> (topk_weights float32 [M, K], topk_ids int32 [M, K]); the best expert comes first, shared ones last."""
    logits, all_logits = logits[:, : spec.num_experts].float(), logits
    if spec.score == "topk_softmax":
        chosen, ids = logits.topk(spec.top_k, dim=-1)
        weights = chosen.softmax(dim=-1)
    else:
        scores = logits.sigmoid() if spec.score == "sigmoid" else logits.softmax(dim=-1)
        choice = scores if correction_bias is None else scores + correction_bias
        if spec.num_groups > 1:
            choice = _keep_best_groups(choice, spec)
        ids = choice.topk(spec.top_k, dim=-1)[1]
        weights = scores.gather(1, ids)
    if spec.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.epsilon)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return with_shared(weights, ids.to(torch.int32), all_logits, spec)


def with_shared(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, spec: RouterSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [M, K] of the routed experts -> those of the shared ones behind them."""
    if not spec.shared:
        return weights, ids
    own = logits[:, spec.num_experts :].float().sigmoid() if logits.shape[1] > spec.num_experts else weights.new_ones(weights.shape[0], 1)
    shared = torch.arange(spec.num_experts, spec.num_experts + spec.shared, dtype=ids.dtype, device=ids.device)
    return torch.cat([weights, own.expand(-1, spec.shared)], 1), torch.cat([ids, shared.expand(len(ids), -1)], 1)


def _keep_best_groups(choice: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """choice [M, E] with -inf for experts outside each row's best groups."""
    grouped = choice.view(-1, spec.num_groups, spec.num_experts // spec.num_groups)
    group_scores = grouped.topk(spec.group_best, dim=-1)[0].sum(dim=-1)  # [M, groups]
    best = group_scores.topk(spec.topk_groups, dim=-1)[1]
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).view_as(choice)
