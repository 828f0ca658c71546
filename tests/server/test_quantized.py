"""A quantized checkpoint with adapters, served over HTTP: llmcompressor's files of a Mixtral (other formats: `tests/quantization/`)."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.adapter_files import merged_reference_model, write_adapter
from tests.models.test_against_transformers import load_stock
from tests.quantized_checkpoints import genuine, write_reference
from tests.server.launched import Server

LAYOUTS = {"a": ("per_expert_2d", 4), "b": ("experts_and_attention", 16)}
PROMPTS = [[1, 40, 50, 60, 7], [1, 90, 20, 33], [1, 64, 64, 12, 71, 80, 45]]


def test_base_and_adapters_answer_as_transformers_on_the_dequantized_weights(tmp_path: Path) -> None:
    path = genuine("mixtral-w4a16-g32", tmp_path)
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
