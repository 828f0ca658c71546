"""Every adapter that cannot be served is refused by a sentence with the file, the tensor or field, what was expected and what was found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sglang_lora_moe.lora import adapter_file
from sglang_lora_moe.lora.adapter import AdapterRules, read_adapter
from sglang_lora_moe.lora.adapter_file import AdapterError
from sglang_lora_moe.lora.targets import EmbeddingTarget, ExpertTarget, LinearTarget, Target
from sglang_lora_moe.lora.weights import AdapterWeights

Tensors = dict[str, Tensor]
Config = dict[str, Any]
LAYER = "base_model.model.model.layers.0"
EXPERTS, Q = f"{LAYER}.mlp.experts", f"{LAYER}.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens"
TARGETS: list[Target] = [
    ExpertTarget("model.layers.0.mlp.experts", num_experts=4, hidden=16, intermediate=6),
    LinearTarget("model.layers.0.self_attn.q_proj", 16, 24),
    LinearTarget("model.layers.0.self_attn.o_proj", 24, 16),
    LinearTarget("model.layers.0.mlp.gate", 16, 4),
    LinearTarget("lm_head", 16, 32),
    EmbeddingTarget("model.embed_tokens", 32, 16),
]
R = 2
FLATTENED: dict[str, tuple[int, ...]] = {
    f"{EXPERTS}.base_layer.lora_A.weight": (R * 4, 16),
    f"{EXPERTS}.base_layer.lora_B.weight": (12, R * 4),
    f"{EXPERTS}.lora_A.weight": (R * 4, 6),
    f"{EXPERTS}.lora_B.weight": (16, R * 4),
}
PER_EXPERT: dict[str, tuple[int, ...]] = {
    f"{EXPERTS}.{expert}.{leaf}.lora_{half}.weight": shape
    for expert in (0, 3)
    for leaf, inputs, outputs in (("gate_proj", 16, 6), ("up_proj", 16, 6), ("down_proj", 6, 16))
    for half, shape in (("A", (R, inputs)), ("B", (outputs, R)))
}
LINEAR: dict[str, tuple[int, ...]] = {f"{Q}.lora_A.weight": (R, 16), f"{Q}.lora_B.weight": (24, R)}


def write(directory: Path, shapes: Mapping[str, tuple[int, ...]], **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 4, "base_model_name_or_path": "org/base"} | config))
    return directory


def read(directory: Path, **settings: Any) -> AdapterWeights:
    options: dict[str, Any] = {"rename": str, "max_rank": 8, "dtype": torch.float32, "refused": {"kv_b_proj": "it is absorbed"}} | settings
    return read_adapter(directory, AdapterRules({target.name: target for target in TARGETS}, **options))


def refused(directory: Path, *parts: str, **settings: Any) -> None:
    """Reading must fail, the message must hold all `parts` and lie in `directory`."""
    with pytest.raises(AdapterError) as caught:
        read(directory, **settings)
    message = str(caught.value)
    missing = [part for part in (str(directory), "expected", "found", *parts) if part not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("shapes", [FLATTENED, PER_EXPERT, LINEAR], ids=["flattened", "per expert", "linear"])
def test_the_unspoilt_files_are_read(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    assert read(write(tmp_path, shapes)).modules


# ---- the directory and its files --------------------------------------------------------------------------------------
def test_path(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "a directory", "nothing")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "a directory", "a file")


def test_missing_files(tmp_path: Path) -> None:
    write(tmp_path, LINEAR)
    (tmp_path / "adapter_config.json").unlink()
    refused(tmp_path, "adapter_config.json", "no such file", "save_pretrained")
    write(tmp_path, LINEAR)
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(tmp_path, "adapter_model.safetensors", "no such file")


def test_pickle(tmp_path: Path) -> None:
    write(tmp_path, LINEAR)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    refused(tmp_path, "adapter_model.bin", "pickle", "can run code", "safe_serialization=True")


def test_a_file_that_is_cut_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a trainer that writes it anew: an error, where a map of the file itself would end the process."""
    path, check = write(tmp_path, LINEAR) / "adapter_model.safetensors", adapter_file.safe_open

    def cut(*arguments: Any, **options: Any) -> Any:
        os.truncate(path, 10)
        return check(*arguments, **options)

    monkeypatch.setattr(adapter_file, "safe_open", cut)
    with path.open("rb") as file:
        opened = adapter_file.AdapterFile(path, file)
        assert opened.entries.keys() == LINEAR.keys()
        file.seek(1 << 20)  # away from what is in the buffer
        with pytest.raises(AdapterError, match="the file was changed while it was read"):
            opened.read(f"{Q}.lora_A.weight")


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1], ids=str)
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    file = write(tmp_path, LINEAR) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(tmp_path, "adapter_model.safetensors", "truncated or not a safetensors file", "bytes")


HEADERS: dict[str, Any] = {
    "not json": b"{{{{",
    "not an object": [1],
    "entry without offsets": {"x": {"dtype": "F32", "shape": [1]}},
    "entry is a number": {"x": 3},
    "negative": {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "text offsets": {"x": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
    "three offsets": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    "overlap": {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "xy"},
    "wrong size": {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "list dtype": {"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}},
    "unknown dtype": {"x": {"dtype": "F13", "shape": [1], "data_offsets": [0, 4]}},
    "trailing bytes": {"x": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_corrupt_header(tmp_path: Path, header: Any) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    write(tmp_path, LINEAR)
    (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: truncated or not a safetensors file: .*Copy or download it again"):
        read(tmp_path)


def test_file_changed_while_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that overwrites the file must not take the engine down."""
    from sglang_lora_moe.lora.adapter_file import AdapterFile

    shapes = {f"{Q}.lora_A.weight": (2000, 16), f"{Q}.lora_B.weight": (24, 2000)}  # more than a reader's buffer
    file = write(tmp_path, shapes, r=2000) / "adapter_model.safetensors"
    whole = AdapterFile.read

    def shorten_first(self: AdapterFile, name: str) -> Tensor:
        file.write_bytes(file.read_bytes()[:200])
        return whole(self, name)

    monkeypatch.setattr(AdapterFile, "read", shorten_first)
    refused(tmp_path, "bytes", "changed while it was read", max_rank=2000)


def test_outside_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", write(tmp_path / "outside", LINEAR)
    write(root / "inside", LINEAR)
    assert read(root / "inside", lora_root=root)
    refused(outside, "inside --lora-root", str(root), lora_root=root)
    refused(root / ".." / "outside", "inside --lora-root", lora_root=root)
    (root / "link").symlink_to(outside)
    refused(root / "link", "links followed", lora_root=root)
    (root / "inside" / "adapter_model.safetensors").unlink()
    (root / "inside" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    refused(root / "inside", "adapter_model.safetensors", "inside --lora-root", lora_root=root)


# ---- adapter_config.json ----------------------------------------------------------------------------------------------
FIELDS: dict[str, tuple[Config, tuple[str, ...]]] = {
    "peft_type": ({"peft_type": "LOHA"}, ("peft_type", "'LORA'", "'LOHA'")),
    "dora": ({"use_dora": True}, ("use_dora", "DoRA")),
    "lora_bias": ({"lora_bias": True}, ("lora_bias", "bias of lora_B")),
    "alora": ({"alora_invocation_tokens": [1, 2]}, ("alora_invocation_tokens", "[1, 2]", "activated LoRA")),
    "qalora": ({"use_qalora": True}, ("use_qalora", "QALoRA")),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, ("modules_to_save", "['lm_head']", "LoRA on them")),
    "token indices": ({"trainable_token_indices": [5]}, ("trainable_token_indices", "[5]", "embed_tokens")),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 3]]}, ("layer_replication", "[[0, 2], [1, 3]]", "depth")),
    "future method": ({"use_superlora": True}, ("use_superlora", "plain LoRA")),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights", "'pissa_niter_4'", "path_initial_model_for_weight_conversion")),
    "tied": ({"ensure_weight_tying": True, "target_modules": ["model.embed_tokens"]}, ("ensure_weight_tying", "false")),
    "no rank": ({"r": None}, ("r: ", "a rank of at least 1", "None")),
    "rank is text": ({"r": "8"}, ("a rank", "'8'")),
    "rank zero": ({"r": 0}, ("a rank", "found 0")),
    "no alpha": ({"lora_alpha": None}, ("lora_alpha", "a finite number")),
    "alpha not finite": ({"lora_alpha": float("nan")}, ("lora_alpha", "nan")),
    "alpha beyond float32": ({"lora_alpha": 1e39}, ("lora_alpha", "1e+39")),
    "alpha beyond float64": ({"lora_alpha": 10**400}, ("lora_alpha", "1000")),
    "bad pattern": ({"rank_pattern": {"(": 4}}, ("rank_pattern", "regular expressions", "'('")),
    "pattern value": ({"alpha_pattern": {"q_proj": "x"}}, ("alpha_pattern['q_proj']", "'x'")),
    "pattern list": ({"rank_pattern": [4]}, ("rank_pattern", "[4]")),
    "rslora": ({"use_rslora": "yes"}, ("use_rslora", "'yes'")),
    "target_parameters": ({"target_parameters": "x"}, ("target_parameters", "a list of names")),
    "lora_B_layout": ({"lora_B_layout": "diagonal"}, ("lora_B_layout", "rank_major", "'diagonal'")),
}


@pytest.mark.parametrize(("config", "parts"), FIELDS.values(), ids=FIELDS.keys())
def test_config_field(tmp_path: Path, config: Config, parts: tuple[str, ...]) -> None:
    refused(write(tmp_path, LINEAR, **config), "adapter_config.json", *parts)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"], ids=["empty", "list", "cut", "encoding"])
def test_config_is_not_an_object(tmp_path: Path, text: str) -> None:
    (write(tmp_path, LINEAR) / "adapter_config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "adapter_config.json", "a JSON object")


# ---- tensors ----------------------------------------------------------------------------------------------------------
def without(shapes: dict[str, tuple[int, ...]], *names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if name not in names}


OTHER_TENSORS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "dora": (f"{Q}.lora_magnitude_vector", (24,), "DoRA"),
    "lora_B bias": (f"{Q}.lora_B.bias", (24,), "lora_bias=false"),
    "bias": (f"{Q}.base_layer.bias", (24,), 'bias="none"'),
    "token rows": (f"{EMBED}.token_adapter.trainable_tokens_delta", (3, 16), "retrained token rows"),
    "saved module": ("base_model.model.lm_head.weight", (32, 16), "modules_to_save"),
    "saved norm": (f"{LAYER}.input_layernorm.weight", (16,), "full weights"),
    "replaced linear": (f"{Q}.base_layer.weight", (24, 16), "full weights"),
    "copy of no module": ("base_model.model.embed_tokens.base_layer.weight", (32, 16), "a module of this model that takes adapters"),
    "leftover": (f"{Q}.lora_C", (2, 2), "unknown meaning"),
    "resized vocabulary": (f"{EMBED}.base_layer.weight", (40, 16), "another vocabulary"),
}


@pytest.mark.parametrize(("name", "shape", "part"), OTHER_TENSORS.values(), ids=OTHER_TENSORS.keys())
def test_other_tensor(tmp_path: Path, name: str, shape: tuple[int, ...], part: str) -> None:
    refused(write(tmp_path, LINEAR | {name: shape}), name, part)


def test_no_lora_tensors(tmp_path: Path) -> None:
    refused(write(tmp_path, {}), "LoRA tensors", "0 tensors")


@pytest.mark.parametrize("shapes", [FLATTENED, PER_EXPERT, LINEAR], ids=["flattened", "per expert", "linear"])
def test_missing_half(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    for lost in (name for name in shapes):
        refused(write(tmp_path, without(shapes, lost)), lost, "other half", "no such tensor", "incomplete")


def test_missing_expert_beside_a_shared_matrix(tmp_path: Path) -> None:
    """Files with one A for all experts have a B for each of them; where some lack it, they would be served without a word."""
    shapes = {f"{EXPERTS}.{expert}.up_proj.lora_B.weight": (6, R) for expert in (0, 2)} | {f"{EXPERTS}.up_proj.lora_A.weight": (1, R, 16)}
    refused(write(tmp_path, shapes), f"{EXPERTS}.0.up_proj.lora_B.weight", "a lora_B for each of 4 experts", "none for [1, 3]", "incomplete")


def test_missing_embedding_half(tmp_path: Path) -> None:
    refused(write(tmp_path, {f"{EMBED}.lora_embedding_B": (16, R)}), f"{EMBED}.lora_embedding_A", "other half")


def test_missing_outer_pair(tmp_path: Path) -> None:
    inner = {name: shape for name, shape in FLATTENED.items() if "base_layer" in name}
    refused(write(tmp_path, inner), "base_layer.lora_A", "mlp.experts.lora_A and lora_B")


def test_unknown_module(tmp_path: Path) -> None:
    """Another base: the nearest names and the base that the config names help to see which."""
    names = {f"{LAYER}.self_attn.query_proj.lora_{half}.weight": (R, R) for half in "AB"}
    refused(write(tmp_path, names), "model.layers.0.self_attn.query_proj (and 1 more tensors)", "Nearest names: model.layers.0.self_attn.q_proj", "'org/base'")
    refused(write(tmp_path, LINEAR | {"base_model.model.zzz.lora_A.weight": (R, R)}), "found zzz")


def test_refused_module(tmp_path: Path) -> None:
    refused(write(tmp_path, {f"{LAYER}.self_attn.kv_b_proj.lora_A.weight": (R, 16)}), "model.layers.0.self_attn.kv_b_proj", "it is absorbed")


def test_unknown_projection(tmp_path: Path) -> None:
    refused(write(tmp_path, {f"{EXPERTS}.0.side_proj.lora_A.weight": (R, 16)}), "0.side_proj", "gate_up_proj")


WRONG_SHAPES: dict[str, tuple[dict[str, tuple[int, ...]], str, str]] = {
    "linear A": (LINEAR | {f"{Q}.lora_A.weight": (R, 2048)}, "[R, 16]", "[2, 2048]"),
    "linear B": (LINEAR | {f"{Q}.lora_B.weight": (4096, R)}, "[24, R]", "[4096, 2]"),
    "linear 3D": (LINEAR | {f"{Q}.lora_A.weight": (1, R, 16)}, "[R, 16]", "[1, 2, 16]"),
    "linear ranks": (LINEAR | {f"{Q}.lora_B.weight": (24, 3)}, "has rank 2", "[24, 3]"),
    "expert A": (PER_EXPERT | {f"{EXPERTS}.3.up_proj.lora_A.weight": (R, 20)}, "[R, 16]", "[2, 20]"),
    "expert B": (PER_EXPERT | {f"{EXPERTS}.3.up_proj.lora_B.weight": (12, R)}, "[6, R]", "[12, 2]"),
    "expert ranks": (PER_EXPERT | {f"{EXPERTS}.3.up_proj.lora_A.weight": (3, 16)}, "2 rows, the rank of", "[3, 16]"),
    "native experts": ({f"{EXPERTS}.down_proj.lora_A.weight": (5, R, 6), f"{EXPERTS}.down_proj.lora_B.weight": (5, 16, R)}, "[1 or 4, R, 6]", "[5, 2, 6]"),
    "native gate_up without up": (
        {f"{EXPERTS}.gate_up_proj.lora_A.weight": (4, R, 16), f"{EXPERTS}.gate_up_proj.lora_B.weight": (4, 6, R)},
        "[12, R]",
        "[4, 6, 2]",
    ),
    "flattened gate_up without up": (FLATTENED | {f"{EXPERTS}.base_layer.lora_B.weight": (6, R * 4)}, "lora_B [12, R * 4]", "[6, 8]"),
    "flattened inputs": (FLATTENED | {f"{EXPERTS}.lora_A.weight": (R * 4, 7)}, "[R * 4, 6]", "[8, 7]"),
    "flattened experts": (FLATTENED | {f"{EXPERTS}.lora_A.weight": (R * 3, 6), f"{EXPERTS}.lora_B.weight": (16, R * 3)}, "[R * 4, in]", "[6, 6]"),
    "flattened lone": ({f"{EXPERTS}.lora_A.weight": (R * 4, 7), f"{EXPERTS}.lora_B.weight": (99, R * 4)}, "[R * 4, 16]", "[8, 7]"),
    "embedding": ({f"{EMBED}.lora_embedding_A": (R, 99), f"{EMBED}.lora_embedding_B": (16, R)}, "[R, 32]", "[2, 99]"),
    "embedding as linear": ({f"{EMBED}.lora_A.weight": (R, 32), f"{EMBED}.lora_B.weight": (16, R)}, "lora_embedding_A", "the other kind"),
    "expert number": ({f"{EXPERTS}.4.down_proj.lora_A.weight": (R, 6), f"{EXPERTS}.4.down_proj.lora_B.weight": (16, R)}, "below 4", "expert 4"),
}


@pytest.mark.parametrize(("shapes", "expected", "found"), WRONG_SHAPES.values(), ids=WRONG_SHAPES.keys())
def test_wrong_shape(tmp_path: Path, shapes: dict[str, tuple[int, ...]], expected: str, found: str) -> None:
    refused(write(tmp_path, shapes), "lora_", expected, found)


def test_wrong_shape_names_the_base(tmp_path: Path) -> None:
    shapes = WRONG_SHAPES["linear A"][0]
    refused(write(tmp_path, shapes), f"{Q}.lora_A.weight", "made for another base model", "adapter_config.json names 'org/base'")


@pytest.mark.parametrize("shapes", [FLATTENED, PER_EXPERT, LINEAR], ids=["flattened", "per expert", "linear"])
def test_rank(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    refused(write(tmp_path, shapes), "at most 1", "rank 2", "--max-lora-rank 2", max_rank=1)
    refused(write(tmp_path, shapes, r=8), "rank 8 for model.layers.0.", "rank 2", "adapter_config.json", "rank_pattern")


def test_empty_tensors(tmp_path: Path) -> None:
    """What a sharded trainer saves when it did not gather its weights."""
    refused(write(tmp_path, {f"{Q}.lora_A.weight": (0, 16), f"{Q}.lora_B.weight": (24, 0)}), "a rank of at least 1", "[0, 16]", "gather")
    refused(write(tmp_path, {f"{Q}.lora_A.weight": (0,), f"{Q}.lora_B.weight": (0,)}), "[R, 16]", "[0]")


def test_twice(tmp_path: Path) -> None:
    """Two names of one module, of which neither may win silently."""
    other = {name.replace("q_proj", "query"): shape for name, shape in LINEAR.items()}
    refused(write(tmp_path, LINEAR | other), "one lora_", "query", rename=lambda name: name.replace("query", "q_proj"))
    other = {name.replace("mlp", "moe"): shape for name, shape in PER_EXPERT.items()}
    refused(write(tmp_path, PER_EXPERT | other), "one lora_", "moe", rename=lambda name: name.replace("moe", "mlp"))


MIXTURES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "flattened and per expert": (FLATTENED | PER_EXPERT, "mixes layouts"),
    "fused and separate": (
        PER_EXPERT | {f"{EXPERTS}.gate_up_proj.lora_A.weight": (4, R, 16), f"{EXPERTS}.gate_up_proj.lora_B.weight": (4, 12, R)},
        "gate_up_proj or gate_proj and up_proj",
    ),
    "shared and per expert": (PER_EXPERT | {f"{EXPERTS}.down_proj.lora_A.weight": (1, R, 6)}, "one matrix for all experts or one for each"),
}


@pytest.mark.parametrize(("shapes", "part"), MIXTURES.values(), ids=MIXTURES.keys())
def test_mixed_layouts(tmp_path: Path, shapes: dict[str, tuple[int, ...]], part: str) -> None:
    refused(write(tmp_path, shapes), part)


def test_shared_b_with_several_alphas(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"{EXPERTS}.{expert}.down_proj.lora_A.weight": (R, 6) for expert in range(4)}
    shapes[f"{EXPERTS}.down_proj.lora_B.weight"] = (1, 16, R)
    assert read(write(tmp_path, shapes))
    refused(write(tmp_path, shapes, alpha_pattern={r"experts\.2\.down_proj": 9}), "one alpha", "[2.0, 4.5]")


def test_lone_parameter_that_fits_both(tmp_path: Path) -> None:
    """Both parameters have one shape and the config does not say which one was trained."""
    square = ExpertTarget("model.layers.0.mlp.experts", num_experts=4, hidden=16, intermediate=16, gated=False)
    directory = write(tmp_path, {f"{EXPERTS}.lora_A.weight": (R * 4, 16), f"{EXPERTS}.lora_B.weight": (16, R * 4)})
    with pytest.raises(AdapterError, match=r"lora_A\.weight: expected one parameter in target_parameters, found \[\]"):
        read_adapter(directory, AdapterRules({square.name: square}, str, 8, torch.float32))


def test_gate_of_experts_without_gate(tmp_path: Path) -> None:
    plain = ExpertTarget("model.layers.0.mlp.experts", num_experts=4, hidden=16, intermediate=6, gated=False)
    with pytest.raises(AdapterError, match="gate_proj.lora_A.weight: expected up_proj and down_proj, as model.layers.0.mlp.experts has no gate, found gate"):
        read_adapter(write(tmp_path, PER_EXPERT), AdapterRules({plain.name: plain}, str, 8, torch.float32))


# ---- values -----------------------------------------------------------------------------------------------------------
def edit(directory: Path, change: Callable[[Tensors], None]) -> Path:
    from safetensors.torch import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_pattern_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader serves other adapters, too: a pattern may not hold it up."""
    from sglang_lora_moe.lora import adapter_config

    monkeypatch.setattr(adapter_config, "PATTERN_SECONDS", 0.2)
    pattern = r"(.*)" + ".*" * 12 + r"\1[0-9A-Z]"
    refused(write(tmp_path, LINEAR, rank_pattern={pattern: 4}), "rank_pattern", repr(pattern), "over 0.2 s")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("shapes", [FLATTENED, PER_EXPERT, LINEAR], ids=["flattened", "per expert", "linear"])
def test_not_finite(tmp_path: Path, shapes: dict[str, tuple[int, ...]], value: float) -> None:
    name = sorted(shapes)[-1]

    def spoil(tensors: Tensors) -> None:
        tensors[name][1, 1] = value

    refused(edit(write(tmp_path, shapes), spoil), name, "finite weights", f"{value} at [1, 1]")


def test_beyond_float32(tmp_path: Path) -> None:
    name = f"{Q}.lora_A.weight"

    def widen(tensors: Tensors) -> None:
        tensors[name] = tensors[name].double()
        tensors[name][1, 1] = -1e300

    refused(edit(write(tmp_path, LINEAR), widen), name, "finite weights", "-1e+300 at [1, 1]")


def test_quantized_tensor(tmp_path: Path) -> None:
    def quantize(tensors: Tensors) -> None:
        tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"].to(torch.int8)

    refused(edit(write(tmp_path, LINEAR), quantize), f"{Q}.lora_A.weight", "one of F64, F32, F16, BF16", "I8")


def test_too_large_for_float16(tmp_path: Path) -> None:
    def enlarge(tensors: Tensors) -> None:
        tensors[f"{Q}.lora_A.weight"] *= 1e6

    directory = edit(write(tmp_path, LINEAR), enlarge)
    assert read(directory)
    refused(directory, "self_attn.q_proj", "float16", "--dtype bfloat16", dtype=torch.float16)


def test_too_large_for_bfloat16(tmp_path: Path) -> None:
    """Weights that float32 holds and bfloat16 rounds to infinity, which in a tile that adapters share is NaN for all of them."""

    def enlarge(value: float) -> Path:
        def change(tensors: Tensors) -> None:
            tensors[f"{Q}.lora_B.weight"][1, 1] = value

        return edit(write(tmp_path / f"{value:g}", LINEAR), change)

    largest = read(enlarge(3.39e38), dtype=torch.bfloat16)
    assert all(tensor.isfinite().all() for module in largest.modules.values() for tensor in module.tensors())
    assert read(enlarge(3.4e38))
    refused(enlarge(-3.4e38), "self_attn.q_proj", "bfloat16 (3.38953e+38)", dtype=torch.bfloat16)
