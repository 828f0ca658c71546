"""Stacked linears and the embedding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sglang_lora_moe.layers.embedding import Embedding
from sglang_lora_moe.layers.linear import Linear


@torch.no_grad()
def test_parts_are_stacked_in_order() -> None:
    modules = {"m.q": nn.Linear(6, 4), "m.k": nn.Linear(6, 2, bias=False), "m.v": nn.Linear(6, 2)}
    linear = Linear.from_modules(modules, device="cpu")
    assert linear.parts == (("m.q", 4), ("m.k", 2), ("m.v", 2))
    for name, (weight, bias) in linear.part_views().items():
        weight.copy_(modules[name].weight)
        assert (bias is None) == (modules[name].bias is None)
        if bias is not None:
            bias.copy_(modules[name].bias)
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(linear(x), torch.cat([module(x) for module in modules.values()], dim=-1))
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_made_from_meta() -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)
    linear = Linear.from_modules({"head": module}, device="cpu", slot_source="logits")
    assert (linear.weight.device.type, linear.weight.dtype, linear.bias, linear.slot_source) == ("cpu", torch.bfloat16, None, "logits")
    assert linear(torch.zeros(0, 3, dtype=torch.bfloat16)).shape == (0, 5)


def test_weights_are_narrow_where_no_number_changes() -> None:
    """Float32 routers of checkpoints in bfloat16: half the bytes, and the products of float32 as before."""
    for exact in (True, False):
        linear, x = Linear((("gate", 6),), 40, dtype=torch.float32, device="cpu"), torch.randn(3, 40)
        linear.weight.copy_(torch.randn(6, 40).bfloat16() if exact else torch.randn(6, 40))
        before = linear(x)
        linear.narrow(torch.bfloat16)
        assert linear.weight.dtype == (torch.bfloat16 if exact else torch.float32)
        assert torch.equal(linear(x), before)


def test_unknown_slot_source() -> None:
    with pytest.raises(ValueError, match="'rows'"):
        Linear((("a", 1),), 1, dtype=torch.float32, device="cpu", slot_source="rows")


def test_embedding() -> None:
    embedding = Embedding("model.embed_tokens", 5, 3, dtype=torch.float32, device="cpu")
    embedding.weight.copy_(torch.arange(15.0).view(5, 3))
    assert embedding(torch.tensor([[4, 0]])).tolist() == [[[12.0, 13.0, 14.0], [0.0, 1.0, 2.0]]]
