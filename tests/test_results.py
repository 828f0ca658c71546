"""RESULTS.md and HISTORY.md against the files they are written from."""

from __future__ import annotations

import json
import re
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PAGES = {name: (BENCHMARKS / name).read_text() for name in ("RESULTS.md", "HISTORY.md")}


def test_every_result_file_is_named_and_every_named_file_is_there() -> None:
    there = {path.name for path in (BENCHMARKS / "results").iterdir()}
    named = {name for text in PAGES.values() for name in re.findall(r"results/([\w.-]+\.json)", text)}
    assert named == there


def test_a_file_is_of_the_commit_that_the_page_says() -> None:
    found = re.findall(r"at ([0-9a-f]{7})\s+\(`results/([\w.-]+\.json)`", PAGES["RESULTS.md"])
    assert found
    for commit, name in found:
        assert json.loads((BENCHMARKS / "results" / name).read_text())["commit"][:7] == commit, name


def test_the_page_stays_short_enough_to_be_read() -> None:
    assert len(PAGES["RESULTS.md"].splitlines()) <= 250
    assert len(PAGES["RESULTS.md"]) <= 30_000
