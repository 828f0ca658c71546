"""The emulator itself (csrc/emulator): its primitives compute what the hardware documents, and planted errors do not pass."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.moe_cases import generator
from tests.ops import emulator

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]
DRIVER = Path(__file__).parent / "emulator_cases.cu"


@pytest.fixture(scope="module")
def run_case(driver: Path) -> Run:
    def run(name: str, data: torch.Tensor | None, out_bytes: int, order: int = 0) -> subprocess.CompletedProcess[bytes]:
        blob = b"" if data is None else data.contiguous().view(torch.uint8).numpy().tobytes()
        return subprocess.run([driver, name, str(len(blob)), str(out_bytes), str(order)], input=blob, capture_output=True)

    return run


def result(run: subprocess.CompletedProcess[bytes], dtype: torch.dtype) -> torch.Tensor:
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    return torch.frombuffer(bytearray(run.stdout), dtype=dtype)


def test_async_copies_arrive_at_their_wait(run_case: Run) -> None:
    data = torch.arange(256, dtype=torch.int32)
    found = result(run_case("copy", data, 1024), torch.int32)
    expected = torch.where(torch.arange(256) < 192, data, 0)  # rows of lanes 16.. of the second group are zero-filled
    assert torch.equal(found, torch.cat([expected[:128].roll(-4), expected[128:].roll(-4)]))


def test_a_missing_wait_shows(run_case: Run) -> None:
    data = torch.arange(256, dtype=torch.int32)
    found = result(run_case("copy_without_wait", data, 1024), torch.int32)
    poison = emulator.POISON * 0x10001
    assert (found[:120] == poison).all(), "data was visible before its wait"  # the last lane of the barrier runs on to its own wait first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_instructions(run_case: Run, dtype: torch.dtype) -> None:
    g = generator(0)
    a, b = torch.randn(16, 16, generator=g).to(dtype), torch.randn(16, 8, generator=g).to(dtype)
    name = "multiply_bf16" if dtype == torch.bfloat16 else "multiply_fp16"
    found = result(run_case(name, torch.cat([a.view(-1), b.view(-1)]), 512), torch.float32).view(16, 8)
    torch.testing.assert_close(found, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_collectives(run_case: Run) -> None:
    values = torch.randint(1, 9, (32,), generator=generator(1), dtype=torch.int32)
    found = result(run_case("collectives", values, 1024), torch.int32).view(32, 8).tolist()
    lanes = values.tolist()
    for lane, row in enumerate(found):
        ballot = sum((v & 1) << i for i, v in enumerate(lanes))
        match = sum((v == lanes[lane]) << i for i, v in enumerate(lanes))
        bits = (1 << lane) - 1 + lanes[lane].bit_count()
        place = (lanes[lane].bit_length() - 1) * 100 + (lanes[lane] & -lanes[lane]).bit_length() - 1
        shuffled = (lanes[lane - 3] if lane >= 3 else lanes[lane]) + 1000 * lanes[lane ^ 6]
        expected = [ballot, match, shuffled, lanes[5], sum(lanes), -min(lanes), bits, place]
        assert [v % 2**32 for v in row] == [v % 2**32 for v in expected], f"lane {lane}"


def test_packing_rounds_as_torch_does(run_case: Run) -> None:
    values = torch.cat(
        [
            torch.randn(40, generator=generator(2)),
            torch.tensor([0.0, -0.0, 1e-7, 6e-5, 65504.0, 65519.0, 65520.0, -1e30, 2049.0, 2051.0, 1 + 2**-8, 1 + 3 * 2**-8]),
        ]
    )
    values = torch.cat([values, torch.randn(64 - len(values), generator=generator(3)) * 1e-5])
    found = result(run_case("pack", values, 256), torch.int32).view(32, 2)
    assert torch.equal(found[:, 0].contiguous().view(torch.int16), values.bfloat16().view(torch.int16))
    assert torch.equal(found[:, 1].contiguous().view(torch.int16), values.half().view(torch.int16))


@pytest.mark.parametrize("order", [0, 1, 7])
def test_barriers_hold_in_every_order(run_case: Run, order: int) -> None:
    data = torch.arange(128, dtype=torch.int32)
    assert torch.equal(result(run_case("reverse", data, 512, order), torch.int32), data.flip(0))
    assert not torch.equal(result(run_case("reverse_without_barrier", data, 512, order), torch.int32), data.flip(0))


def test_clusters_read_each_others_memory_between_barriers(run_case: Run) -> None:
    data = torch.arange(128, dtype=torch.int32)
    assert torch.equal(result(run_case("pass_on", data, 512), torch.int32), data.roll(-32))
    assert not torch.equal(result(run_case("pass_on_at_once", data, 512), torch.int32), data.roll(-32))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("early_return", "not reached by all"),
        ("split_warp", "different collectives"),
        ("overrun", "heap-buffer-overflow"),
        ("pass_on_and_leave", "block that has ended"),
    ],
)
def test_planted_errors_stop_the_program(run_case: Run, name: str, message: str) -> None:
    run = run_case(name, None, 256)
    assert run.returncode != 0
    assert message in run.stderr.decode()
