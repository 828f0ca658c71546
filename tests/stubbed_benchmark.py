"""Runs a benchmark of expert layers with its measurements replaced, to see what it would measure beside what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import timing

Key = tuple[int, int, int]  # M, rank, active


def stub(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *fixed: str) -> tuple[Callable[..., list[Key]], list[list[Key]]]:
    """(a run with further arguments, which returns the rows of `out`; the groups measured so far)."""
    measured: list[list[Key]] = []

    def measure(rows, ceilings, device):
        measured.append([(row.tokens, row.rank, row.active) for row in rows])
        return [{**bench.key_of(row), "us": 1.0} for row in rows]

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(timing, "measure_ceilings", lambda device: timing.Ceilings(4e12, 4e12, 8e14, 7e14))

    def run(*arguments: str) -> list[Key]:
        monkeypatch.setattr("sys.argv", ["bench", "--out", str(out), *fixed, *arguments])
        bench.main()
        return [(row["M"], row["rank"], row["active"]) for row in json.loads(out.read_text())["rows"]]

    return run, measured
