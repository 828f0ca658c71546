"""The integer formats, bit for bit: every file layout becomes the same canonical weight."""

from __future__ import annotations

import pytest
import torch

from sglang_lora_moe.quantization.wna16 import AWQ_ORDER, QuantizationError, WNA16Scheme, dequantize, pack, read_weight, split_row, unpack
from tests.quantize import quantize
from tests.quantized_checkpoints import ones_of

OUT, IN = 64, 256


def codes_scales_zeros(bits: int, group: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(bits * 1000 + group)
    codes = torch.randint(0, 1 << bits, (OUT, IN), dtype=torch.uint8)
    scales = torch.rand(OUT, IN // group).to(torch.float16) + 0.5
    zeros = torch.randint(0, 1 << bits, (OUT, IN // group), dtype=torch.uint8)
    zeros[:9, 0] = 0  # which borrow from their neighbours in the first version of GPTQ's files
    return codes, scales, torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros


def expected(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int) -> torch.Tensor:
    return (codes.int() - zeros.int().repeat_interleave(group, 1)).float() * scales.float().repeat_interleave(group, 1)


def stored_zeros(zeros: torch.Tensor, bits: int, version: int) -> torch.Tensor:
    return pack(zeros.t().contiguous(), bits) - (ones_of(bits) if version == 1 else 0)


CASES = [(4, 32, True), (4, 128, False), (4, IN, True), (8, 64, True), (8, 128, False)]


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_is_the_inverse_of_unpack(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 5, 64), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    word = pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8), 4)  # low nibble first
    assert word.item() & 0xFFFFFFFF == 0x87654321


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_compressed_tensors(bits: int, group: int, symmetric: bool) -> None:
    rows = OUT - 3  # so that the last words of zero points are not full
    codes, scales, zeros = (tensor[:rows] for tensor in codes_scales_zeros(bits, group, symmetric))
    tensors = {"weight_packed": pack(codes, bits), "weight_scale": scales}
    if not symmetric:
        tensors["weight_zero_point"] = pack(zeros.t().contiguous(), bits).t().contiguous()
    weight = read_weight("layer", tensors, (rows, IN), WNA16Scheme(bits, -1 if group == IN else group, symmetric, "compressed-tensors"))
    assert torch.equal(dequantize(weight, torch.float32), expected(codes, scales, zeros, group))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_gptq(bits: int, group: int, symmetric: bool, version: int) -> None:
    codes, scales, zeros = codes_scales_zeros(bits, group, symmetric)
    tensors = {
        "qweight": pack(codes, bits).t().contiguous(),
        "scales": scales.t().contiguous(),
        "qzeros": stored_zeros(zeros, bits, version),
        "g_idx": torch.arange(IN, dtype=torch.int32) // group,
    }
    weight = read_weight("layer", tensors, (OUT, IN), WNA16Scheme(bits, group, symmetric, "gptq" if version == 1 else "gptq_v2"))
    assert (weight.zeros is None) == symmetric
    assert torch.equal(dequantize(weight, torch.float32), expected(codes, scales, zeros, group))


def test_awq() -> None:
    codes, scales, zeros = codes_scales_zeros(4, 64, False)

    def words(columns: torch.Tensor) -> torch.Tensor:  # [n, OUT] -> nibble k of a word is column AWQ_ORDER[k]
        return pack(columns.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2).contiguous(), 4)

    tensors = {"qweight": words(codes.t()), "scales": scales.t().contiguous(), "qzeros": words(zeros.t())}
    weight = read_weight("layer", tensors, (OUT, IN), WNA16Scheme(4, 64, False, "awq"))
    assert torch.equal(dequantize(weight, torch.float32), expected(codes, scales, zeros, 64))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_stays_within_half_a_step(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, OUT, IN)
    q = quantize(weight, bits, 32, symmetric)
    step = q.scales.repeat_interleave(32, -1)
    assert ((dequantize(q, torch.float32) - weight).abs() <= step * 0.5001 + 1e-6).all()


def refusal(match: str, **changes: object) -> None:
    codes, scales, _ = codes_scales_zeros(4, 64, True)
    tensors = {"weight_packed": pack(codes, 4), "weight_scale": scales}
    arguments = {"group_size": 64, "symmetric": True}
    for key, value in changes.items():
        (arguments if key in arguments else tensors)[key] = value
    with pytest.raises(QuantizationError, match=match):
        scheme = WNA16Scheme(bits=4, format="compressed-tensors", **arguments)  # type: ignore[arg-type]
        read_weight("model.layers.0.mlp.experts.3.up_proj", {k: v for k, v in tensors.items() if v is not None}, (OUT, IN), scheme)


def test_refusals_name_the_tensor_and_the_way_out() -> None:
    refusal(r"experts\.3\.up_proj\.weight_scale is missing", weight_scale=None)
    refusal(r"weight_zero_point is present, but .* symmetric", weight_zero_point=torch.zeros(8, 4, dtype=torch.int32))
    refusal(r"weight_zero_point is missing", symmetric=False)
    refusal(r"do not divide into groups of 96.*requantize", group_size=96)
    refusal(r"weight_packed: expected \(64, 32\) of torch.int32, found \(64, 16\)", weight_packed=torch.zeros(64, 16, dtype=torch.int32))
    refusal(r"g_idx permutes input columns.*desc_act=False", weight_g_idx=torch.randperm(IN) // 64)
    with pytest.raises(QuantizationError, match="x: 36 input features do not divide into groups of 36 and words of 8; requantize"):
        split_row("x", 36, WNA16Scheme(4, -1, True, "gptq"))


def test_gptq_symmetric_with_odd_zeros_is_refused() -> None:
    codes, scales, zeros = codes_scales_zeros(4, 64, False)
    tensors = {"qweight": pack(codes, 4).t(), "scales": scales.t(), "qzeros": stored_zeros(zeros, 4, 1)}
    with pytest.raises(QuantizationError, match='symmetric 4-bit weights have zero 8; set "sym": false'):
        read_weight("layer", tensors, (OUT, IN), WNA16Scheme(4, 64, True, "gptq"))


@pytest.mark.parametrize(("declared", "written"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_gptq_symmetric_of_the_other_version_is_refused(declared: str, written: str) -> None:
    """Not with the advice to declare zero points, which would load and be wrong by one step everywhere."""
    codes, scales, zeros = codes_scales_zeros(4, 64, True)
    tensors = {"qweight": pack(codes, 4).t(), "scales": scales.t(), "qzeros": stored_zeros(zeros, 4, 1 if written == "gptq" else 2)}
    with pytest.raises(QuantizationError, match=f'have zero 8; set "checkpoint_format": "{written}"'):
        read_weight("layer", tensors, (OUT, IN), WNA16Scheme(4, 64, True, declared))
