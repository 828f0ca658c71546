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
from tests.ops.cpp import compile_for_emulator
from tests.routing_cases import POPULARITIES, ROUTINGS, generator, make_token_slots, make_topk_ids

HERE = Path(__file__).parent
DEFAULT, LARGE, TINY_BLOCKS = (4096, 1024, 1024), (-1, 64, 256), (-1, 3, 256)  # plans: one_block_pairs, pairs_per_block, threads


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
    dtype: torch.dtype = torch.int32
    plan: tuple[int, int, int] = DEFAULT
    order: int = 0  # of threads: 0 forward, 1 reverse, else shuffled

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        g = generator(self.tokens * 31 + self.experts)
        ids = make_topk_ids(self.routing, self.tokens, self.top_k, self.experts, g, self.dtype)
        return ids, make_token_slots(self.popularity, self.tokens, self.active, g) if self.slots else None

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


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for_emulator(HERE / "align_driver.cpp", tmp_path_factory.mktemp("align"))


def encode(case: Case) -> bytes:
    ids, slots = case.inputs()
    base = op.max_base_tiles(ids.numel(), case.experts, case.base_block)
    lora = op.max_lora_tiles(ids.numel(), case.experts, case.slots, case.lora_block)
    sizes = [case.tokens, case.top_k, case.experts, case.slots, case.base_block, case.lora_block, int(slots is not None)]
    header = torch.tensor([int(case.dtype == torch.int64), *sizes, *case.plan, case.order, base, lora], dtype=torch.int32)
    return b"".join(t.numpy().tobytes() for t in (header, ids, slots) if t is not None)


def decode(output: bytes, cases: list[Case]) -> Iterator[op.Alignment]:
    words = torch.frombuffer(bytearray(output), dtype=torch.int32)
    for case in cases:
        pairs = case.tokens * case.top_k
        base = op.max_base_tiles(pairs, case.experts, case.base_block)
        lora = op.max_lora_tiles(pairs, case.experts, case.slots, case.lora_block)
        parts = words[: pairs + 3 * base + 4 * lora + 4].split([pairs, 3 * base, 4 * lora, 4])
        words = words[pairs + 3 * base + 4 * lora + 4 :]
        yield op.Alignment(parts[0], parts[1].view(-1, 3), parts[2].view(-1, 4), parts[3])


def check_on_emulator(driver: Path, cases: list[Case]) -> None:
    run = subprocess.run([driver], input=b"".join(map(encode, cases)), capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-4000:]
    for case, found in zip(cases, decode(run.stdout, cases), strict=True):
        assert_same(found, case.expected(), case)


@pytest.mark.parametrize("plan", [DEFAULT, LARGE, TINY_BLOCKS], ids=["one block", "three launches", "three launches, tiny blocks"])
def test_emulator_routings_and_popularities(driver: Path, plan: tuple[int, int, int]) -> None:
    cases = [
        Case(37, 3, 8, 5, 5, 4, 4, routing, popularity, plan=plan, order=i) for i, (routing, popularity) in enumerate(itertools.product(ROUTINGS, POPULARITIES))
    ]
    check_on_emulator(driver, cases)


@pytest.mark.parametrize("plan", [DEFAULT, LARGE], ids=["one block", "three launches"])
def test_emulator_sizes(driver: Path, plan: tuple[int, int, int]) -> None:
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
        for (base, lora), tokens, plan in itertools.product(blocks, (15, 16, 17, 47, 48, 49), (DEFAULT, LARGE))
    ]
    check_on_emulator(driver, cases)


def test_emulator_no_tokens_and_bad_slots(driver: Path) -> None:
    check_on_emulator(
        driver, [Case(0, 8, 4, 2, 2), Case(0, 8, 4, 0, 0, plan=LARGE), Case(9, 2, 4, 2, 7, popularity="distinct"), Case(9, 2, 4, 2, 7, plan=LARGE)]
    )


def test_emulator_large(driver: Path) -> None:
    """P = 8,194 with the default plan: three launches, several blocks, runs of many tiles; and one block at its limit."""
    check_on_emulator(
        driver, [Case(4097, 2, 8, 4, 4, 64, 32), Case(512, 8, 128, 16, 16, 16, 16), Case(4097, 2, 8, 4, 4, 128, 16, "one_expert", "zipf", order=1)]
    )
