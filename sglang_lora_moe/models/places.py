"""Where the tensors of a checkpoint go: the storage of a built model, by transformers' parameter names.

A place takes whole tensors, or the pieces of fused parameters (one expert, one of gate and up), checks shapes and dtypes, and
knows what it still lacks. Quantized tensors go into quantized storage as they are, or dequantized into 16-bit storage.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sglang_lora_moe.layers.embedding import Embedding
from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.quantization.wna16 import Tensors, WNA16Scheme, WNA16Weight, dequantize, read_weight
from sglang_lora_moe.quantization.wna16_method import WNA16Method

Piece = tuple[int, int]  # (expert, part) of a fused parameter; part 0 and 1 are gate and up
_TWICE = "brings weights that another tensor of the files has brought already, under another name; remove one of the two"


class LoadError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message names file and tensor, expected and found."""


class TensorPlace:
    """Storage of one whole tensor of the checkpoint, or a view of it that splits a dimension of its `shape`."""

    def __init__(self, storage: torch.Tensor, shape: tuple[int, ...] | None = None) -> None:
        self.storage, self.shape, self.filled = storage, storage.shape if shape is None else shape, False

    def put(self, opened: Any, key: str, piece: Piece | None) -> None:
        if piece is not None:
            raise LoadError("is one expert's tensor, but the model has no experts of that name")
        self._store(_floating(opened.get_tensor(key), self.shape).to(self.storage.device, self.storage.dtype).view(self.storage.shape))

    def put_quantized(self, name: str, tensors: Tensors, piece: Piece | None, scheme: WNA16Scheme) -> None:
        """Take the tensors of the linear `name`, dequantized."""
        if piece is not None or self.storage.dim() != 2:
            raise LoadError("is quantized, but the model has no linear of that name")
        rows, inputs = self.storage.shape
        self._store(dequantize(read_weight(name, tensors, (rows, inputs), scheme, self.storage.device), self.storage.dtype))

    def _store(self, tensor: torch.Tensor) -> None:
        if self.filled and not torch.equal(self.storage, tensor):
            raise LoadError(f"{_TWICE}; if the model ties two of its weights, set tie_word_embeddings to false in config.json")
        self.storage.copy_(tensor)
        self.filled = True

    def missing(self) -> str | None:
        return None if self.filled else "not in the files"


class ExpertsPlace:
    """Storage [E, rows, ..] of one parameter of an experts module, filled whole, by expert, or by expert and part.

    Files hold gate and up rows as halves, interleaved, or as two tensors per expert (parts 0 and 1); storage holds halves.
    """

    def __init__(self, storage: torch.Tensor, num_parts: int, transposed: bool, interleaved: bool) -> None:
        self.storage, self.num_parts, self.transposed, self.interleaved = storage, num_parts, transposed, interleaved
        self.pieces: set[Piece] = set()

    def put(self, opened: Any, key: str, piece: Piece | None) -> None:
        if piece is None:
            self._put_whole(opened.get_slice(key))
            return
        place = self.storage[_rows_of(piece, self.storage, self.num_parts)]
        place.copy_(_floating(opened.get_tensor(key), place.shape))
        _claim(self.pieces, piece)

    def put_quantized(self, name: str, tensors: Tensors, piece: Piece | None, scheme: WNA16Scheme) -> None:
        raise LoadError("is quantized, but the experts of its layer are not")

    def _put_whole(self, read: Any) -> None:
        """A tensor of all experts, read expert by expert."""
        found, expected = list(read.get_shape()), list(self.storage.shape)
        if self.transposed:
            expected[1:] = expected[:0:-1]
        if found != expected:
            raise LoadError(f"has shape {found}, expected {expected}")
        for expert in range(found[0]):
            tensor = _floating(read[expert : expert + 1], (1, *expected[1:]))[0]
            tensor = tensor.T if self.transposed else tensor
            self.storage[expert].copy_(torch.cat([tensor[0::2], tensor[1::2]]) if self.interleaved else tensor)
            _claim(self.pieces, *((expert, part) for part in range(self.num_parts)))

    def missing(self) -> str | None:
        return _missing_pieces(self.pieces, self.storage.shape[0], self.num_parts)


class QuantizedPlace:
    """Quantized storage of one linear [rows, in], or of one parameter of an experts module [E, rows, in] in `num_parts` parts."""

    def __init__(self, weight: WNA16Weight, num_parts: int = 0, shape: tuple[int, int] | None = None) -> None:
        self.weight, self.num_parts, self.shape = weight, num_parts, shape  # 0 parts: not of experts; shape: of a linear that weight splits a dimension of
        self.pieces: set[Piece] = set()

    def put(self, opened: Any, key: str, piece: Piece | None) -> None:
        raise LoadError(f"is {opened.get_slice(key).get_dtype()}, but the files also hold this module quantized")

    def put_quantized(self, name: str, tensors: Tensors, piece: Piece | None, scheme: WNA16Scheme) -> None:
        """Take the tensors of the linear `name` as they are."""
        if (piece is None) != (self.num_parts == 0):
            raise LoadError("is one expert's tensor where a whole linear is expected, or the other way round")
        weight = self.weight if piece is None else self.weight[_rows_of(piece, self.weight.packed, self.num_parts)]
        shape = self.shape or (weight.out_features, weight.in_features)
        source = read_weight(name, tensors, shape, scheme, weight.packed.device)  # AWQ's order takes a CPU some ms
        weight.packed.copy_(source.packed.view(weight.packed.shape))
        weight.scales.copy_(source.scales.view(weight.scales.shape))
        if weight.zeros is not None:
            weight.zeros[:] = 1 << (weight.bits - 1) if source.zeros is None else source.zeros.view(weight.zeros.shape)
        _claim(self.pieces, piece or (0, 0))

    def missing(self) -> str | None:
        if self.num_parts:
            return _missing_pieces(self.pieces, self.weight.packed.shape[0], self.num_parts)
        return None if self.pieces else "not in the files"


Place = TensorPlace | ExpertsPlace | QuantizedPlace


def _rows_of(piece: Piece, storage: torch.Tensor, num_parts: int) -> tuple[int, slice]:
    """Index of one piece in a parameter [E, rows, ..] of experts."""
    expert, part = piece
    if expert >= storage.shape[0]:
        raise LoadError(f"belongs to expert {expert}, but the model has {storage.shape[0]} experts")
    rows = storage.shape[1] // num_parts
    return expert, slice(part * rows, (part + 1) * rows)


def _claim(pieces: set[Piece], *new: Piece) -> None:
    if not pieces.isdisjoint(new):
        raise LoadError(_TWICE)
    pieces.update(new)


def _missing_pieces(pieces: set[Piece], num_experts: int, num_parts: int) -> str | None:
    absent = [e for e in range(num_experts) if any((e, part) not in pieces for part in range(num_parts))]
    return f"experts {absent[:8]} of {num_experts} not in the files" if absent else None


def find_places(hf: nn.Module) -> dict[str, Place]:
    """Every tensor that a checkpoint must bring, by transformers' parameter name. Tied names share one place."""
    places: dict[str, Place] = {}
    shared: dict[tuple[int, torch.Size], TensorPlace] = {}

    def place(storage: torch.Tensor) -> TensorPlace:
        return shared.setdefault((storage.data_ptr(), storage.shape), TensorPlace(storage.detach()))

    for path, module in hf.named_modules():
        if isinstance(module, Linear):
            for name, (weight, bias) in module.part_views().items():
                places[f"{name}.weight"] = QuantizedPlace(weight) if isinstance(weight, WNA16Weight) else place(weight)
                if bias is not None:
                    places[f"{name}.bias"] = place(bias)
        elif isinstance(module, Embedding):
            places[f"{module.name}.weight"] = place(module.weight)
        elif isinstance(module, FusedMoE):
            places.update(_expert_places(module))
        else:
            for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if leaf not in module._non_persistent_buffers_set:
                    places[f"{path}.{leaf}" if path else leaf] = place(tensor)
    return places


def _expert_places(experts: Any) -> Iterator[tuple[str, Place]]:
    gated, interleaved, transposed = experts.spec.gated, experts.interleaved_gate_up, experts.is_transposed
    first = "gate_up_proj" if gated else "up_proj"
    parts = 2 if gated else 1
    quantized, shared = isinstance(experts.quant_method, WNA16Method), experts.shared
    w13, w2 = experts.quant_method.weights(experts) if quantized else (experts.w13.detach(), experts.w2.detach())
    count, rows, hidden = shared.parts if shared else 0, experts.spec.intermediate_size, experts.spec.hidden_size
    (w13, own13), (w2, own2) = ((weight[: experts.spec.num_experts - count], weight[experts.spec.num_experts - count :]) for weight in (w13, w2))
    if quantized:
        yield f"{experts.name}.{first}", QuantizedPlace(w13, parts)
        yield f"{experts.name}.down_proj", QuantizedPlace(w2, 1)
    else:
        yield f"{experts.name}.{first}", ExpertsPlace(w13, parts, transposed, interleaved)
        yield f"{experts.name}.down_proj", ExpertsPlace(w2, 1, transposed, False)
    if shared:
        wide, kind = (count * rows, hidden), QuantizedPlace if quantized else TensorPlace
        for leaf, weight, shape in (("gate_proj", own13[:, :rows], wide), ("up_proj", own13[:, rows:], wide), ("down_proj", own2.transpose(0, 1), wide[::-1])):
            yield f"{shared.name}.{leaf}.weight", kind(weight, shape=shape)
    if experts.spec.has_bias:
        yield f"{experts.name}.{first}_bias", ExpertsPlace(experts.b13.detach(), parts, False, interleaved)
        yield f"{experts.name}.down_proj_bias", ExpertsPlace(experts.b2.detach(), 1, False, False)


def _floating(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor`, if it is of floating point and of this shape."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise LoadError(f"has dtype {tensor.dtype}, expected float32, float16 or bfloat16 (the checkpoint seems quantized)")
    if tensor.shape != shape:
        raise LoadError(f"has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor
