"""From safetensors files into the built model's storage, through transformers' own name tables.

Nothing is read into a second copy of the model: tensors are copied one by one (fused expert tensors expert by expert)
into storage that exists already. Every tensor of the files must find its place and every place its tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

from sglang_lora_moe.layers.embedding import Embedding
from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.linear import Linear

# Recomputed at build time, so old checkpoints that stored them lose nothing.
RECOMPUTED = re.compile(r"(rotary_emb|rope)\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
INDEX = "model.safetensors.index.json"


class LoadError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message names file and tensor, expected and found."""


# ---- where tensors go -----------------------------------------------------------------------------------------------
class TensorPlace:
    """Storage of one whole tensor of the checkpoint."""

    def __init__(self, storage: torch.Tensor) -> None:
        self.storage, self.filled = storage, False

    def put(self, opened: Any, key: str, piece: tuple[int, int] | None) -> None:
        if piece is not None:
            raise LoadError("is one expert's tensor, but the model has no experts of that name")
        tensor = _floating(opened.get_tensor(key))
        if tensor.shape != self.storage.shape:
            raise LoadError(f"has shape {list(tensor.shape)}, expected {list(self.storage.shape)}")
        tensor = tensor.to(self.storage.device, self.storage.dtype)
        if self.filled and not torch.equal(self.storage, tensor):
            raise LoadError("differs from another tensor that the model ties it to; set tie_word_embeddings to false in config.json")
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
        self.pieces: set[tuple[int, int]] = set()

    def put(self, opened: Any, key: str, piece: tuple[int, int] | None) -> None:
        if piece is None:
            self._put_whole(opened.get_slice(key))
            return
        expert, part = piece
        if expert >= self.storage.shape[0]:
            raise LoadError(f"belongs to expert {expert}, but the model has {self.storage.shape[0]} experts")
        rows = self.storage.shape[1] // self.num_parts
        place, tensor = self.storage[expert, part * rows : (part + 1) * rows], _floating(opened.get_tensor(key))
        if tensor.shape != place.shape:
            raise LoadError(f"has shape {list(tensor.shape)}, expected {list(place.shape)}")
        place.copy_(tensor)
        self.pieces.add(piece)

    def _put_whole(self, read: Any) -> None:
        """A tensor of all experts, read expert by expert."""
        found, expected = list(read.get_shape()), list(self.storage.shape)
        if self.transposed:
            expected[1:] = expected[:0:-1]
        if found != expected:
            raise LoadError(f"has shape {found}, expected {expected}")
        for expert in range(found[0]):
            self._put_expert(expert, _floating(read[expert : expert + 1])[0])
            self.pieces.update((expert, part) for part in range(self.num_parts))

    def _put_expert(self, expert: int, tensor: torch.Tensor) -> None:
        if self.transposed:
            tensor = tensor.T
        if self.interleaved:
            half = tensor.shape[0] // 2
            self.storage[expert, :half].copy_(tensor[0::2])
            self.storage[expert, half:].copy_(tensor[1::2])
        else:
            self.storage[expert].copy_(tensor)

    def missing(self) -> str | None:
        absent = [e for e in range(self.storage.shape[0]) if any((e, part) not in self.pieces for part in range(self.num_parts))]
        return f"experts {absent[:8]} of {self.storage.shape[0]} not in the files" if absent else None


Place = TensorPlace | ExpertsPlace


def find_places(hf: nn.Module) -> dict[str, Place]:
    """Every tensor that a checkpoint must bring, by transformers' parameter name. Tied names share one place."""
    places: dict[str, Place] = {}
    shared: dict[tuple[int, torch.Size], TensorPlace] = {}

    def place(storage: torch.Tensor) -> TensorPlace:
        return shared.setdefault((storage.data_ptr(), storage.shape), TensorPlace(storage.detach()))

    for path, module in hf.named_modules():
        if isinstance(module, Linear):
            for name, (weight, bias) in module.part_views().items():
                places[f"{name}.weight"] = place(weight)
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


def _expert_places(experts: Any) -> Iterator[tuple[str, ExpertsPlace]]:
    gated, interleaved, transposed = experts.spec.gated, experts.interleaved_gate_up, experts.is_transposed
    first = "gate_up_proj" if gated else "up_proj"
    parts = 2 if gated else 1
    yield f"{experts.name}.{first}", ExpertsPlace(experts.w13.detach(), parts, transposed, interleaved)
    yield f"{experts.name}.down_proj", ExpertsPlace(experts.w2.detach(), 1, transposed, False)
    if experts.spec.has_bias:
        yield f"{experts.name}.{first}_bias", ExpertsPlace(experts.b13.detach(), parts, False, interleaved)
        yield f"{experts.name}.down_proj_bias", ExpertsPlace(experts.b2.detach(), 1, False, False)


def _floating(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise LoadError(f"has dtype {tensor.dtype}, expected float32, float16 or bfloat16 (the checkpoint seems quantized)")
    return tensor


# ---- names ----------------------------------------------------------------------------------------------------------
class NameTable:
    """transformers' rules from checkpoint names to module names, for one model."""

    def __init__(self, hf: Any) -> None:
        rules: list[Any] = get_model_conversion_mapping(hf)
        self.renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.prefix = hf.base_model_prefix

    def place_of(self, key: str, places: dict[str, Place]) -> tuple[str, tuple[int, int] | None]:
        """Module name of a tensor, and (expert, part) if it is one expert's piece of a fused parameter."""
        if key in places:
            return key, None
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, places)
        if pattern is None:
            return name, None
        converter = next(rule for rule in self.converters if pattern in rule.source_patterns)
        unknown = [type(step).__name__ for step in converter.operations if not isinstance(step, MergeModulelist | Concatenate)]
        expert = re.search(r"\.experts\.(\d+)\.", key)
        if unknown or expert is None or len(converter.target_patterns) != 1:
            raise LoadError(f"needs the conversion {unknown or converter.operations} to {converter.target_patterns}, which is not supported")
        return name, (int(expert.group(1)), converter.source_patterns.index(pattern))

    def rename_module(self, name: str) -> str:
        """A checkpoint's module path as transformers' module path; expert numbers and leaf names (w1, gate_proj) stay."""
        renamed = rename_source_key(f"{name}.weight", self.renamings, [])[0]
        return renamed.removesuffix(".weight")


# ---- files ----------------------------------------------------------------------------------------------------------
def list_files(path: Path) -> dict[str, list[str] | None]:
    """Files to read and, from an index file, the tensors promised in each (None = all that the file has)."""
    index = path / INDEX
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise LoadError(f"{index} is not an index of safetensors files: {error!r}") from error
        files: dict[str, list[str] | None] = {}
        for key, file in weight_map.items():
            files.setdefault(file, []).append(key)  # type: ignore[union-attr]
        absent = [file for file in files if not (path / file).is_file()]
        if absent:
            raise LoadError(f"{index} names files that do not exist: {', '.join(sorted(absent)[:5])}")
        return dict(sorted(files.items()))
    if (path / "model.safetensors").is_file():
        return {"model.safetensors": None}
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if not found:
        pickles = sorted(file.name for file in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        hint = f"; {pickles[0]} is a pickle file, which is refused because it can run code: convert it to safetensors" if pickles else ""
        raise LoadError(f"{path} has no *.safetensors files{hint}")
    return dict.fromkeys(found)


def load_weights(hf: Any, path: Path, table: NameTable, show_progress: bool) -> None:
    """Fill the model from the directory, strictly."""
    places = find_places(hf)
    ignorable = _ignorable(hf)
    unused: list[str] = []
    files = list_files(path)
    with tqdm(total=sum((path / file).stat().st_size for file in files), unit="B", unit_scale=True, desc="Loading weights", disable=not show_progress) as bar:
        for file, promised in files.items():
            try:
                with safe_open(path / file, framework="pt") as opened:
                    _load_file(opened, path / file, promised, places, table, ignorable, unused)
            except SafetensorError as error:
                raise LoadError(f"{path / file} is not a complete safetensors file: {error}") from error
            bar.update((path / file).stat().st_size)
    if unused:
        raise LoadError(f"{path}: {len(unused)} tensors have no place in {type(hf).__name__}: {', '.join(unused[:8])}")
    absent = {name: what for name, place in places.items() if (what := place.missing())}
    if absent:
        listed = "; ".join(f"{name}: {what}" for name, what in list(absent.items())[:8])
        raise LoadError(f"{path} lacks {len(absent)} tensors of {type(hf).__name__}: {listed}")


def _load_file(
    opened: Any, file: Path, promised: list[str] | None, places: dict[str, Place], table: NameTable, ignorable: Callable[[str], bool], unused: list[str]
) -> None:
    present = set(opened.keys())
    for key in sorted(present) if promised is None else promised:
        if key not in present:
            raise LoadError(f"{file} lacks tensor {key}, which {INDEX} promises there")
        try:
            name, piece = table.place_of(key, places)
            if name in places:
                places[name].put(opened, key, piece)
            elif not ignorable(key) and not ignorable(name):
                unused.append(key)
        except LoadError as error:
            raise LoadError(f"{file}: tensor {key} {error}") from error


def _ignorable(hf: Any) -> Callable[[str], bool]:
    """Tensors that may be skipped: recomputed buffers, what the class itself ignores, and next-token-prediction layers past the last."""
    patterns = [re.compile(pattern) for pattern in (getattr(hf, "_keys_to_ignore_on_load_unexpected", None) or [])]
    num_layers = hf.config.get_text_config().num_hidden_layers

    def ignorable(key: str) -> bool:
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
        beyond = layer is not None and int(layer.group(1)) >= num_layers
        return beyond or key.startswith("mtp.") or RECOMPUTED.search(key) is not None or any(p.search(key) for p in patterns)

    return ignorable
