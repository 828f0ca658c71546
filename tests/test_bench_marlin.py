"""What benchmarks.bench_marlin measures beside what; its timings need a GPU."""

from __future__ import annotations

import json

from benchmarks import bench_marlin, timing


def test_rows_of_a_size_stand_together_behind_their_base() -> None:
    groups = bench_marlin.plan(["qwen3-30b-a3b", "mixtral-8x7b"], ["int4-g128", "int4-g32"], [1, 4], [(16, 4), (16, 1)])
    assert all({(row.shape, row.weights, row.tokens) for row in rows} == {(rows[0].shape, rows[0].weights, rows[0].tokens)} for rows in groups)
    assert [[(row.rank, row.active) for row in rows] for rows in groups] == [[(0, 0), (16, 4), (16, 1)]] * 4 + [[(0, 0)]] * 4


def test_resumes_what_is_missing_beside_its_base(tmp_path, monkeypatch) -> None:
    measured = []

    def measure(rows, ceilings, device):
        measured.append([(row.tokens, row.rank, row.active) for row in rows])
        return [{**bench_marlin.key_of(row), "us": 1.0} for row in rows]

    monkeypatch.setattr(bench_marlin, "measure", measure)
    monkeypatch.setattr(timing, "measure_ceilings", lambda device: timing.Ceilings(4e12, 4e12, 8e14, 7e14))

    def run(*arguments: str) -> list[tuple[int, int, int]]:
        out = tmp_path / "out.json"
        monkeypatch.setattr("sys.argv", ["bench", "--out", str(out), "--shapes", "gpt-oss-20b", "--tokens", "16", "--weights", "int4-g128", *arguments])
        bench_marlin.main()
        return [(row["M"], row["rank"], row["active"]) for row in json.loads(out.read_text())["rows"]]

    assert run("--no-adapters", "--time-limit", "0") == []
    assert run("--no-adapters") == [(16, 0, 0)]
    assert run() == [(16, 0, 0), (16, 16, 4), (16, 16, 1)]
    assert measured[1:] == [[(16, 0, 0), (16, 16, 4), (16, 16, 1)]]
