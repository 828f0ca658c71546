"""The serving benchmark: its figures on numbers known by hand, and a run against the embedded demo."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving_load import Record, assign_adapters, make_load, parse_goodput, percentile, summarize
from tests.demo_server import DEMO, ROOT, demo_server


def record(*events: float, tokens: int = 3, error: str | None = None) -> Record:
    one = Record("a", 10, tokens, error=error)
    for event in events:
        one.arrived(event)
    return one


def test_figures() -> None:
    records = [record(0.1, 0.2, 0.4), record(0.3, 0.4, 0.5), record(error="refused")]
    found = summarize(records, 2.0, {"ttft": 200.0, "tpot": 200.0})
    assert (found["completed"], found["failed"], found["total_input_tokens"], found["total_output_tokens"]) == (2, 1, 20, 6)
    assert found["request_throughput"] == 1.0 and found["output_throughput"] == 3.0 and found["request_goodput"] == 0.5
    expected = {
        "mean_ttft_ms": 200,
        "p99_ttft_ms": 300,
        "mean_tpot_ms": 125,
        "mean_itl_ms": 125,
        "median_itl_ms": 100,
        "p99_itl_ms": 200,
        "mean_e2e_latency_ms": 450,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert math.isnan(summarize([], 1.0)["p99_itl_ms"])
    assert percentile(range(1, 101), 0.99) == 100 and percentile(range(1, 101), 0.5) == 51


def test_goodput_limits() -> None:
    assert parse_goodput(["ttft:200", "tpot:12.5"]) == {"ttft": 200.0, "tpot": 12.5}
    for entry in ("itl:5", "ttft", "ttft:x"):
        with pytest.raises(ValueError, match=f"--goodput: expected .*got '{entry}'"):
            parse_goodput([entry])


def test_loads() -> None:
    rng, names = random.Random(0), [f"a{i}" for i in range(4)]
    assert assign_adapters(6, names, "distinct", 1.0, rng) == ["a0", "a1", "a2", "a3", "a0", "a1"]
    zipf = assign_adapters(4000, names, "zipf", 1.0, rng)
    uniform = assign_adapters(4000, names, "uniform", 1.0, rng)
    assert 1800 < zipf.count("a0") < 2050 and 400 < zipf.count("a3") < 560 and 900 < uniform.count("a0") < 1100
    assert assign_adapters(2, [], "zipf", 1.0, rng) == [None, None]
    load = make_load([None] * 500, 8, 4, 50, rng, rate=10.0, range_ratio=0.5)
    assert (
        load[0].at == 0 and 40 < load[-1].at < 60 and {len(one.input_ids) for one in load} == {4, 5, 6, 7, 8} and {one.output_len for one in load} == {2, 3, 4}
    )
    assert all(one.at == 0 and len(one.input_ids) == 8 for one in make_load(["a"] * 3, 8, 4, 50, rng))


def run(url: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_serving.py"), "--base-url", url, "--vocab-size", "90", "--disable-tqdm", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}, timeout=300)


def test_against_the_demo(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    common = ["--num-prompts", "24", "--random-input-len", "16", "--random-output-len", "12", "--output-file", str(out)]
    with demo_server("--log-level", "warning") as url:
        closed = run(url, *common, "--max-concurrency", "8", "--lora-request-distribution", "zipf", "--goodput", "e2el:60000", "--label", "closed")
        again = ["--request-rate", "6", "--lora-name", "upper", "none", "--label", "open", "--load-meanwhile", f"meanwhile={DEMO / 'upper'}"]
        paced = run(url, *common, *again)
        refused = run(url, "--num-prompts", "3", "--warmup-requests", "0", "--lora-name", "nobody")
    assert closed.returncode == 0 and paced.returncode == 0, closed.stderr + paced.stderr
    assert "TTFT ms, mean / p50 / p99" in closed.stdout and json.loads(closed.stdout.splitlines()[-1])["label"] == "closed"
    recorded = json.loads(out.read_text())
    assert recorded["bench"] == "serving" and [row["label"] for row in recorded["rows"]] == ["closed", "open"]
    for row in recorded["rows"]:
        assert (row["completed"], row["failed"], row["total_output_tokens"], row["total_input_tokens"]) == (24, 0, 24 * 12, 24 * 16)
        assert 0 < row["median_ttft_ms"] <= row["p99_ttft_ms"] <= row["p99_e2e_latency_ms"]  # a request without text before its end has one event
        assert row["mean_ttft_ms"] < row["mean_e2e_latency_ms"] and row["mean_itl_ms"] > 0
    assert recorded["rows"][0]["adapters"] == 6 and recorded["rows"][0]["request_goodput"] == recorded["rows"][0]["request_throughput"]
    assert recorded["rows"][1]["loads_meanwhile"] > 0
    assert refused.returncode == 1 and "failed: status 404" in refused.stdout and "'nobody' is not loaded" in refused.stdout
