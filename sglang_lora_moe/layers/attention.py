"""Attention over the paged KV cache: the cache of a layer, the `torch_native` backend and the fused standard module.

Every step is packed: T tokens of B requests in one row of tokens. A layer writes its new keys and values to the rows that
`StepContext.kv_slots` names and then attends, per request, to the rows that the page table names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.layers.step import StepContext

# Upper bound of one block of attention scores (elements), so that a long prompt does not need n * m memory at once.
MAX_SCORES = 1 << 25


@dataclass(frozen=True)
class KVLayerSpec:
    """Shape of one layer's cache per token. v_dim 0: nothing is stored for values, they are a prefix of the keys (MLA)."""

    num_heads: int
    k_dim: int
    v_dim: int


@dataclass(frozen=True)
class AttentionSpec:
    """Fixed facts of one attention layer. `window` W: a query sees itself and the W - 1 tokens before it."""

    kv: KVLayerSpec
    num_heads: int
    value_dim: int  # columns of the output per head; equals kv.v_dim unless that is 0
    scaling: float
    window: int | None = None


class AttentionBackend(Protocol):
    """Computes attention of the packed step over one layer's cache."""

    def begin_step(self) -> None: ...

    def attend(self, q: torch.Tensor, layer: "PagedAttention", sinks: torch.Tensor | None) -> torch.Tensor:
        """q [T, Hq, Dk] -> [T, Hq, value_dim]; rows of padding tokens are undefined."""
        ...


class PagedAttention:
    """One layer's cache and its way through the backend. Not a module: it owns no weights."""

    def __init__(self, ctx: StepContext, spec: AttentionSpec, backend: AttentionBackend) -> None:
        self.ctx, self.spec, self.backend = ctx, spec, backend
        self.k_cache = torch.empty(0)
        self.v_cache = torch.empty(0)
        self.calls = 0  # of this layer; ServedModel checks that each layer ran once a step

    def allocate(self, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """Give the layer `num_pages` zeroed pages: k_cache [rows, Hkv, Dk], v_cache [rows, Hkv, Dv], also in float8 (e4m3, unscaled)."""
        kv, rows = self.spec.kv, num_pages * self.ctx.page_size
        self.k_cache = torch.zeros(rows, kv.num_heads, kv.k_dim, dtype=dtype, device=device)
        self.v_cache = torch.zeros(rows, kv.num_heads, kv.v_dim, dtype=dtype, device=device) if kv.v_dim else self.k_cache[..., : self.spec.value_dim]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """q [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv] or None (prefix of k), sinks [Hq] or None -> [T, Hq, value_dim]."""
        self.calls += 1
        slots = self.ctx.kv_slots[: k.shape[0]]
        write_rows(self.k_cache, slots, k)
        if v is not None:
            write_rows(self.v_cache, slots, v)
        return self.backend.attend(q, self, sinks)


def write_rows(cache: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """cache[rows] = values in the cache's dtype; what float8 cannot hold becomes its largest number."""
    if cache.dtype.itemsize == 1:
        limit = torch.finfo(cache.dtype).max
        cache, values = cache.view(torch.uint8), values.clamp(-limit, limit).to(cache.dtype).view(torch.uint8)
    cache.index_copy_(0, rows, values.to(cache.dtype))


def read_rows(cache: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """cache[rows] in `dtype`."""
    if cache.dtype.itemsize == 1:
        return cache.view(torch.uint8).index_select(0, rows).view(cache.dtype).to(dtype)
    return cache.index_select(0, rows).to(dtype)


# ---- torch_native ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _DecodeGroup:
    """Requests with one new token each, gathered side by side and padded to the longest."""

    tokens: torch.Tensor | slice  # their rows of the step [G]
    rows: torch.Tensor  # cache rows int64 [G * L]
    length: int  # L
    mask: torch.Tensor | None  # bool [G, L], None = nothing padded


@dataclass(frozen=True)
class _PrefillRequest:
    """One request with several new tokens; the cache rows are in order, from the first key that any of them sees."""

    start: int  # first token in the step
    num_queries: int
    first_position: int  # of the first query
    rows: torch.Tensor  # cache rows int64 [m]
    first_key: int  # position of rows[0]


class TorchNativeAttention:
    """Plain torch: decode requests are padded and batched, prefill requests run one by one. Works on any device."""

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx
        self._plans: dict[int | None, tuple[list[_DecodeGroup], list[_PrefillRequest]]] = {}  # by window, for this step

    def begin_step(self) -> None:
        """Forget the previous step; layers of equal window share one plan."""
        self._plans.clear()

    def attend(self, q: torch.Tensor, layer: PagedAttention, sinks: torch.Tensor | None) -> torch.Tensor:
        spec = layer.spec
        if spec.window not in self._plans:
            self._plans[spec.window] = self._plan(spec.window)
        groups, prefills = self._plans[spec.window]
        if len(groups) == 1 and not prefills and isinstance(groups[0].tokens, slice):
            return _decode(q[groups[0].tokens], groups[0], layer, sinks)
        out = q.new_zeros(q.shape[0], spec.num_heads, spec.value_dim)  # padding tokens stay zero
        for group in groups:
            out[group.tokens] = _decode(q[group.tokens], group, layer, sinks)
        for request in prefills:
            stop = request.start + request.num_queries
            out[request.start : stop] = _prefill(q[request.start : stop], request, layer, sinks)
        return out

    def _plan(self, window: int | None) -> tuple[list[_DecodeGroup], list[_PrefillRequest]]:
        ctx = self.ctx
        decode: list[tuple[int, int, int]] = []  # (request, token, keys seen)
        prefills: list[_PrefillRequest] = []
        start = 0
        for b, (num_queries, length) in enumerate(zip(ctx.query_lens, ctx.seq_lens_host, strict=True)):
            if num_queries == 1:
                decode.append((b, start, min(length, window or length)))
            elif num_queries > 1:
                first = length - num_queries
                first_key = max(0, first - window + 1) if window else 0
                positions = torch.arange(first_key, length, device=ctx.device)
                prefills.append(_PrefillRequest(start, num_queries, first, self._rows(ctx.page_table[b], positions), first_key))
            start += num_queries
        whole_step = len(decode) == ctx.num_tokens
        return [self._decode_group(members, whole_step) for members in _similar_lengths(decode)], prefills

    def _decode_group(self, members: list[tuple[int, int, int]], whole_step: bool) -> _DecodeGroup:
        device = self.ctx.device
        requests = torch.tensor([b for b, _, _ in members], device=device)
        counts = [count for _, _, count in members]
        longest = max(counts)
        offsets = torch.arange(longest, device=device)
        seen = torch.tensor(counts, device=device)
        first_key = self.ctx.seq_lens[requests] - seen  # > 0 only behind a window
        # Padding repeats the last key, so that only rows of the request itself are read; the mask hides it.
        positions = first_key[:, None] + torch.minimum(offsets[None], seen[:, None] - 1)
        rows = self._rows(self.ctx.page_table[requests], positions)
        mask = None if min(counts) == longest else offsets[None] < seen[:, None]
        in_order = whole_step and len(members) == self.ctx.num_tokens and all(token == i for i, (_, token, _) in enumerate(members))
        tokens = slice(0, len(members)) if in_order else torch.tensor([token for _, token, _ in members], device=device)
        return _DecodeGroup(tokens, rows.flatten(), longest, mask)

    def _rows(self, page_table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Cache rows int64 of `positions` [.., L] through `page_table` [.., pages]."""
        size = self.ctx.page_size
        pages = page_table.gather(-1, positions // size).to(torch.int64)
        return pages * size + positions % size


def _similar_lengths(members: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Split decode requests so that padding at most doubles the work of each group; one group in step order if it can be."""
    if not members:
        return []
    counts = [count for _, _, count in members]
    if max(counts) * len(counts) <= 2 * sum(counts):
        return [members]
    groups: list[list[tuple[int, int, int]]] = []
    for member in sorted(members, key=lambda m: -m[2]):
        if not groups or 2 * member[2] < groups[-1][0][2]:
            groups.append([])
        groups[-1].append(member)
    return groups


def _decode(q: torch.Tensor, group: _DecodeGroup, layer: PagedAttention, sinks: torch.Tensor | None) -> torch.Tensor:
    """q [G, Hq, Dk], one query per request -> [G, Hq, Dv]. Query heads that share a KV head act as its queries."""
    spec, batch = layer.spec, q.shape[0]
    k = read_rows(layer.k_cache, group.rows, q.dtype).view(batch, group.length, spec.kv.num_heads, -1)
    v = read_rows(layer.v_cache, group.rows, q.dtype).view(batch, group.length, spec.kv.num_heads, -1) if spec.kv.v_dim else k[..., : spec.value_dim]
    q = q.view(batch, spec.kv.num_heads, -1, spec.kv.k_dim)  # [G, Hkv, Hq / Hkv, Dk]
    mask = None if group.mask is None else group.mask[:, None, None]
    sink = None if sinks is None else sinks.view(1, spec.kv.num_heads, -1, 1)
    out = _attend(q, k.transpose(1, 2), v.transpose(1, 2), mask, spec.scaling, sink)
    return out.reshape(batch, spec.num_heads, spec.value_dim)


def _prefill(q: torch.Tensor, request: _PrefillRequest, layer: PagedAttention, sinks: torch.Tensor | None) -> torch.Tensor:
    """q [n, Hq, Dk] of one request -> [n, Hq, Dv], in blocks of queries."""
    spec = layer.spec
    groups, m = spec.num_heads // spec.kv.num_heads, request.rows.shape[0]
    k = read_rows(layer.k_cache, request.rows, q.dtype).transpose(0, 1).unsqueeze(1)  # [Hkv, 1, m, Dk]
    v = read_rows(layer.v_cache, request.rows, q.dtype).transpose(0, 1).unsqueeze(1) if spec.kv.v_dim else k[..., : spec.value_dim]
    k, v = k.expand(-1, groups, -1, -1), v.expand(-1, groups, -1, -1)
    sink = None if sinks is None else sinks.view(spec.kv.num_heads, groups, 1, 1)
    keys = torch.arange(request.first_key, request.first_key + m, device=q.device)
    block = max(1, MAX_SCORES // (spec.num_heads * m))
    outputs = []
    for begin in range(0, request.num_queries, block):
        part = q[begin : begin + block].view(-1, spec.kv.num_heads, groups, spec.kv.k_dim).permute(1, 2, 0, 3)  # [Hkv, g, n', Dk]
        queries = torch.arange(part.shape[2], device=q.device)[:, None] + (request.first_position + begin)
        mask = keys <= queries
        if spec.window:
            mask &= queries - keys < spec.window
        whole = part.shape[2] == m and not spec.window  # a fresh prompt in one block: the fused kernel needs no mask
        outputs.append(_attend(part, k, v, mask, spec.scaling, sink, causal=whole).permute(2, 0, 1, 3))  # [n', Hkv, g, Dv]
    return torch.cat(outputs).reshape(request.num_queries, spec.num_heads, spec.value_dim)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float, sinks: torch.Tensor | None, causal: bool = False
) -> torch.Tensor:
    """softmax(scaling * q k^T [+ a sink column]) v over four-dimensional tensors; mask bool, True = seen; softmax in float32.

    `causal` promises that the mask is the square lower triangle.
    """
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if causal else mask, is_causal=causal, scale=scaling)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    # A sink is one more score that takes part in the softmax and has no value.
    scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.matmul(scores.softmax(dim=-1)[..., :-1].to(v.dtype), v)


def _triton(ctx: StepContext) -> AttentionBackend:
    from sglang_lora_moe.layers.attention_triton import TritonAttention

    return TritonAttention(ctx)


ATTENTION_BACKENDS: dict[str, Callable[[StepContext], AttentionBackend]] = {"torch_native": TorchNativeAttention, "triton": _triton}


# ---- the standard module --------------------------------------------------------------------------------------------
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) in halves layout: x [T, heads, D], cos and sin [T, R/2]; the first R of D columns turn."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class Attention(nn.Module):
    """Replaces a whole q/k/v/o attention module of transformers, with one fused qkv linear.

    q and k may be normalised per head or over the whole row, before the rotation. `half_tables`: the model's cos and sin
    have R/2 columns (gpt-oss); elsewhere R columns of which the second half repeats the first.
    """

    def __init__(
        self,
        qkv: Linear,
        o_proj: Linear,
        paged: PagedAttention,
        *,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm_per_head: bool = True,
        sinks: nn.Parameter | None = None,
        half_tables: bool = False,
    ) -> None:
        super().__init__()
        self.qkv, self.o_proj, self.paged = qkv, o_proj, paged
        self.q_norm, self.k_norm, self.norm_per_head, self.sinks, self.half_tables = q_norm, k_norm, norm_per_head, sinks, half_tables

    def forward(self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: object) -> tuple[torch.Tensor, None]:
        """hidden_states [1, T, H], position_embeddings cos and sin [1, T, R or R/2] -> ([1, T, H], None)."""
        out = self.attend(self.qkv(hidden_states[0]), *self.tables(position_embeddings))
        return self.o_proj(out.flatten(1))[None], None

    def tables(self, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, R/2]."""
        cos, sin = (table[0] if self.half_tables else table[0, :, : table.shape[-1] // 2] for table in position_embeddings)
        return cos, sin

    def attend(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """qkv [T, rows of q, k and v], cos and sin [T, R/2] -> [T, Hq, Dv]: what lies between the two linears."""
        spec = self.paged.spec
        head_dim, kv_heads = spec.kv.k_dim, spec.kv.num_heads
        q, k, v = qkv.split([spec.num_heads * head_dim, kv_heads * head_dim, kv_heads * spec.kv.v_dim], dim=-1)
        q, k = self._normed(q, self.q_norm, head_dim), self._normed(k, self.k_norm, head_dim)
        return self.paged(rotate(q, cos, sin), rotate(k, cos, sin), v.unflatten(-1, (kv_heads, spec.kv.v_dim)), self.sinks)

    def _normed(self, x: torch.Tensor, norm: nn.Module | None, head_dim: int) -> torch.Tensor:
        """x [T, heads * D] -> [T, heads, D], normalised over D or over the whole row."""
        if norm is not None and not self.norm_per_head:
            x = norm(x)
        x = x.unflatten(-1, (-1, head_dim))
        return norm(x) if norm is not None and self.norm_per_head else x
