"""Integer linears of single tokens with what adapters add: on the emulator under AddressSanitizer and UBSan, on a GPU the operator itself."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.lora.host_views import slot_views
from sglang_lora_moe.lora.stacks import LinearStacks
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.lora_linear import LinearAddend
from sglang_lora_moe.ops.marlin_linear import PAIR_TOKENS, adds, marlin_linear, repack_linear
from sglang_lora_moe.ops.marlin_moe_pairs import can_add, marlin_linear_pairs
from sglang_lora_moe.quantization.wna16 import dequantize
from tests.moe_cases import Noise, generator
from tests.ops import ahead, emulator
from tests.ops.emulator import DEVICE
from tests.ops.test_marlin_linear import make_weight
from tests.ops.test_skinny_linear import make_addend
from tests.references import ref_linear, relative_error

DRIVER = Path(__file__).parent / "marlin_pairs_driver.cpp"
QKV = (160, 32, 64)


def waits_for(item: pytest.Item) -> ahead.Command | None:
    return ahead.emulated(DRIVER)


def emulate(driver: Path) -> emulator.Operators:
    """The operator on CPU tensors is the emulated kernel."""
    turn = 0

    def run(
        x, packed, scales, zeros, bias, ids, weights, s, slots, pool, offset, rank, scaling, starts, out, group_size, part_stride, units, alone
    ) -> None:  # fmt: skip
        nonlocal turn
        turn += 1
        splits, parts, width = (0, 0, 0) if s is None else (s.shape[0], *s.shape[2:])
        entries = 0 if s is None else (parts - 1) * part_stride + rank.numel()
        tables = [None if t is None else t.as_strided((entries,), (1,)) for t in (offset, rank, scaling)]
        fields = (
            turn % 4, 1, x.shape[0], 1, out.shape[1], x.shape[1], *packed.shape[1:3], scales.shape[2], group_size, packed.shape[3] // 32,
            x.dtype == torch.bfloat16, zeros is not None, bias is not None, True, s is not None, 0 if rank is None else rank.numel(),
            -(-width // 16) * 16, -(-width // 16) * 16, splits, units, 1, parts, part_stride, width, alone,
        )  # fmt: skip
        head = struct.pack("26i4f4q", *map(int, fields), 0.0, 0.0, 0.0, 0.0, 0, 0 if pool is None else pool.numel(), 0, 0)
        written = emulator.answer(driver, head, x, packed, scales, zeros, bias, ids, weights, slots, pool, *tables, starts, s)
        out.copy_(torch.frombuffer(written, dtype=out.dtype, count=out.numel()).view(out.shape))

    return {"marlin_linear_pairs": run}


def begun(x: torch.Tensor, addend: LinearAddend, stacks: list[LinearStacks], splits: int) -> LinearAddend:
    """The addend with its s filled as a kernel before would, in so many parts of x's columns; nothing beyond the ranks."""
    width = addend.tables.a.shrink_width
    s = torch.full((splits, x.shape[0], len(stacks), width), float("nan"), device=x.device)
    for token, slot in enumerate(addend.slots.tolist()):
        for part, of in enumerate(stacks):
            if slot >= 0 and (a := slot_views(of.a, slot)).rank:
                products = x[token].float()[:, None] * a.a_t().float()
                s[:, token, part, : a.rank] = torch.stack([piece.sum(0) for piece in products.chunk(splits)])
    return replace(addend, s=s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("parts", "k", "tokens", "splits", "max_rank"), [(QKV, 256, 1, 1, 16), ((256,), 1024, 1, 32, 16), (QKV, 512, 4, 3, 40), ((96,), 384, 3, 12, 24)]
)
def test_adapters(parts: tuple[int, ...], k: int, tokens: int, splits: int, max_rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts with and without an adapter, ranks that do and do not divide by 4 and 8, blocks of 32 and of 16 rows."""
    for i, (bits, group) in enumerate(((4, 128), (8, 64), (4, 32))):
        noise = Noise(generator(k + i, DEVICE), dtype)
        weight = make_weight(sum(parts), k, bits, group, i == 1, dtype, DEVICE)
        bias = noise(sum(parts)) if i == 1 else None
        form, x = repack_linear(weight, bias), noise(tokens, k)
        addend, stacks, slots = make_addend(parts, k, tokens, 4, "uniform", noise, max_rank=max_rank)
        if i == 2:
            slots.fill_(1)
        low = begun(x, addend, stacks, splits)
        assert can_add(low, x)
        with monkeypatch.context() as patch:
            if i == 2:
                patch.setattr(launch, "multiprocessors", lambda device: 1000)
            found, plain = marlin_linear_pairs(x, form, low), marlin_linear_pairs(x, form)
            again = marlin_linear_pairs(x, form, low)
        assert relative_error(found, ref_linear(x, dequantize(weight, dtype), bias, stacks, slots)) < 5e-3
        assert torch.equal(found[slots < 0], plain[slots < 0]), "rows without an adapter changed"
        assert torch.equal(found, again), "two runs differ"


def test_rule() -> None:
    noise = Noise(generator(0, DEVICE), torch.bfloat16)
    cases = ((QKV, 16, 1, True), ((160, 24, 64), 16, 1, False), ((40,), 16, 1, False), (QKV, 22, 1, False), (QKV, 16, PAIR_TOKENS + 1, False))
    for parts, max_rank, tokens, fits in cases:
        addend, stacks, _ = make_addend(parts, 64, tokens, 4, "uniform", noise, max_rank=max_rank)
        x, form = noise(tokens, 64), repack_linear(make_weight(sum(parts), 64, 4, 32, False, torch.bfloat16, DEVICE))
        assert adds(x, form, low := begun(x, addend, stacks, 1)) == fits
        assert not adds(x, replace(form, rows=1 << 20), low), "measured for small weights alone"
        if fits:
            assert torch.equal(marlin_linear(x, form, addend=low), marlin_linear_pairs(x, form, low))
            assert torch.equal(marlin_linear(x, form), marlin_linear_pairs(x, form))
