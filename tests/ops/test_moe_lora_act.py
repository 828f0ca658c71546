"""The activation with adapters between two expert GEMMs: on the emulator under AddressSanitizer and UBSan; on a GPU the operator itself."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.moe_lora_act import moe_lora_activation
from tests.moe_cases import LAYOUTS, MoECase, make_case
from tests.ops import emulator
from tests.references import assert_near, on_host, ref_activation, stack_matrix

DRIVER = Path(__file__).parent / "act_driver.cpp"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
POISON = -12345.0


@pytest.fixture(scope="module", autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The operator on CPU tensors is the emulated kernel."""
    if GPU:
        yield
        return
    yield from emulator.implemented("moe_lora_act", lambda *args: run_emulated(request.getfixturevalue("driver"), *args))


def run_emulated(
    driver, gate_up, s, b_pool, b_offset, b_stride, b_rank, b_split, a_pool, a_offset, a_stride, a_rank, scaling, next_offset, next_stride, slots, tiles,
    counts, sorted_pairs, act, next_s, records, max_rank, top_k, lora_block, gated, activation, alpha, limit, parts, multiprocessors, overlap,
) -> None:  # fmt: skip
    fields = (
        act.shape[0] % 4, *act.shape, s.shape[-1], max_rank, next_s.shape[-1], top_k, lora_block, a_rank.numel(), tiles.shape[0],
        act.dtype == torch.bfloat16, gated, activation, parts, multiprocessors,
    )  # fmt: skip
    head = struct.pack("15i2fxxxxqq", *map(int, fields), alpha, limit, b_pool.numel(), a_pool.numel())
    inputs = (gate_up, s, b_pool, b_offset, b_stride, b_rank, b_split, a_pool, a_offset, a_stride, a_rank, scaling, next_offset, next_stride)
    written, where = emulator.answer(driver, head, *inputs, slots, tiles, counts, sorted_pairs), 0
    for out, poison in ((act, 0xCD), (next_s, 0xCD), (records, 0xFF)):
        size = out.numel() * out.element_size()
        new = torch.frombuffer(written, dtype=out.dtype, offset=where, count=out.numel()).view(out.shape)
        untouched = torch.frombuffer(bytearray([poison] * size), dtype=out.dtype).view(out.shape)
        out.copy_(torch.where(new == untouched, out, new))
        where += size


class Poisoned(Workspace):
    """Scratch of its own for every buffer, full of one value."""

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, -1 if dtype == torch.int64 else POISON, dtype=dtype, device=self.device)


def low_rank(case: MoECase, routing: Routing) -> LowRank:
    """s13 as a grouped shrink leaves it, of random values; what nobody may read is NaN."""
    a, b = case.stacks.a13, case.stacks.b13
    s = torch.full((1, routing.num_pairs, a.shrink_width), float("nan"), dtype=case.x.dtype, device=case.x.device)
    host = on_host(b)
    for _, slot, start, rows in routing.alignment.lora_tiles[: int(routing.alignment.counts[2])].tolist():
        rank = int(host.rank[slot])
        for half in range(1 + int(host.split_a[slot])):
            s[0, start : start + rows, half * a.max_rank : half * a.max_rank + rank] = torch.randn(rows, rank, device=s.device).to(s.dtype)
    return LowRank(s, b, case.token_slots)


def check(case: MoECase, lora_block: int = 16) -> None:
    """All that the kernel writes, and nothing else, however many blocks share it."""
    torch.manual_seed(1)
    routing = Routing(case.topk_ids, case.token_slots, case.spec.num_experts, case.num_slots, base_block=16, lora_block=lora_block)
    gate_up, s13, a2, b2 = torch.randn(routing.num_pairs, case.spec.w13_rows, device=case.x.device), low_rank(case, routing), case.stacks.a2, case.stacks.b2
    run = {"spec": case.spec, "workspace": Poisoned(DEVICE), "routing": routing}
    act, low = moe_lora_activation(gate_up, s13, a2, b2, **run)
    for options in ({"parts": 1}, {"parts": 2, "multiprocessors": 1}):
        again, other = moe_lora_activation(gate_up, s13, a2, b2, **run, **options)
        assert torch.equal(act, again) and torch.equal(low.records, other.records)
        assert_near(other.s[other.s != POISON], low.s[other.s != POISON].float(), "s of the second projection in other blocks")
    valid, _, loras, _ = routing.alignment.counts.tolist()
    want_act, want_s, want_records = gate_up.clone(), torch.full(low.s[0].shape, POISON, device=act.device), []
    b13, a2, b2, tiles = on_host(case.stacks.b13), on_host(a2), on_host(b2), routing.alignment.lora_tiles[:loras].tolist()
    for expert, slot, start, rows in tiles:
        matrix, rank, half = stack_matrix(b13, slot, expert, False), int(b13.rank[slot]), case.spec.w13_rows // 2
        if matrix is not None:
            low13 = s13.s[0, start : start + rows].float()
            parts = [low13[:, :rank] @ matrix.T] if not int(b13.split_a[slot]) else [
                low13[:, :rank] @ matrix[:half].T, low13[:, b13.max_rank : b13.max_rank + rank] @ matrix[half:].T]  # fmt: skip
            want_act[start : start + rows] += torch.cat(parts, dim=1)
    want_act = ref_activation(want_act, case.spec)
    for expert, slot, start, rows in tiles:
        matrix = stack_matrix(a2, slot, expert, True)
        if matrix is not None:
            want_s[start : start + rows, : matrix.shape[0]] = act[start : start + rows].float() @ matrix.T * float(b2.scaling[slot])
        want_records.append([start, rows, int(a2.rank[slot]), 0, (int(b2.offset[slot]) + expert * int(b2.expert_stride[slot])) // 8])
    assert low.records[:loras].tolist() == want_records and bool((low.records[loras:] == -1).all())
    poison = torch.tensor(POISON, dtype=act.dtype)
    assert bool((act[valid:] == poison).all()) and bool((low.s[0][want_s == POISON] == poison).all()), "written where nothing belongs"
    if valid:
        assert_near(act[:valid], want_act[:valid], "activation between the GEMMs", case.name)
    if bool((want_s != POISON).any()):
        assert_near(low.s[0][want_s != POISON], want_s[want_s != POISON], "s of the second projection", case.name)


# (columns of act, ranks, layouts, LoRA block, tokens): ranks and columns beside the kernel's steps, warps and blocks without columns, several blocks
SMALL = [
    (8, (16, 1, 7), ("dense", "shared_outer"), 16, 33),
    (40, (8, 3, 16), LAYOUTS, 16, 40),
    (264, (20, 0, 4), ("split", "dense"), 16, 24),
    (520, (16, 12), ("split", "split_shared_outer"), 32, 90),
    (1096, (16, 5), ("split",), 64, 20),
    (72, (64, 33), ("split", "dense"), 20, 40),
    (128, (256, 100), ("split", "dense"), 16, 12),
]
SPECS = {
    "silu": {}, "gelu": {"activation": "gelu"}, "gelu_tanh": {"activation": "gelu_tanh"}, "clamped": {"swiglu_alpha": 1.702, "swiglu_limit": 1.5},
    "relu": {"activation": "relu"}, "ungated": {"gated": False, "activation": "relu2"}, "ungated silu": {"gated": False},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inter", "ranks", "layouts", "lora_block", "tokens"), SMALL)
def test_equals_loop(inter: int, ranks: tuple[int, ...], layouts: tuple[str, ...], lora_block: int, tokens: int, dtype: torch.dtype) -> None:
    adapters = {"ranks": ranks, "layouts": layouts, "active": min(3, len(ranks) + 1), "slots": 4, "popularity": "zipf"}
    check(make_case(spec=MoESpec(3, 2, 64, inter), m=tokens, dtype=dtype, device=DEVICE, **adapters), lora_block)


@pytest.mark.parametrize("spec", SPECS)
def test_activations(spec: str) -> None:
    layouts = ("dense", "shared_outer", "gate_up_only", "down_only")
    check(make_case(spec=MoESpec(4, 2, 64, 48, **SPECS[spec]), m=30, dtype=torch.bfloat16, device=DEVICE, layouts=layouts))


@pytest.mark.parametrize("routing", ["one_expert", "few_experts", "edges", "some_invalid", "all_invalid", "partial"])
@pytest.mark.parametrize("popularity", ["none", "identical", "distinct"])
def test_routings(routing: str, popularity: str) -> None:
    check(make_case(m=37, experts=5, inter=48, routing=routing, dtype=torch.bfloat16, device=DEVICE, ranks=(4, 0, 9), active=3, popularity=popularity))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "lora_block"), [(1, 16), (64, 16), (257, 16), (1024, 32), (4097, 128)])
@pytest.mark.parametrize(("ranks", "layouts"), [((16,), ("split",)), ((1, 64, 0, 7), LAYOUTS), ((256, 16), ("split", "shared_outer"))])
@pytest.mark.parametrize("inter", [256, 768, 2880])
def test_real_sizes(inter: int, ranks: tuple[int, ...], layouts: tuple[str, ...], tokens: int, lora_block: int, dtype: torch.dtype) -> None:
    check(make_case(spec=MoESpec(64, 4, 512, inter), m=tokens, dtype=dtype, device=DEVICE, ranks=ranks, layouts=layouts, active=4, slots=5), lora_block)
