"""The linear of more than 64 tokens that adds B s: on the emulator under AddressSanitizer and UBSan; on a Hopper GPU the operator itself."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.ops.lora_linear import COUNTS, LinearAddend, linear_shrink, shrink_splits
from sglang_lora_moe.ops.middle_linear import TOKENS, _shape_of, middle_linear, shape_for
from tests.moe_cases import Noise, generator
from tests.ops import emulator
from tests.ops.emulator import DEVICE, GPU
from tests.ops.test_skinny_linear import make_addend
from tests.references import ref_linear, relative_error

DRIVER = Path(__file__).parent / "middle_driver.cpp"
pytestmark = emulator.HOPPER_OR_EMULATED


def emulate(driver: Path) -> emulator.Operators:
    """The operator on CPU tensors is the emulated kernel."""
    turn = 0

    def run(
        x, w, bias, out, s, slots, pool, offset, rank, scaling, starts, part_stride, max_rank, tokens, rows, splits, overlap,
    ) -> None:  # fmt: skip
        nonlocal turn
        turn += 1
        parts = s.shape[2]
        entries = (parts - 1) * part_stride + rank.numel()
        tables = [t.as_strided((entries,), (1,)) for t in (offset, rank, scaling)]
        fields = (
            turn % 4, x.shape[0], w.shape[0], x.shape[1], x.dtype == torch.bfloat16, bias is not None, parts,
            s.shape[3], max_rank, part_stride, rank.numel(), entries, tokens, rows, splits, *starts, *[0] * (5 - len(starts)),
        )  # fmt: skip
        written = emulator.answer(driver, struct.pack("20iq", *map(int, fields), pool.numel()), x, w, bias, s, slots, pool, *tables)
        out.copy_(torch.frombuffer(written, dtype=out.dtype).view(out.shape))

    return {"middle_linear": run}


def with_s(x: torch.Tensor, addend: LinearAddend, stacks: list) -> LinearAddend:
    """The addend with s = A x; what nobody may read is NaN."""
    (m, k), tables = x.shape, addend.tables
    s = torch.full((1, m, tables.num_parts, tables.a.shrink_width), float("nan"), device=x.device)
    for part, stack in enumerate(stacks):
        for slot in addend.slots.unique().tolist():
            rank, rows = 0 if slot < 0 else int(stack.a.rank[slot]), addend.slots == slot
            if rank:
                s[0, rows, part, :rank] = x[rows].float() @ stack.a.pool[int(stack.a.offset[slot]) :][: rank * k].view(rank, k).float().T
    return replace(addend, s=s)


@pytest.mark.parametrize("splits", [1, 2, 4] if GPU else [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("m", "slots", "max_rank", "k", "tokens", "rows"),
    [(70, 1, 16, 1024, 72, 48), (130, 4, 40, 576, 72, 96), (90, 9, 24, 1088, 128, 112), (200, 3, 64, 512, 104, 32), (300, 40, 20, 512, 104, 64)],
)
def test_adapters(m: int, slots: int, max_rank: int, k: int, tokens: int, rows: int, dtype: torch.dtype, splits: int) -> None:
    parts, noise = (72, 16, 24), Noise(generator(m, DEVICE), dtype)
    x, w, bias = noise(m, k), noise(sum(parts), k, std=k**-0.5), noise(sum(parts))
    addend, stacks, token_slots = make_addend(parts, k, m, slots, "uniform", noise, max_rank=max_rank)
    low = with_s(x, addend, stacks)
    found = middle_linear(x, w, bias, low, (tokens, rows, splits))
    assert relative_error(found, ref_linear(x, w, bias, stacks, token_slots)) < 5e-3
    assert torch.equal(found, middle_linear(x, w, bias, low, (tokens, rows, splits))), "two runs differ"
    nobody = middle_linear(x, w, bias, replace(low, slots=torch.full_like(low.slots, -1)), (tokens, rows, splits))
    assert torch.equal(found[token_slots < 0], nobody[token_slots < 0]), "rows without an adapter changed"


def test_rule() -> None:
    """One wave of blocks, and no more tokens than that pays for."""
    assert _shape_of(256, 2048, (0, 4096, 4608, 5120), 132) == (128, 80, 1)
    assert _shape_of(256, 4096, (0, 2048), 132) == (128, 64, 2)
    assert _shape_of(200, 4096, (0, 151936), 132) is None and _shape_of(200, 4096, (0, 2044), 132) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [TOKENS[0], 128, 200, 256, TOKENS[-1]])
def test_by_the_rule(m: int, dtype: torch.dtype) -> None:
    """The widths of Qwen3-30B-A3B behind the launch that makes s, in a captured graph too."""
    noise = Noise(generator(m, DEVICE), dtype)
    for parts, k in (((4096, 512, 512), 2048), ((2048,), 4096)):
        for slots, max_rank in ((4, 16), (8, 64)):
            x, w = noise(m, k), noise(sum(parts), k, std=k**-0.5)
            addend, stacks, token_slots = make_addend(parts, k, m, slots, "uniform", noise, max_rank=max_rank)
            shares = torch.empty(shrink_splits(m, k, max_rank), m, len(parts), addend.tables.a.shrink_width, device=x.device)
            low, counts = replace(addend, s=torch.empty_like(shares[:1])), torch.zeros(COUNTS, dtype=torch.int32, device=x.device)
            shape = shape_for(x, w, low)
            assert shape is not None

            def multiply(x=x, w=w, low=low, shape=shape, shares=shares, counts=counts) -> torch.Tensor:
                given = x * 1  # by the launch before the shrink
                linear_shrink(given, low, shares, counts)
                return middle_linear(given, w, None, low, shape)

            found = multiply()
            assert relative_error(found, ref_linear(x, w, None, stacks, token_slots)) < 5e-3
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = multiply()
            for _ in range(3):
                out.fill_(float("nan"))
                graph.replay()
                assert torch.equal(found, out), "the replay differs"
    assert shape_for(x[:64], w, replace(low, s=low.s[:, :64])) is None and shape_for(x.float(), w.float(), low) is None
