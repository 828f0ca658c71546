"""Soak: many random requests at once while adapters come and go, then the books must be even and every answer right.

    PYTHONPATH=examples python -m benchmarks.soak       # 2,000 requests at 32 concurrent against the embedded demo
    python -m benchmarks.soak --url http://HOST:PORT --adapter NAME=PATH --adapter NAME=PATH ...   # against a running server

Requests take a random prompt, adapter, length and kind (greedy or seeded); a tenth is aborted, by closing the connection
or by /abort_request. Meanwhile one task loads and unloads adapters, and one name gets other content each time, in place or after an unload.
Every finished answer must equal the answer of the same request alone, and at the end no page and no slot may be held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

SWAPPED = "soak-swapped"  # the name that stands for another adapter after each reload
# of the demo server: fewer slots than adapters, fewer in host memory than loaded, and a cache that forces retractions
LOCAL_SLOTS, LOCAL_HOST, LOCAL_TOKENS = 3, 4, 640


@dataclass(frozen=True)
class Options:
    requests: int = 2000
    concurrency: int = 32
    abort_share: float = 0.1
    max_tokens: int = 48
    prompts: int = 16
    seed: int = 0
    admin_key: str | None = None


@dataclass(frozen=True)
class Case:
    """One way to ask. `path` is the directory of the adapter's content, None for the base model."""

    prompt: int
    path: str | None
    seed: int | None  # None = greedy


@dataclass
class Report:
    finished: int = 0
    aborted: int = 0
    refused_404: int = 0  # of adapters that were unloaded at that moment
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    reloads: int = 0
    seconds: float = 0.0
    peaks: dict[str, int] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.wrong and not self.leaks and self.finished > 0


class Soak:
    """`adapters`: name -> path. The first half stays loaded, the others come and go."""

    def __init__(self, client: httpx.AsyncClient, adapters: dict[str, str], options: Options) -> None:
        self.client, self.adapters, self.options = client, adapters, options
        self.random = random.Random(options.seed)
        names = list(adapters)
        self.moving = names[len(names) // 2 :]
        self.loaded = set(names)  # as far as this client knows: requests may race with the changes
        self.prompts: list[list[int]] = []
        self.solo: dict[Case, list[int]] = {}
        self.report = Report()
        self.over = False

    async def run(self) -> Report:
        await self._make_prompts()
        for name, path in self.adapters.items():
            await self._post("/load_lora_adapter", lora_name=name, lora_path=path)
        await self._post("/load_lora_adapter", lora_name=SWAPPED, lora_path=self.adapters[self.moving[0]])
        await self._solo_runs()
        begin = time.perf_counter()
        churn, watch = asyncio.ensure_future(self._churn()), asyncio.ensure_future(self._watch())
        todo = iter(range(self.options.requests))
        await asyncio.gather(*(self._worker(todo) for _ in range(self.options.concurrency)))
        self.report.seconds = time.perf_counter() - begin
        self.over = True
        await churn
        await watch
        await self._check_books()
        return self.report

    # ---- what is asked ----------------------------------------------------------------------------------------------
    async def _make_prompts(self) -> None:
        """Random ids, half of the prompts behind one long prefix, so that the prefix cache has work."""
        info = (await self.client.get("/model_info")).json()
        ids = [i for i in range(3, min(info["vocab_size"], 95)) if i not in info["eos_token_ids"]]
        prefix = self.random.choices(ids, k=48)
        for i in range(self.options.prompts):
            own = self.random.choices(ids, k=self.random.randint(1, 40))
            self.prompts.append(prefix + own if i % 2 else own)

    async def _solo_runs(self) -> None:
        """The answer to each case with nothing else running and nothing cached."""
        for prompt in range(self.options.prompts):
            for name, path in [(None, None), *self.adapters.items()]:
                for seed in (None, 1):
                    await self._post("/flush_cache")
                    body = self._body(Case(prompt, path, seed), name, self.options.max_tokens)
                    self.solo[Case(prompt, path, seed)] = (await self._post("/generate", **body))["output_ids"]

    def _body(self, case: Case, name: str | None, max_tokens: int) -> dict[str, Any]:
        sampling = {"temperature": 0.0} if case.seed is None else {"temperature": 0.8, "seed": case.seed, "top_p": 0.95}
        return {"input_ids": self.prompts[case.prompt], "lora_path": name, "sampling_params": sampling | {"max_new_tokens": max_tokens, "ignore_eos": True}}

    async def _worker(self, todo: Any) -> None:
        for number in todo:
            name = self.random.choice([None, *self.adapters, SWAPPED])
            prompt, seed = self.random.randrange(self.options.prompts), self.random.choice([None, None, 1])
            tokens = self.random.randint(1, self.options.max_tokens)
            paths = [self.adapters[moving] for moving in self.moving] if name == SWAPPED else [self.adapters[name] if name else None]
            body = self._body(Case(prompt, paths[0], seed), name, tokens) | {"rid": f"soak-{self.options.seed}-{number}"}
            if self.random.random() < self.options.abort_share:
                await self._aborted(body)
            else:
                await self._finished(body, [self.solo[Case(prompt, path, seed)][:tokens] for path in paths])

    async def _finished(self, body: dict[str, Any], expected: list[list[int]]) -> None:
        """Ask, streaming or not, and compare with what may come (one answer per content the name may stand for)."""
        if self.random.random() < 0.5:
            response = await self.client.post("/generate", json=body)
            status, answer = response.status_code, response.json()
        else:
            async with self.client.stream("POST", "/generate", json=body | {"stream": True}) as stream:
                lines = [line async for line in stream.aiter_lines() if line]
                status = stream.status_code
            answer = json.loads(lines[-2].removeprefix("data: ")) if status == 200 else json.loads(lines[0])
        if status == 404 and body["lora_path"] in [*self.moving, SWAPPED]:
            self.report.refused_404 += 1
        elif status != 200 or "error" in answer:
            self.report.wrong.append(f"{body['rid']}: status {status}: {answer}")
        elif answer["output_ids"] not in expected:
            self.report.wrong.append(f"{body['rid']} ({body['lora_path']}): {answer['output_ids']} instead of {' or '.join(map(str, expected))}")
        else:
            self.report.finished += 1
            self.report.tokens += len(answer["output_ids"])

    async def _aborted(self, body: dict[str, Any]) -> None:
        """Leave the stream after some events, before the first one, or have it aborted by name."""
        events = self.random.randint(0, 5)
        by_name = self.random.random() < 0.3
        body["sampling_params"]["max_new_tokens"] = self.options.max_tokens * 4
        self.report.aborted += 1
        if events == 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.client.post("/generate", json=body), self.random.random() * 0.05)
            return
        async with self.client.stream("POST", "/generate", json=body | {"stream": True}) as stream:
            async for _ in stream.aiter_lines():
                events -= 1
                if events <= 0 and not by_name:
                    return
                if events == 0:
                    await self._post("/abort_request", rid=body["rid"])

    # ---- what changes meanwhile -------------------------------------------------------------------------------------
    async def _churn(self) -> None:
        """Unload and load again; `SWAPPED` gets the content of the next moving adapter each time."""
        turn = 0
        while not self.over:
            await asyncio.sleep(0.02)
            name = self.moving[turn % len(self.moving)]
            turn += 1
            await self._post("/unload_lora_adapter", lora_name=name)
            await self._post("/load_lora_adapter", lora_name=name, lora_path=self.adapters[name])
            swapped = {"lora_name": SWAPPED, "lora_path": self.adapters[self.moving[turn % len(self.moving)]], "pinned": self.random.random() < 0.2}
            if self.random.random() < 0.5:
                await self._post("/unload_lora_adapter", lora_name=SWAPPED)
                await self._post("/load_lora_adapter", **swapped)
            else:
                await self._post("/load_lora_adapter", **swapped, load_inplace=True)
            self.report.reloads += 2
            if turn % 5 == 0:
                await self._post("/flush_cache")

    async def _watch(self) -> None:
        """Remember the largest values of the books."""
        while not self.over:
            for key, value in (await self._stats()).items():
                if isinstance(value, int):
                    self.report.peaks[key] = max(self.report.peaks.get(key, 0), value)
            await asyncio.sleep(0.2)

    # ---- the end ----------------------------------------------------------------------------------------------------
    async def _check_books(self) -> None:
        """Nothing runs, so nothing may be held; with all adapters unloaded and the cache flushed all is free."""
        for name in [*self.adapters, SWAPPED]:
            await self._post("/unload_lora_adapter", lora_name=name)
        deadline = time.monotonic() + 10
        while (stats := await self._stats())["running"] + stats["waiting"] and time.monotonic() < deadline:
            await asyncio.sleep(0.05)  # the last disconnects may still be on their way
        even = {"running": 0, "waiting": 0, "kv_pages_used": 0, "slots_running": 0, "slots_used": 0, "adapters_unloading": []}
        self.report.leaks += [f"{key} is {stats[key]}, not {value}" for key, value in even.items() if stats[key] != value]
        if stats["kv_pages_free"] + stats["kv_pages_cached"] != stats["kv_pages_total"]:
            self.report.leaks.append(f"pages: {stats['kv_pages_free']} free + {stats['kv_pages_cached']} cached of {stats['kv_pages_total']}")
        await self._post("/flush_cache")
        stats = await self._stats()
        if stats["kv_pages_free"] != stats["kv_pages_total"]:
            self.report.leaks.append(f"after a flush {stats['kv_pages_free']} of {stats['kv_pages_total']} pages are free")

    async def _stats(self) -> dict[str, Any]:
        return dict((await self.client.get("/server_info")).json()["stats"])

    async def _post(self, path: str, **body: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.options.admin_key}"} if self.options.admin_key else {}
        response = await self.client.post(path, json=body, headers=headers)
        if response.status_code != 200:
            raise RuntimeError(f"{path} {body}: {response.status_code} {response.text}")
        return response.json()


async def soak(url: str, adapters: dict[str, str], options: Options) -> Report:
    """Run it against the server at `url`; `adapters` may be loaded there already."""
    if len(adapters) < 2:
        raise ValueError("a soak needs at least two adapters")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await Soak(client, adapters, options).run()


@contextlib.asynccontextmanager
async def demo() -> AsyncIterator[tuple[str, dict[str, str]]]:
    """The embedded demo, served by a process of its own."""
    from demo_tasks import ADAPTERS
    from tests.demo_server import DEMO, demo_server

    limits = ("--max-loras-per-batch", str(LOCAL_SLOTS), "--max-loaded-loras", str(LOCAL_HOST), "--max-total-tokens", str(LOCAL_TOKENS))
    with demo_server(*limits, "--log-level", "warning") as url:
        yield url, {name: str(DEMO / name) for name in ADAPTERS}


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it the embedded demo is served")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="an adapter that the server at --url can load")
    for name, value in asdict(Options()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value) if value is not None else str, default=value)
    given = vars(parser.parse_args())
    url, named = given.pop("url"), given.pop("adapter")
    options = Options(**given)
    if url is None:
        async with demo() as (url, adapters):
            report = await soak(url, adapters, options)
    else:
        report = await soak(url, dict(entry.split("=", 1) for entry in named), options)
    for line in report.wrong[:20] + report.leaks:
        print(line)
    print(json.dumps({"bench": "soak", "clean": report.is_clean, "options": asdict(options)} | asdict(report) | {"wrong": len(report.wrong)}))
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
