"""Every architecture and adapter layout through the engine, against transformers with the adapter merged in (float32).

One engine a model holds all its adapters; base and adapters run mixed in one batch, with chunked prefill, then decode. On a GPU this is the
triton backend throughout, decode eagerly and in captured graphs.
The whole distribution of every position is compared: prompt positions come from prefill, output positions from decode.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_lora_moe.engine.engine import Engine
from tests.adapter_files import HAND_LAYOUTS, PEFT_LAYOUTS, merged_reference_model, write_adapter
from tests.books import check_core
from tests.engine.test_engine import prompt
from tests.tiny_models import make_tiny_model

ALL = [*PEFT_LAYOUTS, *HAND_LAYOUTS]
ON_EXPERTS = [name for name in ALL if name not in ("dense_mlp", "unsloth_projs", "routed_and_shared", "shared_up")]
LAYOUTS = {
    "qwen3_moe": ON_EXPERTS,
    "mixtral": ON_EXPERTS,
    "deepseek_v3": [*ON_EXPERTS, "dense_mlp", "routed_and_shared"],
    "gpt_oss": [*PEFT_LAYOUTS, "grouped_by_expert", "native_3d", "native_3d_dense", "tinker", "unsloth_projs"],
    "qwen2_moe": ["all_linear", "dense_mlp", "per_expert_2d", "target_parameters_3d", "routed_and_shared", "shared_up"],
    "olmoe": ["all_linear", "per_expert_2d", "target_parameters_3d"],
    "qwen3": ["attention_only", "all_linear", "dense_mlp", "embedding"],
}
VOCAB, STEPS, TOLERANCE = 128, 6, 1e-4
RANKS = (4, 8, 16)


@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["eager", "graphs"])
@pytest.mark.parametrize("arch", LAYOUTS)
def test_every_layout_equals_transformers(arch: str, graphs: bool, device: torch.device, tmp_path: Path) -> None:
    base = make_tiny_model(arch, tmp_path)
    paths = {name: write_adapter(name, base, tmp_path / name, rank=RANKS[i % 3], alpha=8, seed=i) for i, name in enumerate(LAYOUTS[arch])}
    names: list[str | None] = [None, *paths]
    prompts = [prompt(9 + 5 * (i % 4), i) for i in range(len(names))]
    greedy = {"temperature": 0.0, "max_new_tokens": STEPS, "ignore_eos": True}
    with Engine(
        model_path=str(base),
        device=device.type,
        dtype="float32",
        moe_runner_backend="triton" if device.type == "cuda" and arch != "qwen3" else "auto",
        disable_cuda_graph=not graphs,
        max_running_requests=24,
        enable_lora=True,
        lora_paths=[f"{name}={path}" for name, path in paths.items()],
        max_loras_per_batch=len(paths),
        max_lora_rank=32,  # PEFT doubles the rank of gate_up in all-linear adapters
        page_size=4,
        chunked_prefill_size=64,
        max_total_tokens=2048,
    ) as engine:
        assert (engine.core.runner.graphs is not None) == graphs
        scores = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": VOCAB}
        results = engine.generate(input_ids=prompts, sampling_params=greedy, lora_path=names, **scores)
        few = engine.generate(input_ids=prompts[:3], sampling_params=greedy, lora_path=names[:3])  # steps of 3 tokens need no sorting
        assert [result["output_ids"] for result in few] == [result["output_ids"] for result in results[:3]]
        check_core(engine.core)
    worst = 0.0
    for name, ids, result in zip(names, prompts, results, strict=True):
        reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval() if name is None else merged_reference_model(base, paths[name])
        sequence = ids + result["output_ids"]
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([sequence])).logits[0]
        greedy = logits[len(ids) - 1 : -1].argmax(-1).tolist()
        assert result["output_ids"] == greedy, f"{arch} {name}: greedy tokens differ"
        expected = torch.log_softmax(logits[:-1], -1)
        meta = result["meta_info"]
        found = torch.empty_like(expected)
        for row, top in enumerate([*meta["input_top_logprobs"][1:], *meta["output_top_logprobs"]]):
            found[row, [token for _, token, _ in top]] = torch.tensor([value for value, _, _ in top])
        error = (found - expected).abs().max().item()
        worst = max(worst, error)
        assert error <= TOLERANCE, f"{arch} {name}: largest log-probability difference {error:.1e}"
    print(f"{arch}: {len(names)} variants, largest difference {worst:.1e}")
