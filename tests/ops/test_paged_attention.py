"""Paged attention against a loop over requests in float64, through the interpreter here and natively on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.references import assert_near, relative_error

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU  # the interpreter computes bfloat16 wrongly


def reference(q, k, v, table, lens, seqs, page, scale, window, sinks, softcap):
    """softmax(scale q k^T, sinks) v, request by request."""
    outs, start, groups = [], 0, q.shape[1] // k.shape[1]
    for b, (n, m) in enumerate(zip(lens, seqs, strict=True)):
        index = torch.arange(m, device=q.device)
        rows = table[b, index // page].long() * page + index % page
        keys, values = (x[rows].double().repeat_interleave(groups, 1) for x in (k, v))
        s = torch.einsum("nhd,mhd->hnm", q[start : start + n].double(), keys) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        i, j = torch.arange(m - n, m, device=q.device)[:, None], index[None]
        seen = (j <= i) & (j > i - (window or m + 1))
        s = s.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            s = torch.cat([s, sinks.double().view(-1, 1, 1).expand(-1, n, 1)], -1)
        outs.append(torch.einsum("hnm,mhd->nhd", s.softmax(-1)[..., :m], values))
        start += n
    return torch.cat(outs)


CASES = {
    "gqa": {"heads": (8, 2), "d": 32},
    "mha_odd_dim": {"heads": (3, 3), "d": 24},
    "window_sinks": {"heads": (4, 1), "d": 16, "window": 9, "sinks": True},
    "softcap": {"heads": (4, 2), "d": 16, "softcap": 5.0},
    "latent": {"heads": (6, 1), "d": 40, "dv": 32},
    "latent_shares": {"heads": (20, 1), "d": 272, "dv": 256},
    "wide": {"heads": (4, 2), "d": 136},
}
REAL = {  # Qwen3-30B-A3B, gpt-oss-20b and DeepSeek-V3's latents
    "qwen3": {"heads": (32, 4), "d": 128},
    "gpt_oss": {"heads": (64, 8), "d": 64, "window": 128, "sinks": True},
    "wide_192": {"heads": (16, 2), "d": 192},
    "wide_256": {"heads": (8, 4), "d": 256},
    "deepseek": {"heads": (16, 1), "d": 576, "dv": 512},
    "deepseek_128": {"heads": (128, 1), "d": 576, "dv": 512},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, decode: bool, dtype: torch.dtype) -> None:
    lens, seqs = ([1, 1, 1, 1], [1, 37, 300, 5]) if decode else ([5, 1, 20, 33], [5, 37, 20, 70])
    check(CASES[case], decode, dtype, lens, seqs, page=8)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("case", ["gqa", "window_sinks", "latent"])
def test_float8_cache(case: str, decode: bool) -> None:
    """Equals attention over the values that float8 has kept."""
    lens, seqs = ([1, 1, 1, 1], [1, 37, 300, 5]) if decode else ([5, 1, 20, 33], [5, 37, 20, 70])
    check(CASES[case], decode, torch.float32, lens, seqs, page=8, cache=torch.float8_e4m3fn)


@pytest.mark.parametrize("page", [16, 32, 64])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("case", ["gqa", "window_sinks", "latent_shares"])
def test_blocks_of_two_pages_or_of_part_of_one(case: str, decode: bool, page: int) -> None:
    lens, seqs = ([1, 1, 1], [1, 37, 130]) if decode else ([5, 20, 33], [5, 20, 100])
    check(CASES[case], decode, torch.float32, lens, seqs, page)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("case", ["deepseek", "deepseek_128"])
def test_real_latents_in_float8(case: str, decode: bool) -> None:
    lens, seqs = ([1] * 33, [1 + 61 * i for i in range(33)]) if decode else ([1, 700, 129, 64, 1], [5, 700, 1129, 64, 900])
    check(REAL[case], decode, torch.bfloat16, lens, seqs, page=16, cache=torch.float8_e4m3fn)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # float32 latents take a minute to compile
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case: str, decode: bool, dtype: torch.dtype) -> None:
    lens, seqs = ([1] * 33, [1 + 61 * i for i in range(33)]) if decode else ([1, 700, 129, 64, 1], [5, 700, 1129, 64, 900])
    check(REAL[case], decode, dtype, lens, seqs, page=16)


def check(spec: dict[str, Any], decode: bool, dtype: torch.dtype, lens: list[int], seqs: list[int], page: int, cache: torch.dtype | None = None) -> None:
    """What no request has written is NaN, and no page where a request has none."""
    from sglang_lora_moe.ops import paged_attention as op

    (hq, hkv), d = spec["heads"], spec["d"]
    dv = spec.get("dv", d)
    torch.manual_seed(0)
    pages = max(seqs) // page + 1
    table = (torch.randperm(len(seqs) * pages, device="cpu") + 1).view(len(seqs), pages).int().to(DEVICE)
    k = torch.randn((len(seqs) * pages + 1) * page, hkv, d, device=DEVICE).to(dtype)
    v = k[..., :dv] if "dv" in spec else torch.randn(*k.shape[:2], dv, device=DEVICE).to(dtype)
    unwritten = torch.ones(k.shape[0], dtype=torch.bool, device=DEVICE)
    for row, tokens in zip(table, seqs, strict=True):
        index = torch.arange(tokens, device=DEVICE)
        unwritten[row[index // page].long() * page + index % page] = False
        row[-(-tokens // page) :] = 1 << 30
    k[unwritten] = v[unwritten] = float("nan")
    q = torch.randn(sum(lens), hq, d, device=DEVICE).to(dtype)
    if cache is not None:
        k = k.to(cache)
        v = k[..., :dv] if "dv" in spec else v.to(cache)
    sinks = torch.randn(hq, device=DEVICE).to(dtype) if spec.get("sinks") else None
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    args = {"page_size": page, "scale": d**-0.5, "window": spec.get("window"), "sinks": sinks, "softcap": spec.get("softcap"), "decode": decode}
    seq_lens = torch.tensor(seqs, dtype=torch.int32, device=DEVICE)
    out = op.paged_attention(q, k, v, table, starts, seq_lens, **args)
    want = reference(q, k.to(dtype), v.to(dtype), table, lens, seqs, page, d**-0.5, args["window"], sinks, args["softcap"])
    assert_near(out, want.float(), f"paged_attention, {'decode' if decode else 'prefill'}", spec)
    assert torch.equal(out, op.paged_attention(q, k, v, table, starts, seq_lens, **args)), "two runs differ"
    if decode and "dv" in spec:  # splits of latents may be merged elsewhere
        apart = op.paged_attention(q, k, v, table, starts, seq_lens, **args, apart=True)
        if isinstance(apart, tuple):  # what no split has seen was not written
            parts, lse = apart
            apart = (parts.nan_to_num() * torch.softmax(lse * math.log(2), 2)[..., None]).sum(2)
            assert lse.shape[2] > 1
        assert relative_error(apart, out.float()) <= (5e-3 if dtype == torch.bfloat16 else 1e-3)


def test_refuses_shapes_that_do_not_fit() -> None:
    from sglang_lora_moe.ops import paged_attention as op

    q, k = torch.zeros(1, 4, 8, device=DEVICE), torch.zeros(16, 3, 8, device=DEVICE)
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="heads must divide"):
        op.paged_attention(q, k, k, one[None], torch.tensor([0, 1], dtype=torch.int32), one, page_size=8, scale=1.0, decode=True)
