"""Attention of many query tokens by wgmma: on the emulator under AddressSanitizer and UBSan; on a Hopper GPU the operator itself."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.ops.paged_attention import in_cuda, paged_attention
from tests.ops import emulator
from tests.ops.emulator import DEVICE, GPU
from tests.ops.test_paged_attention import reference
from tests.references import relative_error

DRIVER = Path(__file__).parent / "attention_driver.cpp"
pytestmark = emulator.HOPPER_OR_EMULATED
CASES = {  # heads, KV heads, page, query tokens and all tokens of each request
    "group 8": (8, 1, 16, [40, 1], [40, 300]),
    "group 4, context": (8, 2, 16, [5, 33, 2], [261, 33, 130]),
    "one head, large pages": (2, 2, 256, [150], [300]),
    "group 16, small pages, padding": (16, 1, 8, [9, 20], [200, 0]),
}
if GPU:
    CASES["Qwen3-30B-A3B"] = (32, 4, 16, [700, 1, 2048, 64, 513], [700, 900, 2048, 1000, 3000])
    CASES["many requests"] = (32, 8, 64, [7 * i % 50 + 1 for i in range(200)], [7 * i % 50 + 1 + 31 * i % 900 for i in range(200)])


def emulate(driver: Path) -> emulator.Operators:
    """The operator on CPU tensors is the emulated kernel."""
    order = 0

    def run(q, k_cache, v_cache, page_table, query_starts, seq_lens, tickets, out, page_size, scale, blocks, overlap) -> None:
        nonlocal order
        order += 1
        sizes = (order % 4, *q.shape[:2], k_cache.shape[1], *page_table.shape, page_size, q.dtype == torch.bfloat16, blocks, k_cache.shape[0])
        head = struct.pack("10if", *map(int, sizes), scale * 1.4426950408889634)
        written = emulator.answer(driver, head, q, k_cache, v_cache, page_table, query_starts, seq_lens)
        tickets.copy_(torch.frombuffer(written[:8], dtype=torch.int32))
        out.copy_(torch.frombuffer(written[8:], dtype=out.dtype).view(out.shape))

    return {"prefill_attention": run}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, dtype: torch.dtype) -> None:
    """What no request has written is NaN. A request of 0 tokens is padding, whose rows are zeros."""
    hq, hkv, page, lens, seqs = CASES[case]
    torch.manual_seed(0)
    pages = max(seqs) // page + 1
    table = (torch.randperm(len(seqs) * pages, device="cpu") + 1).view(len(seqs), pages).int().to(DEVICE)
    caches = tuple(torch.randn((len(seqs) * pages + 1) * page, hkv, 128, device=DEVICE).to(dtype) for _ in range(2))
    for row, tokens in zip(table, seqs, strict=True):
        written = torch.arange(tokens, pages * page, device=DEVICE)
        for cache in caches:
            cache[row[written // page].long() * page + written % page] = float("nan")
    q = (torch.randn(sum(lens), hq, 128, device=DEVICE) * 2).to(dtype)
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    seq_lens, tickets, scale = torch.tensor(seqs, dtype=torch.int32, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE), 128**-0.5
    real = [i for i, tokens in enumerate(seqs) if tokens]
    rows = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1]), device=DEVICE) for i in real])
    want = reference(q[rows], *caches, table[real], [lens[i] for i in real], [seqs[i] for i in real], page, scale, None, None, None)
    for blocks in (1, 2) if not GPU else (132, 3):
        out = torch.full_like(q, float("nan"))
        torch.ops.sglang_lora_moe.prefill_attention(q, *caches, table, starts, seq_lens, tickets, out, page, scale, blocks, True)
        assert relative_error(out[rows], want) < 5e-3
        assert out.isfinite().all()
        assert not tickets.any(), "the next launch would begin in the middle"
        out[rows] = 0
        assert not out.any()


@pytest.mark.gpu
def test_paged_attention_takes_it() -> None:
    """With tickets and without a window: the same result as Triton's to rounding, and bit-equal in every run, in graphs too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1024, heads, 128, device=DEVICE, dtype=torch.bfloat16) for heads in (32, 4, 4))
    table = torch.randperm(64, device=DEVICE).int().view(2, 32)
    starts, lens = torch.tensor([0, 512, 1024], dtype=torch.int32, device=DEVICE), torch.tensor([512, 512], dtype=torch.int32, device=DEVICE)
    assert in_cuda(q, k, v, 16)
    assert not in_cuda(q, k[..., :64], v, 16)
    assert not in_cuda(q[:, :24], k, v, 16)
    tickets = torch.zeros(2, dtype=torch.int32, device=DEVICE)

    def run(tickets: torch.Tensor | None) -> torch.Tensor:
        return paged_attention(q, k, v, table, starts, lens, page_size=16, scale=0.1, decode=False, tickets=tickets)

    first = run(tickets)
    assert relative_error(first, run(None)) < 5e-3
    emulator.check_replays(lambda: run(tickets), first)
