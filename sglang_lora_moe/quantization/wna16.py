"""Integer weights with 16-bit activations (int4 and int8): one canonical form, and the file layouts that become it.

    w[o, i] = (q[o, i] - z[o, g(i)]) * s[o, g(i)]        g(i) = i // group_size

Canonical: codes q packed along the input dimension, low bits first, into int32 words `packed [.., O, I * bits / 32]`; `scales [.., O, I / group_size]` in the
checkpoint's 16-bit dtype; `zeros` uint8 of the scales' shape, or None for symmetric weights, whose zero is 2^(bits - 1). This is compressed-tensors'
pack-quantized layout; GPTQ (packed along the input, transposed, stored zeros minus one in its first version) and AWQ (packed along the output in an interleaved
order) are converted to it when read. Leading dimensions (experts) pass through.

Sources: compressed-tensors `pack_to_int32`; AutoGPTQ `qlinear_cuda`; AutoAWQ `WQLinear_GEMM`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble k of a word is output column 8 * word + AWQ_ORDER[k]

# Tensors of one linear by format, as they follow the module's name.
_GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
TENSORS = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "gptq": _GPTQ_TENSORS,
    "gptq_v2": _GPTQ_TENSORS,
    "awq": ("qweight", "qzeros", "scales"),
}
_READ_ON_HOST = frozenset({"weight_shape", "weight_g_idx", "g_idx"})  # what is looked at and not kept


class QuantizationError(ValueError):
    """A quantized tensor or configuration that cannot be served; the message names it and the way out."""


@dataclass(frozen=True)
class WNA16Scheme:
    """How the linears of a checkpoint are quantized, and which tensors hold them."""

    bits: int
    group_size: int  # -1 = one scale per output row
    symmetric: bool
    format: str  # a key of TENSORS

    def __str__(self) -> str:
        group = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        return f"int{self.bits} {group} {'symmetric' if self.symmetric else 'with zero points'} ({self.format})"


@dataclass(frozen=True)
class WNA16Weight:
    """A quantized weight [.., O, I] in the canonical form. See the module's formula."""

    packed: torch.Tensor  # int32 [.., O, I * bits / 32]
    scales: torch.Tensor  # [.., O, I / group_size]
    zeros: torch.Tensor | None  # uint8 [.., O, I / group_size]
    bits: int
    group_size: int

    @property
    def in_features(self) -> int:
        return self.packed.shape[-1] * 32 // self.bits

    @property
    def out_features(self) -> int:
        return self.packed.shape[-2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.packed, self.scales, self.zeros) if t is not None)

    def __getitem__(self, index: Any) -> "WNA16Weight":
        """Views of some experts or rows, or with None of one more dimension."""
        return replace(self, packed=self.packed[index], scales=self.scales[index], zeros=None if self.zeros is None else self.zeros[index])

    def transpose(self, first: int, second: int) -> "WNA16Weight":
        """Views with two dimensions swapped, neither of them the last."""
        zeros = None if self.zeros is None else self.zeros.transpose(first, second)
        return replace(self, packed=self.packed.transpose(first, second), scales=self.scales.transpose(first, second), zeros=zeros)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [.., n] -> codes uint8 [.., n * 32 / bits], low bits first (the byte order of hosts and GPUs: little-endian)."""
    codes = words.contiguous().view(torch.uint8)
    return codes if bits == 8 else torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [.., n] -> int32 [.., ceil(n * bits / 32)], low bits first; a short last word is filled with zeros."""
    short = -codes.shape[-1] % (32 // bits)
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes.clone(memory_format=torch.contiguous_format).view(torch.int32)


def dequantize(weight: WNA16Weight, dtype: torch.dtype) -> torch.Tensor:
    """The float weight [.., O, I]: (q - z) * s with scales and product in `dtype` (the value that kernels multiply by)."""
    codes = weight.packed.view(torch.uint8)
    if weight.bits == 4:
        values = torch.empty(*codes.shape, 2, dtype=dtype, device=codes.device)
        values[..., 0] = codes & 15
        values[..., 1] = codes >> 4
        values = values.flatten(-2)
    else:
        values = codes.to(dtype)
    groups = values.unflatten(-1, (-1, weight.group_size))
    # Differences of codes and zeros are exact in every dtype, so that the product is rounded once.
    groups.sub_(1 << (weight.bits - 1) if weight.zeros is None else weight.zeros.to(dtype).unsqueeze(-1))
    groups.mul_(weight.scales.to(dtype).unsqueeze(-1))
    return values


Tensors = dict[str, torch.Tensor]  # of one linear, by what follows its name
_WORDS = (torch.int32,)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def _take(name: str, leaf: str, tensors: Tensors, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    """The tensor `leaf` of the linear `name`, if it is there and as expected."""
    if leaf not in tensors:
        raise QuantizationError(f"{name}.{leaf} is missing from the checkpoint; download or quantize it again")
    tensor = tensors[leaf]
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise QuantizationError(
            f"{name}.{leaf}: expected {shape} of {' or '.join(map(str, dtypes))}, found {tuple(tensor.shape)} of {tensor.dtype}; "
            "the file and quantization_config in config.json (bits, group_size) must agree"
        )
    if dtypes is _SCALES and not torch.isfinite(tensor).all():
        raise QuantizationError(f"{name}.{leaf} holds NaN or infinity; download or quantize it again")
    return tensor


def split_row(name: str, in_features: int, scheme: WNA16Scheme) -> tuple[int, int]:
    """(groups of one row, inputs of a group); refuses widths that do not divide."""
    group_size, word = in_features if scheme.group_size == -1 else scheme.group_size, 32 // scheme.bits
    if in_features % group_size or in_features % word:
        raise QuantizationError(
            f"{name}: {in_features} input features do not divide into groups of {group_size} and words of {word}; "
            "requantize with a group size that divides them"
        )
    return in_features // group_size, group_size


def read_weight(name: str, tensors: Tensors, shape: tuple[int, int], scheme: WNA16Scheme, device: torch.device | str | None = None) -> WNA16Weight:
    """The tensors of the linear `name`, logical shape (O, I), by whatever format `scheme` names; converted on `device`, where it is given.

    Raises QuantizationError, naming `name` and tensor, for what is missing or not as the scheme says.
    """
    if device is not None:
        tensors = {leaf: tensor if leaf in _READ_ON_HOST else tensor.to(device) for leaf, tensor in tensors.items()}
    return {"compressed-tensors": _from_compressed_tensors, "awq": _from_awq}.get(scheme.format, _from_gptq)(name, tensors, shape, scheme)


def _from_compressed_tensors(name: str, tensors: Tensors, shape: tuple[int, int], scheme: WNA16Scheme) -> WNA16Weight:
    """weight_packed [O, I*b/32], weight_scale [O, G], weight_zero_point [O*b/32, G], maybe weight_shape [2] and weight_g_idx [I] -> canonical."""
    (out, inn), bits = shape, scheme.bits
    groups, group = split_row(name, inn, scheme)
    if scheme.symmetric and "weight_zero_point" in tensors:
        raise QuantizationError(f"{name}.weight_zero_point is present, but the quantization config declares symmetric weights")
    packed = _take(name, "weight_packed", tensors, (out, inn * bits // 32), _WORDS)
    scales = _take(name, "weight_scale", tensors, (out, groups), _SCALES)
    if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
        raise QuantizationError(f"{name}.weight_shape: expected {shape}, found {tuple(tensors['weight_shape'].tolist())}")
    if "weight_g_idx" in tensors:
        _check_group_index(name, tensors["weight_g_idx"], inn, group)
    zeros = None
    if not scheme.symmetric:
        words = _take(name, "weight_zero_point", tensors, (-(-out * bits // 32), groups), _WORDS)
        zeros = unpack(words.t(), bits)[:, :out].t().contiguous()
    return WNA16Weight(packed.contiguous(), scales.contiguous(), zeros, bits, group)


def _check_group_index(name: str, index: torch.Tensor, inn: int, group: int) -> None:
    """Accept a group index that says nothing; refuse one that permutes columns over groups (act-order)."""
    if index.shape != (inn,):
        raise QuantizationError(f"{name}.g_idx: expected ({inn},), found {tuple(index.shape)}")
    if not torch.equal(index.long(), torch.arange(inn) // group):
        raise QuantizationError(
            f"{name}.g_idx permutes input columns over groups (desc_act / actorder=group), which expert kernels cannot read; "
            "requantize with desc_act=False or static groups"
        )


def _from_gptq(name: str, tensors: Tensors, shape: tuple[int, int], scheme: WNA16Scheme) -> WNA16Weight:
    """qweight [I*b/32, O], qzeros [G, O*b/32], scales [G, O], maybe g_idx [I] -> canonical. The first version of the format stores zeros minus one."""
    (out, inn), bits, first_version = shape, scheme.bits, scheme.format == "gptq"
    groups, group = split_row(name, inn, scheme)
    packed = _take(name, "qweight", tensors, (inn * bits // 32, out), _WORDS).t().contiguous()
    scales = _take(name, "scales", tensors, (groups, out), _SCALES).t().contiguous()
    words = _take(name, "qzeros", tensors, (groups, out * bits // 32), _WORDS)
    if "g_idx" in tensors:
        _check_group_index(name, tensors["g_idx"], inn, group)
    if first_version:  # the tools take one from all zeros of a word at once, so that a zero of 0 borrows from the next one
        words = words + (0x11111111 if bits == 4 else 0x01010101)
    zeros, middle = unpack(words, bits).t(), 1 << (bits - 1)
    others = zeros[zeros != middle]
    if scheme.symmetric and others.numel():
        other_version = bool((zeros == middle + (1 if first_version else -1)).all())
        way_out = f'"checkpoint_format": "{"gptq_v2" if first_version else "gptq"}"' if other_version else '"sym": false'
        raise QuantizationError(f"{name}.qzeros holds {int(others[0])}, but symmetric {bits}-bit weights have zero {middle}; set {way_out}")
    return WNA16Weight(packed, scales, zeros.contiguous() if others.numel() else None, bits, group)


def _from_awq(name: str, tensors: Tensors, shape: tuple[int, int], scheme: WNA16Scheme) -> WNA16Weight:
    """qweight [I, O/8], qzeros [G, O/8], scales [G, O] of AWQ's gemm layout -> canonical."""
    out, inn = shape
    groups, group = split_row(name, inn, scheme)
    packed = _take(name, "qweight", tensors, (inn, out // 8), _WORDS)
    scales = _take(name, "scales", tensors, (groups, out), _SCALES)
    zeros = _awq_columns(_take(name, "qzeros", tensors, (groups, out // 8), _WORDS)).contiguous()
    return WNA16Weight(pack(_awq_columns(packed), 4), scales.t().contiguous(), zeros, scheme.bits, group)


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, O / 8] -> uint8 [O, n]: the columns in order, transposed byte by byte (a word's nibble k is half of byte k // 2)."""
    halves = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))  # [n, O / 8, 4]
    columns = torch.empty(halves.shape[1], 8, halves.shape[0], dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(AWQ_ORDER):
        half = halves[..., nibble // 2].t()
        columns[:, column] = half >> 4 if nibble % 2 else half & 15
    return columns.flatten(0, 1)
