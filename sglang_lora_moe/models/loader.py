"""From safetensors files into the built model's storage, through transformers' own name tables.

Nothing is read into a second copy of the model: tensors are copied one by one (fused expert tensors expert by expert)
into storage that exists already. Every tensor of the files must find its place and every place its tensor.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

from sglang_lora_moe.models.places import LoadError, Piece, find_places
from sglang_lora_moe.models.quantized import WeightFormats
from sglang_lora_moe.quantization.wna16 import QuantizationError

# Recomputed at build time, so old checkpoints that stored them lose nothing.
RECOMPUTED = re.compile(r"(rotary_emb|rope)\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
INDEX = "model.safetensors.index.json"


class NameTable:
    """transformers' rules from checkpoint names to module names, for one model."""

    def __init__(self, hf: Any) -> None:
        rules: list[Any] = get_model_conversion_mapping(hf)
        self.renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.prefix = hf.base_model_prefix

    def place_of(self, key: str, places: dict[str, Any]) -> tuple[str, Piece | None]:
        """Module name of a tensor, and (expert, part) if it is one expert's piece of a fused parameter."""
        if key in places:
            return key, None
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, places)
        if pattern is None:
            return _linearised(name, places)
        converter = next(rule for rule in self.converters if pattern in rule.source_patterns)
        unknown = [type(step).__name__ for step in converter.operations if not isinstance(step, MergeModulelist | Concatenate)]
        expert = re.search(r"\.experts\.(\d+)\.", key)
        if unknown or expert is None or len(converter.target_patterns) != 1:
            raise LoadError(f"needs the conversion {unknown or converter.operations} to {converter.target_patterns}, which is not supported")
        return name, (int(expert.group(1)), converter.source_patterns.index(pattern))

    def rename_module(self, name: str) -> str:
        """A checkpoint's module path as transformers' module path; expert numbers and leaf names (w1, gate_proj) stay."""
        return rename_source_key(f"{name}.weight", self.renamings, [])[0].removesuffix(".weight")


_LINEARISED = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")


def _linearised(name: str, places: dict[str, Any]) -> tuple[str, Piece | None]:
    """Quantization tools save experts one by one under these names, also where the model's own files name them otherwise (Mixtral)."""
    match = _LINEARISED.fullmatch(name)
    if match is None:
        return name, None
    experts, expert, projection, leaf = match.groups()
    for fused in ("down_proj",) if projection == "down" else ("gate_up_proj", "up_proj"):
        place = f"{experts}.{fused}{'_bias' if leaf == 'bias' else ''}"
        if place in places:
            return place, (int(expert), 1 if (projection, fused) == ("up", "gate_up_proj") else 0)
    return name, None


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise LoadError(f"{file} is not a complete safetensors file: {error}") from error


def list_files(path: Path) -> dict[str, list[str]]:
    """Files to read, and the tensors to read from each: those that an index promises there, without an index all."""
    index = path / INDEX
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise LoadError(f"{index} is not an index of safetensors files: {error!r}") from error
        promised: dict[str, list[str]] = {}
        for key, name in weight_map.items():
            promised.setdefault(name, []).append(key)
        absent = [name for name in promised if not (path / name).is_file()]
        if absent:
            raise LoadError(f"{index} names files that do not exist: {', '.join(sorted(absent)[:5])}")
        return dict(sorted(promised.items()))
    whole = path / "model.safetensors"
    found = [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
    if not found:
        pickles = sorted(file.name for file in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        hint = f"; {pickles[0]} is a pickle file, which is refused because it can run code: convert it to safetensors" if pickles else ""
        raise LoadError(f"{path} has no *.safetensors files{hint}")
    files = {}
    for file in found:
        with _open(file) as opened:
            files[file.name] = sorted(opened.keys())
    return files


def load_weights(hf: Any, path: Path, table: NameTable, formats: WeightFormats, show_progress: bool) -> None:
    """Fill the model from the directory, strictly. Quantized storage must have been made by `formats`."""
    places, ignorable, files = find_places(hf), _ignorable(hf), list_files(path)

    def put(opened: Any, key: str) -> bool:
        """Bring the tensor `key` to its place; False if it has none and may not be ignored."""
        if formats.is_quantized(key):
            return formats.put(opened, key, places) or ignorable(key)
        name, piece = table.place_of(key, places)
        if name not in places:
            return ignorable(key) or ignorable(name) or formats.is_idle_bias(opened, key)
        places[name].put(opened, key, piece)
        return True

    unused: list[str] = []
    with tqdm(total=sum((path / file).stat().st_size for file in files), unit="B", unit_scale=True, desc="Loading weights", disable=not show_progress) as bar:
        for file, promised in files.items():
            unused += _load_file(path / file, promised, put)
            bar.update((path / file).stat().st_size)
    if unused:
        raise LoadError(f"{path}: {len(unused)} tensors have no place in {type(hf).__name__}: {', '.join(unused[:8])}{formats.why_unused(unused)}")
    formats.log_dequantized()
    absent = {name: what for name, place in places.items() if (what := place.missing())}
    if absent:
        listed = "; ".join(f"{name}: {what}" for name, what in list(absent.items())[:8])
        raise LoadError(f"{path} lacks {len(absent)} tensors of {type(hf).__name__}: {listed}")


def _load_file(file: Path, promised: list[str], put: Callable[[Any, str], bool]) -> list[str]:
    """The tensors of one file that have no place."""
    unused: list[str] = []
    with _open(file) as opened:
        present = set(opened.keys())
        for key in promised:
            if key not in present:
                raise LoadError(f"{file} lacks tensor {key}, which {INDEX} promises there")
            try:
                if not put(opened, key):
                    unused.append(key)
            except LoadError as error:
                raise LoadError(f"{file}: tensor {key} {error}") from error
            except QuantizationError as error:
                raise QuantizationError(f"{file}: {error}") from error
    return unused


def _ignorable(hf: Any) -> Callable[[str], bool]:
    """Tensors that may be skipped: recomputed buffers, what the class itself ignores, and next-token-prediction layers past the last."""
    patterns = [re.compile(pattern) for pattern in (getattr(hf, "_keys_to_ignore_on_load_unexpected", None) or [])]
    num_layers = hf.config.get_text_config().num_hidden_layers

    def ignorable(key: str) -> bool:
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
        beyond = layer is not None and int(layer.group(1)) >= num_layers
        return beyond or key.startswith("mtp.") or RECOMPUTED.search(key) is not None or any(p.search(key) for p in patterns)

    return ignorable
