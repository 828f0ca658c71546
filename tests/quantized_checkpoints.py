"""Quantized checkpoints, and the 16-bit models that they stand for by an arithmetic of their own.

`genuine(name, directory)` copies one of `tests/data/quantized` (written by llmcompressor). `write_quantized(...)` writes
GPTQ, AWQ or compressed-tensors files in their documented layouts. `write_reference(path, directory)` is a float32
checkpoint for transformers with the weights dequantized here, independently of the package, one bit field at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_lora_moe.quantization.wna16 import AWQ_ORDER, pack, unpack
from tests.quantize import quantize
from tests.tiny_models import make_tokenizer

DATA = Path(__file__).parent / "data" / "quantized"
GENUINE = sorted(path.name for path in DATA.iterdir() if (path / "config.json").exists())
QUANTIZED = r".*layers\..*(proj|experts\.\d+\.w\d)\.weight"  # what the tools quantize of Qwen3-MoE and Mixtral
TOKENIZER_AND_MORE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def genuine(name: str, directory: Path) -> Path:
    path = Path(shutil.copytree(DATA / name, directory / name))
    make_tokenizer().save_pretrained(path)
    return path


# ---- reference ------------------------------------------------------------------------------------------------------
def fields(words: Tensor, bits: int) -> Tensor:
    """int32 [r, n] -> int64 [r, n * 32 / bits]: bit fields from the low end of each word."""
    columns = [(words.long() >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    return torch.stack(columns, -1).flatten(1)


def ones_of(bits: int) -> int:
    """A word with 1 in each of its fields: what GPTQ tools take from qzeros, as whole numbers, for the first version of their format."""
    return sum(1 << shift for shift in range(0, 32, bits))


def dequantized(tensors: dict[str, Tensor], bits: int, method: str) -> Tensor:
    """float32 [out, in] of one linear's tensors, as its format documents."""
    if "weight_packed" in tensors:
        out, inputs = tensors["weight_shape"].tolist()
        scale = tensors["weight_scale"].float()
        codes = fields(tensors["weight_packed"], bits)[:, :inputs] - 2 ** (bits - 1)
        zero = torch.zeros_like(scale)
        if "weight_zero_point" in tensors:
            zero = (fields(tensors["weight_zero_point"].T, bits)[:, :out].T - 2 ** (bits - 1)).float()
        group = torch.arange(inputs) * scale.shape[1] // inputs
        return (codes - zero[:, group]) * scale[:, group]
    scale = tensors["scales"].float()  # [groups, out]
    zero, codes = fields(tensors["qzeros"].long() + (ones_of(bits) if method == "gptq" else 0), bits), tensors["qweight"]
    if method == "awq":  # columns interleaved within each word, inputs not packed
        order = torch.arange(scale.shape[1]).view(-1, 8)[:, [AWQ_ORDER.index(c) for c in range(8)]].flatten()
        codes, zero = fields(codes, bits)[:, order], zero[:, order]
    else:
        codes = fields(codes.T, bits).T
    group = torch.arange(codes.shape[0]) * scale.shape[0] // codes.shape[0]
    return ((codes - zero[group]) * scale[group]).T.contiguous()


def write_reference(path: Path, directory: Path) -> Path:
    """The float32 checkpoint, as transformers reads it, that the quantized one at `path` stands for."""
    directory.mkdir(parents=True)
    config = json.loads((path / "config.json").read_text())
    method = quantization_of(config)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "model.safetensors").items():
        name, _, leaf = key.rpartition(".")
        parts.setdefault(name, {})[leaf] = tensor
    state: dict[str, Tensor] = {}
    for name, tensors in parts.items():
        if "weight_packed" in tensors or "qweight" in tensors:
            name = name.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2") if "block_sparse_moe" in name else name
            state[f"{name}.weight"] = dequantized(tensors, *method(name))
            tensors = {leaf: tensor for leaf, tensor in tensors.items() if leaf == "bias"}
        elif "block_sparse_moe.experts" in name:
            name = name.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2")
        state |= {f"{name}.{leaf}": tensor.float().contiguous() for leaf, tensor in tensors.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    for file in TOKENIZER_AND_MORE:
        if (path / file).exists():
            shutil.copyfile(path / file, directory / file)
    return directory


def quantization_of(config: dict[str, Any]) -> Any:
    """(bits, method) by name; `dynamic` rules may change the bits."""
    quantization = config["quantization_config"]
    if quantization["quant_method"] == "compressed-tensors":
        bits = next(iter(quantization["config_groups"].values()))["weights"]["num_bits"]
        return lambda name: (bits, "compressed-tensors")
    method = quantization["quant_method"] if quantization["quant_method"] == "awq" else quantization["checkpoint_format"]

    def of(name: str) -> tuple[int, str]:
        rules = [changes["bits"] for rule, changes in quantization.get("dynamic", {}).items() if re.match(rule.removeprefix("+:"), name) and "bits" in changes]
        return rules[0] if rules else quantization["bits"], method

    return of


# ---- writing --------------------------------------------------------------------------------------------------------
def pack_linear(weight: Tensor, method: str, bits: int, group_size: int, symmetric: bool) -> dict[str, Tensor]:
    """Round-to-nearest tensors of one linear in the layout of `method`."""
    size = weight.shape[1] if group_size == -1 else group_size
    scale_dtype = torch.bfloat16 if method == "compressed-tensors" else torch.float16
    q = quantize(weight, bits, size, symmetric and method != "awq", scale_dtype)
    codes, scales = unpack(q.packed, bits), q.scales
    zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8) if q.zeros is None else q.zeros
    if method == "compressed-tensors":
        tensors = {"weight_packed": q.packed, "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
        return tensors if symmetric else tensors | {"weight_zero_point": pack(zeros.T.contiguous(), bits).T.contiguous()}
    if method == "awq":

        def words(columns: Tensor) -> Tensor:
            return pack(columns.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2).contiguous(), 4)

        return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T.contiguous()}
    stored = pack(zeros.T.contiguous(), bits) - (ones_of(bits) if method == "gptq" else 0)
    index = torch.arange(weight.shape[1], dtype=torch.int32) // size
    return {"qweight": pack(codes.T.T, bits).T.contiguous(), "qzeros": stored, "scales": scales.T.contiguous(), "g_idx": index}


def quantization_config(method: str, bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    if method == "compressed-tensors":
        strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "actorder": None, **strategy}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, "format": "pack-quantized"}
        return {"quant_method": method, "format": "pack-quantized", "config_groups": {"group_0": group}, "ignore": ["lm_head", r"re:.*\.gate$"]}
    if method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["gate"]}
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": False, "checkpoint_format": method}


def write_quantized(
    source: Path,
    target: Path,
    method: str,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    only: str = QUANTIZED,
    schemes: dict[str, tuple[int, int]] | None = None,
    **config_fields: Any,
) -> Path:
    """Quantize the 16-bit checkpoint `source`; `method` "gptq" or "gptq_v2" is also the checkpoint_format.

    `only` matches the tensors to quantize, `schemes` names others' (pattern -> bits, group size), and `config_fields` are added to
    quantization_config.
    """
    target.mkdir(parents=True)
    state: dict[str, Tensor] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if not re.fullmatch(only, key):
            state[key] = tensor
            continue
        name = key.removesuffix(".weight")
        chosen = next((scheme for pattern, scheme in (schemes or {}).items() if re.fullmatch(pattern, name)), (bits, group_size))
        for leaf, part in pack_linear(tensor.float(), method, *chosen, symmetric).items():
            state[f"{name}.{leaf}"] = part
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(method, bits, group_size, symmetric) | config_fields
    (target / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER_AND_MORE:
        if (source / file).exists():
            shutil.copyfile(source / file, target / file)
    return target
