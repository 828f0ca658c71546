"""How every benchmark here measures and records.

Method (the one the peers' recorded figures were taken with, so that columns compare): a list of calls, each on its own set
of inputs, is captured in one CUDA graph, so that launches cost what they cost in serving and one replay touches more
memory than L2 holds; events around each replay; the median over replays divided by the number of calls. Kernel launch
gaps inside a graph are included (an empty kernel: about 1.2 us on an H200). What is compared to a few microseconds is captured
together and replayed in turn (`time_in_turn`): the chip's power state moves figures of the same kernels by up to 4 % over a run.

`Results` writes the one JSON schema of all benchmarks, row by row, so that a run that is cut short resumes.
Knows no kernel, no model shape and no peer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROTATED_BYTES = 200 << 20  # one replay touches at least this much, several times the 50 MB of L2 on Hopper
MAX_CALLS = 64  # calls in one graph


@dataclass(frozen=True)
class Timing:
    """Microseconds per call; low and high are the 5th and 95th percentile over replays."""

    us: float
    low_us: float
    high_us: float
    calls: int
    replays: int


def rotations(bytes_per_call: int, *, least: int = 2, most: int = 8) -> int:
    """How many input sets to rotate over so that one pass over them exceeds L2, within what memory and set-up time allow."""
    return max(least, min(most, math.ceil(ROTATED_BYTES / max(bytes_per_call, 1))))


def rotate(calls: Sequence[Callable[[], object]], count: int) -> list[Callable[[], object]]:
    """`count` calls that go round the given ones."""
    return [calls[i % len(calls)] for i in range(count)]


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls once in one graph. Each runs once before, eagerly on a side stream, so that compilation and handles stay out of the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_replays(replay: Callable[[], object], calls: int, *, budget_ms: float = 60.0, least: int = 5, most: int = 40) -> Timing:
    """Median time of one of the `calls` calls inside `replay`, over as many replays as fit the budget."""
    return _replay_in_turn([replay], [calls], budget_ms, least, most)[0]


def _replay_in_turn(replays: Sequence[Callable[[], object]], calls: Sequence[int], budget_ms: float, least: int, most: int) -> list[Timing]:
    """A timing for each replay, which holds so many calls; round by round, each once a round. The budget is for each of them."""

    def turns(rounds: int) -> list[list[float]]:  # milliseconds by replay and round
        events = [[(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in replays] for _ in range(rounds)]
        for events_of_round in events:
            for replay, (first, last) in zip(replays, events_of_round, strict=True):
                first.record()
                replay()
                last.record()
        torch.cuda.synchronize()
        return [[first.elapsed_time(last) for first, last in of_replay] for of_replay in zip(*events, strict=True)]

    turns(2)
    once = sum(elapsed for (elapsed,) in turns(1))
    rounds = max(least, min(most, int(budget_ms * len(replays) / max(once, 1e-3))))
    timings = []
    for times, count in zip(turns(rounds), calls, strict=True):
        per_call = sorted(elapsed * 1e3 / count for elapsed in times)
        timings.append(Timing(statistics.median(per_call), per_call[len(per_call) // 20], per_call[-1 - len(per_call) // 20], count, rounds))
    return timings


def time_in_turn(variants: Sequence[Sequence[Callable[[], object]]], *, count: int | None = None, budget_ms: float = 60.0) -> list[Timing]:
    """Median microseconds of one call of each variant: every variant's calls are a graph as in `time_calls`, and the graphs are replayed in turn.

    A replay must leave L2 behind, so that none finds what the one before it read; all graphs and what they read are in memory at once.
    """
    totals = [count or max(4, min(MAX_CALLS, len(calls))) for calls in variants]
    graphs = [capture(rotate(calls, total)) for calls, total in zip(variants, totals, strict=True)]
    timings = _replay_in_turn([graph.replay for graph in graphs], totals, budget_ms, 5, 40)
    for graph in graphs:
        graph.reset()
    return timings


def time_calls(calls: Sequence[Callable[[], object]], *, count: int | None = None, budget_ms: float = 60.0) -> Timing:
    """Median microseconds of one call, the calls rotated `count` times (default: at least 4, at most MAX_CALLS) in one captured graph."""
    return time_in_turn([calls], count=count, budget_ms=budget_ms)[0]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached in this run: bytes count read plus written."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    gemm_flops: float  # bf16 8192^3, ten products after three
    gemm_flops_sustained: float  # three hundred in a row: long flop-bound work runs at the power limit

    def floor_us(self, bytes_moved: float, flops: float = 0.0) -> float:
        """No version runs faster: bytes at the read rate or flops at the peak rate, whichever takes longer."""
        return max(bytes_moved / self.read_bytes_per_s, flops / self.gemm_flops) * 1e6


def measure_ceilings(device: torch.device, *, size: int = 8192, copy_bytes: int = 2 << 30) -> Ceilings:
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_replays(lambda: target.copy_(source), 1)
    words = source.view(torch.float32)
    read = time_replays(lambda: torch.amax(words), 1)
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    b = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(a)

    def products(count: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
        return 2.0 * size**3 * count / (begin.elapsed_time(end) * 1e-3)

    products(3)
    peak, sustained = products(10), products(300)
    return Ceilings(2 * copy_bytes / copy.us * 1e6, copy_bytes / read.us * 1e6, peak, sustained)


def package_versions(*, peer: str | None = None) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "peer": peer}


def current_commit() -> str:
    """The checkout's commit, with `+` when files differ from it; "unknown" in a bare copy of the tree."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if dirty else "")


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


class Deadline:
    """A wall-clock limit in seconds; None never ends. Rows run in order of priority until it is reached."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    def reached(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end


class Results:
    """One benchmark's JSON file. Rows are keyed by `key_fields`; a row that is already there is not measured again."""

    def __init__(self, path: Path, bench: str, key_fields: Sequence[str], settings: dict[str, Any], *, commit: str | None = None, peer: str | None = None):
        self.path = path
        self.key_fields = tuple(key_fields)
        self.record: dict[str, Any] = {
            "bench": bench,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": commit or current_commit(),
            "gpu": gpu_name(),
            "versions": package_versions(peer=peer),
            "settings": settings,
            "rows": [],
        }
        if path.exists():
            self._resume(json.loads(path.read_text()))

    def _resume(self, stored: dict[str, Any]) -> None:
        for field in ("bench", "commit", "gpu", "versions"):
            if stored[field] != self.record[field]:
                raise ValueError(
                    f"{self.path} was measured with {field} {stored[field]!r}, this run has {self.record[field]!r}: give another --out or remove the file"
                )
        self.record["settings"] = {**stored["settings"], **self.record["settings"]}
        self.record["rows"] = stored["rows"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.record["rows"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        wanted = tuple(key[field] for field in self.key_fields)
        return next((row for row in self.rows if tuple(row[field] for field in self.key_fields) == wanted), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append and write the file, atomically: a run killed here keeps every row before."""
        assert self.find(**{field: row[field] for field in self.key_fields}) is None, f"row {row} is there already"
        self.rows.append({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
        self.save()

    def set_ceilings(self, ceilings: Ceilings) -> None:
        self.record["settings"]["ceilings"] = asdict(ceilings)
        self.save()

    def stored_ceilings(self) -> Ceilings | None:
        found = self.record["settings"].get("ceilings")
        return Ceilings(**found) if found else None

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = {name: value for name, value in self.record.items() if name != "rows"}
        rows = ",\n".join("  " + json.dumps(row) for row in self.rows)  # one row a line: readable, and small diffs
        scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + rows + "\n]}\n")
        scratch.replace(self.path)


def default_path(bench: str) -> Path:
    gpu = gpu_name().replace("NVIDIA ", "").replace(" ", "-").lower()
    return Path(__file__).resolve().parent / "results" / f"{time.strftime('%Y-%m-%d', time.gmtime())}-{bench}-{gpu}.json"


def add_arguments(parser: argparse.ArgumentParser, bench: str) -> None:
    """The options all benchmarks share."""
    parser.add_argument("--out", type=Path, default=default_path(bench), help="JSON file; rows already in it are kept and not measured again")
    parser.add_argument("--time-limit", type=float, default=None, help="seconds after which no further row is started")
    parser.add_argument("--shapes", nargs="*", default=None, help="names of model shapes, default all")
    parser.add_argument("--tokens", nargs="*", type=int, default=None, help="values of M, default all")
    parser.add_argument("--commit", default=None, help="commit to record when run from a copy without .git")


def format_table(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> str:
    """Right-aligned text table; floats with two decimals, None as '-'."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [list(columns)] + [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
