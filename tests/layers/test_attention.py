"""The paged cache and the torch_native backend against attention written out per token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import sglang_lora_moe.layers.attention as attention
from sglang_lora_moe.layers.attention import AttentionSpec, KVLayerSpec, PagedAttention, TorchNativeAttention, rotate
from sglang_lora_moe.layers.step import StepContext

PAGE = 4


@dataclass
class Case:
    heads: int = 4
    kv_heads: int = 2
    k_dim: int = 8
    v_dim: int = 8  # 0 = values are a prefix of the keys
    window: int | None = None
    sinks: bool = False


CASES = {
    "grouped": Case(),
    "one head each": Case(heads=2, kv_heads=2),
    "window": Case(window=5),
    "window 1": Case(window=1),
    "sinks": Case(sinks=True),
    "sinks and window": Case(sinks=True, window=6),
    "values narrower": Case(v_dim=4),
    "latent": Case(kv_heads=1, k_dim=12, v_dim=0),
}
# (tokens in the cache before, new tokens) per request
STEPS = {
    "prefill": [(0, 7), (0, 1), (0, 12)],
    "decode": [(9, 1), (14, 1), (12, 1)],
    "decode of very different lengths": [(0, 1), (60, 1), (3, 1), (31, 1)],
    "mixed": [(9, 1), (4, 9), (0, 3), (20, 1), (8, 5)],
}


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, case: Case, sinks: torch.Tensor | None) -> torch.Tensor:
    """One query q [Hq, D] at `position` over keys k [n, Hkv, D]."""
    first = max(0, position - case.window + 1) if case.window else 0
    out = []
    for head in range(case.heads):
        kv_head = head // (case.heads // case.kv_heads)
        scores = k[first : position + 1, kv_head] @ q[head] * 0.3
        if sinks is not None:
            scores = torch.cat([scores, sinks[head : head + 1]])
        out.append(scores.softmax(0)[: position + 1 - first] @ v[first : position + 1, kv_head])
    return torch.stack(out)


def run_case(case: Case, work: list[tuple[int, int]], padding: int = 0) -> None:
    generator = torch.Generator().manual_seed(0)
    ctx = StepContext(max_tokens=64, max_requests=8, max_pages=20, page_size=PAGE)
    value_dim = case.v_dim or 6
    spec = AttentionSpec(KVLayerSpec(case.kv_heads, case.k_dim, case.v_dim), case.heads, value_dim, 0.3, case.window)
    backend = TorchNativeAttention(ctx)
    layer = PagedAttention(ctx, spec, backend)
    layer.allocate(100, torch.float32, torch.device("cpu"))
    layer.k_cache.fill_(1e4)  # stale rows must not matter
    sinks = torch.randn(case.heads, generator=generator) if case.sinks else None
    free = torch.randperm(99, generator=generator)[: 8 * 12] + 1

    expected, queries, new_k, new_v, start = [], [], [], [], 0
    for b, (before, n) in enumerate(work):
        total = before + n
        q, k = torch.randn(n, case.heads, case.k_dim, generator=generator), torch.randn(total, case.kv_heads, case.k_dim, generator=generator)
        v = torch.randn(total, case.kv_heads, case.v_dim, generator=generator) if case.v_dim else k[..., :value_dim]
        num_pages = -(-total // PAGE)
        pages, free = free[:num_pages], free[num_pages:]
        rows = pages[torch.arange(total) // PAGE] * PAGE + torch.arange(total) % PAGE
        layer.k_cache[rows[:before]], layer.v_cache[rows[:before]] = k[:before], v[:before]
        ctx.page_table[b, :num_pages] = pages.to(torch.int32)
        ctx.kv_slots[start : start + n], ctx.seq_lens[b] = rows[before:], total
        expected += [reference(q[i], k, v, before + i, case, sinks) for i in range(n)]
        queries.append(q), new_k.append(k[before:]), new_v.append(v[before:])
        start += n
    ctx.num_tokens, ctx.num_requests = start + padding, len(work)
    ctx.query_lens, ctx.seq_lens_host = [n for _, n in work], [before + n for before, n in work]
    ctx.kv_slots[start : start + padding] = 0

    def padded(parts: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat(parts)
        return torch.cat([whole, whole[:1].expand(padding, -1, -1)])

    backend.begin_step()
    out = layer(padded(queries), padded(new_k), padded(new_v) if case.v_dim else None, sinks)
    assert out.shape == (start + padding, case.heads, value_dim)
    torch.testing.assert_close(out[:start], torch.stack(expected), rtol=0, atol=1e-5)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, step: str) -> None:
    run_case(CASES[name], STEPS[step])
    run_case(CASES[name], STEPS[step], padding=3)


def test_long_prompts_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_SCORES", 4 * 20 * 3)  # three queries a block
    for name in ("grouped", "window", "sinks", "latent"):
        run_case(CASES[name], [(0, 20), (10, 10)])


def test_rotation_leaves_the_rest_and_keeps_norms() -> None:
    x, angle = torch.randn(3, 2, 10), torch.rand(3, 4)
    y = rotate(x, angle.cos(), angle.sin())
    assert torch.equal(y[..., 8:], x[..., 8:])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(x, torch.ones(3, 4), torch.zeros(3, 4)), x)
