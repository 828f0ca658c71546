"""Adapters on every weight that takes them, of the architectures that no table of layouts lists, against transformers and PEFT (float32)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.adapter_files import randomise_lora
from tests.models.driver import Driver, Sequence, put_in_slot
from tests.models.test_against_transformers import OTHERS, VARIANTS, build, load_stock, random_tokens, stock_logits
from tests.tiny_models import make_tiny_model

CASES = {arch: (arch, fields) for arch, fields in OTHERS.items()} | VARIANTS
BESIDE = {"phimoe": ["lm_head"]}  # of which PEFT writes the bias too


@pytest.mark.parametrize("case", CASES)
def test_adapters_on_everything(case: str, tmp_path: Path) -> None:
    arch, fields = CASES[case]
    path = make_tiny_model(arch, tmp_path, **fields)
    model, stock = build(path), load_stock(path)
    modules = {name: module for name, module in stock.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    parameters = {name for name, tensor in stock.named_parameters() if tensor.dim() > 1 and not name.endswith("_bias")}
    parameters -= {f"{name}.weight" for name in modules}

    def taken(name: str) -> bool:
        module = name.removesuffix(".weight")
        return not any(module.endswith(f".{suffix}") for suffix in model.refused_adapter_modules) and module not in BESIDE.get(arch, ())

    config: dict[str, Any] = {"target_modules": [*filter(taken, modules)], "target_parameters": [*filter(taken, parameters)] or None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(load_stock(path), LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **config))
    randomise_lora(adapted, torch.Generator().manual_seed(0), 0.5)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokens = random_tokens(0, 20)
    expected = stock_logits(PeftModel.from_pretrained(load_stock(path), str(tmp_path / "adapter")).eval(), tokens)
    slot = put_in_slot(model, tmp_path / "adapter")
    base, found = Driver(model).step([(Sequence(tokens), 20), (Sequence(tokens, slot=slot), 20)])
    torch.testing.assert_close(base, stock_logits(stock, tokens), rtol=0, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - base).abs().max() > 0.5
