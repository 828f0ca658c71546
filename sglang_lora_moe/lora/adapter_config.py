"""`adapter_config.json`: the fields that matter for inference, PEFT's rank and alpha rules, and refusal of what is not plain LoRA."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex

from sglang_lora_moe.engine.validate import is_int, is_number, shown
from sglang_lora_moe.lora.adapter_file import AdapterError

CONFIG_FILE = "adapter_config.json"
PATTERN_SECONDS = 5  # for one name; the re module has no limit, and a pattern may need years
_compile = lru_cache(1 << 16)(regex.compile)  # of one file: EVA and PEFT's conversions to LoRA write a pattern for each module, and regex keeps 500

# Fields that turn the file into something else than y += scaling * B A x, when set, and what to do about it
_REFUSED = {
    "use_dora": "DoRA (a magnitude per output) is not served; train with use_dora=false, or merge the adapter into its own base model",
    "lora_bias": "a bias of lora_B is not served; train with lora_bias=false",
    "alora_invocation_tokens": "activated LoRA (an adapter that starts at a token) is not served; train a plain LoRA adapter",
    "use_qalora": "QALoRA (pooled inputs) is not served; train with use_qalora=false",
    "use_bdlora": "block-diagonal LoRA is not served; train a plain LoRA adapter",
    "arrow_config": "Arrow routing between adapters is not served; name one adapter in each request instead",
    "kasa_config": "KaSA (singular values beside A and B) is not served; train a plain LoRA adapter",
    "velora_config": "VeLoRA is not served; train a plain LoRA adapter",
    "monteclora_config": "MonteCLoRA is not served; train a plain LoRA adapter",
    "modules_to_save": "fully retrained modules are not served per adapter; train with LoRA on them instead, or merge the adapter into its own base model",
    "trainable_token_indices": "retrained token rows are not served per adapter; train with LoRA on embed_tokens (target_modules) instead",
    "layer_replication": "replicated layers need a base model of another depth; merge the adapter into its own base model",
}
# Initialisations that change the base weights: A and B are right only on top of the changed ones
_CHANGED_BASE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields with no meaning for inference, or read below. Anything else that is set is mentioned in the report
# fmt: off
_KNOWN = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "target_modules", "peft_version", "peft_type", "lora_B_layout",
    "base_model_name_or_path", "bias", "fan_in_fan_out", "ensure_weight_tying", "task_type", "auto_mapping", "revision", "inference_mode", "lora_dropout",
    "exclude_modules", "init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
}
# fmt: on
B_LAYOUTS = ("rank_major", "grouped_by_expert")
_LISTS = (list, tuple, set)  # a set in what LoraConfig.to_dict() gives


@dataclass(frozen=True)
class AdapterConfig:
    """The inference-relevant part of adapter_config.json."""

    path: Path
    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regex -> rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # regex -> alpha
    target_modules: tuple[str, ...] = ()  # () where it is a pattern
    target_parameters: tuple[str, ...] = ()
    peft_version: tuple[int, ...] | None = None
    lora_b_layout: str = "rank_major"  # order of the columns of a flattened 3D lora_B: rank- or expert-major
    base_model: str | None = None
    warnings: tuple[str, ...] = ()
    matched: set[str | None] = field(default_factory=set)  # patterns that have decided for a module of the file
    modules: set[str] = field(default_factory=set)  # of the file, as patterns see their names

    def rank(self, name: str) -> int:
        """Rank of the module called `name` in the file."""
        return self._lookup(self.rank_pattern, name, self.r)

    def scaling(self, rank: int, name: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        alpha = self._lookup(self.alpha_pattern, name, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _lookup(self, patterns: dict[str, Any], name: str, default: Any) -> Any:
        """PEFT's rule: the first pattern that matches the whole name, or a part of it that follows a dot. A targeted parameter goes by its own name."""
        if any(f".{name}.weight".endswith(f".{parameter}") for parameter in self.target_parameters):
            name = f"{name}.weight"
        pattern = next((pattern for pattern in patterns if self._matches(pattern, name)), None)
        self.matched.add(pattern)
        self.modules.add(name)
        return default if pattern is None else patterns[pattern]

    def _matches(self, pattern: str, name: str) -> bool:
        try:
            return _compile(rf"(.*\.)?({pattern})$").match(name, timeout=PATTERN_SECONDS) is not None
        except TimeoutError:
            found = f"found {pattern!r}, which takes over {PATTERN_SECONDS} s for {name}"
            raise AdapterError(f"{self.path}: rank_pattern, alpha_pattern: expected patterns that match at once, {found}") from None

    def inference_fields(self) -> dict[str, Any]:
        """What of the config changes the adapter's function, for its revision."""
        patterns = [list(self.rank_pattern.items()), list(self.alpha_pattern.items())]  # in order: the first match counts
        parameters = sorted(self.target_parameters)
        return {"alpha": [self.r, self.lora_alpha, self.use_rslora, patterns], "layout": [parameters, self.peft_version, self.lora_b_layout]}


def read_config(directory: Path) -> AdapterConfig:
    """Read and check `adapter_config.json` in an adapter's directory."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{directory}: expected {CONFIG_FILE}, found no such file. Save the adapter with PEFT's save_pretrained.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: expected a JSON object, found something else: {error}") from error
    return parse_config(path, raw)


def parse_config(path: Path, raw: object) -> AdapterConfig:
    """Check the content of an adapter_config.json; `path` names it in errors."""
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    _refuse_other_methods(path, raw)
    _compile.cache_clear()
    get = _Fields(path, raw)
    layout = raw.get("lora_B_layout") or "rank_major"
    return AdapterConfig(
        path=path,
        r=get.rank("r", raw.get("r")),
        lora_alpha=get.number("lora_alpha", raw.get("lora_alpha")),
        use_rslora=get.boolean("use_rslora"),
        rank_pattern=get.patterns("rank_pattern", get.rank),
        alpha_pattern=get.patterns("alpha_pattern", get.number),
        target_modules=get.names("target_modules") if not isinstance(raw.get("target_modules"), str) else (),
        target_parameters=get.names("target_parameters"),
        peft_version=_version(raw.get("peft_version")),
        lora_b_layout=get.expect(layout in B_LAYOUTS, "lora_B_layout", f"one of {', '.join(B_LAYOUTS)}", layout),
        base_model=raw["base_model_name_or_path"] if isinstance(raw.get("base_model_name_or_path"), str) else None,
        warnings=_warnings(raw),
    )


def _refuse_other_methods(path: Path, raw: dict[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type: expected 'LORA', found {raw.get('peft_type')!r}. Only LoRA adapters are served.")
    for name, reason in _REFUSED.items():
        if raw.get(name):
            raise AdapterError(f"{path}: {name}: expected it unset, found {shown(raw[name])}: {reason}.")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE_INITS):
        way_out = "Convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        raise AdapterError(f"{path}: init_lora_weights: expected an initialisation that keeps the base weights, found {init!r}, which changes them. {way_out}")
    targets = raw.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets if isinstance(targets, _LISTS) else []
    if raw.get("ensure_weight_tying") and any(str(name).rpartition(".")[2] in ("embed_tokens", "lm_head") for name in targets):
        reason = "one pair shared by embedding and output head is not served; train with ensure_weight_tying=false"
        raise AdapterError(f"{path}: ensure_weight_tying: expected false with {targets}, found true: {reason}.")
    for name, value in raw.items():
        if name.startswith("use_") and value is True and name not in _KNOWN:
            raise AdapterError(f"{path}: {name}: expected a field of plain LoRA, found one that is not known here. Train a plain LoRA adapter.")


def _warnings(raw: dict[str, Any]) -> tuple[str, ...]:
    found = []
    unknown = sorted(name for name, value in raw.items() if name not in _KNOWN and name not in _REFUSED and value)
    if unknown:
        found.append(f"{CONFIG_FILE}: fields without effect here: {', '.join(unknown)}")
    if raw.get("bias") not in (None, "none"):
        found.append(f"{CONFIG_FILE}: bias is {raw['bias']!r}, but only a file without bias tensors is accepted")
    if raw.get("lora_alpha") == 0:
        found.append(f"{CONFIG_FILE}: lora_alpha is 0, so that the adapter changes nothing but where an alpha_pattern says otherwise")
    if raw.get("fan_in_fan_out"):
        found.append(f"{CONFIG_FILE}: fan_in_fan_out is set, which has no effect on linear layers")
    if raw.get("target_parameters") and not raw.get("lora_B_layout") and "unsloth" in str(raw.get("auto_mapping")):
        found.append(f"{CONFIG_FILE}: Unsloth without lora_B_layout: lora_B of experts was read rank_major; say grouped_by_expert there if it was packed so")
    return tuple(found)


def _version(text: Any) -> tuple[int, ...] | None:
    """(0, 19) of "0.19.1" or "0.19.1.dev0@...", None where absent."""
    numbers = regex.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return tuple(int(number) for number in numbers.groups()) if numbers else None


class _Fields:
    """Typed access to the fields of one config; errors name the file and the field."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path, self.raw = path, raw

    def expect(self, is_right: bool, name: str, expected: str, value: Any) -> Any:
        """`value` if it is right."""
        if not is_right:
            raise AdapterError(f"{self.path}: {name}: expected {expected}, found {shown(value)}")
        return value

    def rank(self, name: str, value: Any) -> int:
        return self.expect(is_int(value) and value >= 1, name, "a rank of at least 1", value)

    def number(self, name: str, value: Any) -> float:
        return self.expect(is_number(value), name, "a finite number, also in float32", value)

    def boolean(self, name: str) -> bool:
        value = self.raw.get(name)
        return bool(self.expect(isinstance(value, bool | None), name, "true or false", value))

    def names(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name) or []
        return tuple(self.expect(isinstance(value, _LISTS) and all(isinstance(item, str) for item in value), name, "a list of names", value))

    def patterns(self, name: str, check: Callable[[str, Any], Any]) -> dict[str, Any]:
        value = self.raw.get(name) or {}
        for pattern in self.expect(isinstance(value, dict), name, "an object of pattern -> number", value):
            try:
                _compile(rf"(.*\.)?({pattern})$")
            except regex.error as error:
                self.expect(False, name, "regular expressions as keys", f"{pattern!r} ({error})")
            check(f"{name}[{pattern!r}]", value[pattern])
        return value
