"""Quantized checkpoints with adapters, served over HTTP: llmcompressor's files of a Mixtral, and GPTQ and AWQ by their layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapter_files import merged_reference_model, write_adapter
from tests.models.test_against_transformers import load_stock
from tests.quantized_checkpoints import genuine, write_quantized, write_reference
from tests.server.launched import Server
from tests.tiny_models import make_tiny_model

LAYOUTS = {"a": ("per_expert_2d", 4), "b": ("experts_and_attention", 16)}
PROMPTS = [[1, 40, 50, 60, 7], [1, 90, 20, 33], [1, 64, 64, 12, 71, 80, 45]]


def written(arch: str, method: str, **options: Any) -> Callable[[Path], Path]:
    return lambda directory: write_quantized(make_tiny_model(arch, directory), directory / method, method, **options)


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "compressed-tensors": lambda directory: genuine("mixtral-w4a16-g32", directory),
    "gptq": written("qwen3_moe", "gptq", symmetric=False, desc_act=True),  # quantized in another order, but into groups that lie in order
    "awq": written("mixtral", "awq"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_base_and_adapters_answer_as_transformers_on_the_dequantized_weights(name: str, tmp_path: Path) -> None:
    path = CHECKPOINTS[name](tmp_path)
    reference = write_reference(path, tmp_path / "reference")
    adapters = {key: write_adapter(layout, reference, tmp_path / key, rank=rank) for key, (layout, rank) in LAYOUTS.items()}
    models = {None: load_stock(reference)} | {key: merged_reference_model(reference, adapter) for key, adapter in adapters.items()}
    paths = [f"{key}={adapter}" for key, adapter in adapters.items()]
    server = Server("--model-path", str(path), "--lora-paths", *paths, "--page-size", "4", "--max-total-tokens", "1024")
    try:
        for adapter, model in models.items():
            for ids in PROMPTS:
                params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
                result = server.generate(input_ids=ids, lora_path=adapter, sampling_params=params, return_logprob=True)
                tokens = ids + result["output_ids"]
                with torch.no_grad():
                    logprobs = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, len(ids) - 1 : -1].float(), -1)
                assert result["output_ids"] == logprobs.argmax(-1).tolist(), adapter
                found = torch.tensor([value for value, *_ in result["meta_info"]["output_token_logprobs"]])
                torch.testing.assert_close(found, logprobs.max(-1).values, rtol=0, atol=1e-4)
    finally:
        server.end()


def test_a_permuting_group_index_ends_the_start_with_tensor_and_way_out(tmp_path: Path) -> None:
    """GPTQ with desc_act, as its tools write it: the columns of a group lie anywhere."""
    path = written("qwen3_moe", "gptq", desc_act=True)(tmp_path)
    state = load_file(path / "model.safetensors")
    for key in [key for key in state if key.endswith("g_idx")]:
        state[key] = state[key][torch.randperm(state[key].shape[0], generator=torch.Generator().manual_seed(0))].contiguous()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    status, said = Server("--model-path", str(path)).end(None)
    assert status == 2 and "Traceback" not in said
    assert "model.layers.0.mlp.experts.0.gate_proj.g_idx permutes input columns over groups" in said and "requantize with desc_act=False" in said
