"""Rules of `quantization_config`: which module gets which scheme, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_lora_moe.quantization.config import QuantizationConfig, parse_quantization_config
from sglang_lora_moe.quantization.wna16 import QuantizationError, WNA16Scheme
from tests.quantized_checkpoints import quantization_config

PACKED = quantization_config("compressed-tensors", 4, 128, True)
GPTQ = quantization_config("gptq", 4, 128, True)
AWQ = quantization_config("awq", 4, 64, False)
PROJ = "model.layers.3.mlp.experts.5.gate_proj"


def group(targets: list[str], bits: int = 4, group_size: int = 128, **weights: Any) -> dict[str, Any]:
    fields = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": True} | weights
    return {"targets": targets, "weights": fields, "format": "pack-quantized"}


def parse(config: dict[str, Any], **changes: Any) -> QuantizationConfig:
    return parse_quantization_config(config | changes)


def bits_of(config: QuantizationConfig, *names: str) -> int | None:
    scheme = config.scheme_for(*names)
    return None if scheme is None else scheme.bits


def test_compressed_tensors_targets_and_exceptions() -> None:
    config = parse(
        PACKED,
        config_groups={"a": group(["Linear"]), "b": group([r"re:.*self_attn.*"], bits=8), "c": group(["model.layers.0.self_attn.q_proj"], group_size=32)},
        ignore=["lm_head", r"re:.*mlp\.gate$", "model.layers.1.mlp.experts.0.up_proj"],
    )
    assert config.scheme_for(PROJ) == WNA16Scheme(4, 128, True, "compressed-tensors")
    assert bits_of(config, "model.layers.0.self_attn.o_proj") == 8, "a pattern goes before the class name"
    assert config.scheme_for("model.layers.0.self_attn.q_proj") == WNA16Scheme(4, 32, True, "compressed-tensors"), "a name goes before a pattern"
    assert [bits_of(config, name) for name in ("lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.experts.0.up_proj")] == [None] * 3
    assert bits_of(config, "model.layers.1.mlp.gate_proj") == 4
    assert bits_of(config, "model.layers.1.block_sparse_moe.gate", "model.layers.1.mlp.gate") is None, "any of a module's names counts"
    only_experts = parse(PACKED, config_groups={"a": group([r"re:.*experts.*"])})
    assert bits_of(only_experts, PROJ) == 4 and bits_of(only_experts, "model.layers.0.self_attn.q_proj") is None
    assert bits_of(parse(PACKED, ignore=["re:.*mlp"]), PROJ) is None, "a pattern is matched against the beginning of a name"
    both = parse(PACKED, config_groups={"a": group([r"re:.*proj"]), "b": group([r"re:.*gate"], bits=8)})
    assert bits_of(both, PROJ) == 8, "patterns are tried in the order of their text"


def test_fields_that_are_not_given() -> None:
    weights = {"num_bits": 4, "strategy": "channel"}
    assert parse(PACKED, config_groups={"a": {"targets": ["Linear"], "weights": weights}}, format="pack-quantized").scheme_for(PROJ) == WNA16Scheme(
        4, -1, True, "compressed-tensors"
    )
    assert parse({"quant_method": "gptq", "bits": 4}).scheme_for(PROJ) == WNA16Scheme(4, -1, True, "gptq")


@pytest.mark.parametrize("group_size", [32, -1])
def test_a_strategy_that_the_group_size_says(group_size: int) -> None:
    config = parse(PACKED, config_groups={"a": group(["Linear"], group_size=group_size, strategy=None)})  # type: ignore[arg-type]
    assert config.scheme_for(PROJ) == WNA16Scheme(4, group_size, True, "compressed-tensors")


def test_compressed_tensors_channel_and_zero_points() -> None:
    config = parse(PACKED, config_groups={"a": group(["Linear"], bits=8, group_size=None, strategy="channel", symmetric=False, actorder="weight")})  # type: ignore[arg-type]
    assert config.scheme_for(PROJ) == WNA16Scheme(8, -1, False, "compressed-tensors")


def test_gptq_dynamic_rules() -> None:
    rules = {r"-:.*\.layers\.1\..*": {}, r"+:.*experts.*": {"bits": 8, "group_size": 32}, r".*o_proj": {"sym": False}}
    config = parse(GPTQ, dynamic=rules)
    assert config.scheme_for("model.layers.1.mlp.experts.0.gate_proj") is None
    assert config.scheme_for(PROJ) == WNA16Scheme(8, 32, True, "gptq")
    assert config.scheme_for("model.layers.0.self_attn.o_proj") == WNA16Scheme(4, 128, False, "gptq")
    assert config.scheme_for("model.layers.0.self_attn.q_proj") == WNA16Scheme(4, 128, True, "gptq")
    assert parse(GPTQ, checkpoint_format="gptq_v2").scheme_for(PROJ) == WNA16Scheme(4, 128, True, "gptq_v2")
    assert not config.covers_by_default("lm_head") and parse(GPTQ, lm_head=True).covers_by_default("lm_head")


def test_awq_old_field_names_and_exceptions() -> None:
    config = parse({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM", "modules_to_not_convert": ["gate", "layers.0.self_attn"]})
    assert config.scheme_for(PROJ) == WNA16Scheme(4, 128, False, "awq"), "gate_proj is not gate"
    assert config.scheme_for("model.layers.3.mlp.gate") is None
    assert config.scheme_for("model.layers.0.self_attn.q_proj") is None and config.scheme_for("model.layers.10.self_attn.q_proj") is not None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": ({"quant_method": "fp8"}, "quantized as 'fp8' are not supported; supported are compressed-tensors"),
    "mxfp4": ({"quant_method": "mxfp4"}, "'mxfp4'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
    "no method": ({"bits": 4}, "quantized as None"),
    "float-quantized": (PACKED | {"config_groups": {"g": group(["Linear"]) | {"format": "float-quantized"}}}, r"config_groups\.g\.format is 'float-quantized'"),
    "float weights": (PACKED | {"config_groups": {"g": group(["Linear"], type="float")}}, r"config_groups\.g\.weights .*must be integers"),
    "activations": (
        PACKED | {"config_groups": {"g": group(["Linear"]) | {"input_activations": {"num_bits": 8}}}},
        r"input_activations .*use a weight-only scheme such as W4A16",
    ),
    "per tensor": (PACKED | {"config_groups": {"g": group(["Linear"], strategy="tensor")}}, r"strategy is 'tensor': scales must be per group or per channel"),
    "two bits": (PACKED | {"config_groups": {"g": group(["Linear"], bits=2)}}, r"num_bits is 2: weights of 4 and 8 bits"),
    "no group size": (PACKED | {"config_groups": {"g": group(["Linear"], group_size=None)}}, r"group_size is None"),  # type: ignore[arg-type]
    "act order": (PACKED | {"config_groups": {"g": group(["Linear"], actorder="group")}}, r"actorder is 'group': .* use actorder \"weight\""),
    "act order in old files": (PACKED | {"config_groups": {"g": group(["Linear"], actorder=True)}}, "actorder is True"),
    "preset": (PACKED | {"config_groups": {"W4A16": ["Linear"]}}, r"config_groups\.W4A16 is \['Linear'\]"),
    "groups in a list": (PACKED | {"config_groups": [group(["Linear"])]}, r"config_groups is \[.*: it must be an object"),
    "rules in a list": (GPTQ | {"dynamic": ["-:.*o_proj"]}, r"dynamic is \['-:\.\*o_proj'\]: it must be an object"),
    "rule without fields": (GPTQ | {"dynamic": {".*o_proj": 8}}, r"dynamic\.\.\*o_proj is 8: it must be an object"),
    "no groups": (PACKED | {"config_groups": {}}, "no group names a target"),
    "bad pattern": (PACKED | {"ignore": ["re:*gate"]}, r"ignore is '\*gate': it is not a regular expression"),
    "kv cache": (PACKED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme .*quantize without"),
    "transforms": (PACKED | {"transform_config": {"config_groups": {}}}, "transform_config .*quantize without transforms"),
    "sparsity": (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config .*save them dense"),
    "gptq bits": (GPTQ | {"bits": 3}, "quantization_config.bits is 3"),
    "gptq format": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "gptq marlin": (GPTQ | {"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
    "gptq rule": (GPTQ | {"dynamic": {".*up_proj": {"bits": 2}}}, r"dynamic\.\.\*up_proj\.bits is 2"),
    "gptq group": (GPTQ | {"group_size": 0}, "group_size is 0: a group size is a positive number"),
    "awq gemv": (AWQ | {"version": "gemv"}, "version is 'gemv': only the \"gemm\" layout"),
    "awq 8 bits": (AWQ | {"bits": 8}, "bits is 8: the gemm layout of AWQ has 4 bits"),
    "awq symmetric": (AWQ | {"zero_point": False}, "zero_point is False"),
    "awq group": (AWQ | {"group_size": "128"}, "group_size is '128'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_field_and_value(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(QuantizationError, match=message):
        parse_quantization_config(config)


def test_empty_transforms_and_sparsity_are_nothing() -> None:
    """llmcompressor writes both empty."""
    assert parse(PACKED, transform_config={}, sparsity_config={}, kv_cache_scheme=None).scheme_for(PROJ) is not None
