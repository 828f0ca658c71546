"""Writes the checkpoints of this folder with llmcompressor, as users do; run again only to change them.

    pip install llmcompressor==0.14.0.1 transformers==5.17.0        # in an environment of its own: it pins its own versions
    python -m tests.data.quantized.write tests/data/quantized       # from the repository's root

Random tiny models (no calibration data). Tokenizers are left out: `tests.tiny_models.make_tokenizer` is theirs.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from tests.tiny_models import make_tiny_model

ROUTERS_AND_HEAD = ["lm_head", "re:.*mlp.gate$"]
_WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4, "intermediate_size": 128}
_SMALL = {"num_experts": 4, "moe_intermediate_size": 64, "intermediate_size": 64}


def group(bits: int, group_size: int, symmetric: bool = True) -> dict[str, Any]:
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group_size)
    return {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}}


def channel(bits: int) -> dict[str, Any]:
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    return {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}}


# name -> architecture, overrides of its tiny config, recipe, ignored modules
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    # the preset, group 128; layer 0 is dense
    "qwen3_moe-w4a16": ("qwen3_moe", _WIDE | {"mlp_only_layers": [0]}, {"targets": "Linear", "scheme": "W4A16"}, ROUTERS_AND_HEAD),
    # exceptions: one of q, k, v of layer 0, and all experts of layer 1
    "mixtral-w4a16-g32": (
        "mixtral",
        {"num_local_experts": 4, "intermediate_size": 64},
        group(4, 32),
        [*ROUTERS_AND_HEAD, "model.layers.0.self_attn.v_proj", r"re:.*layers\.1\..*experts.*"],
    ),
    "mixtral-w8a16-g64": ("mixtral", {"num_local_experts": 4, "intermediate_size": 64}, group(8, 64), ROUTERS_AND_HEAD),
    "qwen3_moe-w4a16-asym-g32": ("qwen3_moe", _SMALL, group(4, 32, symmetric=False), ROUTERS_AND_HEAD),
    "qwen3_moe-w8a16-channel": ("qwen3_moe", _SMALL, channel(8), ROUTERS_AND_HEAD),
}
KEPT = ("config.json", "generation_config.json", "model.safetensors")


def write(name: str, target: Path) -> None:
    arch, overrides, recipe, ignore = CHECKPOINTS[name]
    with tempfile.TemporaryDirectory() as scratch:
        source = make_tiny_model(arch, scratch, **overrides)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model = oneshot(model=model, recipe=QuantizationModifier(ignore=ignore, **recipe)) or model
        written = Path(scratch) / "written"
        model.save_pretrained(written, save_compressed=True)
        target.mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            shutil.copyfile(written / file, target / file)


if __name__ == "__main__":
    for checkpoint in sys.argv[2:] or CHECKPOINTS:
        write(checkpoint, Path(sys.argv[1]) / checkpoint)
