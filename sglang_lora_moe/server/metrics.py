"""Prometheus metrics of one app, in its own registry.

Per-model series carry `model_name`: the base or an adapter, as a client names it. There are as many as loaded adapters
plus one, because a series begins with the first token of a request and is removed when its adapter is unloaded.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.front import Chunk, GenerateRequest

PREFIX = "sglang_lora_moe"
_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_ITL_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_E2E_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)

# gauge -> (key of the engine's stats, help)
_ENGINE_GAUGES = {
    "running_requests": ("running", "requests being computed"),
    "waiting_requests": ("waiting", "requests waiting for pages, tokens or an adapter slot"),
    "kv_pages": ("kv_pages_total", "pages of the KV cache"),
    "kv_pages_used": ("kv_pages_used", "KV cache pages that running requests hold"),
    "kv_pages_cached": ("kv_pages_cached", "KV cache pages kept for prefix sharing only"),
    "adapter_slots": ("slots_total", "adapter slots on the device"),
    "adapter_slots_used": ("slots_used", "adapter slots that hold an adapter"),
}


class Metrics:
    """Observes streams of chunks; adds what the engine's books say when scraped."""

    def __init__(self, base_name: str) -> None:
        self.registry = CollectorRegistry()
        self._base = base_name
        self._names: set[str] = set()  # of the models that have series; what comes after an adapter's unloading is not counted

        def counter(name: str, text: str, labels: tuple[str, ...] = ("model_name",)) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, ("model_name",), buckets=buckets, registry=self.registry)

        self._requests = counter("requests", "finished requests by how they ended, each of n samples counted", ("model_name", "finish_reason"))
        self._refused = counter("requests_refused", "requests that the engine refused, by HTTP status", ("status",))
        self._prompt = counter("prompt_tokens", "prompt tokens of accepted requests")
        self._cached = counter("cached_prompt_tokens", "prompt tokens taken from the prefix cache")
        self._generated = counter("generated_tokens", "tokens generated")
        self._ttft = histogram("time_to_first_token_seconds", "from the request's arrival to its first tokens, unless these are also its last", _TTFT_BUCKETS)
        self._inter = histogram("inter_token_seconds", "time from one token to the next of a sample", _ITL_BUCKETS)
        self._latency = histogram("request_seconds", "from the request's arrival to its end", _E2E_BUCKETS)
        self._gauges = {name: Gauge(f"{PREFIX}_{name}", text, registry=self.registry) for name, (_, text) in _ENGINE_GAUGES.items()}
        self._hit_rate = Gauge(f"{PREFIX}_prefix_hit_rate", "prompt tokens found in the prefix cache / prompt tokens looked up", registry=self.registry)
        self._adapters = Gauge(f"{PREFIX}_adapters_loaded", "adapters loaded, resident or not", registry=self.registry)
        self._bytes = Gauge(f"{PREFIX}_adapter_bytes", "size of an adapter's weights", ("model_name",), registry=self.registry)
        self._resident = Gauge(f"{PREFIX}_adapter_resident", "1 while the adapter is on the device", ("model_name",), registry=self.registry)

    async def observe(self, request: GenerateRequest, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        """Pass `chunks` on, counting them."""
        begin, name, is_first = time.perf_counter(), request.adapter or self._base, True
        last: dict[int, float] = {}  # sample -> when its last tokens came
        open_samples = set(range(request.n))
        try:
            async with aclosing(chunks) as items:
                async for chunk in items:
                    now = time.perf_counter()
                    if is_first:
                        is_first = False
                        self._names.add(name)
                        self._prompt.labels(name).inc(chunk.prompt_tokens)
                        self._cached.labels(name).inc(chunk.cached_tokens)
                        if request.stream or chunk.finish_reason is None:  # else the tokens were held back until the end
                            self._ttft.labels(name).observe(now - begin)
                    if chunk.token_ids:
                        self._count_tokens(name, chunk, now, last)
                    if chunk.finish_reason:
                        open_samples.discard(chunk.index)
                        self._end(name, chunk.finish_reason, now - begin)
                    yield chunk
        except RequestError as error:
            self._refused.labels(str(error.status)).inc()
            raise
        finally:
            if not is_first:
                for _ in open_samples:  # the client went away, or something failed
                    self._end(name, "abort", time.perf_counter() - begin)

    def forget(self, adapter: str) -> None:
        """Drop the series of an unloaded adapter."""
        if adapter not in self._names:
            return
        self._names.remove(adapter)
        for metric in (self._requests, self._prompt, self._cached, self._generated, self._ttft, self._inter, self._latency):
            metric.remove_by_labels({"model_name": adapter})

    def render(self, stats: dict[str, Any], adapters: dict[str, dict[str, Any]]) -> bytes:
        """The text of /metrics, given the engine's books."""
        for name, (key, _) in _ENGINE_GAUGES.items():
            self._gauges[name].set(stats.get(key, 0))
        self._hit_rate.set(stats.get("prefix_hit_tokens", 0) / max(stats.get("prefix_query_tokens", 0), 1))
        self._adapters.set(len(adapters))
        self._bytes.clear()
        self._resident.clear()
        for name, record in adapters.items():
            self._bytes.labels(name).set(record["nbytes"])
            self._resident.labels(name).set(bool(record["resident"]))
        return generate_latest(self.registry)

    def _count_tokens(self, name: str, chunk: Chunk, now: float, last: dict[int, float]) -> None:
        if name not in self._names:
            return
        count, previous = len(chunk.token_ids), last.get(chunk.index)
        self._generated.labels(name).inc(count)
        last[chunk.index] = now
        if previous is not None:
            for _ in range(count):
                self._inter.labels(name).observe((now - previous) / count)

    def _end(self, name: str, reason: str, seconds: float) -> None:
        if name in self._names:
            self._requests.labels(name, reason).inc()
            self._latency.labels(name).observe(seconds)
