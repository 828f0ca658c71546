"""Routings and adapter assignments, shared by kernel tests and benchmarks, so that both walk the same axes."""

from __future__ import annotations

import torch

POPULARITIES = ("none", "identical", "distinct", "uniform", "zipf", "mixed")
ROUTINGS = ("uniform", "zipf", "one_expert", "few_experts", "some_invalid", "all_invalid")


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def make_token_slots(popularity: str, tokens: int, active: int, g: torch.Generator) -> torch.Tensor:
    """int32 [M], values in -1..active-1.

    none: base only; identical: all on one adapter; distinct: token t on adapter t mod active; uniform and zipf: random, zipf with
    weights 1, 1/2, 1/3..; mixed: uniform, and every other token on the base.
    """
    if popularity == "none" or active == 0:
        return torch.full((tokens,), -1, dtype=torch.int32)
    if popularity == "identical":
        return torch.full((tokens,), active // 2, dtype=torch.int32)
    if popularity == "distinct":
        return torch.arange(tokens, dtype=torch.int32) % active
    if popularity == "zipf":
        weights = 1.0 / torch.arange(1, active + 1)
        return torch.multinomial(weights.expand(max(tokens, 1), active), 1, generator=g)[:tokens, 0].to(torch.int32)
    slots = torch.randint(0, active, (tokens,), generator=g, dtype=torch.int32)
    if popularity == "mixed":
        slots[::2] = -1
    return slots


def make_topk_ids(routing: str, tokens: int, top_k: int, experts: int, g: torch.Generator, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """[M, K]: the K best of random scores (uniform; zipf: scores fall with the expert's number), or the extremes a kernel may meet."""
    if routing == "one_expert":
        return torch.full((tokens, top_k), experts - 1, dtype=dtype)
    if routing == "all_invalid":
        return torch.full((tokens, top_k), -1, dtype=dtype)
    if routing == "few_experts":
        return torch.randint(0, min(3, experts), (tokens, top_k), generator=g).to(dtype)
    scores = torch.rand((tokens, experts), generator=g)
    if routing == "zipf":
        scores = scores.clamp_min(1e-6).log() / (1.0 / torch.arange(1, experts + 1))  # weighted sampling without replacement
    ids = scores.topk(min(top_k, experts), dim=1).indices
    if top_k > experts:
        ids = torch.cat([ids, torch.randint(0, experts, (tokens, top_k - experts), generator=g)], dim=1)
    if routing == "some_invalid":
        drop = torch.rand((tokens, top_k), generator=g)
        ids = torch.where(drop < 0.2, -1, torch.where(drop > 0.9, experts, ids))
    return ids.to(dtype).contiguous()
