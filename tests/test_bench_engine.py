"""A run of bench_engine that was cut goes on where it stopped; the engine itself needs a GPU and is not made here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_engine
from benchmarks.bench_engine import Bench, Probe


class FakeBench(Bench):
    made: list[tuple[int, int]] = []  # rank, slots
    decoded: list[tuple[int, int]] = []  # batch, adapters in it

    def __init__(self, args: Any, path: Path, rank: int, slots: int) -> None:
        self.rank, self.targets, self.memory = rank, {}, {"rank": rank}
        self.model: Any = SimpleNamespace(moe_runner_backend="triton")
        self.made.append((rank, slots))

    def decode(self, batch: int, adapters: list[str | None]) -> tuple[dict[str, float], Probe]:
        active = len(set(adapters) - {None})
        self.decoded.append((batch, active))
        return {"step_us": 1000.0 * batch + 100 * active, "host_us": 1.0, "gpu_us": 2.0, "busy": 0.99}, Probe(8.0, 8.0, active)

    def prefill(self, count: int, adapters: list[str | None]) -> tuple[float, float]:
        return 2000.0 * count, 1900.0 * count

    def close(self) -> None: ...


def test_a_cut_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_engine, "Bench", FakeBench)
    made, decoded = FakeBench.made, FakeBench.decoded

    def run(*words: str) -> list[dict[str, Any]]:
        made.clear()
        decoded.clear()
        monkeypatch.setattr("sys.argv", ["bench_engine", "--out", str(tmp_path / "found.json"), "--commit", "c0ffee", "--prefills", "1", *words])
        bench_engine.main()
        return json.loads((tmp_path / "found.json").read_text())["rows"]

    first = run("--batches", "1", "16", "--active", "4")
    assert made == [(0, 0), (16, 4)] and decoded == [(1, 0), (16, 0), (1, 1), (16, 4)] and len(first) == 6
    both = run("--batches", "1", "16", "--active", "4", "1")  # base and four adapters are there
    assert made == [(16, 4)] and decoded == [(1, 1), (16, 1)] and both[:6] == first and len(both) == 9
    more = run("--batches", "64", "16", "--active", "4")  # one batch is new, for both engines
    assert made == [(0, 0), (16, 4)] and decoded == [(64, 0), (64, 4)] and len(more) == 11
    assert more[-1]["base_step_us"] == 64000.0 and more[-1]["step_us"] == 64400.0
    assert run("--batches", "256", "--active", "4", "--time-limit", "0") == more and made == []
    decoded.clear()
    one = run("--batches", "1", "--active", "4", "--one-engine", "--out", str(tmp_path / "one.json"))
    assert one == more and made == [(16, 4)] and decoded == [(1, 0), (1, 1)]
    rows = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert [(row["rank"], row["active"], row["base_step_us"]) for row in rows if row["phase"] == "decode"] == [(0, 0, 1000.0), (16, 4, 1000.0)]
