"""What the serving benchmarks share: a load of requests of fixed lengths over adapters, and the usual figures of how it was served.

Names and definitions of the figures are those of SGLang's and vLLM's bench_serving: TTFT is the time to the first token, ITL the
time between two events of a stream, TPOT a request's time after its first token by its other tokens, all in milliseconds;
goodput counts the requests that kept every given limit. Knows no server and no engine.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DISTRIBUTIONS = ("uniform", "zipf", "distinct")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")  # vLLM's names in --goodput


@dataclass(frozen=True)
class Planned:
    """One request of a load. `adapter` None = the base model; `at` seconds after the start, 0 = as soon as there is room."""

    input_ids: list[int]
    output_len: int
    adapter: str | None = None
    at: float = 0.0


@dataclass
class Record:
    """How one request was served. Times in seconds; `itl` holds the gaps between its events."""

    adapter: str | None
    prompt_len: int
    output_len: int = 0
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    error: str | None = None

    def arrived(self, seconds: float) -> None:
        """An event with tokens, `seconds` after the request was sent."""
        if self.ttft:
            self.itl.append(seconds - self.latency)
        else:
            self.ttft = seconds
        self.latency = seconds

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / max(self.output_len - 1, 1)


def assign_adapters(count: int, names: Sequence[str | None], distribution: str, alpha: float, rng: random.Random) -> list[str | None]:
    """An adapter for each request: "uniform" and "zipf" (the k-th with weight k^-alpha) at random, "distinct" in turn."""
    if not names:
        return [None] * count
    if distribution == "distinct":
        return list(itertools.islice(itertools.cycle(names), count))
    weights = [(k + 1) ** -alpha if distribution == "zipf" else 1.0 for k in range(len(names))]
    return rng.choices(names, weights, k=count)


def make_load(
    adapters: Sequence[str | None], input_len: int, output_len: int, vocab: int, rng: random.Random, *, rate: float = float("inf"), range_ratio: float = 1.0
) -> list[Planned]:
    """A request of random ids for each of `adapters`, `rate` a second by Poisson. Lengths lie between `range_ratio` of the given ones and these."""
    load, at = [], 0.0
    for adapter in adapters:
        prompt = rng.randint(max(int(input_len * range_ratio), 1), input_len)
        output = rng.randint(max(int(output_len * range_ratio), 1), output_len)
        load.append(Planned([rng.randrange(3, vocab) for _ in range(prompt)], output, adapter, at))
        at += rng.expovariate(rate) if rate != float("inf") else 0.0
    return load


def summarize(records: Sequence[Record], duration: float, goodput: dict[str, float] | None = None) -> dict[str, Any]:
    """The figures of a load that took `duration` seconds. `goodput`: limits in ms by GOODPUT_METRICS."""
    done = [record for record in records if record.error is None]
    prompts, outputs = sum(record.prompt_len for record in done), sum(record.output_len for record in done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "input_throughput": prompts / duration,
        "output_throughput": outputs / duration,
        "total_throughput": (prompts + outputs) / duration,
    }
    if goodput:
        kept = [all(value <= goodput.get(name, float("inf")) for name, value in _limits(record).items()) for record in done]
        result["request_goodput"] = sum(kept) / duration
    series = {
        "ttft": [record.ttft for record in done],
        "tpot": [record.tpot for record in done if record.output_len > 1],
        "itl": [gap for record in done for gap in record.itl],
        "e2e_latency": [record.latency for record in done],
    }
    for name, values in series.items():
        for statistic, value in _statistics([1e3 * value for value in values]).items():
            result[f"{statistic}_{name}_ms"] = value
    return result


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def parse_goodput(entries: Sequence[str]) -> dict[str, float]:
    """vLLM's `ttft:200 tpot:50` (milliseconds) as a dict; ValueError names the entry at fault."""
    limits = {}
    for entry in entries:
        name, _, value = entry.partition(":")
        if name not in GOODPUT_METRICS or not value.replace(".", "", 1).isdecimal():
            raise ValueError(f"--goodput: expected {'|'.join(GOODPUT_METRICS)}:MILLISECONDS, got {entry!r}")
        limits[name] = float(value)
    return limits


def format_summary(result: dict[str, Any]) -> str:
    """The figures as the peers print them."""
    lines = [f"{'concurrency, adapters':32} {result.get('max_concurrency')}, {result.get('adapters')}"]
    lines += [f"{'requests completed / failed':32} {result['completed']} / {result['failed']} in {result['duration']:.2f} s"]
    rates = {
        "requests/s": "request_throughput",
        "goodput requests/s": "request_goodput",
        "output tokens/s": "output_throughput",
        "all tokens/s": "total_throughput",
        "share of the base's output": "retention",
    }
    lines += [f"{label:32} {result[key]:.2f}" for label, key in rates.items() if key in result]
    for name in ("ttft", "tpot", "itl", "e2e_latency"):
        mean, median, p99 = (result[f"{statistic}_{name}_ms"] for statistic in ("mean", "median", "p99"))
        lines.append(f"{name.upper() + ' ms, mean / p50 / p99':32} {mean:.2f} / {median:.2f} / {p99:.2f}")
    return "\n".join(lines)


def _limits(record: Record) -> dict[str, float]:
    return {"ttft": 1e3 * record.ttft, "tpot": 1e3 * record.tpot, "e2el": 1e3 * record.latency}


def _statistics(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"mean": float("nan"), "median": float("nan"), "std": float("nan"), "p99": float("nan")}
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "std": statistics.pstdev(values), "p99": percentile(values, 0.99)}
