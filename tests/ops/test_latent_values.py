"""Splits of latent attention merged where their sum is multiplied: on the emulator under AddressSanitizer and UBSan; on a Hopper GPU the operator itself."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.ops.latent_attention import latent_values, values_merge
from sglang_lora_moe.ops.paged_attention import paged_attention
from tests.ops import emulator
from tests.ops.emulator import DEVICE, GPU
from tests.references import relative_error

DRIVER = Path(__file__).parent / "latent_values_driver.cpp"
pytestmark = emulator.HOPPER_OR_EMULATED
CASES = {  # tokens, heads, splits, columns of a latent, rows of a head that are skipped, and that are not
    "one token": (1, 2, 32, 512, 128, 128),
    "twelve tokens": (12, 1, 16, 512, 128, 128),
    "clusters of four": (9, 4, 16, 32, 24, 64),
    "many rows": (5, 1, 8, 64, 0, 256),
    "no cluster": (3, 2, 2, 96, 8, 16),
    "many heads": (17, 40, 2, 64, 16, 128),
}
if GPU:
    real = ((12, 16, 16), (64, 16, 4), (132, 16, 2), (1, 128, 32), (33, 128, 2))
    CASES |= {f"{m} tokens of {heads} heads": (m, heads, splits, 512, 128, 128) for m, heads, splits in real}


def emulate(driver: Path) -> emulator.Operators:
    """The operator on CPU tensors is the emulated kernel."""
    order = 0

    def run(parts, lse, w, out, overlap) -> None:
        nonlocal order
        order += 1
        rows = out.shape[1] // lse.shape[1]
        head = struct.pack("8i", order % 4, *lse.shape, w.shape[1], w.shape[0] // lse.shape[1] - rows, rows, w.dtype == torch.bfloat16)
        out.copy_(torch.frombuffer(emulator.answer(driver, head, parts, lse, w), dtype=out.dtype).view(out.shape))

    return {"latent_values": run}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, dtype: torch.dtype) -> None:
    """Splits without keys hold NaN; a token without any is padding, whose values are zeros."""
    m, heads, splits, columns, skipped, rows = CASES[case]
    torch.manual_seed(0)
    parts, lse = torch.randn(m, heads, splits, columns, device=DEVICE), torch.randn(m, heads, splits, device=DEVICE) * 3
    used = torch.randint(1, splits + 1, (m, 1, 1), device=DEVICE)
    used[m // 2] = splits
    used[m - 1] = 0 if m > 1 else splits // 2
    absent = (torch.arange(splits, device=DEVICE) >= used).expand_as(lse)
    lse[absent], parts[absent] = float("-inf"), float("nan")
    w = (torch.randn(heads * (skipped + rows), columns, device=DEVICE) * columns**-0.5).to(dtype)
    share = torch.softmax(lse * math.log(2), 2).nan_to_num()
    x = (torch.where(absent[..., None], 0, parts) * share[..., None]).sum(2).to(dtype)
    want = torch.einsum("thr,hvr->thv", x.float(), w.float().view(heads, -1, columns)[:, skipped:]).flatten(1)
    found = latent_values((parts, lse), w, rows)
    assert relative_error(found, want) < 5e-3
    assert m == 1 or not found[m - 1].any()
    assert torch.equal(found, latent_values((parts, lse), w, rows)), "two runs differ"


def test_what_is_no_number_stays_so() -> None:
    parts, lse = torch.ones(2, 1, 2, 32, device=DEVICE), torch.zeros(2, 1, 2, device=DEVICE)
    lse[1, 0, 1] = float("nan")
    found = latent_values((parts, lse), torch.ones(16, 32, device=DEVICE, dtype=torch.bfloat16), 16)
    assert (found[0] == 32).all() and found[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [130, 2000])
@pytest.mark.parametrize(("requests", "heads"), [(1, 16), (12, 16), (64, 16), (132, 16), (200, 16), (2, 128), (16, 128)])
def test_equals_the_merge_before(requests: int, heads: int, keys: int) -> None:
    """Attention and values of DeepSeek's latents, some requests much shorter than others; two replays are bit-equal."""
    torch.manual_seed(0)
    pages = keys // 16 + 1
    cache = torch.randn((requests * pages + 1) * 16, 1, 576, device=DEVICE).bfloat16()
    q, w = torch.randn(requests, heads, 576, device=DEVICE).bfloat16(), torch.randn(heads * 256, 512, device=DEVICE).bfloat16() * 512**-0.5
    table = (torch.randperm(requests * pages, device=DEVICE) + 1).int().view(requests, pages)
    lens = torch.tensor([keys if i % 3 == 0 else 1 + 37 * i % keys for i in range(requests)], dtype=torch.int32, device=DEVICE)
    starts = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE)
    assert values_merge(w, 128, 16) and not values_merge(w, 128, 17) and not values_merge(w.float(), 128, 16) and not values_merge(w, 192, 16)

    def run(apart: bool) -> torch.Tensor:
        return latent_values(paged_attention(q, cache, cache[..., :512], table, starts, lens, page_size=16, scale=576**-0.5, decode=True, apart=apart), w, 128)

    want, found = run(False), run(True)
    assert relative_error(found, want.float()) < 5e-3
    emulator.check_replays(lambda: run(True), found)
