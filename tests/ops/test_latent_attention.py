"""The kernels between the linears of latent attention, against the formulas of their docstring."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.ops.latent_attention import latent_queries, latent_values
from tests.references import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 2e-6} | ({torch.bfloat16: 5e-3} if DEVICE == "cuda" else {})  # the interpreter does not round bfloat16 to nearest
TINY, LITE = (4, 24, 20, 32, 16), (16, 128, 128, 512, 64)  # heads, columns of a head's plain key and value, of a latent and of what is rotated
CASES = [(TINY, dtype) for dtype in BOUNDS] + [pytest.param(LITE, torch.bfloat16, marks=pytest.mark.gpu)]  # in float32 a minute to compile


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape) * 0.3).to(DEVICE, dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_queries(shape: tuple[int, ...], dtype: torch.dtype, tokens: int) -> None:
    """q and the latents are neighbours in one tensor, as a fused linear gives them."""
    torch.manual_seed(0)
    heads, nope, v_dim, rank, rope = shape
    width, interleaved = heads * (nope + rope), tokens != 5
    both, kv_b, norm = noise(tokens, width + rank + rope, dtype=dtype), noise(heads * (nope + v_dim), rank, dtype=dtype), noise(rank, dtype=dtype) + 1
    angle, positions = noise(64, rope // 2), torch.randint(0, 64, (tokens,), device=DEVICE)
    kv_slots, tables = torch.randperm(tokens + 8, device=DEVICE)[:tokens], (angle.cos(), angle.sin())
    caches = [torch.zeros(tokens + 8, 1, rank + rope, dtype=dtype, device=DEVICE) for _ in range(2)]
    found, again = (
        latent_queries(
            both, both[:, width:], kv_b, (norm, 1e-6), cache, (kv_slots, positions), tables, heads=heads, nope_dim=nope, interleaved=interleaved
        ) for cache in caches
    )  # fmt: skip
    assert torch.equal(found, again) and torch.equal(*caches)
    cos, sin = (table[positions] for table in tables)
    q, c, kr = both[:, :width].float().view(tokens, heads, -1), both[:, width : width + rank].float(), both[:, width + rank :].float()
    w_uk = kv_b.float().view(heads, -1, rank)[:, :nope]
    queries = torch.cat([torch.einsum("thn,hnr->thr", q[..., :nope], w_uk), turned(q[..., nope:], cos[:, None], sin[:, None], interleaved)], -1)
    normed = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-6) * norm.float()
    assert relative_error(found, queries) <= BOUNDS[dtype]
    assert relative_error(caches[0][kv_slots, 0], torch.cat([normed, turned(kr, cos, sin, interleaved)], -1)) <= BOUNDS[dtype]
    assert caches[0].count_nonzero(dim=-1).bool().sum() == tokens


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(1)
    heads, nope, v_dim, rank, _ = shape
    x, kv_b = noise(tokens, heads, rank, dtype=dtype), noise(heads * (nope + v_dim), rank, dtype=dtype)
    want = torch.einsum("thr,hvr->thv", x.float(), kv_b.float().view(heads, -1, rank)[:, nope:]).flatten(1)
    out = latent_values(x, kv_b, v_dim)
    assert torch.equal(out, latent_values(x, kv_b, v_dim)) and relative_error(out, want) <= BOUNDS[dtype]


def test_refuses_shapes_that_do_not_fit() -> None:
    one, row = torch.zeros(1, 64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit"):
        latent_queries(one, one, one, (one[0], 1e-6), one[:, None], (row, row), (one, one), heads=1, nope_dim=8, interleaved=True)
