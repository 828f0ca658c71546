"""The grouped shrink in CUDA: on the emulator under AddressSanitizer and UBSan; on a Hopper GPU the operator itself, up to 4,097 tokens."""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.lora.stacks import Stack
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import fused_moe_lora, launch
from sglang_lora_moe.ops.fused_moe_lora import moe_expand, moe_shrink
from sglang_lora_moe.ops.low_rank import Following, LowRank
from sglang_lora_moe.ops.moe_lora_shrink import can_shrink, group_shrink
from tests.moe_cases import LAYOUTS, MoECase, make_case
from tests.ops import emulator
from tests.references import assert_near, on_host, stack_matrix

DRIVER = Path(__file__).parent / "shrink_driver.cpp"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(GPU and torch.cuda.get_device_capability() != (9, 0), reason="the Triton kernel runs elsewhere")
DTYPES = [torch.float16, torch.bfloat16]
POISON = -12345.0  # what s holds before


def emulate(driver: Path) -> emulator.Operators:
    """The operator on CPU tensors is the emulated kernel."""
    order = 0

    def run(
        x, pool, offset, stride, rank, split, scaling, b_offset, b_stride, tiles, base_tiles, counts, sorted_pairs, s, records, ranges,
        next_records, next_offset, next_stride, next_rank, next_scaling, next_b_offset, next_b_stride,
        max_rank, top_k, lora_block, gather, early, multiprocessors, overlap,
    ) -> None:  # fmt: skip
        nonlocal order
        order += 1
        fields = (
            order % 4, *x.shape, s.shape[-1], max_rank, top_k, lora_block, x.dtype == torch.bfloat16, gather, early, rank.numel(), tiles.shape[0],
            base_tiles.shape[0], sorted_pairs.numel(), ranges is not None, multiprocessors, next_records is not None,
        )  # fmt: skip
        inputs = (x, pool, offset, stride, rank, split, scaling, b_offset, b_stride, tiles, base_tiles, counts, sorted_pairs)
        inputs += (next_offset, next_stride, next_rank, next_scaling, next_b_offset, next_b_stride)
        written = emulator.answer(driver, struct.pack("17ixxxxq", *map(int, fields), pool.numel()), *inputs)
        where = 0
        for out, poison in ((s.view(torch.int16), emulator.POISON), (records, -1), (ranges, -1), (next_records, -1)):
            if out is not None:
                new = torch.frombuffer(written, dtype=out.dtype, offset=where, count=out.numel()).view(out.shape)
                out.copy_(torch.where(new == poison, out, new))
                where += out.numel() * out.element_size()

    return {"moe_lora_shrink": run}


def shrink(a: Stack, b: Stack, routing: Routing, x: torch.Tensor, gather: bool, **options: Any) -> tuple[torch.Tensor, ...]:
    """(s, records, ranges) of one launch, poisoned before."""
    made = routing.alignment
    s = torch.full((1, routing.num_pairs, a.shrink_width), POISON, dtype=x.dtype, device=x.device)
    records = torch.full((made.lora_tiles.shape[0], 5), -1, dtype=torch.int64, device=x.device)
    ranges = torch.full((made.base_tiles.shape[0], 2), -1, dtype=torch.int32, device=x.device)
    early = options.pop("early", False)
    group_shrink(x, a, b, routing, s, records, None if early else ranges, gather=gather, early=early, **options)
    return s[0], records, ranges


def check(case: MoECase, *, half: str, base_block: int, lora_block: int) -> None:
    """All that the kernel writes, and nothing else; the same at every run, on any number of blocks, early or not."""
    a, b, gather = (case.stacks.a13, case.stacks.b13, True) if half == "13" else (case.stacks.a2, case.stacks.b2, False)
    routing = Routing(case.topk_ids, case.token_slots, case.spec.num_experts, case.num_slots, base_block=base_block, lora_block=lora_block)
    x = case.x if gather else torch.randn(routing.num_pairs, a.dim, device=case.x.device).to(case.x.dtype)
    s, records, ranges = shrink(a, b, routing, x, gather)
    again = shrink(a, b, routing, x, gather, multiprocessors=1)
    early = shrink(a, b, routing, x, gather, early=True)
    assert torch.equal(s, again[0]) and torch.equal(records, again[1]) and torch.equal(ranges, again[2])
    assert torch.equal(s, early[0]) and torch.equal(records, early[1])
    _, bases, loras, _ = routing.alignment.counts.tolist()
    tiles, base_tiles = routing.alignment.lora_tiles[:loras].tolist(), routing.alignment.base_tiles[:bases].tolist()
    source = routing.sorted_pairs.long() // routing.top_k if gather else torch.arange(routing.num_pairs, device=x.device)
    a_host, b_host = on_host(a), on_host(b)
    expected, written = torch.full(s.shape, POISON, device=s.device), torch.zeros(s.shape, dtype=torch.bool, device=s.device)
    want = []
    for expert, slot, start, rows in tiles:
        rank, split = int(a_host.rank[slot]), int(a_host.split_a[slot])
        want.append([start, rows, rank, split, (int(b_host.offset[slot]) + expert * int(b_host.expert_stride[slot])) // 8])
        matrix = stack_matrix(a_host, slot, expert, True)
        if matrix is None:
            continue
        low = x[source[start : start + rows]].float() @ matrix.T * float(b_host.scaling[slot])
        for part in range(1 + split):
            expected[start : start + rows, part * a.max_rank : part * a.max_rank + rank] = low[:, part * rank : (part + 1) * rank]
            written[start : start + rows, part * a.max_rank : part * a.max_rank + rank] = True
    assert records[:loras].tolist() == want and bool((records[loras:] == -1).all())
    assert bool((s[~written] == torch.tensor(POISON, dtype=s.dtype)).all()), "written where nothing belongs"
    if written.any():
        assert_near(s[written], expected[written], "grouped shrink", case.name)
    for i, (_, start, rows) in enumerate(base_tiles):
        met = [t for t, (_, _, first, count) in enumerate(tiles) if first < start + rows and first + count > start]
        low_end, high_end = ranges[i].tolist()
        assert list(range(low_end, high_end)) == met, (i, start, rows)
    assert bool((ranges[bases:] == -1).all())
    if gather:
        check_following(case, routing)


def check_following(case: MoECase, routing: Routing) -> None:
    """The records of a second projection whose shrink is another kernel's; what the first one writes stays what it was."""
    a, b, a13, b13 = case.stacks.a2, case.stacks.b2, case.stacks.a13, case.stacks.b13
    records = torch.full((routing.alignment.lora_tiles.shape[0], 5), -1, dtype=torch.int64, device=case.x.device)
    following = Following(a, LowRank(case.x, b, case.token_slots, records), case.x)
    for found, before in zip(shrink(a13, b13, routing, case.x, True, following=following), shrink(a13, b13, routing, case.x, True), strict=True):
        assert torch.equal(found, before)
    loras, want, a, b = int(routing.alignment.counts[2]), [], on_host(a), on_host(b)
    for expert, slot, start, rows in routing.alignment.lora_tiles[:loras].tolist():
        places = [(int(stack.offset[slot]) + expert * int(stack.expert_stride[slot])) // 8 for stack in (a, b)]
        want.append([start, int(b.scaling[slot].view(torch.int32)) << 32 | rows, int(a.rank[slot]), *places])
    assert records[:loras].tolist() == want and bool((records[loras:] == -1).all())


# (columns, ranks, layouts, LoRA block, tokens): each shape of the kernel, ranks beside its steps, columns beside its chunks
SMALL = [
    (40, (16, 1, 7), ("dense", "shared_outer"), 16, 33),
    (264, (8, 3, 16), LAYOUTS, 16, 40),
    (384, (40, 0, 22), ("split", "dense"), 16, 24),
    (72, (16, 5), ("dense", "shared_outer"), 32, 90),
    (520, (16, 12), ("split", "split_shared_outer"), 32, 70),
    (136, (50, 64), ("split",), 32, 50),
    (200, (16, 2), ("dense",), 64, 150),
    (648, (16, 9), ("split",), 64, 150),
    (256, (64, 33), ("split", "dense"), 64, 120),
    (136, (16, 4), ("dense",), 128, 300),
    (392, (16, 10), ("split",), 128, 260),
    (128, (256, 100), ("split", "dense"), 128, 100),
    (200, (32, 9), ("split",), 128, 200),
    (136, (64, 9), ("split",), 288, 450),
    (136, (16, 3), ("split",), 48, 150),
    (64, (8,), ("split",), 20, 40),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", ["13", "2"])
@pytest.mark.parametrize(("cols", "ranks", "layouts", "lora_block", "tokens"), SMALL)
def test_equals_loop(cols: int, ranks: tuple[int, ...], layouts: tuple[str, ...], lora_block: int, tokens: int, half: str, dtype: torch.dtype) -> None:
    adapters = {"ranks": ranks, "layouts": layouts, "active": min(3, len(ranks) + 1), "slots": 4, "popularity": "zipf"}
    case = make_case(spec=MoESpec(3, 2, cols, cols), m=tokens, dtype=dtype, device=DEVICE, **adapters)
    check(case, half=half, base_block=32, lora_block=lora_block)


@pytest.mark.parametrize("routing", ["one_expert", "few_experts", "edges", "some_invalid", "all_invalid", "partial"])
@pytest.mark.parametrize("popularity", ["none", "identical", "distinct"])
def test_routings(routing: str, popularity: str) -> None:
    adapters = {"ranks": (4, 0, 9), "active": 3, "popularity": popularity}
    case = make_case(m=37, experts=5, hidden=48, inter=48, routing=routing, dtype=torch.bfloat16, device=DEVICE, **adapters)
    check(case, half="13", base_block=16, lora_block=16)


def test_what_it_takes() -> None:
    rows = torch.zeros(2, 768, dtype=torch.bfloat16, device=DEVICE)
    assert can_shrink(rows, 128) == GPU
    assert not any(can_shrink(*case) for case in ((rows.float(), 128), (rows, 8), (rows[:, :256], 128), (rows[:, :756], 128)))


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("inter", [256, 384, 512, 768])
@pytest.mark.parametrize(("tokens", "slots"), [(700, 1), (1024, 1), (2048, 4)])
def test_tiles_that_triton_cannot_have(monkeypatch: pytest.MonkeyPatch, tokens: int, slots: int, inter: int, rank: int) -> None:
    """Whichever kernels make the two shrinks of a layer, LoRA tiles of a Triton kernel have a power of two of rows."""
    case = make_case(spec=MoESpec(128, 8, 512, inter), m=tokens, ranks=(rank,), layouts=("split_shared_outer",), active=1, slots=slots, dtype=torch.bfloat16)
    seen: list[tuple[bool, int]] = []
    monkeypatch.setattr(launch, "has_wgmma", lambda device: True)
    monkeypatch.setattr(fused_moe_lora, "group_shrink", lambda rows, a, b, routing, *rest, **options: seen.append((True, routing.lora_block)))
    monkeypatch.setattr(fused_moe_lora, "_launch_group_shrink", lambda rows, s, a, b, routing, tile, *rest: seen.append((False, tile.m)))
    monkeypatch.setattr(fused_moe_lora, "_expand_kernel", defaultdict(lambda: lambda *rest, **options: seen.append((False, options["BM"]))))
    for lora_block in (32, 64):
        routing = Routing(case.topk_ids, case.token_slots, 128, slots, base_block=144, lora_block=lora_block)
        act, workspace = torch.zeros(8 * tokens, inter, dtype=torch.bfloat16), Workspace(torch.device("cpu"))
        moe_shrink(case.x, case.stacks.a13, case.stacks.b13, routing, workspace, gather=True, name="13", by_cuda=True)
        moe_shrink(act, case.stacks.a2, case.stacks.b2, routing, workspace, gather=False, name="2", by_cuda=True)
        fused = Routing(case.topk_ids, case.token_slots, 128, slots, base_block=144, lora_block=lora_block)
        fused_moe_lora.fused_moe_lora(act.new_zeros(8 * tokens, 2 * inter), case.x, case.stacks.a13, case.stacks.b13, fused, workspace, gather=True)
    assert all(by_cuda or rows & (rows - 1) == 0 for by_cuda, rows in seen), seen
    assert ((True, 144) in seen) == (rank == 64 and inter >= 512 and tokens == 1024)
    assert ((True, 48) in seen) == (inter >= 512 and tokens == 2048)


@pytest.mark.gpu
def test_equals_the_triton_kernel() -> None:
    """Both shrinks of a routing, as a layer calls them: what B makes of them."""
    case = make_case(spec=MoESpec(128, 8, 768, 512), m=900, ranks=(16, 3, 64), layouts=LAYOUTS, active=6, slots=6, dtype=torch.bfloat16, device=DEVICE)
    found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    act = torch.randn(7200, 512, device=DEVICE).bfloat16()
    for by_cuda, results in found.items():
        routing = Routing(case.topk_ids, case.token_slots, 128, 6, lora_block=32)
        for gather, x, a, b in ((True, case.x, case.stacks.a13, case.stacks.b13), (False, act, case.stacks.a2, case.stacks.b2)):
            low = moe_shrink(x, a, b, routing, Workspace(torch.device(DEVICE)), gather=gather, name="test", by_cuda=by_cuda)
            results.append(moe_expand(torch.zeros(7200, b.dim, dtype=torch.bfloat16, device=DEVICE), low, routing))
    for cuda, triton in zip(found[True], found[False], strict=True):
        assert_near(cuda, triton.float(), "grouped shrink against Triton's")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", ["13", "2"])
@pytest.mark.parametrize(("tokens", "lora_block"), [(1, 16), (64, 16), (257, 16), (1024, 32), (2048, 48), (4096, 64), (4097, 128), (12000, 288)])
@pytest.mark.parametrize(("ranks", "layouts"), [((16,), ("split",)), ((1, 64, 0, 7), LAYOUTS), ((256, 16), ("split", "shared_outer"))])
def test_real_sizes(ranks: tuple[int, ...], layouts: tuple[str, ...], tokens: int, lora_block: int, half: str, dtype: torch.dtype) -> None:
    sizes = {"ranks": ranks, "layouts": layouts, "active": 4, "slots": 5}
    check(make_case(spec=MoESpec(64, 4, 2048, 768), m=tokens, dtype=dtype, device=DEVICE, **sizes), half=half, base_block=64, lora_block=lora_block)
