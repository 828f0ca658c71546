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
class _Request:
    """The new tokens of one request; the cache rows are in order, from the first key that any of them sees."""

    start: int  # first token in the step
    num_queries: int
    rows: torch.Tensor  # cache rows int64 [m]
    first_key: int  # position of rows[0]


class TorchNativeAttention:
    """Plain torch, one request after another. Works on any device."""

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx
        self._requests: dict[int | None, list[_Request]] = {}  # by window, of this step

    def begin_step(self) -> None:
        """Forget the previous step; layers of equal window share what is found."""
        self._requests.clear()

    def attend(self, q: torch.Tensor, layer: PagedAttention, sinks: torch.Tensor | None) -> torch.Tensor:
        spec = layer.spec
        if spec.window not in self._requests:
            self._requests[spec.window] = self._find(spec.window)
        out = q.new_zeros(q.shape[0], spec.num_heads, spec.value_dim)  # padding tokens stay zero
        for request in self._requests[spec.window]:
            stop = request.start + request.num_queries
            out[request.start : stop] = _attend_request(q[request.start : stop], request, layer, sinks)
        return out

    def _find(self, window: int | None) -> list[_Request]:
        ctx, size, found, start = self.ctx, self.ctx.page_size, [], 0
        for b, (num_queries, length) in enumerate(zip(ctx.query_lens, ctx.seq_lens_host, strict=True)):
            if num_queries > 0:
                first_key = max(0, length - num_queries - window + 1) if window else 0
                positions = torch.arange(first_key, length, device=ctx.device)
                rows = ctx.page_table[b].gather(0, positions // size).to(torch.int64) * size + positions % size
                found.append(_Request(start, num_queries, rows, first_key))
            start += num_queries
        return found


def _attend_request(q: torch.Tensor, request: _Request, layer: PagedAttention, sinks: torch.Tensor | None) -> torch.Tensor:
    """q [n, Hq, Dk] of one request -> [n, Hq, Dv], in blocks of queries."""
    spec = layer.spec
    groups, m = spec.num_heads // spec.kv.num_heads, request.rows.shape[0]
    k = read_rows(layer.k_cache, request.rows, q.dtype).transpose(0, 1).unsqueeze(1)  # [Hkv, 1, m, Dk]
    v = read_rows(layer.v_cache, request.rows, q.dtype).transpose(0, 1).unsqueeze(1) if spec.kv.v_dim else k[..., : spec.value_dim]
    sink = None if sinks is None else sinks.view(spec.kv.num_heads, groups, 1, 1)
    if request.num_queries == 1:  # sees all keys; query heads that share a KV head act as its queries
        sink = None if sink is None else sink.transpose(1, 2)
        return _attend(q.view(spec.kv.num_heads, 1, groups, spec.kv.k_dim), k, v, None, spec.scaling, sink).reshape(1, spec.num_heads, spec.value_dim)
    k, v = k.expand(-1, groups, -1, -1), v.expand(-1, groups, -1, -1)
    keys = torch.arange(request.first_key, request.first_key + m, device=q.device)
    block = max(1, MAX_SCORES // (spec.num_heads * m))
    outputs = []
    for begin in range(0, request.num_queries, block):
        part = q[begin : begin + block].view(-1, spec.kv.num_heads, groups, spec.kv.k_dim).permute(1, 2, 0, 3)  # [Hkv, g, n', Dk]
        queries = torch.arange(part.shape[2], device=q.device)[:, None] + (request.first_key + m - request.num_queries + begin)
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
        return self.o_proj(self.attend(self.qkv(hidden_states[0]), *self.tables(position_embeddings)).flatten(1))[None], None

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
