"""bfloat16 against transformers in float32, every architecture: given tokens, given experts, whole logits (ARCHITECTURE.md, "Numerics": 2e-2).

Weights are rounded to bfloat16 before either reads them, as those of real checkpoints are, so that only the arithmetic differs, and
brought to unit gain: the tiny models have 1.5 a layer to make float32 errors show, with which transformers' own bfloat16 forward of
deepseek_v3, given the same experts, is 2.7e-2 off.
On a CPU the torch_native path, on a GPU the triton path with decode in captured graphs; base and adapters mixed in one batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sglang_lora_moe.engine.engine import Engine
from tests.adapter_files import merged_reference_model, write_adapter
from tests.forced_experts import ForcedEngine, run_reference
from tests.references import keep_error, relative_error
from tests.tiny_models import make_tiny_model

ARCHS = ("qwen3_moe", "gpt_oss", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "qwen3")
# two layers with the widths of Qwen3-30B-A3B, and an eighth of its experts
QWEN3_30B = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 8}
QWEN3_30B |= {"moe_intermediate_size": 768}
LIMIT = 2e-2
LENGTH, PROMPT = 44, 21


def rounded(directory: Path, gain: float = 1.0) -> Path:
    """The model or adapter in `directory`, its matrices times `gain`, all weights rounded to bfloat16."""
    for file in directory.glob("*.safetensors"):
        weights = {name: tensor * gain if tensor.dim() > 1 and "embed_tokens" not in name else tensor for name, tensor in load_file(file).items()}
        save_file({name: tensor.to(torch.bfloat16).to(tensor.dtype) for name, tensor in weights.items()}, file, {"format": "pt"})
    return directory


@pytest.mark.parametrize(("arch", "widths"), [*((arch, {}) for arch in ARCHS), pytest.param("qwen3_moe", QWEN3_30B, marks=pytest.mark.gpu, id="Qwen3-30B")])
def test_bfloat16_logits(arch: str, widths: dict[str, int], device: torch.device, tmp_path: Path) -> None:
    base = rounded(make_tiny_model(arch, tmp_path, **widths), gain=1 / 1.5)
    layouts = ("attention_only", "all_linear") if arch == "qwen3" else ("target_parameters_3d", "experts_and_attention")
    paths = {layout: rounded(write_adapter(layout, base, tmp_path / layout, rank=8, alpha=16, seed=i)) for i, layout in enumerate(layouts)}
    tokens = torch.randint(3, 98, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
    references = {name: run_reference(merged_reference_model(base, path), tokens) for name, path in paths.items()}
    references = {None: run_reference(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), tokens)} | references
    with Engine(
        model_path=str(base), device=device.type, dtype="bfloat16", enable_lora=True, lora_paths=[f"{name}={path}" for name, path in paths.items()],
        max_loras_per_batch=3, max_lora_rank=16, page_size=4, chunked_prefill_size=32, max_total_tokens=4096, max_running_requests=24, disable_cuda_graph=True,
    ) as engine:  # fmt: skip
        forced = ForcedEngine(engine, graphs=device.type == "cuda")
        for copies in (1, 7):  # 3 requests by pair, 21 sorted
            for adapter, found in forced.logits(references, prompt=PROMPT, copies=copies):
                expected = references[adapter].logits[PROMPT - 1 : -1]
                error = keep_error(f"logits of {arch}{' at real widths' * bool(widths)}, bfloat16", relative_error(found, expected))
                keep_error(f"share of greedy tokens that differ, {arch}, bfloat16", float((found.argmax(-1) != expected.argmax(-1)).float().mean()))
                assert error <= LIMIT, f"{arch}, adapter {adapter}, {copies} of each: relative error {error:.2e}"
