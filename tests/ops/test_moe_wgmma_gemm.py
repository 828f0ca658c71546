"""The wgmma GEMM inside whole layers: on the emulator under AddressSanitizer and UBSan, with the other kernels in Triton's interpreter;
on a Hopper GPU the operator itself, also in clusters, which the emulator does not know."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_lora_moe.moe.backends import triton_lora
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import fused_moe_lora, moe_wgmma_gemm
from sglang_lora_moe.ops.moe_grouped_gemm import GemmTile
from sglang_lora_moe.ops.moe_lora_align import moe_lora_align_block_size
from sglang_lora_moe.ops.moe_tiles import LayerTiles
from sglang_lora_moe.ops.moe_wgmma_gemm import WgmmaTile, wgmma_gemm
from tests.moe.test_triton import check, check_on_gpu
from tests.moe_cases import LAYOUTS, POPULARITIES, full_grid, generator, make_case, make_topk_ids
from tests.ops import emulator
from tests.ops.emulator import GPU
from tests.references import assert_near

DRIVER = Path(__file__).parent / "wgmma_driver.cpp"
SMALL = {"experts": 5, "top_k": 2, "hidden": 72, "inter": 136}
FORMS = [(144, 1), (32, 1), (72, 1), *([(144, 2)] if GPU else [])]  # tokens of a block's tile, blocks of a cluster
SOME_ROWS = (144, 1, 136)  # and rows of a tile, if fewer
pytestmark = emulator.HOPPER_OR_EMULATED


def tile(group: int, tokens: int, cluster: int, rows: int = 0) -> WgmmaTile:
    return WgmmaTile(group, cluster, tokens=tokens, rows=rows)


def tiles(form: tuple[int, ...]) -> LayerTiles:
    return LayerTiles(tile(2, *form), tile(3, *form), lora_block=16)


def emulate(driver: Path) -> emulator.Operators:
    """The operator on CPU tensors is the emulated kernel."""
    order = 0

    def gemm(
        x, w, bias, tiles, counts, sorted_pairs, s, pool, records, ranges, out, next_pool, next_records, next_parts, next_s,
        top_k, halves, max_rank, alpha, cubic, limit, shift, gather, scatter, group, blocks, tokens, cluster, stream, report, behind, queued, overlap,
    ) -> None:  # fmt: skip
        nonlocal order
        order += 1
        fields = (
            order % 4, x.shape[0], w.shape[0], out.shape[1], x.shape[1], sorted_pairs.numel(), top_k, halves, x.dtype == torch.bfloat16, bias is not None,
            tiles.shape[0], s is not None, 0 if s is None else s.shape[2], max_rank, 0 if records is None else records.shape[0], gather, scatter, group, blocks,
            tokens, report, behind, queued, 0 if next_parts is None else next_parts.shape[2], 0 if next_s is None else next_s.shape[2],
        )  # fmt: skip
        head = struct.pack("25i4fxxxxqq", *map(int, fields), alpha, cubic, limit, shift, *(0 if p is None else p.numel() for p in (pool, next_pool)))
        answer = emulator.answer(driver, head, x, w, bias, tiles, counts, sorted_pairs, s, pool, records, ranges, next_pool, next_records)
        written = torch.frombuffer(answer[: 2 * out.numel()], dtype=torch.int16).view(out.shape)
        end = 2 * out.numel() + 4 * tiles.numel()
        tiles.copy_(torch.frombuffer(answer[2 * out.numel() : end], dtype=torch.int32).view(tiles.shape))
        if next_s is not None:
            next_s.copy_(torch.frombuffer(answer[end:], dtype=next_s.dtype).view(next_s.shape))
        rows = (written != emulator.POISON).any(1)
        out[rows] = written.view(out.dtype)[rows]

    return {"moe_wgmma_gemm": gemm}


def shrink_in_torch(
    x, pool, offset, stride, rank, split, scaling, b_offset, b_stride, tiles, base_tiles, counts, sorted_pairs, s, records, ranges,
    next_records, next_offset, next_stride, next_rank, next_scaling, next_b_offset, next_b_stride, max_rank, top_k, lora_block, gather, *launch,
) -> None:  # fmt: skip
    """What csrc/moe_lora_shrink.cu writes, which has its own tests."""
    assert gather and s.shape[0] == 1
    found = tiles[: int(counts[2])].tolist()
    for t, (expert, slot, start, rows) in enumerate(found):
        a0, r = int(offset[slot] + expert * stride[slot]), int(rank[slot])
        a = pool[a0 : a0 + r * (1 + int(split[slot])) * x.shape[1]].view(-1, r, x.shape[1]) if r else pool.new_zeros(1, 0, x.shape[1])
        for half, matrix in enumerate(a):
            made = x[sorted_pairs[start : start + rows].long() // top_k].float() @ matrix.float().T * scaling[slot]
            s[0, start : start + rows, half * max_rank : half * max_rank + r] = made.to(s.dtype)
        records[t] = torch.tensor([start, rows, r, int(split[slot]), int(b_offset[slot] + expert * b_stride[slot]) // 8])
        places = (int(table[slot] + expert * step[slot]) // 8 for table, step in ((next_offset, next_stride), (next_b_offset, next_b_stride)))
        next_records[t] = torch.tensor([start, int(next_scaling[slot].view(torch.int32)) << 32 | rows, int(next_rank[slot]), *places])
    for i, (_, start, rows) in enumerate(base_tiles[: int(counts[1])].tolist()):
        ranges[i, 0] = sum(f[2] + f[3] <= start for f in found)
        ranges[i, 1] = sum(f[2] < start + rows for f in found)


@pytest.fixture(params=[1 << 30, *([0] if GPU else [])], ids=["gate_up adds", *(["down adds"] if GPU else [])])
def following(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The shrink of act within gate_up at every size and rank that the kernel takes; parts added up there, or in down, whose blocks wait for each other."""
    monkeypatch.setattr(moe_wgmma_gemm, "MANY_ROWS", request.param)
    for module in (triton_lora, fused_moe_lora):
        monkeypatch.setattr(module, "can_shrink", lambda rows, experts: True)
    yield from () if GPU else emulator.implemented({"moe_lora_shrink": shrink_in_torch})
    if GPU:
        yield


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["uniform", "one_expert", "partial", "all_invalid"])
def test_base_layer(device: torch.device, routing: str, dtype: torch.dtype, form: tuple[int, int]) -> None:
    for tokens in (1, 45):
        check(make_case(**SMALL, m=tokens, dtype=dtype, device=device, routing=routing, popularity="none"), tiles(form), lora=False)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_adapters_by_popularity(device: torch.device, popularity: str, form: tuple[int, int]) -> None:
    adapters: dict[str, Any] = {"ranks": (8, 0, 24, 16), "layouts": ("split",), "routing": "partial", "popularity": popularity}
    check(make_case(**SMALL, **adapters, m=29, dtype=torch.float16, device=device), tiles(form))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("ranks", [(40, 8, 1), (72, 16, 32)], ids=str)
def test_mixed_layouts(device: torch.device, ranks: tuple[int, ...], form: tuple[int, int]) -> None:
    """Split and shared A, shared-outer experts, one half alone, ranks that are no multiple of eight, more columns than a stage holds."""
    common: dict[str, Any] = {**SMALL, "m": 21, "dtype": torch.float16, "device": device}
    check(make_case(**common, ranks=ranks, layouts=LAYOUTS, active=6, slots=7), tiles(form))
    check(make_case(**common, ranks=ranks[:2], layouts=("dense",)), tiles(form))


@pytest.mark.parametrize("form", [*FORMS, SOME_ROWS], ids=str)
def test_many_rows(device: torch.device, form: tuple[int, ...]) -> None:
    """Tiles of many numbers of eights, several of one expert, widths beyond one block of columns and a tail of k."""
    spec = MoESpec(6, 1, 264, 136, has_bias=True, swiglu_alpha=1.702, swiglu_limit=1.5)
    common: dict[str, Any] = {"spec": spec, "m": 400, "dtype": torch.float16, "device": device}
    check(make_case(**common, ranks=(16, 8), active=2, popularity="zipf", routing="zipf"), tiles(form))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 45, 400])
def test_gpu_down_by_triton(m: int) -> None:
    """Behind a gate_up by wgmma of as many rows a tile."""
    mixed = LayerTiles(tile(1, 144, 1, 128), GemmTile(128, 128, 64, 4, 3, 2, 1, True), lora_block=64)
    check(make_case(**SMALL, m=m, dtype=torch.bfloat16, device="cuda", popularity="none", routing="zipf"), mixed, lora=False)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("m", [1, 29, 300])
@pytest.mark.parametrize("ranks", [(8, 0, 24, 16), (40, 8, 1), (64, 64), (16,), (4,)], ids=str)
def test_shrink_within_gate_up(device: torch.device, following: None, ranks: tuple[int, ...], m: int, form: tuple[int, int]) -> None:
    """Mixed ranks and layouts, tiles of one and of two rounds to memory, two blocks of columns."""
    common: dict[str, Any] = {**SMALL, "m": m, "dtype": torch.float16, "device": device, "routing": "partial" if m < 300 else "zipf"}
    check(make_case(**common, ranks=ranks, layouts=LAYOUTS, active=6, slots=7), tiles(form))


@pytest.mark.parametrize("rank", [8, 64])
def test_shrink_of_many_adapters_within_gate_up(device: torch.device, following: None, rank: int) -> None:
    """More runs than a stage holds, more LoRA tiles than a warp has lanes."""
    common: dict[str, Any] = {"experts": 2, "top_k": 1, "hidden": 64, "inter": 64, "routing": "one_expert", "dtype": torch.float16, "device": device}
    check(make_case(**common, m=130, ranks=(rank,), layouts=("split",), active=40, slots=40, popularity="distinct"), tiles(FORMS[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [64, 1024, 4097])
@pytest.mark.parametrize("ranks", [(16,), (16, 0, 1, 40, 8, 64)], ids=str)
def test_shrink_within_gate_up_at_real_shapes(device: torch.device, ranks: tuple[int, ...], tokens: int, form: tuple[int, int]) -> None:
    spec = MoESpec(128, 8, 2048, 768)
    adapters: dict[str, Any] = {"ranks": ranks, "layouts": LAYOUTS, "active": 6, "slots": 6, "routing": "partial"}
    check(make_case(spec=spec, m=tokens, dtype=torch.bfloat16, device=device, **adapters), tiles(form))


def test_many_adapters_in_a_tile(device: torch.device) -> None:
    """More LoRA tiles in one tile than a warp has lanes."""
    common: dict[str, Any] = {"experts": 2, "top_k": 1, "hidden": 64, "inter": 64, "routing": "one_expert", "dtype": torch.float16, "device": device}
    check(make_case(**common, m=90, ranks=(4, 8), layouts=("split",), active=40, slots=40, popularity="distinct"), tiles(FORMS[0]))


@pytest.mark.parametrize("form", [*FORMS, SOME_ROWS], ids=str)
def test_4097_tokens(device: torch.device, form: tuple[int, ...]) -> None:
    """The operator alone: gathered rows in sorted order, an expert of few tokens, an odd tail."""
    g, shape = generator(0, device), tile(2, *form)
    x, w = (torch.randn(*shape, generator=g, device=device).half() for shape in ((4097, 72), (3, 40, 72)))
    ids = make_topk_ids("zipf", 4097, 1, 3, g)
    align = moe_lora_align_block_size(ids, None, 3, 0, shape.m, 16)
    out = torch.full((4097, 40), float("nan"), dtype=torch.float16, device=device)
    wgmma_gemm(x, w, None, align, out, shape, top_k=1, gather=True, scatter=False)
    order = align.sorted_pairs.long()
    expected = torch.einsum("mk,mnk->mn", x[order].float(), w.float()[ids[order, 0].long()])
    assert_near(out, expected, "moe_wgmma_gemm")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [64, 1024, 4097])
@pytest.mark.parametrize("load", ["base", "mixed"])
def test_real_shapes(device: torch.device, load: str, tokens: int, form: tuple[int, int]) -> None:
    """Qwen3-30B-A3B and gpt-oss-20b."""
    for spec in (MoESpec(128, 8, 2048, 768), MoESpec(32, 4, 2880, 2880, has_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0)):
        adapters: dict[str, Any] = {"ranks": (16, 0, 1, 100, 8, 64), "layouts": LAYOUTS, "active": 6, "slots": 6, "routing": "partial"}
        case = make_case(spec=spec, m=tokens, dtype=torch.bfloat16, device=device, **(adapters if load == "mixed" else {"popularity": "none", "slots": 1}))
        check(case, tiles(form), lora=load == "mixed")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [3, 64, 700])
def test_gpu_axes(tokens: int, form: tuple[int, int]) -> None:
    """Popularity by routing, layouts by rank, slots from 1 to 64, in graphs too."""
    for arguments in full_grid(spec=MoESpec(32, 4, 1024, 512), m=tokens):
        check_on_gpu(tiles=tiles(form), **arguments)


@pytest.mark.gpu
def test_gpu_refusals_name_expected_and_actual(device: torch.device) -> None:
    x, w, out = (torch.zeros(*shape, dtype=torch.float16, device=device) for shape in ((9, 72), (3, 40, 72), (9, 40)))
    align = moe_lora_align_block_size(torch.zeros(9, 1, dtype=torch.int32, device=device), None, 3, 0, WgmmaTile().m, 16)
    wrong = [
        ((x.float(), w, out), "bfloat16 or float16, got Float"),
        ((torch.zeros(72, 9, dtype=torch.float16, device=device).t(), w, out), r"x to be contiguous .*Half \[9, 72\], not contiguous on cuda:0"),
        ((x, w[:, :32].contiguous(), out), r"expected w \[E, 40, 72\] .* got \[3, 32, 72\]"),
        ((x, w.bfloat16(), out), r"w to be contiguous Half .* got BFloat16 \[3, 40, 72\]"),
        ((x, w.cpu(), out), "w to be .* not on a GPU"),
        ((x, w, out[:4]), r"out to be .* at least 360 elements .* got Half \[4, 40\]"),
    ]
    for (a, b, c), message in wrong:
        with pytest.raises(RuntimeError, match=message):
            wgmma_gemm(a, b, None, align, c, WgmmaTile(), top_k=1, gather=True, scatter=False)
