"""Checkpoint files: shards, stray and missing tensors, damage, dtypes, dummy weights."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sglang_lora_moe.layers.fused_moe import FusedMoE
from sglang_lora_moe.layers.topk import Router
from sglang_lora_moe.models.build import build_model
from sglang_lora_moe.models.places import ExpertsPlace, LoadError
from sglang_lora_moe.models.served import ServedModel
from tests.models.driver import Driver, Sequence, make_context
from tests.models.test_against_transformers import build
from tests.tiny_models import make_tiny_model

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"


def edit(path: Path, change: Callable[[Tensors], None]) -> Path:
    """Rewrite the single weights file of a model after `change` was applied to its tensors."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    return path


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def logits(model: ServedModel) -> torch.Tensor:
    return Driver(model).run(Sequence(list(range(5, 25))), 20)


def shard(path: Path, stock: Any) -> None:
    (path / "model.safetensors").unlink()
    stock.save_pretrained(path, max_shard_size="100KB")


def test_sharded_checkpoint(tmp_path: Path) -> None:
    path = make_tiny_model("qwen3_moe", tmp_path)
    whole = logits(build(path))
    shard(path, AutoModelForCausalLM.from_pretrained(path))
    assert len(list(path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(build(path)), whole)
    next(iter(path.glob("model-00002*"))).unlink()
    with pytest.raises(LoadError, match=r"names files that do not exist: model-00002"):
        build(path)


def test_index_that_promises_too_much(tmp_path: Path) -> None:
    path = make_tiny_model("qwen3_moe", tmp_path)
    shard(path, AutoModelForCausalLM.from_pretrained(path))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.7.extra.weight"] = file
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=rf"{file} lacks tensor model.layers.7.extra.weight"):
        build(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(LoadError, match="not an index"):
        build(path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate.weight", "lm_head.weight"])
def test_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    path = edit(make_tiny_model("qwen3_moe", tmp_path), without(name))
    with pytest.raises(LoadError, match=rf"lacks 1 tensors of Qwen3MoeForCausalLM: {name}"):
        build(path)


def test_missing_expert_is_named(tmp_path: Path) -> None:
    path = edit(make_tiny_model("qwen3_moe", tmp_path), without(EXPERT.format(5, "up")))
    with pytest.raises(LoadError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj: experts \[5\] of 8"):
        build(path)


def test_unused_tensor_is_named(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.scale"] = torch.ones(3)

    with pytest.raises(LoadError, match=r"1 tensors have no place in Qwen3MoeForCausalLM: model\.layers\.0\.self_attn\.q_proj\.scale"):
        build(edit(make_tiny_model("qwen3_moe", tmp_path), add))


def test_expert_beyond_the_last(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[EXPERT.format(8, "up")] = tensors[EXPERT.format(7, "up")]

    with pytest.raises(LoadError, match=r"experts\.8\.up_proj\.weight belongs to expert 8, but the model has 8 experts"):
        build(edit(make_tiny_model("qwen3_moe", tmp_path), add))


def test_weights_under_two_names(tmp_path: Path) -> None:
    """Whichever was read last would count, and nobody would know."""

    def adding(name: str, *shape: int) -> Callable[[Tensors], None]:
        return lambda tensors: tensors.update({name: torch.randn(shape)})

    twice = "brings weights that another tensor of the files has brought already, under another name; remove one of the two"
    with pytest.raises(LoadError, match=rf"tensor {EXPERT.format(3, 'up')} {twice}"):
        build(edit(make_tiny_model("qwen3_moe", tmp_path), adding(EXPERT.format("03", "up"), 32, 64)))
    with pytest.raises(LoadError, match=rf"tensor model\.layers\.0\.mlp\.gate\.weight {twice}"):
        build(edit(make_tiny_model("mixtral", tmp_path), adding("model.layers.0.mlp.gate.weight", 8, 64)))
    with pytest.raises(LoadError, match=rf"tensor model\.layers\.0\.mlp\.experts\.down_proj {twice}"):
        build(edit(make_tiny_model("gpt_oss", tmp_path), adding("model.layers.0.mlp.experts.3.down_proj.weight", 64, 32)))


def test_ignorable_tensors_are_skipped(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)  # next-token prediction sits behind the last layer
        tensors["mtp.norm.weight"] = torch.ones(2)

    path = make_tiny_model("deepseek_v3", tmp_path)
    before = logits(build(path))
    assert torch.equal(logits(build(edit(path, add))), before)


@pytest.mark.parametrize(
    ("arch", "name", "shape"),
    [
        ("qwen3_moe", "model.layers.0.self_attn.q_proj.weight", r"\[3, 64\], expected \[128, 64\]"),
        ("qwen3_moe", EXPERT.format(2, "down"), r"\[3, 32\], expected \[64, 32\]"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", r"\[3, 64, 64\], expected \[8, 64, 64\]"),
    ],
)
def test_wrong_shape_is_named(arch: str, name: str, shape: str, tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:3]

    with pytest.raises(LoadError, match=rf"model\.safetensors: tensor {name} has shape {shape}"):
        build(edit(make_tiny_model(arch, tmp_path), cut))


def test_quantized_tensor_is_refused(tmp_path: Path) -> None:
    def quantize(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    with pytest.raises(LoadError, match=r"model\.norm\.weight has dtype torch\.int8"):
        build(edit(make_tiny_model("qwen3_moe", tmp_path), quantize))


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = make_tiny_model("qwen3_moe", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(LoadError, match=r"model\.safetensors is not a complete safetensors file"):
        build(path)


def test_pickle_is_refused(tmp_path: Path) -> None:
    path = make_tiny_model("qwen3_moe", tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin is a pickle file"):
        build(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(LoadError, match=r"has no \*\.safetensors files$"):
        build(path)


def test_tied_embedding(tmp_path: Path) -> None:
    path = make_tiny_model("qwen3_moe", tmp_path, tie_word_embeddings=True)
    model = build(path)
    assert model.hf.lm_head.weight is model.hf.model.embed_tokens.weight

    def add_head(value: float) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + value

        return change

    assert torch.equal(logits(build(edit(path, add_head(0.0)))), logits(model))
    with pytest.raises(LoadError, match=r"embed_tokens\.weight brings weights that another .* set tie_word_embeddings to false"):
        edit(path, add_head(1.0))
        build(path)


def test_fused_experts_are_stored_as_halves(tmp_path: Path) -> None:
    path = make_tiny_model("gpt_oss", tmp_path)
    experts: Any = next(module for module in build(path).hf.modules() if isinstance(module, FusedMoE))
    assert (experts.interleaved_gate_up, experts.is_transposed) == (True, True)
    stored = load_file(path / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]  # [E, H, 2I]
    assert torch.equal(experts.w13[3, :32], stored[3, :, 0::2].T)
    assert torch.equal(experts.w13[3, 32:], stored[3, :, 1::2].T)


def test_progress_bar_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tiny_model("qwen3_moe", tmp_path)
    build_model(path, ctx=make_context(), dtype=torch.float32, device="cpu", show_progress=True)
    assert "Loading weights: 100%" in capsys.readouterr().err


def test_fused_tensor_is_read_expert_by_expert() -> None:
    """No second copy of a fused tensor is made: at most one expert is in memory beside the storage."""

    class Slice:
        largest = 0

        def get_shape(self) -> list[int]:
            return [4, 6, 3]

        def __getitem__(self, index: slice) -> torch.Tensor:
            Slice.largest = max(Slice.largest, index.stop - index.start)
            return torch.full((1, 6, 3), float(index.start))

    class File:
        def get_slice(self, key: str) -> Slice:
            return Slice()

    storage = torch.zeros(4, 3, 6)
    tracemalloc.start()
    place = ExpertsPlace(storage, 1, transposed=True, interleaved=False)
    place.put(File(), "x", None)
    tracemalloc.stop()
    assert Slice.largest == 1 and place.missing() is None
    assert storage[:, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_dummy_weights_are_sensible(arch: str, tmp_path: Path) -> None:
    path = make_tiny_model(arch, tmp_path)
    (path / "model.safetensors").unlink()
    model = build(path, load_format="dummy", dtype=torch.bfloat16)
    chosen: list[torch.Tensor] = []
    for module in model.hf.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    out = Driver(model).run(Sequence(list(range(3, 83))), 80)
    assert torch.isfinite(out).all() and 0.1 < out.std() < 10
    for ids in chosen:
        load = torch.bincount(ids.flatten(), minlength=8) / ids.numel()
        assert load.max() < 2.5 / 8 and load.min() > 0.2 / 8, load
    again = build(path, load_format="dummy", dtype=torch.bfloat16)
    assert torch.equal(again.hf.lm_head.weight, model.hf.lm_head.weight)
    assert not torch.equal(build(path, load_format="dummy", dtype=torch.bfloat16, seed=1).hf.lm_head.weight, model.hf.lm_head.weight)


def test_eos_ids(tmp_path: Path) -> None:
    path = make_tiny_model("qwen3", tmp_path)
    assert build(path).eos_token_ids == [2]
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 9]}))
    assert build(path).eos_token_ids == [2, 9]
    (path / "generation_config.json").unlink()
    assert build(path).eos_token_ids == [2]
