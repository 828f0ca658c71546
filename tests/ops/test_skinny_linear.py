"""The linear of few tokens with its adapters: on the emulator under AddressSanitizer and UBSan; on a Hopper GPU the operator itself, in clusters too."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.lora.host_views import slot_views
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.targets import LinearTarget
from sglang_lora_moe.lora.weights import LinearLoRA
from sglang_lora_moe.ops.lora_linear import LinearAddend, PartTables
from sglang_lora_moe.ops.skinny_linear import MOST_TOKENS, empty_halves, half_for, shape_for, shape_of, skinny_linear
from tests.moe_cases import Noise, generator, make_token_slots
from tests.ops import emulator
from tests.ops.emulator import DEVICE, GPU
from tests.references import ref_linear, relative_error
from tests.slots import write_slot

DRIVER = Path(__file__).parent / "skinny_driver.cpp"
pytestmark = emulator.HOPPER_OR_EMULATED
SPLITS = [1, 2, 4, 8] if GPU else [2]


def emulate(driver: Path) -> emulator.Operators:
    """The operator on CPU tensors is the emulated kernel."""
    turn = 0

    def run(
        x, w, bias, out, s, slots, order, ordered, pool, a_offset, b_offset, rank, scaling, starts, part_stride, width, max_rank, rows, splits, group,
        overlap,
    ) -> None:  # fmt: skip
        nonlocal turn
        turn += 1
        given = s is not None and s.dim() == 4
        parts = 0 if s is None else starts.numel() - 1
        entries = 0 if s is None else (parts - 1) * part_stride + rank.numel()
        tables = [None if t is None else t.as_strided((entries,), (1,)) for t in (a_offset, b_offset, rank, scaling)]
        fields = (
            turn % 4, x.shape[0], w.shape[0], x.shape[1], x.dtype == torch.bfloat16, bias is not None, s is not None, parts,
            width, max_rank, part_stride, 0 if rank is None else rank.numel(), entries, rows, splits, group, s.shape[0] if given else 0,
        )  # fmt: skip
        head = struct.pack("17iq", *map(int, fields), 0 if pool is None else pool.numel())
        written = emulator.answer(driver, head, x, w, bias, slots, order, ordered, pool, *tables, starts, s if given else None)
        out.copy_(torch.frombuffer(written, dtype=out.dtype).view(out.shape))

    return {"skinny_linear": run}


def make_addend(parts: tuple[int, ...], k: int, m: int, slots: int, popularity: str, noise: Noise, *, max_rank: int) -> tuple:
    """(addend, stacks, slots of the tokens)."""
    g = noise.generator
    names = [f"part{i}" for i in range(len(parts))]
    pool = LoRAMemoryPool([LinearTarget(name, k, rows) for name, rows in zip(names, parts, strict=True)], slots, max_rank, noise.dtype, DEVICE)
    pool.pool.fill_(float("nan"))
    for slot in range(slots):
        rank = (16, max_rank, 1, 7)[slot % 4]
        some = [(name, rows) for i, (name, rows) in enumerate(zip(names, parts, strict=True)) if slot % 4 != 3 or i == slot % len(parts)]
        write_slot(pool, slot, {n: LinearLoRA(noise(rank, k, std=k**-0.5), noise(r, rank, std=rank**-0.5), 0.5 + slot % 3) for n, r in some})
    token_slots = make_token_slots(popularity, m, slots, g, base_share=0.2)
    firsts = [sum(parts[:i]) for i in range(len(parts))]
    stacks = [pool.stacks_for(name) for name in names]
    tables = PartTables(list(zip(stacks, firsts, parts, strict=True)))
    ordered, order = token_slots.sort(stable=True)
    return LinearAddend(empty_halves(half_for(tables, m), DEVICE), tables, token_slots, order.int(), ordered), stacks, token_slots


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "rows", "group"), [(1, 40, 1088, 16, 2), (9, 200, 1024, 80, 3), (37, 104, 1152, 48, 4), (64, 520, 1024, 72, 2)])
def test_base(m: int, n: int, k: int, rows: int, group: int, dtype: torch.dtype, splits: int) -> None:
    noise = Noise(generator(m, DEVICE), dtype)
    x, w, bias = noise(m, k), noise(n, k, std=k**-0.5), noise(n)
    for b in (None, bias):
        found = skinny_linear(x, w, b, None, (rows, splits, group))
        want = torch.nn.functional.linear(x.float(), w.float(), None if b is None else b.float())
        assert relative_error(found, want) < 3e-3
        assert torch.equal(found, skinny_linear(x, w, b, None, (rows, splits, group)))


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("m", "slots", "popularity", "max_rank", "k", "rows"),
    [
        (1, 1, "identical", 16, 1024, 96),
        (5, 4, "uniform", 40, 1024, 88),
        (40, 9, "zipf", 22, 1088, 48),
        (64, 64, "distinct", 64, 1024, 48),
        (64, 32, "uniform", 64, 1024, 8),
        (37, 2, "uniform", 16, 1152, 48),
    ],
)
def test_adapters(m: int, slots: int, popularity: str, max_rank: int, k: int, rows: int, dtype: torch.dtype, splits: int) -> None:
    parts = (72, 16, 24)
    noise = Noise(generator(m, DEVICE), dtype)
    x, w = noise(m, k), noise(sum(parts), k, std=k**-0.5)
    addend, stacks, token_slots = make_addend(parts, k, m, slots, popularity, noise, max_rank=max_rank)
    found, plain = skinny_linear(x, w, None, addend, (rows, splits, 2)), skinny_linear(x, w, None, None, (rows, splits, 2))
    assert relative_error(found, ref_linear(x, w, None, stacks, token_slots)) < 5e-3
    assert torch.equal(found[token_slots < 0], plain[token_slots < 0]), "rows without an adapter changed"
    assert torch.equal(found, skinny_linear(x, w, None, addend, (rows, splits, 2))), "two runs differ"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("m", "slots", "popularity", "max_rank", "shares", "rows", "splits"),
    [
        (1, 4, "uniform", 16, 32, 96, 2), (1, 1, "identical", 16, 1, 16, 2), (5, 4, "distinct", 16, 3, 88, 1), (16, 9, "uniform", 16, 32, 16, 2),
        (2, 4, "uniform", 64, 32, 80, 2), (5, 9, "zipf", 40, 3, 32, 2), (13, 2, "uniform", 20, 9, 72, 4), (16, 16, "distinct", 16, 16, 112, 8),
    ],
)  # fmt: skip
def test_given_sums(m: int, slots: int, popularity: str, max_rank: int, shares: int, rows: int, splits: int, dtype: torch.dtype) -> None:
    """s is made by the kernel before, in shares; what no adapter has of it is never read as a number."""
    parts, k = (72, 16, 24), 1024
    noise = Noise(generator(m + shares, DEVICE), dtype)
    x, w, bias = noise(m, k), noise(sum(parts), k, std=k**-0.5), noise(sum(parts))
    addend, stacks, token_slots = make_addend(parts, k, m, slots, popularity, noise, max_rank=max_rank)
    s = torch.full((shares, m, len(parts), addend.tables.a.shrink_width), float("nan"), device=DEVICE)
    for p, part in enumerate(stacks):
        for token, slot in enumerate(token_slots.tolist()):
            if slot >= 0 and (rank := int(part.a.rank[slot])):
                low = x[token].float() @ slot_views(part.a, slot).a_t()
                values = low * torch.randn(shares, 1, generator=noise.generator, device=DEVICE)
                values[-1] = low - values[:-1].sum(0)
                s[:, token, p, :rank] = values
    given, shape = replace(addend, s=s), (rows, splits, 2)
    found, plain = skinny_linear(x, w, bias, given, shape), skinny_linear(x, w, bias, None, shape)
    assert relative_error(found, ref_linear(x, w, bias, stacks, token_slots)) < 5e-3
    assert torch.equal(found[token_slots < 0], plain[token_slots < 0]), "rows without an adapter changed"
    assert torch.equal(found, skinny_linear(x, w, bias, given, shape)), "two runs differ"


def test_rule() -> None:
    """Weights that one wave of blocks can hold, and no others."""
    assert shape_of(5120, 2048, 132) is not None and shape_of(2048, 4096, 132) is not None
    assert shape_of(151936, 2048, 132) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 16, MOST_TOKENS])
def test_by_the_rule(m: int, dtype: torch.dtype) -> None:
    """The widths of Qwen3-30B-A3B, in a captured graph too."""
    noise = Noise(generator(m, DEVICE), dtype)
    for parts, k in (((4096, 512, 512), 2048), ((2048,), 4096)):
        x, w = noise(m, k), noise(sum(parts), k, std=k**-0.5)
        addend, stacks, token_slots = make_addend(parts, k, m, 8, "uniform", noise, max_rank=64)
        shape = shape_for(x, w, addend)
        assert shape is not None
        found = skinny_linear(x, w, None, addend, shape)
        assert relative_error(found, ref_linear(x, w, None, stacks, token_slots)) < 5e-3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = skinny_linear(x, w, None, addend, shape)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, out), "the replay differs"
    assert shape_for(x.float(), w.float(), None) is None and shape_for(x.expand(MOST_TOKENS + 1, -1, -1)[:, 0], w, None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_launches_take_turns(dtype: torch.dtype) -> None:
    """Linears of all shapes share s, launched eagerly and from graphs of odd and even numbers of launches, replayed in any order."""
    noise, cases = Noise(generator(7, DEVICE), dtype), []
    for m, slots, rank in ((16, 4, 16), (MOST_TOKENS, 16, 64), (1, 1, 40), (33, 4, 16)):
        for parts, k in (((4096, 512, 512), 2048), ((2048,), 4096)):
            x, w = noise(m, k), noise(sum(parts), k, std=k**-0.5)
            addend, stacks, token_slots = make_addend(parts, k, m, slots, "uniform", noise, max_rank=rank)
            cases.append((x, w, addend, ref_linear(x, w, None, stacks, token_slots)))
            if m == 16:
                nobody = torch.full_like(addend.slots, -1)
                cases.append((x, w, replace(addend, slots=nobody, ordered_slots=nobody), torch.nn.functional.linear(x.float(), w.float())))
    s = empty_halves(max(half_for(addend.tables) for _, _, addend, _ in cases), DEVICE)
    half = s.numel() // 2

    def multiply(i: int) -> torch.Tensor:
        x, w, addend, _ = cases[i]
        return skinny_linear(x, w, None, replace(addend, s=s), shape_for(x, w, addend))

    def launched() -> int:
        count = int(s.view(torch.int32)[-1])
        assert count % 65536 == 0 and (s.view(torch.int32)[:-1].view(2, half)[count // 65536 % 2] == -1).all(), "the next launch would not find its half empty"
        return count // 65536

    found = [multiply(i) for i in range(len(cases))]
    for out, (_, _, _, want) in zip(found, cases, strict=True):
        assert relative_error(out, want) < 5e-3
    graphs = []
    for captured in (range(len(cases)), range(1), range(len(cases) - 3, len(cases))):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, [(i, multiply(i)) for i in captured]))
    assert launched() == len(cases)
    for turn in torch.randint(len(graphs) + 1, (60,), generator=torch.Generator().manual_seed(1)).tolist():
        if turn == len(graphs):
            outs = [(i, multiply(i)) for i in range(0, len(cases), 3)]
        else:
            graph, outs = graphs[turn]
            for _, out in outs:
                out.fill_(float("nan"))
            graph.replay()
        before, expected = launched(), [torch.equal(out, found[i]) for i, out in outs]
        assert all(expected), f"launch {before}: {expected}"
