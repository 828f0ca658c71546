"""What benchmarks.bench_moe_lora measures beside what; its timings need a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_moe_lora
from benchmarks.moe_inputs import LayerInputs, Setup
from benchmarks.shapes import SHAPES
from tests.stubbed_benchmark import stub


def test_rows_of_a_size_stand_together_behind_their_base() -> None:
    groups = bench_moe_lora.plan(["qwen3-30b-a3b", "mixtral-8x7b"], [1, 4], [16, 64], [1, 4])
    assert all({(row.shape, row.tokens) for row in rows} == {(rows[0].shape, rows[0].tokens)} and rows[0].rank == 0 for rows in groups)
    loads = [[(row.rank, row.active, row.slots) for row in rows[1:]] for rows in groups]
    assert loads[0] == [(16, 4, 4), (16, 1, 1), (16, 4, 16), (16, 4, 64)]
    assert loads[1:4] == [[(16, 4, 4), (16, 1, 1)]] * 3 and loads[4:] == [[(64, 1, 1), (64, 4, 4)]] * 4
    assert [[row.rank for row in rows] for rows in bench_moe_lora.plan(["gpt-oss-20b"], [1], [], [])] == [[0]]


def test_layers_of_a_size_have_one_routing_and_one_set_of_weights() -> None:
    base = LayerInputs.build(Setup(SHAPES["qwen3-30b-a3b"], 4), torch.device("meta"))
    with_adapters = base.with_adapters(Setup(SHAPES["qwen3-30b-a3b"], 4, 16, 2, 3))
    assert all(a.x is b.x and a.topk_ids is b.topk_ids for a, b in zip(base.inputs, with_adapters.inputs, strict=True))
    assert with_adapters.weights is base.weights and len(with_adapters.stacks) == len(base.weights)
    assert [inp.num_slots for inp in (base.inputs[0], with_adapters.inputs[0])] == [0, 3] and base.inputs[0].token_slots is None
    with pytest.raises(AssertionError, match="another layer"):
        base.with_adapters(Setup(SHAPES["qwen3-30b-a3b"], 8, 16, 2))


def test_resumes_what_is_missing_beside_its_base(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench_moe_lora, "warm_compile", lambda rows: None)
    run, measured = stub(bench_moe_lora, monkeypatch, tmp_path / "out.json", "--shapes", "gpt-oss-20b", "--tokens", "4", "16", "--ranks", "16")
    assert run("--active", "4", "--time-limit", "0") == []
    assert run("--active", "4") == [(4, 0, 0), (4, 16, 4), (16, 0, 0), (16, 16, 4)]
    assert run("--active", "4", "1") == [(4, 0, 0), (4, 16, 4), (16, 0, 0), (16, 16, 4), (4, 16, 1), (16, 16, 1)]
    assert measured[2:] == [[(4, 0, 0), (4, 16, 1)], [(16, 0, 0), (16, 16, 1)]]
