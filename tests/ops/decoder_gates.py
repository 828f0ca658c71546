"""Compile the kernels of a decoder layer beside the experts ahead of time and print one JSON line a kernel. Run by test_decoder_compile.py.

Shapes of Qwen3-30B-A3B, with adapters on q, k, v and o. A process of its own: the tests' one has Triton's interpreter switched on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from benchmarks.compile_ahead import compiling
from sglang_lora_moe.layers.topk import RouterSpec
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.targets import LinearTarget
from sglang_lora_moe.ops.latent_attention import latent_queries, latent_values
from sglang_lora_moe.ops.lora_linear import ROWS_MAX, LinearAddend, PartTables, linear_expand, linear_shrink, shrink_splits
from sglang_lora_moe.ops.paged_attention import paged_attention
from sglang_lora_moe.ops.qk_norm_rope import qk_norm_rope
from sglang_lora_moe.ops.rms_norm import rms_norm, rms_norm_shrink
from sglang_lora_moe.ops.router_topk import FEW_TOKENS, beside_norm, normed_logits, router_logits, router_topk

H, HQ, HKV, D, META = 2048, 32, 4, 128, torch.device("meta")
STEPS = ((1, 1), (16, 16), (64, 64), (256, 256), (2048, 1), (2048, 256))  # (tokens, requests)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def addend(names: tuple[str, ...], tokens: int, splits: int, rank: int = 16) -> LinearAddend:
    rows = {"q": HQ * D, "k": HKV * D, "v": HKV * D, "o": H}
    pool = LoRAMemoryPool([LinearTarget(name, HQ * D if name == "o" else H, rows[name]) for name in names], 2, rank, torch.bfloat16, META)
    tables = PartTables([(pool.stacks_for(name), 0, rows[name]) for name in names])  # type: ignore[misc]
    ids = empty(tokens, dtype=torch.int32)
    return LinearAddend(empty(splits, tokens, len(names), rank, dtype=torch.float32), tables, ids, ids, ids)


def layer(tokens: int, requests: int, cache: torch.dtype) -> None:
    decode, x = tokens == requests, empty(tokens, H)
    many = tokens > ROWS_MAX
    qkv = addend(("q", "k", "v"), tokens, shrink_splits(tokens, H) if many else 1)
    o = addend(("o",), tokens, shrink_splits(tokens, HQ * D) if many else HQ)
    if many:
        linear_shrink(x, qkv)
    else:
        rms_norm_shrink(x, empty(H), 1e-6, empty(tokens, H), qkv)
    longs, k_cache, v_cache = empty(tokens, dtype=torch.int64), empty(4096, HKV, D, dtype=cache), empty(4096, HKV, D, dtype=cache)
    tables, norm = (empty(4096, D // 2, dtype=torch.float32),) * 2, empty(D)
    for low in (None, qkv):
        packed = empty(tokens, (HQ + 2 * HKV) * D)
        q = qk_norm_rope(packed, k_cache, v_cache, longs, longs, tables, num_heads=HQ, q_weight=norm, k_weight=norm, addend=low)
    pages, lens = empty(requests, 64, dtype=torch.int32), empty(requests, dtype=torch.int32)
    starts = empty(requests + 1, dtype=torch.int32)
    args = {"page_size": 16, "scale": D**-0.5, "decode": decode, "low": None if many else o}
    out = paged_attention(q, k_cache, v_cache, pages, starts, lens, **args)
    if not many:  # the merge by programs of 32 ranks
        paged_attention(q, k_cache, v_cache, pages, starts, lens, **args | {"low": addend(("o",), tokens, HQ, 64)})
    if many:
        linear_shrink(out.flatten(1), o)
        linear_expand(x, o)
    rms_norm(x, empty(H), 1e-6, empty(tokens, H), addend=o)
    if tokens <= FEW_TOKENS:
        router_topk(router_logits(x, empty(128, H), None), RouterSpec(128, 8))
        router_topk(normed_logits(x, empty(H), 1e-6, x, empty(128, H))[2], RouterSpec(128, 8))
        grouped = RouterSpec(256, 8, "sigmoid", True, True, 8, 4, 2, True, 1e-20, 2.5, 1)
        wide = empty(256, H, dtype=torch.float32)
        router_topk(router_logits(x, wide, None), grouped, empty(256, dtype=torch.float32))
        if beside_norm(x, wide, None):
            router_topk(normed_logits(x, empty(H), 1e-6, x, wide)[2], grouped, empty(256, dtype=torch.float32))


def latents(tokens: int, requests: int, cache: torch.dtype, heads: int = 16) -> None:
    """Of DeepSeek-V2-Lite, with linears between of DeepSeek-V3's form."""
    dim, rank, rope, longs, ints = 128, 512, 64, empty(tokens, dtype=torch.int64), empty(requests + 1, dtype=torch.int32)
    both, kv_b, k_cache = empty(tokens, heads * (dim + rope) + rank + rope), empty(2 * heads * dim, rank), empty(4096, 1, rank + rope, dtype=cache)
    rms_norm(both[:, :1536], empty(1536), 1e-6)
    tables = (empty(4096, rope // 2, dtype=torch.float32),) * 2
    found = latent_queries(
        both, both[:, heads * (dim + rope) :], kv_b, (empty(rank), 1e-6), k_cache, (longs, longs), tables, heads=heads, nope_dim=dim, interleaved=True
    )
    found = paged_attention(
        found, k_cache, k_cache[..., :rank], empty(requests, 64, dtype=torch.int32), ints, ints[1:],
        page_size=16, scale=0.1, decode=tokens == requests,
    )  # fmt: skip
    latent_values(found, kv_b, dim)


def wide_heads(tokens: int, requests: int, dim: int = 256) -> None:
    """Attention of 8 heads of 256 columns over 2 of keys."""
    cache, ints = empty(4096, 2, dim), empty(requests + 1, dtype=torch.int32)
    pages = empty(requests, 64, dtype=torch.int32)
    paged_attention(empty(tokens, 8, dim), cache, cache, pages, ints, ints[1:], page_size=16, scale=0.1, decode=tokens == requests)


def main() -> None:
    for arch in (80, 89, 90):
        for tokens, requests in ((16, 16), (2048, 1)):
            with compiling(arch, inspect=True) as found:
                wide_heads(tokens, requests)
                latents(tokens, requests, torch.bfloat16)
            for kernel in found:
                print(json.dumps({"arch": arch, "tokens": tokens, "cache": str(torch.bfloat16), **asdict(kernel)}))
    for tokens, requests in STEPS:
        for cache in (torch.bfloat16, torch.float8_e4m3fn):
            with compiling(90, inspect=True) as found:
                layer(tokens, requests, cache)
                latents(tokens, requests, cache)
                if tokens in (64, 2048):
                    latents(tokens, requests, cache, 128)
                if requests < tokens:
                    latents(tokens, 5, cache)
            for kernel in found:
                print(json.dumps({"arch": 90, "tokens": tokens, "cache": str(cache), **asdict(kernel)}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
