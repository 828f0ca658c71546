"""RMSNorm against transformers' modules of every family that it replaces."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from sglang_lora_moe.layers.norm import RMSNorm
from sglang_lora_moe.models.recognise import RMS_NORMS
from tests.references import relative_error

FAMILIES = {"Qwen3Moe": "qwen3_moe", "Mixtral": "mixtral", "Olmoe": "olmoe", "GptOss": "gpt_oss", "DeepseekV3": "deepseek_v3", "Ernie4_5_Moe": "ernie4_5_moe"}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_stock(family: str) -> None:
    assert f"{family}RMSNorm" in RMS_NORMS
    module = importlib.import_module(f"transformers.models.{FAMILIES[family]}.modeling_{FAMILIES[family]}")
    stock = getattr(module, f"{family}RMSNorm")(32, eps=1e-5)
    nn.init.normal_(stock.requires_grad_(False).weight)
    norm, x = RMSNorm(stock.weight, stock.variance_epsilon), torch.randn(2, 5, 32)
    torch.testing.assert_close(norm(x), stock(x), rtol=0, atol=1e-6)
    half = x.bfloat16()
    assert norm(half).dtype == torch.bfloat16  # also with a float32 weight
    assert relative_error(norm(half), stock(half)) <= 5e-3
