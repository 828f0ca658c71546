"""The Marlin GEMM and its repack: on the emulator under AddressSanitizer and UBSan, and with a GPU (`gpu`) through the operators."""

from __future__ import annotations

import itertools
import struct
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import marlin_moe as op
from sglang_lora_moe.quantization.wna16 import WNA16Weight, dequantize, pack
from tests.moe_cases import generator
from tests.ops import emulator
from tests.ops.marlin_cases import Case, encode_gemm, encode_repack, unpack_weight
from tests.references import keep_error, relative_error

DRIVER = Path(__file__).parent / "marlin_driver.cpp"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
WIDTHS = ((128, 128), (64, 32), (80, 40), (192, 160), (16, 384))
RANKS = (16, 1, 7, 40)
SILU, CLAMPED = MoESpec(4, 2, 128, 64), MoESpec(4, 2, 128, 64, swiglu_alpha=1.702, swiglu_limit=0.7)


def random_weight(experts: int, rows: int, k: int, bits: int, group: int, zeros: bool, dtype: torch.dtype) -> WNA16Weight:
    """Any code, any zero point (GPTQ's reach 16), scales of any sign and size."""
    g = generator(rows * 31 + k)
    codes = torch.randint(0, 1 << bits, (experts, rows, k), generator=g, dtype=torch.uint8)
    scales = torch.randn(experts, rows, k // group, generator=g).to(dtype)
    points = torch.randint(0, min(256, (1 << bits) + 1), scales.shape, generator=g).to(torch.uint8) if zeros else None
    return WNA16Weight(pack(codes, bits), scales, points, bits, group)


def on(device: str, weight: WNA16Weight) -> WNA16Weight:
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    return replace(weight, packed=weight.packed.to(device), scales=weight.scales.to(device), zeros=zeros)


def assert_same_values(found: WNA16Weight, expected: WNA16Weight, dtype: torch.dtype) -> None:
    assert torch.equal(dequantize(found, dtype).view(torch.int16), dequantize(expected, dtype).view(torch.int16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_repack_is_exact(device: str, bits: int, group: int, zeros: bool, dtype: torch.dtype) -> None:
    for (rows, k), halves in itertools.product(WIDTHS, (1, 2)):
        if group > 0 and k % group:
            continue
        weight = on(device, random_weight(2, rows, k, bits, k if group == -1 else group, zeros, dtype))
        assert_same_values(unpack_weight(op.marlin_moe_repack(weight, halves)), weight, dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_emulated_repack_equals_torch(driver: Path, bits: int) -> None:
    for (rows, k), halves in itertools.product(WIDTHS, (1, 2)):
        weight = random_weight(2, rows, k, bits, k, False, torch.bfloat16)
        found = torch.frombuffer(emulator.answer(driver, encode_repack(weight, halves)), dtype=torch.int32)
        assert torch.equal(found, op.marlin_moe_repack(weight, halves).packed.flatten()), f"{rows} x {k}, halves {halves}"


def test_shapes_are_those_of_the_kernels(driver: Path) -> None:
    found = torch.frombuffer(emulator.answer(driver, struct.pack("37i", 2, *[0] * 36)), dtype=torch.int32).view(-1, 6).tolist()
    assert found == [list(astuple(shape)) for shape in op.SHAPES]


def check(driver: Path, cases: list[Case]) -> None:
    words = torch.frombuffer(emulator.answer(driver, b"".join(map(encode_gemm, cases))), dtype=torch.int16)
    for case in cases:
        expected, written = case.expected()
        found, words = words[: expected.numel()].view(case.dtype).view(expected.shape), words[expected.numel() :]
        error = float((found[written].float() - expected[written]).norm() / expected[written].norm().clamp(min=1e-6))
        assert error <= 2e-3, f"relative error {error:.1e}: {case}"
        assert (found[~written].contiguous().view(torch.int16) == emulator.POISON).all(), f"a row without expert was written: {case}"


FORMATS = list(itertools.product((4, 8), (32, 64, 128, -1), (False, True), op.DTYPES))
INT8_FORMATS = ((0,), (1,), (2,), (3,), (0, 3))  # of each shape of tiles in marlin_driver.cpp: 2 * zeros + float16


@pytest.mark.parametrize("config", range(len(op.SHAPES)))
def test_emulated_gemm_formats(driver: Path, config: int) -> None:
    """int4 in each format at each shape of tiles, int8 in those that the driver has of a shape; the result is exact to the rounding of the output."""
    cases = [
        Case(5, bits=bits, group=256 if group == -1 else group, zeros=zeros, dtype=dtype, k=256, config=config, halves=1 + i % 2, order=i % 3)
        for i, (bits, group, zeros, dtype) in enumerate(FORMATS)
        if bits == 4 or i % 4 in INT8_FORMATS[config]
    ]
    check(driver, cases)


@pytest.mark.parametrize("config", range(len(op.SHAPES)))
def test_emulated_gemm_routings_and_widths(driver: Path, config: int) -> None:
    block = op.SHAPES[config].block_tokens
    base = Case(5, config=config)
    cases = [replace(base, routing=r, halves=h, tokens=9) for r in ("one_expert", "few_experts", "some_invalid", "all_invalid") for h in (1, 2)]
    cases += [replace(base, rows=rows, k=k, group=k, halves=halves) for rows, k in WIDTHS for halves in (1, 2)]
    cases += [replace(base, tokens=t, routing="one_expert", top_k=1, k=32, rows=32) for t in (block - 1, block, block + 1, 2 * block + 3)]
    check(driver, cases)


@pytest.mark.parametrize("config", [0, 1, 2])
def test_emulated_gemm_shares_tiles(driver: Path, config: int) -> None:
    """Few tiles over many blocks: several blocks share one, in every order of threads; long k keeps them busy."""
    base = Case(3, config=config, k=1024, rows=64, experts=2, group=128, top_k=1)
    cases = [replace(base, sms=sms, tokens=t, order=i) for i, (sms, t) in enumerate(((1, 3), (2, 1), (3, 2), (5, 9)))]
    check(driver, [*cases, replace(base, k=4096, sms=1), replace(base, k=1152, sms=7)])


def test_emulated_gemm_draws_tiles_and_halves_of_tiles(driver: Path) -> None:
    """At least a tile for each block: where they do not come out even, who draws the halves of one shares it; even and odd numbers of stages."""
    base = Case(9, experts=6, group=128, ranks=RANKS, sms=1)
    check(driver, [replace(base, rows=r, halves=h, k=k, order=k % 3) for r in (128, 384, 640) for h in (1, 2) for k in (512, 640)])
    check(driver, [replace(base, rows=384, tokens=40, sms=2, k=1024, spec=SILU, halves=2), replace(base, rows=384, routing="some_invalid", k=768)])


@pytest.mark.parametrize("ranks", [(), RANKS])
def test_emulated_gemm_draws_more_tiles_than_its_queue_holds(driver: Path, ranks: tuple[int, ...]) -> None:
    """By wgmma one block, or two, draw all tiles, gate_up's and down's from counters of their own."""
    base = Case(3, experts=6, rows=640, k=512, group=128, config=4, ranks=ranks)
    check(driver, [replace(base, halves=h, sms=sms, order=i) for i, (h, sms) in enumerate(itertools.product((1, 2), (1, 2)))])
    if not ranks:  # more stages of k than the ring has: tiles are reported, and waited for
        check(driver, [replace(base, k=640, halves=h, sms=2) for h in (1, 2)])


def test_emulated_gemm_bias_and_activation(driver: Path) -> None:
    base = Case(6, halves=2, bias=True, config=1)
    activations = [SILU, CLAMPED, replace(SILU, activation="gelu_tanh")]
    cases = [replace(base, spec=spec) for spec in activations] + [replace(base, halves=h, dtype=d) for h in (1, 2) for d in op.DTYPES]
    check(driver, [*cases, replace(base, spec=SILU, bias=False, config=0), replace(base, spec=SILU, config=3, tokens=70)])


@pytest.mark.parametrize("config", range(len(op.SHAPES)))
def test_emulated_gemm_adds_adapters(driver: Path, config: int) -> None:
    """Odd ranks and more than 16, with and without an A of its own for up; shared tiles, where the block of the last weights adds; many adapters in one."""
    base = Case(19, config=config, ranks=RANKS, k=512, rows=80)
    cases = [replace(base, halves=h, dtype=d, spec=spec) for d in op.DTYPES for h, spec in ((1, None), (2, None), (2, SILU))]
    cases += [replace(base, routing="some_invalid"), replace(base, sms=7, halves=2), replace(base, tokens=1), replace(base, ranks=(2,), bias=True)]
    cases += [replace(base, routing="one_expert", ranks=ranks, top_k=1, tokens=64) for ranks in (RANKS, (8, 16))]
    check(driver, cases)


@pytest.mark.parametrize("config", [1, 2])
def test_emulated_gemm_finds_adapters_by_slot(driver: Path, config: int) -> None:
    """Tiles of 16 tokens, of down alone, compute s. Odd ranks, one matrix for all experts, shared tiles, tiles of one stage, many adapters in one, none."""
    base = Case(19, config=config, ranks=RANKS, k=512, rows=80, by_slot=True)
    kinds: Any = ((1, None),) if config == 1 else ((1, None), (2, None), (2, SILU))
    most = kinds[-1][0]
    cases = [replace(base, halves=h, dtype=d, spec=spec, order=i) for d in op.DTYPES for i, (h, spec) in enumerate(kinds)]
    cases += [replace(base, routing=r, k=1200, group=1200, halves=h) for r in ("some_invalid", "all_invalid") for h in {1, most}]
    cases += [
        replace(base, sms=7, halves=most),
        replace(base, tokens=1),
        replace(base, ranks=(2,), bias=True),
        replace(base, k=128, sms=1),
        replace(base, k=32, ranks=(8,)),
    ]
    cases += [replace(base, routing="one_expert", ranks=ranks, top_k=1, tokens=64, halves=most) for ranks in (RANKS, (8, 16))]
    check(driver, cases)


@pytest.mark.parametrize("config", range(len(op.SHAPES)))
def test_emulated_gemm_of_4097_tokens(driver: Path, config: int) -> None:
    base = Case(4097, top_k=1, experts=3, rows=32, k=32, config=config, routing="zipf")
    check(driver, [base, replace(base, ranks=(16, 3))])


def weights_case(config: int, sizes: float) -> Case:
    """Its output is the weights of its one expert, one column a token."""
    return Case(128, top_k=1, experts=1, k=128, rows=128, group=32, config=config, x_is_identity=True, sizes=sizes)


def assert_are_weights(found: torch.Tensor, case: Case) -> None:
    assert torch.equal(found.cpu().T.contiguous(), dequantize(case.weight(), case.dtype)[0]), f"weights are not rounded once: {case}"


@pytest.mark.parametrize("config", [2, 4])
@pytest.mark.parametrize("sizes", [1.0, 2.0**20, 2.0**-60])
def test_emulated_weights_are_rounded_once(driver: Path, sizes: float, config: int) -> None:
    case = weights_case(config, sizes)
    words = torch.frombuffer(emulator.answer(driver, encode_gemm(case)), dtype=torch.bfloat16)
    assert_are_weights(words.view(128, 128), case)


# ---- the GPU -------------------------------------------------------------------------------------------------------


CONFIGS = [pytest.param(i, marks=[] if i < op.EVERYWHERE else pytest.mark.skipif(not HOPPER, reason="wgmma is sm_90's")) for i in range(len(op.SHAPES))]


def run_on_gpu(case: Case, overlap: bool = True) -> torch.Tensor:
    """Through the operators; the output and scratch poisoned before."""
    canonical, (x, ids, bias) = case.weight(), (None if t is None else t.cuda() for t in case.inputs())
    align = case.alignment(on="cuda")
    assert x is not None and ids is not None
    weight = op.marlin_moe_repack(on("cuda", canonical), case.halves, bias)
    scratch = op.GemmScratch.allocate(132, x.device)
    out = torch.full((ids.numel(), case.rows // 2 if case.spec else case.rows), float("nan"), dtype=case.dtype, device="cuda")
    gather = case.halves == 2
    adapters = case.adapters()
    options: dict[str, Any] = {"config": case.config, "sms": 132, "gather": gather, "scatter": not gather, "activation": case.spec, "overlap": overlap}
    options["addend"] = None if adapters is None else adapters.addend()
    op.marlin_moe_gemm(x, weight, align, case.top_k, out, scratch, **options)
    first = out.clone()
    out.fill_(float("nan"))
    op.marlin_moe_gemm(x, weight, align, case.top_k, out, scratch, **options)
    assert torch.equal(first.view(torch.int16), out.view(torch.int16)), f"two runs differ: {case}"
    assert not scratch.arrivals.any(), f"counters are left: {case}"
    return out


def check_on_gpu(case: Case) -> None:
    found, (expected, written) = run_on_gpu(case).cpu(), case.expected()
    error = keep_error(f"marlin GEMM, {str(case.dtype).removeprefix('torch.')}", relative_error(found[written], expected[written]))
    assert error <= 2e-3, f"relative error {error:.1e}: {case}"
    assert found[~written].isnan().all(), f"a row without expert was written: {case}"


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_gpu_repack_equals_torch(bits: int) -> None:
    for (rows, k), halves in itertools.product(WIDTHS, (1, 2)):
        weight = random_weight(3, rows, k, bits, k, False, torch.bfloat16)
        found = op.marlin_moe_repack(replace(weight, packed=weight.packed.cuda(), scales=weight.scales.cuda()), halves)
        assert torch.equal(found.packed.cpu(), op.marlin_moe_repack(weight, halves).packed), f"{rows} x {k}, halves {halves}"


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_gpu_gemm_formats(config: int) -> None:
    for i, (bits, group, zeros, dtype) in enumerate(FORMATS):
        check_on_gpu(Case(11, bits=bits, group=256 if group == -1 else group, zeros=zeros, dtype=dtype, k=256, rows=256, config=config, halves=1 + i % 2))


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_gpu_gemm_routings_and_widths(config: int) -> None:
    base = Case(33, config=config, experts=8)
    for routing, halves in itertools.product(("one_expert", "few_experts", "some_invalid", "all_invalid"), (1, 2)):
        check_on_gpu(replace(base, routing=routing, halves=halves))
    for (rows, k), halves in itertools.product((*WIDTHS, (768, 2048), (2880, 320)), (1, 2)):
        check_on_gpu(replace(base, rows=rows, k=k, group=32 if k % 32 == 0 else k, halves=halves, spec=SILU if halves == 2 else None, bias=True))
    for tokens in (1, 7, 16, 65, 129, 1000):
        check_on_gpu(replace(base, tokens=tokens, k=1024, rows=384, group=128, halves=2, spec=CLAMPED))


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_gpu_gemm_adds_adapters_and_rounds_weights_once(config: int) -> None:
    base = Case(150, config=config, ranks=RANKS, k=512, rows=384)
    for dtype, (halves, spec) in itertools.product(op.DTYPES, ((1, None), (2, None), (2, SILU))):
        check_on_gpu(replace(base, halves=halves, dtype=dtype, spec=spec))
        if op.SHAPES[config].block_tokens == 32 or config == halves == 1:
            for k, tokens in itertools.product((64, 768, 2048), (1, 33, 150)):
                check_on_gpu(replace(base, halves=halves, dtype=dtype, spec=spec, k=k, tokens=tokens, by_slot=True))
    for sizes in (1.0, 2.0**20, 2.0**-60):
        case = weights_case(config, sizes)
        assert_are_weights(run_on_gpu(case), case)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_gpu_gemm_up_to_4097_tokens(config: int) -> None:
    """Odd tails, empty experts, all tokens to one expert."""
    base = Case(4097, config=config, experts=16, k=384, rows=256, group=128)
    for routing, halves in itertools.product(("uniform", "one_expert", "few_experts"), (1, 2)):
        check_on_gpu(replace(base, routing=routing, halves=halves, spec=SILU if halves == 2 else None))
    for tokens in (1, 2, 127, 257, 2049):
        check_on_gpu(replace(base, tokens=tokens))


def test_pool_beyond_32_bit_places_is_refused() -> None:
    def addend(elements: int) -> Any:
        return SimpleNamespace(
            records=1, s=2, ranges=3, a=None, following=None, b=SimpleNamespace(pool=torch.empty(elements, dtype=torch.bfloat16, device="meta"), max_rank=16)
        )

    tiles = torch.empty(0, 4)
    assert op._addend_args(addend(1 << 35), tiles)[2:5] == (1, 3, 16)
    with pytest.raises(ValueError, match="has 65 GiB of at most 64: lower --max-loras-per-batch or --max-lora-rank"):
        op._addend_args(addend(65 << 29), tiles)


@pytest.mark.gpu
def test_gpu_refusals_name_expected_and_actual() -> None:
    case = Case(3, config=0)
    align = case.alignment(on="cuda")
    x, ids, _ = (None if t is None else t.cuda() for t in case.inputs())
    weight, scratch = op.marlin_moe_repack(on("cuda", case.weight()), 1), op.GemmScratch.allocate(132, torch.device("cuda"))
    assert x is not None and ids is not None
    out = torch.empty(ids.numel(), case.rows, dtype=case.dtype, device="cuda")
    good = {"x": x, "weight": weight, "top_k": case.top_k, "out": out, "scratch": scratch, "config": 0}
    wrong = [
        ({"x": x.float()}, "bfloat16 or float16, got Float"),
        ({"x": x.t().contiguous().t()}, "x to be contiguous .* not contiguous"),
        ({"x": x[:2]}, "a row of x for each pair, got 2 rows"),
        ({"top_k": 4}, "top_k pairs of each token, got 6 pairs, top_k 4"),
        ({"weight": replace(weight, scales=weight.scales.half())}, "scales to be contiguous BFloat16 .* got Half"),
        ({"weight": replace(weight, packed=weight.packed.cpu())}, "packed to be .* not on a GPU"),
        ({"out": out[:, :64].contiguous()}, r"expected out \[6, 128\], got width 64"),
        ({"scratch": replace(scratch, partials=scratch.partials[:8])}, r"partials to be .* got Float \[8\]"),
        ({"config": 99}, "no shape of tiles 99"),
    ]
    for changed, message in wrong:
        a: dict[str, Any] = good | changed
        with pytest.raises(RuntimeError, match=message):
            op.marlin_moe_gemm(a["x"], a["weight"], align, a["top_k"], a["out"], a["scratch"], config=a["config"], sms=132, gather=False, scatter=True)
