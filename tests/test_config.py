"""Flags: those of SGLang's and vLLM's LoRA serving work as users expect, or are refused with what to use instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_lora_moe.config import Config, parse_config
from sglang_lora_moe.engine.resolve import resolve
from sglang_lora_moe.engine.tokenizer import load_tokenizer

MODEL = ["--model-path", "/m"]


def test_flags_of_sglang() -> None:
    config = parse_config(
        [
            *MODEL, "--enable-lora", "--lora-paths", "/adapters/a", "b=/adapters/x", '{"lora_name": "c", "lora_path": "/adapters/y", "pinned": true}',
            "--max-lora-rank", "32", "--max-loras-per-batch", "4", "--lora-target-modules", "q_proj", "experts", "--max-loaded-loras", "16",
            "--lora-eviction-policy", "fifo", "--lora-backend", "triton",
        ]
    )  # fmt: skip
    assert config.lora_specs() == [("a", "/adapters/a", False), ("b", "/adapters/x", False), ("c", "/adapters/y", True)]
    assert (config.max_lora_rank, config.max_loras_per_batch, config.max_loaded_loras) == (32, 4, 16)
    assert (config.lora_target_modules, config.lora_eviction_policy, config.lora_backend) == (["q_proj", "experts"], "fifo", "triton")
    assert parse_config([*MODEL, "--lora-paths", "a=/a", "--lora-paths", "b=/b"]).lora_paths == ["a=/a", "b=/b"] and not parse_config(MODEL).lora_paths
    assert parse_config([*MODEL, "--lora-paths", "/adapters/a"]).enable_lora and not parse_config(MODEL).enable_lora


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--lora-backend", "ascend"], "invalid choice: 'ascend'"),
        (["--lora-eviction-policy", "random"], "invalid choice: 'random'"),
        (["--max-lora-chunk-size", "64"], "--max-lora-chunk-size: leave it out"),
        (["--enable-lora-overlap-loading"], "--enable-lora-overlap-loading: leave it out: adapters are always loaded beside running steps"),
        (["--experts-shared-outer-loras"], "the layout is read from the adapter's files"),
        (["--lora-modules", "a=/a"], "--lora-modules: use --lora-paths NAME=PATH"),
        (["--max-loras=4"], "--max-loras: use --max-loras-per-batch"),
        (["--max-cpu-loras", "4"], "--max-cpu-loras: use --max-loaded-loras"),
        (["--model", "/m"], "--model: use --model-path"),
        (["-tp", "2"], "-tp: leave it out: one device is served"),
        (["--enable-lora", "--max-loaded-loras", "0"], "--max-loaded-loras must be at least 1, got 0"),
        (["--max-lora-rank", "x"], "argument --max-lora-rank: invalid int value: 'x'"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--lora-paths", "a=/x", "a=/y"], "--lora-paths: the name 'a' is given twice"),
        (["--lora-paths", '{"lora_name": "a", "lora_path": "/x", "pinned": "false"}'], "pinned 'false'"),
        (["--lora-paths", '{"lora_name": null, "lora_path": "/x"}'], "lora_name is None"),
        (["--lora-paths", '{"name": "a", "lora_path": "/x"}'], "unexpected keyword argument 'name'"),
        (["--max-loras-per-batch", "16"], "--max-loras-per-batch does nothing without --enable-lora or --lora-paths"),
        (["--lora-target-modules", "experts"], "--lora-target-modules does nothing without"),
    ],
)
def test_refusals_say_what_to_use(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config([*MODEL, *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2
    assert re.search(sentence, error), error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(["--version"])
    assert end.value.code == 0 and re.fullmatch(r"sglang-lora-moe \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_what_can_never_work_is_refused_without_the_command_line_too() -> None:
    with pytest.raises(ValueError, match="--dtype must be one of auto, float32, bfloat16, float16, got 'int4'"):
        Config(model_path="/m", dtype="int4").validate()
    with pytest.raises(ValueError, match="--max-lora-rank does nothing without --enable-lora or --lora-paths"):
        Config(model_path="/m", max_lora_rank=32).validate()
    Config(model_path="/m", max_lora_rank=32, lora_paths=["/a"]).validate()
    Config(model_path="/m", lora_paths=(), lora_target_modules=[]).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"attention_backend": "triton"}, "--attention-backend triton needs a CUDA device, and the model is on cpu; use auto"),
        ({"lora_backend": "csgmv"}, "--lora-backend csgmv needs a CUDA device"),
        ({"device": "cuda", "max_loras_per_batch": 257}, "--max-loras-per-batch 257: on a GPU at most 256 are resident"),
    ],
)
def test_what_the_device_cannot_run_is_refused_before_anything_is_loaded(
    fields: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=sentence):
        resolve(Config(model_path=str(tmp_path), **({"device": "cpu"} | fields)))


def test_a_tokenizer_that_was_named_must_be_there(tmp_path: Path) -> None:
    assert load_tokenizer(Config(model_path=str(tmp_path))) is None  # a model without one answers token ids
    with pytest.raises(ValueError, match="--tokenizer-path /else: there is no tokenizer in it"):
        load_tokenizer(Config(model_path=str(tmp_path), tokenizer_path="/else"))
