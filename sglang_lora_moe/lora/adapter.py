"""Reads a PEFT adapter directory against a model's targets: everything in it is understood, or it is refused by name.

`read_adapter` (files) and `read_tensors` (memory) check the config, the file, each tensor's name, shape, rank and values, and return the weights in the one
form that the memory pool stores. It knows no device, no slot and no model: only names and shapes (`lora/targets.py`).
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sglang_lora_moe.lora.adapter_config import AdapterConfig, parse_config, read_config
from sglang_lora_moe.lora.adapter_file import AdapterError, AdapterFile, AdapterMemory, AdapterTensors
from sglang_lora_moe.lora.adapter_layouts import INNER, OUTER, PROJECTIONS, AdapterSource, ExpertKey, join_shared, missing_half, read_experts
from sglang_lora_moe.lora.targets import EmbeddingTarget, ExpertTarget, PairTarget, Target
from sglang_lora_moe.lora.weights import AdapterWeights, EmbeddingLoRA, LinearLoRA, ModuleLoRA

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?:\.default|\.[^.]+(?=\.weight))?(?:\.weight)?")
_EXPERTS = re.compile(r"(?P<experts>.+\.(?:experts|shared_experts?))(?:\.(?P<rest>.+))?")
# Tensors beside A and B: what the end of their name says that they are
_OTHER_TENSORS = {
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "DoRA magnitudes, which are not served; train with use_dora=false"),
    ".lora_B.bias": "a bias of lora_B, which is not served; train with lora_bias=false",
    ".bias": 'a bias of the base model, which is not served; train with bias="none", and remove the copy of one that is unchanged',
    ".trainable_tokens_delta": "retrained token rows, which are not served; train with LoRA on embed_tokens instead",
    ".weight": "full weights of a module (modules_to_save or a resized vocabulary), which are not served per adapter; use LoRA on the module",
}
_Pair = dict[str, tuple[str, str]]  # of a linear or embedding: "A" | "B" -> names in the file, of the tensor and of its module
# Spellings of other trainers, tried when neither the name nor its renaming is a target
_ALIASES = ((".attn.", ".self_attn."), ("model.unembed_tokens", "lm_head"))


@dataclass(frozen=True)
class AdapterRules:
    """What adapters of one model are read against. It may be sent to another process.

    `rename` maps a module path of an older checkpoint to the model's (`ServedModel.rename_adapter_module`), `refused` names modules (by the
    end of their path) that cannot take adapters, with the reason; `left_out` are targets that --lora-target-modules leaves without memory.
    """

    targets: Mapping[str, Target]
    rename: Callable[[str], str]
    max_rank: int
    dtype: torch.dtype
    lora_root: str | Path | None = None
    base_model: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()


def read_adapter(path: str | Path, rules: AdapterRules) -> AdapterWeights:
    """Read and check the adapter in directory `path`; raises AdapterError. Weights are returned on the CPU in `rules.dtype`, contiguous."""
    directory = _checked_directory(Path(path), Path(rules.lora_root) if rules.lora_root is not None else None)
    config, weights = read_config(directory), directory / WEIGHTS_FILE
    try:
        file = weights.open("rb")
    except OSError as error:
        raise AdapterError(f"{weights}: cannot be read: {error.strerror}") from error
    with file:
        return _read(str(path), AdapterFile(weights, file), config, rules)


def read_tensors(name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], rules: AdapterRules) -> AdapterWeights:
    """As `read_adapter`, for the content of both files in memory: `tensors` under PEFT's names, `config` as in adapter_config.json."""
    return _read("", AdapterMemory(name, tensors), parse_config(Path(f"config_dict of {name}"), dict(config)), rules)


def _read(path: str, file: AdapterTensors, config: AdapterConfig, rules: AdapterRules) -> AdapterWeights:
    source = AdapterSource(file, config, rules.max_rank, rules.dtype)
    source.warnings += config.warnings + _base_warning(config, rules.base_model)
    files: dict[str, Any] = {}  # targets as files have them: a shared expert is a module of its own
    for target in rules.targets.values():
        files.update({part.name: part for part in target.of_files()} if isinstance(target, ExpertTarget) else {target.name: target})
    keys = _Names(source, replace(rules, targets=files))
    modules: dict[str, ModuleLoRA] = {name: _read_pair(source, files[name], pair) for name, pair in keys.pairs.items()}
    experts = {name: read_experts(source, files[name], group) for name, group in keys.experts.items()}
    for target in rules.targets.values():
        if isinstance(target, ExpertTarget):
            parts = [experts.get(part.name) for part in target.of_files()]
            if any(part is not None for part in parts):
                modules[target.name] = join_shared(target, *parts)
    if rules.dtype is not torch.float32:
        _check_range(source, modules)
    if unmatched := sorted({*config.rank_pattern, *config.alpha_pattern} - config.matched):
        source.warn(f"{config.path.name}: no module of the file has its rank or alpha from the patterns {', '.join(unmatched)}")
    targets = [name for name in (*config.target_modules, *config.target_parameters) if not any(f".{name}." in f".{module}." for module in config.modules)]
    if targets:
        source.warn(f"{config.path.name}: the file has no weights for the targets {', '.join(targets)}")
    # of trained weights only the first are looked at
    idle = [name for name, module in modules.items() if any(not tensor.view(-1)[:64].any() and not tensor.any() for tensor in module.tensors())]
    if idle:
        source.warn(f"A or B is all zeros in {len(idle)} of {len(modules)} modules, such as {', '.join(idle[:3])}: they change nothing, as if untrained")
    revision = file.revision(config.inference_fields() | {"paramwrapper_layout": file.metadata.get("paramwrapper_layout")})
    return AdapterWeights(path, revision, config, modules, source.warnings)


# ---- the directory ----------------------------------------------------------------------------------------------------
def _checked_directory(path: Path, root: Path | None) -> Path:
    """`path` if it is an adapter's directory inside `root` (links followed)."""
    if root is not None:
        real_root = Path(os.path.realpath(root))
        for inside in (path, path / "adapter_config.json", path / WEIGHTS_FILE):
            if not Path(os.path.realpath(inside)).is_relative_to(real_root):
                raise AdapterError(f"{inside}: expected a path inside --lora-root {root} (links followed), found one outside. Move the adapter there.")
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise AdapterError(f"{path}: expected a directory with adapter_config.json and {WEIGHTS_FILE}, found {found}.")
    if not (path / WEIGHTS_FILE).is_file():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            way_out = "Load it in PEFT and save it again with save_pretrained(..., safe_serialization=True)."
            raise AdapterError(f"{path}: expected {WEIGHTS_FILE}, found {pickles[0]}, a pickle file, which is refused because it can run code. {way_out}")
        raise AdapterError(f"{path}: expected {WEIGHTS_FILE}, found no such file. Save the adapter with PEFT's save_pretrained.")
    return path


def _base_warning(config: AdapterConfig, base_model: str | None) -> tuple[str, ...]:
    """Names differ for many good reasons (a local copy, a quantized copy), so shapes decide and this is only said."""
    mine, theirs = (os.path.basename(os.path.normpath(name)) if name else None for name in (base_model, config.base_model))
    if mine is None or theirs is None or mine.lower() == theirs.lower():
        return ()
    return (f"{config.path.name}: base_model_name_or_path is {config.base_model!r}, this server serves {base_model!r}",)


# ---- names ------------------------------------------------------------------------------------------------------------
class _Names:
    """The target that every tensor of the file belongs to. AdapterError for a tensor that has none."""

    def __init__(self, source: AdapterSource, rules: AdapterRules) -> None:
        self.source, self.targets, self.rename, self.refused, self.left_out = source, rules.targets, rules.rename, rules.refused, rules.left_out
        self.pairs: dict[str, _Pair] = {}  # by target name
        self.experts: dict[str, list[ExpertKey]] = {}  # by target name
        self._taken: dict[tuple[object, ...], str] = {}  # place of a tensor -> its name
        self._resolved: dict[str, str | None] = {}
        unknown: list[tuple[str, str]] = []
        for key in source.file.entries:
            match = _LORA_KEY.fullmatch(key.removeprefix(_PREFIX))
            if match is None:
                self._check_other(key)
            elif not self._add(key, match["module"], match["half"], bool(match["embedding"])):
                unknown.append((key, match["module"]))
        if unknown:
            raise self._unknown(unknown)
        if not self.pairs and not self.experts:
            raise AdapterError(f"{source.file.path}: expected LoRA tensors (lora_A, lora_B), found {len(source.file.entries)} tensors, none of them.")

    def _add(self, key: str, module: str, half: str, embedding: bool) -> bool:
        """File one LoRA tensor under its target; False if the model has no such module."""
        if (expert_key := self._expert_key(key, module, half)) is not None:
            name, entry = expert_key
            place: tuple[object, ...] = (name, *entry[2:])
            self.experts.setdefault(name, []).append(entry)
        else:
            resolved = self._resolve(module)
            if resolved is None or isinstance(self.targets[resolved], ExpertTarget):
                return False
            name, place = resolved, (resolved, half)
            if embedding != isinstance(self.targets[name], EmbeddingTarget):
                expected = "lora_A and lora_B" if embedding else "lora_embedding_A and lora_embedding_B"
                raise self.source.error(key, f"{expected} for {name}", "the other kind", "The adapter was made for another base model.")
            self.pairs.setdefault(name, {})[half] = key, module
        if place in self._taken:
            raise self.source.error(key, f"one lora_{half} of this kind for {name}", f"also {self._taken[place]}", "Remove one of the two.")
        self._taken[place] = key
        return True

    def _expert_key(self, key: str, module: str, half: str) -> tuple[str, ExpertKey] | None:
        match = _EXPERTS.fullmatch(module) or _EXPERTS.fullmatch(self.rename(module))  # Granite's were linears with a weight for all experts
        name = self._resolve(match["experts"]) if match else None
        if match is None or name is None or not isinstance(self.targets[name], ExpertTarget):
            return None
        rest = match["rest"].split(".") if match["rest"] else []
        numbers = [part for part in rest if part.isdecimal()]
        leaves = [part for part in rest if not part.isdecimal()]
        if rest == [] or rest == ["base_layer"]:
            return name, ExpertKey(key, match["experts"], INNER if rest else OUTER, None, half)
        if len(leaves) != 1 or len(numbers) > 1 or leaves[0] not in PROJECTIONS:
            known = ", ".join(PROJECTIONS)
            raise self.source.error(key, f"a projection of {name} ({known}), with an expert number or without", ".".join(rest))
        return name, ExpertKey(key, module, PROJECTIONS[leaves[0]], int(numbers[0]) if numbers else None, half)

    def _resolve(self, module: str) -> str | None:
        """The target that `module` of the file names, None if there is none. Refuses modules that may not have adapters."""
        if module not in self._resolved:
            renamed = self.rename(module)
            candidates = [module, renamed, *(renamed.replace(old, new) for old, new in _ALIASES if old in renamed)]
            for suffix, reason in self.refused.items():
                if any(name == suffix or name.endswith(f".{suffix}") for name in candidates):
                    raise AdapterError(f"{self.source.file.path}: {module}: expected no adapter on {suffix}, found one: {reason}.")
            self._resolved[module] = next((name for name in candidates if name in self.targets), None)
        return self._resolved[module]

    def _check_other(self, key: str) -> None:
        """A tensor that is neither A nor B: an unchanged copy of a base embedding is left alone, anything else is refused."""
        module = key.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
        if key.endswith(".base_layer.weight") and module.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            target = self.targets.get(self._resolve(module) or "")
            if not isinstance(target, PairTarget):
                raise self._unknown([(key, module)])
            sizes, found = [target.out_features, target.in_features], list(self.source.shape(key))
            expected = sizes[::-1] if isinstance(target, EmbeddingTarget) else sizes
            if found != expected:
                raise self.source.error(key, f"a copy of the base weight {expected}", found, "The adapter was made for another vocabulary or base model.")
            self.source.warn(f"{key} was ignored: PEFT's copy of the base weight, which is not read")
            return
        for suffix, what in _OTHER_TENSORS.items():
            if key.endswith(suffix):
                raise self.source.error(key, "only lora_A and lora_B tensors", what)
        raise self.source.error(key, "only lora_A and lora_B tensors", "a tensor of unknown meaning", "Remove it or save the adapter with PEFT.")

    def _unknown(self, unknown: list[tuple[str, str]]) -> AdapterError:
        key, module = unknown[0]
        without = next((name for name in self.left_out if f"{self.rename(module)}.".startswith(f"{name}.")), None)
        if without is not None:
            hint = f"Start the server with --lora-target-modules {without.rpartition('.')[2]} too, or without that flag."
            return self.source.error(key, "a module that --lora-target-modules names", without, hint)
        nearest = difflib.get_close_matches(self.rename(module), list(self.targets), n=3, cutoff=0.4)
        hint = f"Nearest names: {', '.join(nearest)}." if nearest else f"Its modules are such as {', '.join(list(self.targets)[:3])}."
        others = f" (and {len(unknown) - 1} more tensors)" if len(unknown) > 1 else ""
        base = f" {self.source.config.path.name} names the base model {self.source.config.base_model!r}." if self.source.config.base_model else ""
        return self.source.error(key, "a module of this model that takes adapters", f"{module}{others}", hint + base)


# ---- linears and embeddings -------------------------------------------------------------------------------------------
def _read_pair(source: AdapterSource, target: PairTarget, pair: _Pair) -> LinearLoRA:
    """A [R, in] and B [out, R] of a linear, or A [R, V] and B [H, R] of an embedding."""
    (key, name), *others = pair.values()
    if not others:
        raise missing_half(source, key)
    (a_key, _), (b_key, _), inputs, outputs = pair["A"], pair["B"], target.in_features, target.out_features
    a_shape, b_shape = source.shape(a_key), source.shape(b_key)
    if len(a_shape) != 2 or a_shape[1] != inputs:
        raise source.wrong_shape(a_key, f"[R, {inputs}]")
    if len(b_shape) != 2 or b_shape[0] != outputs:
        raise source.wrong_shape(b_key, f"[{outputs}, R]")
    rank = a_shape[0]
    if b_shape[1] != rank:
        raise source.error(b_key, f"[{outputs}, {rank}], as {a_key} has rank {rank}", list(b_shape))
    source.check_rank(a_key, rank, name)
    a, b = (source.file.read(key).to(source.dtype) for key in (a_key, b_key))
    return (EmbeddingLoRA if isinstance(target, EmbeddingTarget) else LinearLoRA)(a, b, source.config.scaling(rank, name))


def _check_range(source: AdapterSource, modules: Mapping[str, ModuleLoRA]) -> None:
    """Weights may exceed the range they are served in, and kernels multiply them by the zeros of other adapters' rows: infinity would make these NaN."""
    for name, module in modules.items():
        for tensor in module.tensors():
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                hint = "Serve with --dtype bfloat16." if tensor.dtype is torch.float16 else "The training run diverged; use another step."
                raise source.error(name, f"weights within {str(tensor.dtype)[6:]} ({torch.finfo(tensor.dtype).max:g})", "larger ones", hint)
