"""Adapters of every layout are read into weights that, merged into transformers' model, give its adapted logits (float32)."""

from __future__ import annotations

import json
import math
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.lora import adapter_config
from sglang_lora_moe.lora.adapter import AdapterRules, read_adapter
from sglang_lora_moe.lora.adapter_file import AdapterError
from sglang_lora_moe.lora.targets import ExpertTarget, LinearTarget, Target, choose_targets
from sglang_lora_moe.lora.weights import AdapterWeights, EmbeddingLoRA, ExpertLoRA, LinearLoRA
from sglang_lora_moe.models.build import build_model
from sglang_lora_moe.models.served import ServedModel
from tests.adapter_files import HAND_LAYOUTS, PEFT_LAYOUTS, edit_adapter, merged_reference_model, randomise_lora, write_adapter
from tests.models.test_against_transformers import OTHERS
from tests.tiny_models import make_tiny_model

TOKENS = torch.randint(3, 98, (2, 13), generator=torch.Generator().manual_seed(0))
FLIPPED = {"flipped", "flipped_grouped"}
EXPERT_LAYOUTS = [name for name in (*PEFT_LAYOUTS, *HAND_LAYOUTS) if name not in ("dense_mlp", "unsloth_projs", "routed_and_shared", "shared_up")]
CASES = [(arch, layout) for arch in ("qwen3_moe", "mixtral", "deepseek_v3") for layout in EXPERT_LAYOUTS]
CASES += [("gpt_oss", layout) for layout in (*PEFT_LAYOUTS, "grouped_by_expert", "native_3d", "native_3d_dense", "tinker", "unsloth_projs")]
CASES += [
    (arch, layout) for arch in ("deepseek_v3", "qwen2_moe") for layout in ("routed_and_shared", "shared_up") if (arch, layout) != ("deepseek_v3", "shared_up")
]
CASES += [("deepseek_v3", "dense_mlp"), ("qwen2_moe", "dense_mlp"), ("qwen2_moe", "all_linear"), ("olmoe", "all_linear"), ("olmoe", "per_expert_2d")]
CASES += [("qwen3", layout) for layout in ("attention_only", "all_linear", "dense_mlp", "embedding")]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """arch, overrides -> (path, served model without weights)."""
    directory = tmp_path_factory.mktemp("models")

    @cache
    def make(arch: str, **overrides: Any) -> tuple[Path, ServedModel]:
        path = make_tiny_model(arch, directory, **overrides)
        context = StepContext(16, 2, 2, 4)
        return path, build_model(path, ctx=context, dtype=torch.float32, device="cpu", load_format="dummy", show_progress=False)

    return make


def read(model: ServedModel, path: Path, **settings: Any) -> AdapterWeights:
    options: dict[str, Any] = {"max_rank": 64, "dtype": torch.float32} | settings
    return read_adapter(path, AdapterRules(choose_targets(model.hf)[0], model.rename_adapter_module, refused=model.refused_adapter_modules, **options))


@torch.no_grad()
def merged_logits(path: Path, weights: AdapterWeights) -> Tensor:
    """Logits of transformers' model after adding every update of `weights` to its parameters."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, lora in weights.modules.items():
        module: Any = model.get_submodule(name)
        if isinstance(lora, EmbeddingLoRA):
            module.weight += (lora.scaling * lora.b @ lora.a).T
        elif isinstance(lora, LinearLoRA):
            module.weight += lora.scaling * lora.b @ lora.a
        else:
            for parameter, delta in expert_deltas(lora, module).items():
                routed = getattr(module, parameter)
                add_to_shared(model.get_submodule(name.rpartition(".")[0]), parameter, delta[len(routed) :])
                routed.add_(delta[: len(routed)])
    return model(input_ids=TOKENS).logits


def add_to_shared(block: Any, parameter: str, delta: Tensor) -> None:
    """Updates [n, ..] of the experts after the routed ones, which are a shared expert's rows of gate and of up, and columns of down."""
    shared = getattr(block, "shared_expert", getattr(block, "shared_experts", None))
    if parameter == "down_proj" and len(delta):
        shared.down_proj.weight += torch.cat([*delta], 1)
    elif len(delta):
        for linear, half in zip((shared.gate_proj, shared.up_proj), delta.chunk(2, 1), strict=True):
            linear.weight += half.flatten(0, 1)


def expert_deltas(lora: ExpertLoRA, module: Any) -> dict[str, Tensor]:
    """The dense update of each parameter, in the module's own layout."""
    deltas = {}
    if lora.a13 is not None and lora.b13 is not None:
        rank, inter = lora.b13.shape[2], lora.b13.shape[1] // 2
        a_gate, a_up = (lora.a13[:, :rank], lora.a13[:, rank:]) if lora.split_a else (lora.a13, lora.a13)
        gate, up = (lora.scaling13 * b @ a for b, a in ((lora.b13[:, :inter], a_gate), (lora.b13[:, inter:], a_up)))
        deltas["gate_up_proj"] = torch.cat([gate, up], 1) if module.is_concatenated else torch.stack([gate, up], 2).flatten(1, 2)
    if lora.a2 is not None and lora.b2 is not None:
        deltas["down_proj"] = lora.scaling2 * lora.b2 @ lora.a2
    return {name: delta.transpose(1, 2) if module.is_transposed else delta for name, delta in deltas.items()}


@torch.no_grad()
def check(path: Path, adapter: Path, weights: AdapterWeights) -> float:
    expected = merged_reference_model(path, adapter)(input_ids=TOKENS).logits
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(input_ids=TOKENS).logits
    assert (expected - base).abs().max() > 0.5, "the adapter must matter"
    error = float((merged_logits(path, weights) - expected).abs().max())
    assert error <= 1e-4
    return error


@pytest.mark.parametrize(("arch", "layout"), CASES, ids=[f"{arch}-{layout}" for arch, layout in CASES])
def test_layout(models: Any, tmp_path: Path, arch: str, layout: str) -> None:
    path, model = models(arch)
    adapter = write_adapter(layout, path, tmp_path / "adapter", rank=4, alpha=10, seed=3)
    weights = read(model, adapter)
    check(path, adapter, weights)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for module in weights.modules.values() for tensor in module.tensors())


@pytest.mark.parametrize("layout", ["per_expert_2d", "target_parameters_3d", "shared_outer", "experts_and_attention"])
def test_rank_one(models: Any, tmp_path: Path, layout: str) -> None:
    path, model = models("qwen3_moe")
    adapter = write_adapter(layout, path, tmp_path / "adapter", rank=1, alpha=10, seed=3)
    check(path, adapter, read(model, adapter))


def test_sharing_is_kept(models: Any, tmp_path: Path) -> None:
    """What a file shares between experts, or between gate and up, is stored once."""
    path, model = models("qwen3_moe")
    expected = {
        "shared_outer": ((1, 4, 64), (8, 64, 4), False),
        "tinker": ((1, 8, 64), (8, 64, 4), True),
        "per_expert_2d": ((8, 8, 64), (8, 64, 4), True),
        "gate_only": ((8, 4, 64), (8, 64, 4), False),
        "native_3d": ((8, 8, 64), (8, 64, 4), True),
        "target_parameters_3d": ((8, 4, 64), (8, 64, 4), False),
        "all_linear": ((8, 8, 64), (8, 64, 8), False),  # PEFT doubles the rank of fused gate and up
    }
    for layout, (a13, b13, split) in expected.items():
        lora = read(model, write_adapter(layout, path, tmp_path / layout, rank=4)).modules["model.layers.0.mlp.experts"]
        assert isinstance(lora, ExpertLoRA) and lora.a13 is not None and lora.b13 is not None
        assert (tuple(lora.a13.shape), tuple(lora.b13.shape), lora.split_a) == (a13, b13, split), layout
        if layout in ("shared_outer", "tinker"):
            assert lora.b2 is not None and lora.a2 is not None and lora.b2.shape[0] == 1 and lora.a2.shape[0] == 8


@pytest.mark.parametrize("layout", ["target_parameters_3d", "flipped", "gate_up_only"])
@pytest.mark.parametrize("square", ["gate_up", "down"])
def test_square_parameters(models: Any, tmp_path: Path, layout: str, square: str) -> None:
    """Shapes cannot tell the orientation of a square parameter: the other parameter or the PEFT version does."""
    path, model = models("qwen3_moe", moe_intermediate_size=32 if square == "gate_up" else 64)
    adapter = write_adapter(layout, path, tmp_path / "adapter", rank=4)
    weights = read(model, adapter)
    check(path, adapter, weights)
    assert not weights.warnings


def test_square_parameter_of_unknown_version(models: Any, tmp_path: Path) -> None:
    """PEFT wrote no version before 0.18, when it flipped such files; the report says that this was assumed."""
    path, model = models("qwen3_moe")
    adapter = write_adapter("gate_up_only", path, tmp_path / "adapter", rank=4)
    edit_adapter(adapter, lambda tensors, config: config.update(peft_version="0.18.1"))
    old = read(model, adapter)
    edit_adapter(adapter, lambda tensors, config: config.update(peft_version=None))
    unknown = read(model, adapter)
    assert not old.warnings and "[out, in], because adapter_config.json has no peft_version" in unknown.warnings[0]
    for name, lora in unknown.modules.items():
        assert all(torch.equal(a, b) for a, b in zip(lora.tensors(), old.modules[name].tensors(), strict=True))


@pytest.mark.parametrize("layout", ["gate_up_only", "down_only"])
def test_lone_parameter_without_target_parameters(models: Any, tmp_path: Path, layout: str) -> None:
    """Some exporters leave target_parameters out; the shapes then say which parameter it is."""
    path, model = models("deepseek_v3", moe_intermediate_size=40)
    adapter = write_adapter(layout, path, tmp_path / "adapter", rank=4)
    expected = read(model, adapter)
    edit_adapter(adapter, lambda tensors, config: config.update(target_parameters=None))
    weights = read(model, adapter)
    for name, lora in weights.modules.items():
        assert all(torch.equal(a, b) for a, b in zip(lora.tensors(), expected.modules[name].tensors(), strict=True))


def test_ranks_and_alphas_by_expert(models: Any, tmp_path: Path) -> None:
    """Per-expert ranks are padded to the largest, per-expert alphas go into B; rsLoRA divides by the root of the rank."""
    path, model = models("qwen3_moe")
    prefix, name = "base_model.model.model.layers.1.mlp.experts", "model.layers.1.mlp.experts"
    pairs = {(1, "gate_proj"): (2, 6.0), (1, "up_proj"): (3, 6.0), (4, "up_proj"): (3, 9.0), (5, "down_proj"): (2, 6.0)}
    tensors = {}
    for (expert, leaf), (rank, _) in pairs.items():
        inputs, outputs = (32, 64) if leaf == "down_proj" else (64, 32)
        tensors[f"{prefix}.{expert}.{leaf}.lora_A.weight"] = torch.randn(rank, inputs)
        tensors[f"{prefix}.{expert}.{leaf}.lora_B.weight"] = torch.randn(outputs, rank)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {r"experts\.4\.up_proj": 9}}
    weights = read(model, write_files(tmp_path, tensors, config))
    lora = weights.modules[name]
    assert isinstance(lora, ExpertLoRA)
    deltas = expert_deltas(lora, AutoModelForCausalLM.from_pretrained(path).get_submodule(name))
    expected = {"gate_up_proj": torch.zeros(8, 64, 64), "down_proj": torch.zeros(8, 64, 32)}
    for (expert, leaf), (rank, alpha) in pairs.items():
        update = alpha / math.sqrt(rank) * tensors[f"{prefix}.{expert}.{leaf}.lora_B.weight"] @ tensors[f"{prefix}.{expert}.{leaf}.lora_A.weight"]
        rows = slice(0, 32) if leaf == "gate_proj" else slice(32, 64) if leaf == "up_proj" else slice(0, 64)
        expected["down_proj" if leaf == "down_proj" else "gate_up_proj"][expert, rows] = update
    for parameter, delta in deltas.items():
        torch.testing.assert_close(delta, expected[parameter], rtol=1e-5, atol=1e-5)
    assert lora.scaling13 == 9 / math.sqrt(3) and lora.b13.shape[2] == 3


def write_files(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def write_parameters(path: Path, directory: Path, names: list[str], **settings: Any) -> Path:
    """PEFT's adapter of rank 4 on parameters that no layout of `adapter_files` lists."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=10, target_modules=[], target_parameters=names, **settings))
    randomise_lora(adapted, torch.Generator().manual_seed(0), 0.5)
    adapted.save_pretrained(str(directory))
    return directory


def test_patterns_of_targeted_parameters(models: Any, tmp_path: Path) -> None:
    """PEFT looks a parameter up under its own name, not under its module's: routers, and shared experts, which are experts here."""
    path, model = models("qwen2_moe")
    names = [f"shared_expert.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")]
    patterns: dict[str, Any] = {"rank_pattern": {"down_proj": 3, "up_proj.weight": 2}, "alpha_pattern": {"gate_proj": 50, "down_proj.weight": 7}}
    adapter = write_parameters(path, tmp_path, names, **patterns)
    weights = read(model, adapter)
    check(path, adapter, weights)
    assert weights.warnings == ["adapter_config.json: no module of the file has its rank or alpha from the patterns down_proj, gate_proj"]


def test_a_pattern_for_each_module(tmp_path: Path) -> None:
    """As EVA writes them: patterns are compiled once, however many there are. Compiled for each name, 700 took two minutes."""
    names = [f"many.layers.{i}.self_attn.q_proj" for i in range(600)]
    targets: dict[str, Target] = {name: LinearTarget(name, 4, 4) for name in names}
    tensors = {f"base_model.model.{name}.lora_{half}.weight": torch.ones(2, 4) if half == "A" else torch.ones(4, 2) for name in names for half in "AB"}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": dict.fromkeys(names, 2), "alpha_pattern": {names[-1]: 7}}
    weights = read_adapter(write_files(tmp_path, tensors, config), AdapterRules(targets, str, 8, torch.float32))
    assert adapter_config._compile.cache_info().misses == 600 and weights.modules[names[-1]].scaling == 3.5  # type: ignore[union-attr]


def test_flattened_under_a_parameters_name(models: Any, tmp_path: Path) -> None:
    """2D tensors called experts.gate_up_proj hold all experts when their rows are E * r, and one shared matrix when they are r."""
    path, model = models("qwen3_moe")
    adapter = write_adapter("target_parameters_3d", path, tmp_path / "adapter", rank=4)
    expected = read(model, adapter)

    def rename(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for key in list(tensors):
            leaf = "experts.gate_up_proj.lora" if "base_layer" in key else "experts.down_proj.lora"
            tensors[key.replace("experts.base_layer.lora", leaf).replace("experts.lora", leaf)] = tensors.pop(key)

    weights = read(model, edit_adapter(adapter, rename))
    for name, lora in weights.modules.items():
        assert all(torch.equal(a, b) for a, b in zip(lora.tensors(), expected.modules[name].tensors(), strict=True))


def test_metadata_names_the_orientation(models: Any, tmp_path: Path) -> None:
    """`paramwrapper_layout` in the file's metadata decides for a lone square parameter, against the version."""
    from safetensors.torch import save_file

    path, model = models("qwen3_moe")
    adapter = write_adapter("gate_up_only", path, tmp_path / "adapter", rank=4)
    name = "model.layers.0.mlp.experts"
    normal = read(model, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"paramwrapper_layout": "peft-0.18"})
    flipped = read(model, adapter)
    a, b = tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"]
    lora = flipped.modules[name]
    assert isinstance(lora, ExpertLoRA) and lora.a13 is not None and lora.b13 is not None
    for expert in range(8):
        torch.testing.assert_close(lora.a13[expert], b.view(64, 4, 8)[:, :, expert].T)
        torch.testing.assert_close(lora.b13[expert], a.view(8, 4, 64)[expert].T)
    assert flipped.revision != normal.revision


def test_dtype_and_bytes(models: Any, tmp_path: Path) -> None:
    path, model = models("mixtral")
    adapter = write_adapter("per_expert_2d", path, tmp_path / "adapter", rank=4)
    exact, rounded = read(model, adapter), read(model, adapter, dtype=torch.bfloat16)
    assert {t.dtype for m in exact.modules.values() for t in m.tensors()} == {torch.float32}
    for name, lora in rounded.modules.items():
        for low, high in zip(lora.tensors(), exact.modules[name].tensors(), strict=True):
            assert low.dtype == torch.bfloat16 and torch.equal(low, high.bfloat16()), "one rounding, after the alphas went into B"


def test_revision(models: Any, tmp_path: Path) -> None:
    """Equal for equal content, wherever it lies and whatever does not matter for inference; else different."""
    path, model = models("qwen3_moe")
    first = write_adapter("experts_and_attention", path, tmp_path / "a")
    second = write_adapter("experts_and_attention", path, tmp_path / "b")
    edit_adapter(second, lambda tensors, config: config.update(inference_mode=False, lora_dropout=0.1, base_model_name_or_path="elsewhere/else"))
    revision = read(model, first).revision
    assert len(revision) == 64 and revision == read(model, second).revision == read(model, first, dtype=torch.bfloat16).revision
    edit_adapter(second, lambda tensors, config: config.update(lora_alpha=17))
    assert read(model, second).revision != revision

    def change_one_weight(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["lora_alpha"] = 16
        tensors[sorted(tensors)[0]].view(-1)[0] += 1e-3

    edit_adapter(second, change_one_weight)
    assert read(model, second).revision != revision


def test_warnings(models: Any, tmp_path: Path) -> None:
    """The base copies that were left alone, and what else a user should know."""
    path, model = models("qwen3_moe")
    adapter = write_adapter("embedding", path, tmp_path / "adapter")
    edit_adapter(adapter, lambda tensors, config: config.update(bias="lora_only", trainer_note="x", fan_in_fan_out=True))
    text = "\n".join(read(model, adapter, base_model="someone/another-base").warnings)
    parts = (
        "embed_tokens.base_layer.weight was ignored",
        "lm_head.base_layer.weight was ignored",
        "'someone/another-base'",
        "bias is 'lora_only'",
        "trainer_note",
        "fan_in_fan_out is set",
    )
    assert all(part in text for part in parts), text


def test_experts_of_unsloth(models: Any, tmp_path: Path) -> None:
    """Its files have had two orders of lora_B's columns, and only newer ones say which."""
    path, model = models("qwen3_moe")
    adapter = write_adapter("target_parameters_3d", path, tmp_path / "adapter", rank=4)
    edit_adapter(adapter, lambda tensors, config: config.update(auto_mapping={"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}))
    (warning,) = read(model, adapter).warnings
    assert "lora_B of experts was read rank_major" in warning and "grouped_by_expert" in warning
    edit_adapter(adapter, lambda tensors, config: config.update(lora_B_layout="rank_major"))
    assert not read(model, adapter).warnings


def test_what_has_no_effect_is_said(models: Any, tmp_path: Path) -> None:
    """Experts that the file leaves out, once for all layers, and pairs of which a half was never trained."""
    path, model = models("qwen3_moe")
    assert not read(model, write_adapter("experts_and_attention", path, tmp_path / "whole", rank=4)).warnings
    warnings = read(model, write_adapter("per_expert_2d", path, tmp_path / "some", rank=4)).warnings
    assert warnings == ["the file has nothing for experts [1] of 8 in some layers, where the base model stays as it is"]

    def forget(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for key in tensors:
            tensors[key] *= not key.endswith(("layers.1.mlp.experts.lora_B.weight", "layers.0.self_attn.q_proj.lora_A.weight"))

    adapter = edit_adapter(write_adapter("experts_and_attention", path, tmp_path / "idle", rank=4), forget)
    (warning,) = read(model, adapter).warnings
    patterns = {"alpha_pattern": {"q_proj": 5, r"layers\.0\.self_attn\.q_proj": 3, "nothing": 1}, "rank_pattern": {"w1": 9}}
    edit_adapter(adapter, lambda tensors, config: config.update(patterns | {"lora_alpha": 0}))
    said = "\n".join(read(model, adapter).warnings)
    assert "lora_alpha is 0" in said and r"has its rank or alpha from the patterns layers\.0\.self_attn\.q_proj, nothing, w1" in said
    assert warning.startswith(
        "A or B is all zeros in 2 of 10 modules, such as model.layers.0.self_attn.q_proj, model.layers.1.mlp.experts: they change nothing"
    )


def test_targets_without_weights(models: Any, tmp_path: Path) -> None:
    """What the config names and the file lacks: a part that was not saved, or a name that nothing of the model had."""

    def forget(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for key in [key for key in tensors if "k_proj" in key or "base_layer" in key]:
            del tensors[key]
        config["target_modules"] = [*config["target_modules"], "w9"]

    path, model = models("qwen3_moe")
    adapter = edit_adapter(write_adapter("experts_and_attention", path, tmp_path / "part", rank=4), forget)
    names = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    missing = ", ".join(name for name in names if "k_proj" in name or name == "w9")
    assert read(model, adapter).warnings == [f"adapter_config.json: the file has no weights for the targets {missing}, mlp.experts.gate_up_proj"]
    edit_adapter(adapter, lambda tensors, config: config.update(target_modules=".*o_proj", target_parameters=["mlp.experts.down_proj"]))
    assert not read(model, adapter).warnings  # a pattern may mean anything


def test_names_of_other_trainers(models: Any, tmp_path: Path) -> None:
    """Without PEFT's prefix, and with Tinker's names for attention and the head."""
    _, model = models("gpt_oss")
    tensors = {f"model.layers.0.attn.q_proj.lora_{half}.weight": torch.ones(shape) for half, shape in (("A", (2, 64)), ("B", (128, 2)))}
    tensors |= {f"model.unembed_tokens.lora_{half}.weight": torch.ones(shape) for half, shape in (("A", (2, 64)), ("B", (128, 2)))}
    weights = read(model, write_files(tmp_path, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    assert set(weights.modules) == {"model.layers.0.self_attn.q_proj", "lm_head"}


def test_names_of_a_state_dict(models: Any, tmp_path: Path) -> None:
    """A trainer that saves the model's state itself keeps the name of the adapter, which PEFT would then not find again."""
    path, model = models("qwen3_moe")
    for layout in ("embedding", "all_linear"):
        adapter = write_adapter(layout, path, tmp_path / layout, rank=4)
        expected = read(model, adapter)

        def rename(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
            for key in [key for key in tensors if ".lora_" in key]:
                tensors[re.sub(r"\.lora_(embedding_)?([AB])", r"\g<0>.default", key)] = tensors.pop(key)

        weights = read(model, edit_adapter(adapter, rename))
        assert weights.modules.keys() == expected.modules.keys()
        for name, lora in weights.modules.items():
            assert all(torch.equal(a, b) for a, b in zip(lora.tensors(), expected.modules[name].tensors(), strict=True))


def test_a_state_dict_of_an_adapter_with_a_name(models: Any, tmp_path: Path) -> None:
    """As trainers of several adapters, such as policy and reference, save it; two of them in one file are refused."""
    path, model = models("qwen3_moe")
    adapter = write_adapter("experts_and_attention", path, tmp_path / "adapter", rank=4)
    expected = read(model, adapter)

    def rename(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".actor-1.weight")] = tensors.pop(key)

    weights = read(model, edit_adapter(adapter, rename))
    for name, lora in weights.modules.items():
        assert all(torch.equal(a, b) for a, b in zip(lora.tensors(), expected.modules[name].tensors(), strict=True))
    edit_adapter(adapter, lambda tensors, config: tensors.update({key.replace("actor-1", "reference"): tensor.clone() for key, tensor in tensors.items()}))
    with pytest.raises(AdapterError, match=r"expected one lora_A of this kind .* found also .*actor-1\.weight"):
        read(model, adapter)


def test_granite_of_transformers_4(models: Any, tmp_path: Path) -> None:
    """Its experts were modules `input_linear` and `output_linear` with one weight [E, out, in] each."""
    path, model = models("granitemoe", **OTHERS["granitemoe"])
    adapter = write_parameters(path, tmp_path, ["experts.gate_up_proj", "experts.down_proj"])
    check(path, adapter, read(model, adapter))
    expected = read(model, adapter)

    def rename(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for key in list(tensors):
            new = key.replace("experts.base_layer", "input_linear") if "base_layer" in key else key.replace("experts", "output_linear")
            tensors[new] = tensors.pop(key)
        config["target_parameters"] = ["input_linear.weight", "output_linear.weight"]
        config["rank_pattern"] = {"input_linear.weight": 4, "output_linear": 9}

    weights = read(model, edit_adapter(adapter, rename))
    assert weights.modules.keys() == expected.modules.keys()
    for name, lora in weights.modules.items():
        assert all(torch.equal(a, b) for a, b in zip(lora.tensors(), expected.modules[name].tensors(), strict=True))


def test_lora_root_allows_inside(models: Any, tmp_path: Path) -> None:
    path, model = models("qwen3")
    adapter = write_adapter("attention_only", path, tmp_path / "root" / "team" / "adapter")
    link = tmp_path / "root" / "link"
    link.symlink_to(adapter)
    assert read(model, link, lora_root=tmp_path / "root").revision == read(model, adapter).revision


def test_experts_without_gate(tmp_path: Path) -> None:
    """Experts with up_proj and down_proj only (Nemotron-H): up is all of w13."""
    target: dict[str, Target] = {"m.experts": ExpertTarget("m.experts", num_experts=4, hidden=16, intermediate=24, gated=False)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["experts.up_proj", "experts.down_proj"], "peft_version": "0.21.2"}
    shapes = {"base_layer.lora_A": (8, 16), "base_layer.lora_B": (24, 8), "lora_A": (8, 24), "lora_B": (16, 8)}
    tensors = {f"base_model.model.m.experts.{key}.weight": torch.randn(shape) for key, shape in shapes.items()}
    weights = read_adapter(write_files(tmp_path, tensors, config), AdapterRules(target, str, 8, torch.float32))
    lora = weights.modules["m.experts"]
    assert isinstance(lora, ExpertLoRA) and lora.a13 is not None and lora.b13 is not None and not lora.split_a
    b = tensors["base_model.model.m.experts.base_layer.lora_B.weight"]
    assert lora.a13.shape == (4, 2, 16) and torch.equal(lora.b13[3], b.view(24, 2, 4)[:, :, 3])


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
