"""moe_lora_align_block_size in CUDA against the torch implementation.

Without a GPU the same source runs on the emulator under AddressSanitizer and UBSan, with the threads in several orders. With one (`gpu`),
the full grid runs through the op, eagerly and from a captured graph.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sglang_lora_moe.ops import moe_lora_align as op
from tests.moe_cases import POPULARITIES, ROUTINGS, generator, make_token_slots, make_topk_ids
from tests.ops.align_plans import Plan, align_with_plan

DRIVER = Path(__file__).parent / "align_driver.cpp"
# one_block_pairs, cluster_pairs, pairs_per_block, overlap, most_bins
DEFAULT, CLUSTER = (512, 4096, 0, 1, -1), (-1, 4096, 8, 1, 4096)
TWO_LAUNCHES, TINY_BLOCKS = (-1, 0, 64, 1, 4096), (-1, 0, 3, 0, 4096)
MANY_GROUPS, THREE_LAUNCHES, THREE_TINY = (1024, 0, 0, 1, 0), (-1, 0, 64, 1, 0), (-1, 0, 3, 0, 0)
PLANS = {
    "one block": DEFAULT,
    "two launches": TWO_LAUNCHES,
    "tiny blocks": TINY_BLOCKS,
    "cluster": CLUSTER,
    "one block, up to its limit": MANY_GROUPS,
    "three launches": THREE_LAUNCHES,
    "tiny blocks, many groups": THREE_TINY,
}


@dataclass(frozen=True)
class Case:
    tokens: int
    top_k: int
    experts: int
    slots: int
    active: int
    base_block: int = 16
    lora_block: int = 16
    routing: str = "uniform"
    popularity: str = "uniform"
    base_share: float = 0.0
    dtype: torch.dtype = torch.int32
    plan: Plan = DEFAULT
    order: int = 0  # of threads: 0 forward, 1 reverse, else shuffled

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        g = generator(self.tokens * 31 + self.experts)
        ids = make_topk_ids(self.routing, self.tokens, self.top_k, self.experts, g, self.dtype)
        return ids, make_token_slots(self.popularity, self.tokens, self.active, g, self.base_share) if self.slots else None

    def expected(self) -> op.Alignment:
        ids, slots = self.inputs()
        return op.moe_lora_align_block_size(ids, slots, self.experts, self.slots, self.base_block, self.lora_block)


def assert_same(found: op.Alignment, expected: op.Alignment, case: Case) -> None:
    counts = expected.counts.tolist()
    assert found.counts.tolist() == counts, f"counts of {case}"
    valid, base, lora, _ = counts
    assert torch.equal(found.sorted_pairs[:valid], expected.sorted_pairs[:valid]), f"sorted_pairs of {case}"
    assert torch.equal(found.sorted_pairs[valid:].sort().values, expected.sorted_pairs[valid:].sort().values), f"pairs without expert of {case}"
    assert torch.equal(found.base_tiles[:base], expected.base_tiles[:base]), f"base_tiles of {case}"
    assert torch.equal(found.lora_tiles[:lora], expected.lora_tiles[:lora]), f"lora_tiles of {case}"


# ---- the emulator --------------------------------------------------------------------------------------------------


def encode(case: Case) -> bytes:
    ids, slots = case.inputs()
    base = op.max_tiles(ids.numel(), case.experts, case.base_block)
    lora = op.max_tiles(ids.numel(), case.experts * case.slots, case.lora_block)
    sizes = [case.tokens, case.top_k, case.experts, case.slots, case.base_block, case.lora_block, int(slots is not None)]
    header = torch.tensor([int(case.dtype == torch.int64), *sizes, *case.plan, case.order, base, lora], dtype=torch.int32)
    return b"".join(t.numpy().tobytes() for t in (header, ids, slots) if t is not None)


def decode(output: bytes, cases: list[Case]) -> Iterator[op.Alignment]:
    words = torch.frombuffer(bytearray(output), dtype=torch.int32)
    for case in cases:
        pairs = case.tokens * case.top_k
        base = op.max_tiles(pairs, case.experts, case.base_block)
        lora = op.max_tiles(pairs, case.experts * case.slots, case.lora_block)
        parts = words[: pairs + 3 * base + 4 * lora + 4].split([pairs, 3 * base, 4 * lora, 4])
        words = words[pairs + 3 * base + 4 * lora + 4 :]
        yield op.Alignment(parts[0], parts[1].view(-1, 3), parts[2].view(-1, 4), parts[3])


def check_on_emulator(driver: Path, cases: list[Case]) -> None:
    run = subprocess.run([driver], input=b"".join(map(encode, cases)), capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-4000:]
    for case, found in zip(cases, decode(run.stdout, cases), strict=True):
        assert_same(found, case.expected(), case)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_emulator_routings_and_popularities(driver: Path, plan: Plan) -> None:
    cases = [
        Case(37, 3, 8, 5, 5, 4, 4, routing, popularity, 0.25 * (i % 3), plan=plan, order=i)
        for i, (routing, popularity) in enumerate(itertools.product(ROUTINGS, POPULARITIES))
    ]
    check_on_emulator(driver, cases)


@pytest.mark.parametrize("plan", [DEFAULT, TWO_LAUNCHES, CLUSTER, THREE_LAUNCHES], ids=["one block", "two launches", "cluster", "three launches"])
def test_emulator_sizes(driver: Path, plan: Plan) -> None:
    cases = []
    for i, (tokens, (experts, top_k, slots)) in enumerate(
        itertools.product((1, 2, 31, 32, 33, 133), ((1, 1, 1), (8, 2, 4), (128, 8, 16), (60, 6, 64), (1024, 8, 4), (32, 12, 256), (255, 1, 0), (16, 4, 0)))
    ):
        dtype = torch.int64 if i % 3 == 0 else torch.int32
        cases.append(Case(tokens, top_k, experts, slots, slots, 16, 32, dtype=dtype, plan=plan, order=i % 5))
    check_on_emulator(driver, cases)


def test_emulator_block_edges(driver: Path) -> None:
    """Runs of exactly a block, one less, one more; blocks that are no power of two; blocks of one."""
    blocks = itertools.product((1, 3, 16, 48), (1, 3, 16, 48))
    cases = [
        Case(tokens, 1, 2, 2, 2, base, lora, "one_expert", "identical", plan=plan)
        for (base, lora), tokens, plan in itertools.product(blocks, (15, 16, 17, 47, 48, 49), (DEFAULT, TWO_LAUNCHES, CLUSTER, MANY_GROUPS, THREE_LAUNCHES))
    ]
    check_on_emulator(driver, cases)


def test_emulator_no_tokens_and_bad_slots(driver: Path) -> None:
    empty = [Case(0, 8, 4, 2, 2), Case(0, 8, 4, 0, 0, plan=THREE_LAUNCHES)]
    bad = [Case(9, 2, 4, 2, 7, popularity="distinct", plan=plan) for plan in PLANS.values()]  # slots beyond the last
    check_on_emulator(driver, [*empty, *bad])


def test_emulator_large(driver: Path) -> None:
    """P = 8,194: several blocks, runs of many tiles; 16 adapters of 128 experts; one block at its limit."""
    cases = [
        case
        for bins in (-1, 4096, 0)
        for case in (
            Case(4097, 2, 8, 4, 4, 64, 32, plan=(512, 4096, 0, 1, bins)),
            Case(512, 8, 128, 16, 16, 16, 16, plan=(512, 4096, 0, 1, bins)),
            Case(128, 8, 128, 4, 4, 16, 16, plan=(512, 4096, 0, 1, bins)),
            Case(4097, 2, 8, 4, 4, 128, 16, "one_expert", "zipf", order=1, plan=(512, 4096, 0, 1, bins)),
        )
    ]
    check_on_emulator(driver, cases)


# ---- the GPU -------------------------------------------------------------------------------------------------------

MANY_BLOCKS, APART, MANY_BLOCKS_OF_MANY = (-1, 0, 96, 1, 4096), (-1, 0, 1024, 0, 4096), (-1, 0, 96, 1, 0)
CLUSTER_OF_16 = (-1, 8192, 64, 1, 4096)
ON_GPU: dict[str, Plan | None] = {
    "default": None, "cluster of 16": CLUSTER_OF_16,
    "many groups": MANY_GROUPS, "many blocks": MANY_BLOCKS, "apart": APART, "many blocks, many groups": MANY_BLOCKS_OF_MANY,
}  # fmt: skip


def run_on_gpu(case: Case, plan: Plan | None = None) -> op.Alignment:
    """Through the operator, or past it under a plan; outputs and scratch poisoned before."""
    ids, slots = (None if t is None else t.cuda() for t in case.inputs())
    assert ids is not None
    buffers = op.empty_alignment(ids.numel(), case.experts, case.slots, case.base_block, case.lora_block, ids.device)
    workspace = torch.empty(op.workspace_elements(ids.numel(), case.experts), dtype=torch.int32, device=ids.device)
    for tensor in (buffers.sorted_pairs, buffers.base_tiles, buffers.lora_tiles, buffers.counts, workspace):
        tensor.fill_(-0x32323233)
    sizes = (case.experts, case.slots, case.base_block, case.lora_block)
    if plan is None:
        told = torch.full((1,), 7, dtype=torch.int32, device=ids.device) if case.experts < ids.numel() <= op.MAX_TOLD_PAIRS else None
        op.moe_lora_align_block_size(ids, slots, *sizes, buffers=buffers, workspace=workspace, told=told)
        assert told is None or not told.any(), f"nobody was told: {case}"
    else:
        align_with_plan(plan, ids, slots, sizes, buffers, workspace)
    return op.Alignment(*(t.cpu() for t in (buffers.sorted_pairs, buffers.base_tiles, buffers.lora_tiles, buffers.counts)))


@pytest.mark.gpu
def test_gpu_small() -> None:
    """The first thing to run on a new machine."""
    for plan in ON_GPU.values():
        case = Case(133, 8, 128, 16, 16)
        assert_same(run_on_gpu(case, plan), case.expected(), case)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [8, 32, 60, 64, 128, 256, 512, 1024])
def test_gpu_sizes(experts: int) -> None:
    for i, (tokens, top_k, slots) in enumerate(itertools.product((1, 2, 7, 16, 17, 64, 133, 256, 1000, 4097), (6, 8, 12), (0, 1, 4, 16, 64, 256))):
        dtype = torch.int64 if i % 3 == 0 else torch.int32
        case = Case(tokens, top_k, experts, slots, slots, (16, 32, 64, 128)[i % 4], (16, 64)[i % 2], dtype=dtype)
        assert_same(run_on_gpu(case), case.expected(), case)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ON_GPU.values(), ids=ON_GPU)
def test_gpu_routings_and_popularities(plan: Plan | None) -> None:
    for routing, popularity, (tokens, experts) in itertools.product(ROUTINGS, POPULARITIES, ((7, 8), (133, 128), (512, 256))):
        case = Case(tokens, 8, experts, 16, 11, 48, 16, routing, popularity, 0.5 * (tokens % 2))
        assert_same(run_on_gpu(case, plan), case.expected(), case)


@pytest.mark.gpu
def test_gpu_more_pairs_than_the_tile_masks_fit() -> None:
    """1.2 M pairs: blocks of more than 8,192 pairs would not fit, nor do the masks of the tile kernel in shared memory."""
    case = Case(150_000, 8, 64, 4, 4, 128, 64, popularity="zipf")
    assert_same(run_on_gpu(case), case.expected(), case)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 300, 4097])
def test_gpu_graph_replay_follows_its_inputs(tokens: int) -> None:
    cases = [Case(tokens, 8, 128, 16, active, routing=routing) for active in (16, 3) for routing in ("uniform", "few_experts", "all_invalid", "some_invalid")]
    ids, slots = (t.cuda() for t in cases[0].inputs() if t is not None)
    buffers = op.empty_alignment(ids.numel(), 128, 16, 16, 16, ids.device)
    workspace = torch.empty(op.workspace_elements(ids.numel(), 128), dtype=torch.int32, device="cuda")

    def call() -> None:
        op.moe_lora_align_block_size(ids, slots, 128, 16, 16, 16, buffers=buffers, workspace=workspace)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for case in cases:
        new_ids, new_slots = case.inputs()
        assert new_slots is not None
        ids.copy_(new_ids)
        slots.copy_(new_slots)
        graph.replay()
        found = op.Alignment(*(t.cpu() for t in (buffers.sorted_pairs, buffers.base_tiles, buffers.lora_tiles, buffers.counts)))
        assert_same(found, case.expected(), case)


@pytest.mark.gpu
def test_gpu_runs_are_bit_equal() -> None:
    for tokens in (64, 512, 4097):
        case = Case(tokens, 8, 128, 64, 64, routing="some_invalid", base_share=0.5)
        first, second = run_on_gpu(case), run_on_gpu(case)
        for name in ("sorted_pairs", "base_tiles", "lora_tiles", "counts"):  # poison included
            assert torch.equal(getattr(first, name), getattr(second, name)), f"{name} of {case}"


@pytest.mark.gpu
def test_gpu_refusals_name_expected_and_actual() -> None:
    ids, slots = (t.cuda() for t in Case(8, 2, 4, 2, 2).inputs() if t is not None)
    buffers = op.empty_alignment(16, 4, 2, 16, 16, ids.device)
    workspace = torch.empty(op.workspace_elements(16, 4), dtype=torch.int32, device="cuda")

    def call(ids: torch.Tensor, slots: torch.Tensor | None, experts: int, workspace: torch.Tensor, counts: torch.Tensor) -> None:
        tensors = (buffers.sorted_pairs, buffers.base_tiles, buffers.lora_tiles, counts, workspace)
        torch.ops.sglang_lora_moe.moe_lora_align_block_size(ids, slots, experts, 2, 16, 16, *tensors)

    op.moe_lora_align_block_size(ids, slots, 4, 2, 16, 16)  # loads the library
    wrong = [
        ((ids.float(), slots, 4, workspace, buffers.counts), "int32 or int64"),
        ((ids.t(), slots, 4, workspace, buffers.counts), "contiguous"),
        ((ids, slots[:4], 4, workspace, buffers.counts), r"token_slots to be .* at least 8 elements on cuda:0, got Int \[4\]"),
        ((ids, slots, 1025, workspace, buffers.counts), r"1\.\.1024, got 1025"),
        ((ids, slots, 4, workspace[:8], buffers.counts), "workspace to be"),
        ((ids, slots, 4, workspace, buffers.counts.long()), "counts to be contiguous int32"),
        ((ids, slots, 4, workspace, buffers.counts.cpu()), "on cuda"),
    ]
    for arguments, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
