"""Quantized checkpoints served on the CPU: genuine files of llmcompressor, and GPTQ, AWQ and compressed-tensors by their layouts.

The truth is transformers (and PEFT) in float32 on weights dequantized by `tests.quantized_checkpoints`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.models.build import build_model
from sglang_lora_moe.models.places import LoadError
from sglang_lora_moe.models.served import ServedModel
from sglang_lora_moe.quantization.linear import QuantizedLinear
from sglang_lora_moe.quantization.wna16 import QuantizationError
from tests.adapter_files import merged_reference_model, write_adapter
from tests.models.driver import Driver, Sequence, make_context, put_in_slot
from tests.models.test_against_transformers import load_stock, random_tokens, stock_logits
from tests.quantized_checkpoints import GENUINE, dequantized, genuine, pack_linear, quantization_config, write_quantized, write_reference
from tests.tiny_models import make_tiny_model

TOLERANCE = 1e-4
SYNTHETIC: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gptq": ("qwen3_moe", "gptq", {}),
    "gptq-zeros": ("mixtral", "gptq", {"symmetric": False, "desc_act": True}),  # in another order, but into groups that lie in order
    "gptq-zeros-all-in-the-middle": ("qwen3_moe", "gptq", {"sym": False}),  # declared with zero points, written symmetric
    "gptq-down-int8": (
        "qwen3_moe",
        "gptq",
        {"schemes": {r".*down_proj": (8, 16)}, "dynamic": {r"+:.*experts.*down_proj": {"bits": 8, "group_size": 16}}},
    ),
    "gptq_v2-int8-channel": ("qwen3_moe", "gptq_v2", {"bits": 8, "group_size": -1}),
    "awq": ("mixtral", "awq", {}),
    "awq-qwen": ("qwen3_moe", "awq", {}),
    "packed-int8-zeros": ("mixtral", "compressed-tensors", {"bits": 8, "symmetric": False}),
    "packed-shared-experts": ("qwen2_moe", "compressed-tensors", {"group_size": 16, "only": r".*layers\..*(proj|_gate)\.weight"}),
    "gptq-shared-experts-zeros": ("qwen2_moe", "gptq", {"symmetric": False}),
    "packed-latent": ("deepseek_v3", "compressed-tensors", {"group_size": 8, "only": r".*layers\..*(mlp\..*_proj|q_b_proj|kv_b_proj)\.weight"}),
}


def build(path: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> ServedModel:
    return build_model(path, ctx=make_context(), dtype=dtype, device="cpu", show_progress=False, **kwargs)


def logits_of(model: ServedModel, tokens: list[int]) -> Tensor:
    return Driver(model).run(Sequence(tokens), len(tokens))


def make(name: str, directory: Path) -> Path:
    if name in GENUINE:
        return genuine(name, directory)
    arch, method, options = SYNTHETIC[name]
    return write_quantized(make_tiny_model(arch, directory), directory / "quantized", method, **options)


def linears(model: ServedModel, kind: type[Linear]) -> set[str]:
    return {name for module in model.hf.modules() if type(module) is kind for name, _ in module.parts}


@pytest.mark.parametrize("name", [*GENUINE, *SYNTHETIC])
def test_logits_equal_transformers_on_the_dequantized_weights(name: str, tmp_path: Path) -> None:
    path = make(name, tmp_path)
    tokens = random_tokens(0, 40)
    expected = stock_logits(load_stock(write_reference(path, tmp_path / "reference")), tokens)
    found = logits_of(build(path), tokens)
    assert found.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_the_name_that_compressed_tensors_once_gave_its_configuration(tmp_path: Path) -> None:
    path, tokens = make("packed-int8-zeros", tmp_path), random_tokens(0, 20)
    expected = stock_logits(load_stock(write_reference(path, tmp_path / "reference")), tokens)
    config = json.loads((path / "config.json").read_text())
    config["compression_config"] = {name: value for name, value in config.pop("quantization_config").items() if name != "quant_method"}
    (path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits_of(build(path), tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("quantized", ["both", "experts", "shared_expert", "by channel"])
def test_a_shared_expert_is_one_of_the_experts_where_it_is_quantized_as_they_are(quantized: str, tmp_path: Path) -> None:
    only = {"experts": r".*\.experts\..*_proj\.weight", "shared_expert": r".*shared_expert\..*_proj\.weight"}.get(quantized, r".*expert.*_proj\.weight")
    options = {"group_size": -1 if quantized == "by channel" else 16, "only": only}
    path = write_quantized(make_tiny_model("qwen2_moe", tmp_path), tmp_path / "q", "compressed-tensors", **options)
    model = build(path)
    experts = [module for module in model.hf.modules() if isinstance(module, FusedMoE)]
    assert len(experts) == 2 and all((layer.shared is not None) == (quantized == "both") for layer in experts)
    assert {layer.spec.num_experts for layer in experts} == {10 if quantized == "both" else 8}
    tokens = random_tokens(0, 20)
    expected = stock_logits(load_stock(write_reference(path, tmp_path / "reference")), tokens)
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", ["all_linear", "per_expert_2d", "embedding"])
@pytest.mark.parametrize("name", ["qwen3_moe-w4a16-asym-g32", "mixtral-w4a16-g32", "awq", "gptq-shared-experts-zeros"])
def test_adapters_on_it_equal_peft_on_the_dequantized_weights(name: str, layout: str, tmp_path: Path) -> None:
    """Base and adapter in one step, adapters on experts, attention, router, head and embedding of the logical widths."""
    path = make(name, tmp_path)
    reference = write_reference(path, tmp_path / "reference")
    adapter = write_adapter(layout, reference, tmp_path / "adapter", rank=6, alpha=9)
    model = build(path)
    slot = put_in_slot(model, adapter)
    tokens = random_tokens(1, 24)
    plain, adapted = Driver(model).step([(Sequence(tokens), 24), (Sequence(tokens, slot=slot), 24)])
    torch.testing.assert_close(plain, stock_logits(load_stock(reference), tokens), rtol=0, atol=TOLERANCE)
    expected = stock_logits(merged_reference_model(reference, adapter), tokens)
    torch.testing.assert_close(adapted, expected, rtol=0, atol=TOLERANCE)
    assert (adapted - plain).abs().max() > 0.1


def test_gpt_oss_saved_expert_by_expert(tmp_path: Path) -> None:
    """llmcompressor splits fused, transposed, interleaved experts into linears with biases; transformers itself cannot read these files."""
    source = make_tiny_model("gpt_oss", tmp_path)
    path = write_quantized(source, tmp_path / "q", "compressed-tensors", only=r".*self_attn.*proj\.weight")
    reference = write_reference(path, tmp_path / "reference")
    state, dense = load_file(path / "model.safetensors"), load_file(reference / "model.safetensors")
    for key in [key for key in state if ".mlp.experts." in key]:
        name, _, leaf = key.rpartition(".")
        fused = state.pop(key)
        for expert in range(fused.shape[0]):
            columns = {"down_proj": fused[expert]}
            if leaf.startswith("gate_up"):
                columns = {"gate_proj": fused[expert, ..., 0::2], "up_proj": fused[expert, ..., 1::2]}
            for projection, tensor in columns.items():
                linear = f"{name}.{expert}.{projection}"
                if leaf.endswith("_bias"):
                    state[f"{linear}.bias"] = tensor.clone()
                    continue
                packed = pack_linear(tensor.T, "compressed-tensors", 4, 32, True)
                state |= {f"{linear}.{part}": value for part, value in packed.items()}
                place = slice(None) if projection == "down_proj" else slice(projection == "up_proj", None, 2)
                dense[key][expert, ..., place] = dequantized(packed, 4, "compressed-tensors").T
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, reference / "model.safetensors", metadata={"format": "pt"})
    tokens = random_tokens(0, 40)
    torch.testing.assert_close(logits_of(build(path), tokens), stock_logits(load_stock(reference), tokens), rtol=0, atol=TOLERANCE)


def test_what_is_quantized_stays_quantized_and_exceptions_are_honoured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = build(genuine("mixtral-w4a16-g32", tmp_path))  # excepts v_proj of layer 0 and the experts of layer 1
    layers = model.hf.model.layers
    assert [type(layer.mlp.experts.quant_method).__name__ for layer in layers] == ["WNA16Method", "UnquantizedMethod"]
    assert layers[0].mlp.experts.w13_packed.dtype == torch.int32 and not hasattr(layers[0].mlp.experts, "w13")
    quantized = {f"model.layers.{i}.self_attn.{leaf}" for i, leaf in ((0, "o_proj"), (1, "o_proj"), (1, "q_proj"), (1, "k_proj"), (1, "v_proj"))}
    assert linears(model, QuantizedLinear) == quantized
    assert "lm_head" in linears(model, Linear) and "model.layers.0.self_attn.q_proj" in linears(model, Linear)
    said = [record.getMessage() for record in caplog.records if "dequantized" in record.getMessage()]
    assert said == [f"dequantized to 16 bit at load, as parts of layers that are not quantized as a whole: 2 linears ({', '.join(sorted(NOT_WHOLE))})"]
    assert model.moe_runner_backend == "torch_native"


NOT_WHOLE = {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}


def test_gptq_dynamic_rules_are_honoured(tmp_path: Path) -> None:
    source = make_tiny_model("qwen3_moe", tmp_path)
    rules = {r"-:.*layers\.0\.mlp\.experts.*": {}, r"+:.*o_proj": {"bits": 8, "group_size": 64}}
    only = r".*layers\..*self_attn.*proj\.weight|.*layers\.1\..*experts.*proj\.weight"
    path = write_quantized(source, tmp_path / "q", "gptq", only=only, schemes={r".*o_proj": (8, 64)}, dynamic=rules)
    model = build(path)
    assert [type(layer.mlp.experts.quant_method).__name__ for layer in model.hf.model.layers] == ["UnquantizedMethod", "WNA16Method"]
    assert {layer.self_attn.o_proj.scheme.bits for layer in model.hf.model.layers} == {8}
    tokens = random_tokens(0, 20)
    expected = stock_logits(load_stock(write_reference(path, tmp_path / "reference")), tokens)
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=TOLERANCE)


def test_modules_that_no_rule_excepts_but_the_files_hold_in_16_bit(tmp_path: Path) -> None:
    """GPTQ tools leave routers, gates and sometimes more in 16 bit without a word in config.json."""
    path = write_quantized(
        make_tiny_model("qwen2_moe", tmp_path), tmp_path / "q", "gptq", group_size=16, only=r".*layers\.1\..*(experts|self_attn).*proj\.weight"
    )
    model = build(path)
    assert linears(model, QuantizedLinear) == {f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkvo"}
    tokens = random_tokens(0, 20)
    expected = stock_logits(load_stock(write_reference(path, tmp_path / "reference")), tokens)
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=TOLERANCE)


def test_tensors_of_one_linear_in_different_files(tmp_path: Path) -> None:
    path = write_quantized(make_tiny_model("mixtral", tmp_path), tmp_path / "q", "gptq", symmetric=False)
    expected = logits_of(build(path), [5, 6, 7])
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index: dict[str, str] = {}
    for file in (first, second):
        part = {key: tensor for key, tensor in state.items() if key.endswith(("qweight", "scales")) == (file == first)}
        index |= dict.fromkeys(part, file)
        save_file(part, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert len(index) == len(state)
    assert torch.equal(logits_of(build(path), [5, 6, 7]), expected)


def test_zero_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    path = write_quantized(make_tiny_model("qwen3_moe", tmp_path), tmp_path / "q", "gptq")
    expected = logits_of(build(path), [5, 6, 7])
    edit(path, lambda state, _: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128), f"{EXPERT}.gate_proj.bias": torch.zeros(32)}))
    assert torch.equal(logits_of(build(path), [5, 6, 7]), expected)
    edit(path, lambda state, _: state.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}))
    with pytest.raises(LoadError, match=r"1 tensors have no place .*q_proj\.bias"):
        build(path)


def test_bfloat16(tmp_path: Path) -> None:
    """Scales are kept in the activation dtype; the logits follow the float32 model as 16-bit models do."""
    path = genuine("qwen3_moe-w4a16", tmp_path)
    model = build(path, torch.bfloat16)
    assert {m.w13_scales.dtype for m in model.hf.modules() if isinstance(m, FusedMoE)} == {torch.bfloat16}
    tokens = random_tokens(0, 20)
    expected = logits_of(build(path), tokens)
    assert (logits_of(model, tokens) - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("arch", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_dummy_weights(arch: str, method: str, tmp_path: Path) -> None:
    path = make_tiny_model(arch, tmp_path, **({"kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16} if arch == "deepseek_v3" else {}))
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = quantization_config(method, 4, 16, False)
    (path / "config.json").write_text(json.dumps(config))
    model, again = (build(path, load_format="dummy") for _ in range(2))
    experts = [module for module in model.hf.modules() if isinstance(module, FusedMoE)]
    assert experts and all(layer.w2_packed.dtype == torch.int32 for layer in experts) and linears(model, QuantizedLinear)
    assert "lm_head" in linears(model, Linear)
    found = logits_of(model, random_tokens(0, 30))
    assert found.isfinite().all() and found.std() > 0.3
    assert torch.equal(found, logits_of(again, random_tokens(0, 30)))


# ---- refusals -------------------------------------------------------------------------------------------------------
EXPERT = "model.layers.0.mlp.experts.3"
Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def edit(path: Path, change: Change) -> None:
    state, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    change(state, config["quantization_config"])
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))


def requantized(name: str, method: str, bits: int, group_size: int) -> Change:
    """Put one linear in with other bits or groups, and tell quantization_config so."""

    def change(state: dict[str, Tensor], config: dict[str, Any]) -> None:
        shape = (state[f"{name}.qweight"].shape[1], state[f"{name}.qweight"].shape[0] * 8)
        state.update({f"{name}.{leaf}": tensor for leaf, tensor in pack_linear(torch.randn(shape), method, bits, group_size, True).items()})
        config["dynamic"] = {re.escape(name): {"bits": bits, "group_size": group_size}}

    return change


def to_16_bit(state: dict[str, Tensor], name: str) -> None:
    """Put a compressed-tensors linear in without quantization."""
    tensors = {leaf: state.pop(f"{name}.{leaf}") for leaf in ("weight_packed", "weight_scale", "weight_shape")}
    state[f"{name}.weight"] = dequantized(tensors, 4, "compressed-tensors")


REFUSED: dict[str, tuple[str, Change, str]] = {
    "missing scales": ("gptq", lambda s, c: s.pop(f"{EXPERT}.up_proj.scales"), rf"model\.safetensors: {EXPERT}\.up_proj\.scales is missing"),
    "missing weight": ("gptq", lambda s, c: s.pop(f"{EXPERT}.up_proj.qweight"), rf"{EXPERT}\.up_proj\.qweight is missing"),
    "missing zeros": ("awq", lambda s, c: s.pop(f"{EXPERT}.up_proj.qzeros"), rf"{EXPERT}\.up_proj\.qzeros is missing"),
    "missing expert": (
        "gptq",
        lambda s, c: [s.pop(f"{EXPERT}.down_proj.{leaf}") for leaf in ("qweight", "qzeros", "scales", "g_idx")],
        rf"must be quantized alike, .*{EXPERT}\.down_proj is not quantized, or missing; quantize them alike",
    ),
    "missing linear": (
        "gptq",
        lambda s, c: [s.pop(f"model.layers.1.self_attn.o_proj.{leaf}") for leaf in ("qweight", "qzeros", "scales", "g_idx")],
        r"lacks 1 tensors .*model\.layers\.1\.self_attn\.o_proj\.weight: not in the files",
    ),
    "16-bit expert": (
        "gptq",
        lambda s, c: s.update(
            {f"{EXPERT}.up_proj.weight": [s.pop(f"{EXPERT}.up_proj.{leaf}") for leaf in ("qweight", "qzeros", "scales", "g_idx")][2].float()}
        ),
        rf"must be quantized alike, .*{EXPERT}\.up_proj is not quantized, or missing",
    ),
    "16-bit down in all experts": (
        "compressed-tensors",
        lambda s, c: [to_16_bit(s, name) for name in sorted({key.rpartition(".")[0] for key in s if "layers.1.mlp.experts" in key and "down" in key})],
        r"layers\.1\.mlp\.experts: .* so must the down projections, but .*0\.gate_proj is int4 .*0\.down_proj is not quantized.* except all experts",
    ),
    "mixed bits in down": ("gptq", requantized(f"{EXPERT}.down_proj", "gptq", 8, 16), rf"experts\.0\.down_proj is int4 .*{EXPERT}\.down_proj is int8"),
    "both forms": (
        "gptq",
        lambda s, c: s.update({f"{EXPERT}.up_proj.weight": torch.randn(32, 64)}),
        rf"{EXPERT}\.up_proj\.weight is F32, but the files also hold",
    ),
    "under two names": (
        "awq",
        lambda s, c: s.update({key.replace("experts.3.", "experts.03."): tensor.clone() for key, tensor in s.items() if f"{EXPERT}.up_proj." in key}),
        r"experts\.3\.up_proj\.scales brings weights that another tensor of the files has brought already, under another name; remove one",
    ),
    "NaN": ("compressed-tensors", lambda s, c: s[f"{EXPERT}.up_proj.weight_scale"].fill_(torch.nan), r"up_proj\.weight_scale holds NaN .*; download or"),
    "undeclared": ("awq", lambda s, c: c.clear(), r"no place .*qweight.*; they are of quantized weights, but config\.json has no quantization_config"),
    "other group size": ("gptq", lambda s, c: c.update(group_size=16), r"scales: expected \(2, 64\) .*, found \(1, 64\) .*group_size\) must agree"),
    "wrong shape": (
        "gptq",
        lambda s, c: s.update({f"{EXPERT}.up_proj.qweight": torch.zeros(8, 16, dtype=torch.int32)}),
        r"up_proj\.qweight: expected \(8, 32\)",
    ),
    "wrong logical shape": (
        "compressed-tensors",
        lambda s, c: s.update({f"{EXPERT}.up_proj.weight_shape": torch.tensor([32, 128])}),
        r"up_proj\.weight_shape: expected \(32, 64\), found \(32, 128\)",
    ),
    "wrong group size": ("gptq", lambda s, c: c.update(group_size=64), r"down_proj: 32 input features do not divide into groups of 64 .*; requantize"),
    "zeros though symmetric": (
        "compressed-tensors",
        lambda s, c: s.update({f"{EXPERT}.up_proj.weight_zero_point": torch.zeros(4, 2, dtype=torch.int32)}),
        r"up_proj\.weight_zero_point is present, but .* symmetric",
    ),
    "odd zeros though symmetric": (
        "gptq",
        lambda s, c: s[f"{EXPERT}.up_proj.qzeros"].fill_(0x66666666),
        r'up_proj\.qzeros holds 7, but symmetric 4-bit weights have zero 8; set "sym": false',
    ),
    "act order": (
        "gptq",
        lambda s, c: s.update({f"{EXPERT}.up_proj.g_idx": torch.arange(64, dtype=torch.int32) % 2}),
        r"up_proj\.g_idx permutes input columns .*requantize with desc_act=False",
    ),
    "excepted but quantized": (
        "compressed-tensors",
        lambda s, c: c["ignore"].append(f"{EXPERT}.up_proj"),
        rf"{EXPERT}\.up_proj\.weight_packed is in the files, but quantization_config excepts .*correct config\.json",
    ),
    "mixed bits in qkv": (
        "gptq",
        requantized("model.layers.0.self_attn.k_proj", "gptq", 8, 32),
        r"as one projection, but quantized differently: .*q_proj is int4 group 32 .*k_proj is int8 group 32 .*; quantize them alike",
    ),
    "mixed groups in qkv": ("gptq", requantized("model.layers.0.self_attn.v_proj", "gptq", 4, 64), r"q_proj is int4 group 32 .*v_proj is int4 group 64"),
    "mixed bits in experts": ("gptq", requantized(f"{EXPERT}.up_proj", "gptq", 8, 32), rf"experts\.0\.gate_proj is int4 group 32 .*{EXPERT}\.up_proj is int8"),
    "unknown module": (
        "gptq",
        lambda s, c: s.update({"model.layers.0.self_attn.x_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)}),
        r"no place .*x_proj\.qweight",
    ),
    "unknown tensor": ("gptq", lambda s, c: s.update({f"{EXPERT}.up_proj.perm": torch.zeros(2)}), r"no place .*up_proj\.perm"),
    "quantized embedding": (
        "gptq",
        lambda s, c: s.update({"model.norm.qweight": torch.zeros(2, 2, dtype=torch.int32)}),
        r"model\.norm\.qweight is quantized, but the model has no linear",
    ),
    "unsupported method": ("gptq", lambda s, c: c.update(quant_method="quark"), "quantized as 'quark' are not supported"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per method, which the cases copy and damage."""
    directory = tmp_path_factory.mktemp("sources")
    source = make_tiny_model("qwen3_moe", directory)
    return {method: write_quantized(source, directory / method, method) for method in ("gptq", "awq", "compressed-tensors")}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_tensor_and_value(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    method, change, message = REFUSED[case]
    path = Path(shutil.copytree(sources[method], tmp_path / "q"))
    edit(path, change)
    with pytest.raises((QuantizationError, LoadError), match=message):
        build(path)


def test_marlin_on_a_cpu_or_on_16_bit_weights_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    experts = r"model\.layers\.0\.mlp\.experts: the marlin MoE backend"
    with pytest.raises(ValueError, match=rf"{experts} needs a CUDA device, and the model is on cpu; use --moe-runner-backend auto"):
        build(sources["gptq"], torch.bfloat16, moe_runner_backend="marlin")
    with pytest.raises(ValueError, match=rf"{experts} runs int4 .* float32 activations; use --moe-runner-backend auto"):
        build(sources["gptq"], moe_runner_backend="marlin")
    with pytest.raises(ValueError, match=rf"{experts} runs int4 and int8 weights .*, and these are unquantized; use --moe-runner-backend auto"):
        build(make_tiny_model("qwen3_moe", tmp_path), moe_runner_backend="marlin")
