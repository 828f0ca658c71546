"""int4 experts on the marlin backend with adapters, over HTTP on a GPU, against the engine in this process. Needs the server's libraries.

The full-size case takes 25 GiB of GPU memory and a minute; a smaller GPU skips it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from safetensors.torch import save_file

from benchmarks.dummy_model import CONFIGS, QUANTIZATIONS, write_config
from sglang_lora_moe.config import Config
from sglang_lora_moe.engine.engine import Engine
from tests.adapter_files import write_adapter
from tests.quantized_checkpoints import genuine, write_quantized, write_reference
from tests.server.launched import Server
from tests.tiny_models import make_tiny_model, make_tokenizer

pytestmark = pytest.mark.gpu
PROMPTS = [[1, *range(10 + i, 20 + 3 * i)] for i in range(4)]
PARAMS = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
# architecture, options of `write_quantized`
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("qwen3_moe", {"symmetric": False, "desc_act": True}),  # quantized in another order, but into groups that lie in order
    "awq": ("mixtral", {}),
}
LAYOUTS = {"a": ("per_expert_2d", 4), "b": ("experts_and_attention", 16)}


def compare(path: Path, adapters: dict[str, Path], **flags: Any) -> dict[str, int]:
    """Serve base and adapters, ask for each prompt alone, then ask the engine: equal tokens and log-probabilities. Bytes of memory, as the server says."""
    paths = [f"{name}={adapter}" for name, adapter in adapters.items()]
    config: dict[str, Any] = {"model_path": str(path), "enable_lora": True, "moe_runner_backend": "marlin", "max_running_requests": 16} | flags
    words = [word for name, value in config.items() for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))]
    server = Server(*words, "--lora-paths", *paths)
    try:
        assert server.url, server.end(None)[1][-3000:]
        info = server.get("/get_model_info")
        assert info["moe_runner_backend"] == "marlin" and info["device"] == "cuda"
        asked = [(name, prompt) for name in (None, *adapters) for prompt in PROMPTS]
        served = [server.generate(input_ids=prompt, lora_path=name, sampling_params=PARAMS, return_logprob=True) for name, prompt in asked]
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        named = client.completions.create(model="a", prompt="Mixtures", max_tokens=8, temperature=0, logprobs=1)
        assert named.model == "a" and named.usage is not None and named.usage.completion_tokens >= 1
    finally:
        server.end()
    with Engine(Config(**config, lora_paths=paths)) as engine:
        for (name, prompt), found in zip(asked, served, strict=True):
            expected = engine.generate(input_ids=prompt, lora_path=name, sampling_params=PARAMS, return_logprob=True)
            assert found["output_ids"] == expected["output_ids"], name
            of = [[value for value, *_ in result["meta_info"]["output_token_logprobs"]] for result in (found, expected)]
            assert of[0] == pytest.approx(of[1], abs=1e-6)
        outputs = {name: engine.generate(input_ids=PROMPTS[0], lora_path=name, sampling_params=PARAMS)["output_ids"] for name in (None, *adapters)}
    assert len({tuple(output) for output in outputs.values()}) == len(outputs), f"adapters change nothing: {outputs}"
    return dict(info["memory"])


@pytest.mark.parametrize("name", ["qwen3_moe-w4a16", "qwen3_moe-w4a16-asym-g32", "mixtral-w8a16-g64", "gptq", "awq"])
def test_tiny_checkpoints(name: str, tmp_path: Path) -> None:
    """llmcompressor's files, and GPTQ and AWQ by their layouts; that these logits are right is test_quantized_logits.py's."""
    if name in WRITTEN:
        arch, options = WRITTEN[name]
        path = write_quantized(make_tiny_model(arch, tmp_path), tmp_path / name, name, **options)
    else:
        path = genuine(name, tmp_path)
    reference = write_reference(path, tmp_path / "reference")
    adapters = {key: write_adapter(layout, reference, tmp_path / key, rank=rank) for key, (layout, rank) in LAYOUTS.items()}
    compare(path, adapters, dtype="bfloat16", page_size=4, max_total_tokens=2048)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 60 << 30, reason="needs a GPU with 60 GiB")
def test_full_size(tmp_path: Path) -> None:
    """The Qwen3-30B-A3B shape with random int4 weights, and adapters of rank 2 on experts and attention."""
    shape = "qwen3-30b-a3b"
    path = write_config(shape, tmp_path / shape, **QUANTIZATIONS["int4-g128"])
    make_tokenizer().save_pretrained(path)
    adapters = {name: write_full_size_adapter(CONFIGS[shape], tmp_path / name, seed) for seed, name in enumerate(LAYOUTS)}
    flags = {"load_format": "dummy", "max_lora_rank": 2, "max_loras_per_batch": 2, "context_length": 4096, "chunked_prefill_size": 2048}
    memory = compare(path, adapters, **flags, max_total_tokens=16384, mem_fraction_static=0.9)  # what other tests hold counts into the fraction
    config = CONFIGS[shape]
    heads, kv_heads, head_dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    attention = (2 * heads + 2 * kv_heads) * head_dim * config["hidden_size"]  # weights of q, k, v and o, which steps of many tokens read in 16 bit
    copies = 2 * attention * config["num_hidden_layers"]
    assert memory["weights"] - copies < 0.28 * memory["unquantized"] and memory["loading_peak"] < 1.05 * memory["weights"], memory


def write_full_size_adapter(config: dict[str, Any], directory: Path, seed: int, rank: int = 2) -> Path:
    """All experts (3D tensors by name) and q and o of every layer."""
    directory.mkdir()
    g = torch.Generator().manual_seed(seed)
    h, i, e = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    q = config["num_attention_heads"] * config["head_dim"]
    sizes = {"mlp.experts.gate_up_proj": ((e, 2 * rank, h), (e, 2 * i, rank)), "mlp.experts.down_proj": ((e, rank, i), (e, h, rank))}
    sizes |= {"self_attn.q_proj": ((rank, h), (q, rank)), "self_attn.o_proj": ((rank, q), (h, rank))}
    state = {}
    for layer in range(config["num_hidden_layers"]):
        for name, pair in sizes.items():
            for half, shape in zip("AB", pair, strict=True):
                tensor = torch.randn(shape, generator=g, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)
                state[f"base_model.model.model.layers.{layer}.{name}.lora_{half}.weight"] = tensor
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": []}))
    return directory
