"""Quantized checkpoints in bfloat16 against transformers (and PEFT) in float32 on the dequantized weights: given tokens, given experts, whole
logits (ARCHITECTURE.md, "Numerics": 2e-2), base and adapters mixed in one batch.

On a CPU the torch_native path, on a GPU the marlin and the triton path with decode in captured graphs. The weights that the reference
multiplies by are rounded to bfloat16, as the served ones are: only the arithmetic differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_lora_moe.engine.engine import Engine
from sglang_lora_moe.quantization.linear import QuantizedLinear
from tests.adapter_files import merged_reference_model, write_adapter
from tests.engine.test_forced_logits import LENGTH, LIMIT, PROMPT, rounded
from tests.forced_experts import ForcedEngine, run_reference
from tests.quantized_checkpoints import GENUINE, genuine, write_quantized, write_reference
from tests.references import keep_error, relative_error
from tests.tiny_models import make_tiny_model

# architecture, method, options of `write_quantized`
WRITTEN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gptq-mixtral": ("mixtral", "gptq", {"symmetric": False, "desc_act": True}),  # true, but with an index that permutes nothing
    "gptq-down-int8": ("qwen3_moe", "gptq", {"schemes": {r".*down_proj": (8, 32)}, "dynamic": {r"+:.*experts.*down_proj": {"bits": 8}}}),
    "awq-qwen3_moe": ("qwen3_moe", "awq", {}),
    "awq-mixtral": ("mixtral", "awq", {}),
    "awq-deepseek_v3": ("deepseek_v3", "awq", {}),  # latent attention and shared experts, dense layers
    "packed-qwen2_moe": ("qwen2_moe", "compressed-tensors", {"symmetric": False}),
}
WIDTHS = {"deepseek_v3": {"kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16}}  # whole groups
LAYOUTS = ("all_linear", "experts_and_attention")
# (device, --moe-runner-backend, what it becomes)
PATHS = [
    ("cpu", "auto", "torch_native"),
    pytest.param(("cuda", "auto", "marlin"), marks=pytest.mark.gpu),
    pytest.param(("cuda", "triton", "triton"), marks=pytest.mark.gpu),
]


def make(name: str, directory: Path) -> Path:
    if name in GENUINE:
        return genuine(name, directory)
    arch, method, options = WRITTEN[name]
    source = rounded(make_tiny_model(arch, directory, **WIDTHS.get(arch, {})), gain=1 / 1.5)  # as test_forced_logits
    return write_quantized(source, directory / "quantized", method, **options)


@pytest.mark.parametrize("device_backend", PATHS, ids=lambda path: path[2])
@pytest.mark.parametrize("name", [*GENUINE, *WRITTEN])
def test_bfloat16_logits(name: str, device_backend: tuple[str, str, str], tmp_path: Path) -> None:
    device, backend, resolved = device_backend
    path = make(name, tmp_path)
    reference = rounded(write_reference(path, tmp_path / "reference"))
    adapters = {layout: rounded(write_adapter(layout, reference, tmp_path / layout, rank=8, alpha=16, seed=i)) for i, layout in enumerate(LAYOUTS)}
    tokens = torch.randint(3, 98, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
    references = {layout: run_reference(merged_reference_model(reference, adapter), tokens) for layout, adapter in adapters.items()}
    references = {None: run_reference(AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval(), tokens)} | references
    with Engine(
        model_path=str(path), device=device, dtype="bfloat16", enable_lora=True, lora_paths=[f"{key}={value}" for key, value in adapters.items()],
        max_loras_per_batch=3, max_lora_rank=16, page_size=4, chunked_prefill_size=32, max_total_tokens=4096, max_running_requests=24, disable_cuda_graph=True,
        moe_runner_backend=backend,
    ) as engine:  # fmt: skip
        chosen = engine.model_info["moe_runner_backend"]
        assert chosen.startswith(resolved)  # "marlin+triton" where a layer's experts are not quantized
        assert any(isinstance(module, QuantizedLinear) for module in engine.core.runner.model.hf.modules())
        forced = ForcedEngine(engine, graphs=device == "cuda")
        for copies in (1, 7):  # 3 requests, 21 requests
            for adapter, found in forced.logits(references, prompt=PROMPT, copies=copies):
                expected = references[adapter].logits[PROMPT - 1 : -1]
                error = keep_error(f"logits of {name} on {chosen}, bfloat16", relative_error(found, expected))
                assert error <= LIMIT, f"{name} on {chosen}, adapter {adapter}, {copies} of each: relative error {error:.2e}"
