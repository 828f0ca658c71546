"""The `triton` attention backend and the fused decoder, through the interpreter here and natively on a GPU, against transformers' own model."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.models.build import build_model
from sglang_lora_moe.models.served import ServedModel
from tests.models.driver import Driver, Sequence, make_context
from tests.models.test_against_transformers import OTHERS, load_stock, random_tokens, stock_logits
from tests.ops import emulator
from tests.tiny_models import make_tiny_model

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"num_key_value_heads": 1}),
    "qwen3_moe-dense-layer": ("qwen3_moe", {"mlp_only_layers": [0], "tie_word_embeddings": True, "attention_bias": True}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe-odd-shared-expert": ("qwen2_moe", {"shared_expert_intermediate_size": 48}),  # no whole number of experts: stays beside them
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3-direct-q": ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "norm_topk_prob": False}),
    "deepseek_v3-odd-shared-expert": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "n_shared_experts": 2}),
    "deepseek_v2": ("deepseek_v2", OTHERS["deepseek_v2"]),
    "glm4_moe": ("glm4_moe", OTHERS["glm4_moe"]),  # transformers' forward on the same backend
}


def build(path: Path) -> ServedModel:
    return build_model(path, ctx=make_context(), dtype=torch.float32, device="cpu", attention_backend="triton", show_progress=False)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_stock(case: str, tmp_path: Path) -> None:
    arch, overrides = CASES[case]
    path = make_tiny_model(arch, tmp_path, **overrides)
    seqs = [Sequence(random_tokens(seed, n)) for seed, n in enumerate((22, 25))]
    stock = load_stock(path)
    expected = [stock_logits(stock, seq.tokens) for seq in seqs]
    model = build(path)
    assert (model._decoder is None) == (arch == "glm4_moe")
    driver = Driver(model)
    got: list[list[torch.Tensor]] = [[], []]
    for work, padding in [([(0, 13), (1, 9)], 0), ([(1, 11), (0, 1)], 2), ([(0, 1), (1, 1)], 0), ([(1, 1)], 0), ([(0, 3)], 0)]:
        for (i, _), logits in zip(work, driver.step([(seqs[i], n) for i, n in work], padding), strict=True):
            got[i].append(logits)
    for logits, reference in zip(got, expected, strict=True):
        out = torch.cat(logits)
        torch.testing.assert_close(out, reference[: out.shape[0]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v2"])
def test_values_of_splits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one kernel merges the splits of decode and multiplies by W_UV, here its formulas: steps of one request and of two."""
    steps = []

    def values(parts: torch.Tensor, lse: torch.Tensor, w: torch.Tensor, out: torch.Tensor, overlap: bool) -> None:
        share = torch.softmax(lse * math.log(2), 2)[..., None]
        x = torch.where(share > 0, parts * share, 0).sum(2)
        rows = out.shape[1] // x.shape[1]
        out.copy_(torch.einsum("thr,hvr->thv", x, w.view(x.shape[1], -1, w.shape[1])[:, -rows:]).flatten(1))
        steps.append(lse.shape[0])

    with contextmanager(emulator.implemented)({"latent_values": values}):
        monkeypatch.setattr("sglang_lora_moe.models.decoder.values_merge", lambda kv_b, v_dim, tokens: True)
        test_logits_equal_stock(case, tmp_path)
    assert set(steps) == {1, 2}


def test_only_wanted_logits_are_computed(tmp_path: Path) -> None:
    driver = Driver(build(make_tiny_model("qwen3_moe", tmp_path)))
    whole = driver.run(Sequence(random_tokens(0, 5)), 5)
    driver.ctx.num_logits, driver.ctx.logit_rows[0] = 1, 3
    torch.testing.assert_close(driver.model.forward_logits(), whole[3:4], rtol=0, atol=1e-5)
