"""What benchmarks.bench_marlin measures beside what; its timings need a GPU."""

from __future__ import annotations

from benchmarks import bench_marlin
from tests.stubbed_benchmark import stub


def test_rows_of_a_size_stand_together_behind_their_base() -> None:
    groups = bench_marlin.plan(["qwen3-30b-a3b", "mixtral-8x7b"], ["int4-g128", "int4-g32"], [1, 4], [(16, 4), (16, 1)])
    assert all({(row.shape, row.weights, row.tokens) for row in rows} == {(rows[0].shape, rows[0].weights, rows[0].tokens)} for rows in groups)
    assert [[(row.rank, row.active) for row in rows] for rows in groups] == [[(0, 0), (16, 4), (16, 1)]] * 4 + [[(0, 0)]] * 4


def test_resumes_what_is_missing_beside_its_base(tmp_path, monkeypatch) -> None:
    run, measured = stub(bench_marlin, monkeypatch, tmp_path / "out.json", "--shapes", "gpt-oss-20b", "--tokens", "16", "--weights", "int4-g128")
    assert run("--no-adapters", "--time-limit", "0") == []
    assert run("--no-adapters") == [(16, 0, 0)]
    assert run() == [(16, 0, 0), (16, 16, 4), (16, 16, 1)]
    assert measured[1:] == [[(16, 0, 0), (16, 16, 4), (16, 16, 1)]]
