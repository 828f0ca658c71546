"""`quantization_config` of config.json: which module is quantized and how, by the rules of the tool that wrote it.

Formats: compressed-tensors (pack-quantized), GPTQ and AWQ. Only wNa16 is served, integer weights of 4 or 8 bits with 16-bit activations; everything else is
refused by name. A module may be known by several names (in the checkpoint, and in transformers' model): a rule holds for it if it matches one of them.
"""

import re
from abc import ABC, abstractmethod
from typing import Any, NoReturn

from sglang_lora_moe.quantization.wna16 import QuantizationError, WNA16Scheme

SERVED = "compressed-tensors (pack-quantized), gptq and awq with int4 or int8 weights"


class QuantizationConfig(ABC):
    """What a parsed `quantization_config` answers."""

    @abstractmethod
    def scheme_for(self, *names: str) -> WNA16Scheme | None:
        """The scheme of the linear known by `names`; None = the rules except it."""

    def covers_by_default(self, name: str) -> bool:
        """Whether a linear that no rule names is quantized, for want of files that show it (dummy weights): GPTQ and AWQ tools
        quantize the decoder layers' linears, without the one-row gates of shared experts."""
        return ".layers." in name and not name.endswith("_gate")


def parse_quantization_config(config: dict[str, Any]) -> QuantizationConfig:
    """Raises QuantizationError, with the field and its value, for what cannot be served."""
    method = config.get("quant_method")
    parsers: dict[Any, type[QuantizationConfig]] = {"compressed-tensors": CompressedTensorsConfig, "gptq": GPTQConfig, "awq": AWQConfig}
    if method not in parsers:
        raise QuantizationError(f"checkpoints quantized as {method!r} are not supported; supported are {SERVED}, and 16-bit checkpoints")
    return parsers[method](config)  # type: ignore[call-arg]


class CompressedTensorsConfig(QuantizationConfig):
    """Groups of targets (module names, "re:" patterns, class names), each with a scheme, and a list of ignored modules."""

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("kv_cache_scheme"):
            _refuse("kv_cache_scheme", config["kv_cache_scheme"], "a quantized KV cache is not supported; quantize without kv_cache_scheme")
        if config.get("transform_config"):
            _refuse("transform_config", config["transform_config"], "rotations of activations are not supported; quantize without transforms")
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            _refuse("sparsity_config", config["sparsity_config"], "sparse weights are not supported; save them dense")
        self.schemes: dict[str, WNA16Scheme] = {}
        for name, group in _object("config_groups", config.get("config_groups")).items():
            if not isinstance(group, dict):
                _refuse(f"config_groups.{name}", group, "it must say how its targets are quantized; write the checkpoint with llmcompressor")
            scheme = _packed_scheme(f"config_groups.{name}", group, config.get("format"))
            self.schemes.update(dict.fromkeys(group.get("targets") or [], scheme))
        if not self.schemes:
            _refuse("config_groups", config.get("config_groups"), "no group names a target; write the checkpoint with llmcompressor")
        ignored = config.get("ignore") or []
        self._ignored = frozenset(ignored)
        self._ignored_patterns = [_pattern("ignore", entry.removeprefix("re:")) for entry in ignored if entry.startswith("re:")]
        patterns = sorted(target for target in self.schemes if target.startswith("re:"))  # in the order in which compressed-tensors tries them
        self._patterns = [(_pattern("targets", target.removeprefix("re:")), self.schemes[target]) for target in patterns]

    def scheme_for(self, *names: str) -> WNA16Scheme | None:
        if any(name in self._ignored or any(pattern.match(name) for pattern in self._ignored_patterns) for name in names):
            return None
        for name in names:
            if name in self.schemes:
                return self.schemes[name]
        for pattern, scheme in self._patterns:
            if any(pattern.match(name) for name in names):
                return scheme
        return self.schemes.get("Linear")

    def covers_by_default(self, name: str) -> bool:
        return True


def _packed_scheme(place: str, group: dict[str, Any], default_format: Any) -> WNA16Scheme:
    """One of config_groups."""
    weights, file_format = group.get("weights"), group.get("format") or default_format
    if file_format != "pack-quantized":
        _refuse(f"{place}.format", file_format, f"only pack-quantized is supported of compressed-tensors; supported are {SERVED}")
    if not weights or weights.get("type", "int") != "int":
        _refuse(f"{place}.weights", weights, f"the weights must be integers; supported are {SERVED}")
    for field in ("input_activations", "output_activations"):
        if group.get(field):
            _refuse(f"{place}.{field}", group[field], "quantized activations are not supported; use a weight-only scheme such as W4A16")
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None and isinstance(group_size, int):  # as the tool reads it
        strategy = "group" if group_size > 0 else "channel"
    if strategy not in ("group", "channel"):
        _refuse(f"{place}.weights.strategy", strategy, "scales must be per group or per channel")
    if weights.get("actorder") in ("group", "dynamic", True):
        _refuse(f"{place}.weights.actorder", weights["actorder"], 'columns are permuted over groups, which expert kernels cannot read; use actorder "weight"')
    size = _group_size(f"{place}.weights.group_size", group_size if strategy == "group" else -1)
    return WNA16Scheme(_bits(f"{place}.weights.num_bits", weights.get("num_bits")), size, bool(weights.get("symmetric", True)), "compressed-tensors")


class GPTQConfig(QuantizationConfig):
    """One scheme, and gptqmodel's `dynamic` rules: pattern -> other fields, or "-:pattern" = left in 16 bit.

    The tool quantizes the decoder layers' linears except what it knows to be sensitive (routers, for example), of which the
    configuration says nothing: the files show it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        checkpoint_format = config.get("checkpoint_format") or config.get("format") or "gptq"
        if config.get("is_marlin_format"):
            checkpoint_format = "marlin"
        if checkpoint_format not in ("gptq", "gptq_v2"):
            _refuse("checkpoint_format", checkpoint_format, 'supported are "gptq" and "gptq_v2"; convert or quantize again')
        self.fields = {key: config.get(key) for key in ("bits", "group_size", "sym")}
        self.format, self.lm_head = checkpoint_format, bool(config.get("lm_head"))
        self.scheme = self._make("", self.fields)
        self.rules: list[tuple[re.Pattern[str], WNA16Scheme | None]] = []
        for rule, changes in _object("dynamic", config.get("dynamic")).items():
            scheme = None if rule.startswith("-:") else self._make(f"dynamic.{rule}.", self.fields | _object(f"dynamic.{rule}", changes))
            self.rules.append((_pattern("dynamic", rule.removeprefix("-:").removeprefix("+:")), scheme))

    def _make(self, place: str, fields: dict[str, Any]) -> WNA16Scheme:
        group_size = fields["group_size"] if fields["group_size"] is not None else -1
        symmetric = fields["sym"] if fields["sym"] is not None else True
        return WNA16Scheme(_bits(f"{place}bits", fields["bits"]), _group_size(f"{place}group_size", group_size), bool(symmetric), self.format)

    def scheme_for(self, *names: str) -> WNA16Scheme | None:
        for pattern, scheme in self.rules:
            if any(pattern.match(name) for name in names):
                return scheme
        return self.scheme

    def covers_by_default(self, name: str) -> bool:
        return super().covers_by_default(name) or (self.lm_head and name.endswith("lm_head"))


class AWQConfig(QuantizationConfig):
    """One scheme, always with zero points, and names of modules that stay in 16 bit."""

    def __init__(self, config: dict[str, Any]) -> None:
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            _refuse("version", version, 'only the "gemm" layout of AWQ is supported; convert or quantize again')
        if config.get("zero_point") is False:
            _refuse("zero_point", False, "the gemm layout of AWQ has zero points; quantize with zero_point=true")
        bits = _bits("bits", config.get("bits", config.get("w_bit")))
        if bits != 4:
            _refuse("bits", bits, "the gemm layout of AWQ has 4 bits")
        self.scheme = WNA16Scheme(bits, _group_size("group_size", config.get("group_size", config.get("q_group_size"))), False, "awq")
        self._excepted: list[str] = config.get("modules_to_not_convert") or []

    def scheme_for(self, *names: str) -> WNA16Scheme | None:
        """An exception is one or more whole components of a name: "gate" means mlp.gate, not gate_proj."""
        return None if any(f".{entry}." in f".{name}." for entry in self._excepted for name in names) else self.scheme


def _object(place: str, value: Any) -> dict[str, Any]:
    return (value or {}) if isinstance(value, dict | None) else _refuse(place, value, "it must be an object")


def _bits(place: str, value: Any) -> int:
    if value not in (4, 8):
        _refuse(place, value, "weights of 4 and 8 bits are supported")
    return int(value)


def _group_size(place: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        _refuse(place, value, "a group size is a positive number, or -1 for one scale per output channel")
    return value


def _pattern(place: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        _refuse(place, text, f"it is not a regular expression ({error})")


def _refuse(place: str, value: Any, why: str) -> NoReturn:
    raise QuantizationError(f"quantization_config.{place} is {value!r}: {why}")
