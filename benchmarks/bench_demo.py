"""The embedded demo through HTTP: is every adapter right, what does batching gain, what does the prefix cache gain.

    ./run bench demo [--url http://127.0.0.1:30000]     without --url a server is started and stopped

Three numbers, for README.md and RESULTS.md. The model is tiny, so these show the server and its scheduling, not arithmetic:
- accuracy: exact answers on 200 held-out words each for base and adapters, one chat request a word, 32 at a time;
- batching: output tokens per second of 32 concurrent streams, base and all adapters mixed, against one at a time;
- prefix cache: time to first token on a long prompt whose beginning is cached, against the same prompt computed anew.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Iterable
from typing import Any

import httpx

from benchmarks.timing import current_commit, package_versions
from demo_tasks import ADAPTERS, LETTERS, TASKS, held_out_words
from tests.demo_server import demo_server

CONCURRENT = 32
LONG_PROMPT = 3800  # characters = tokens of the demo's tokenizer; its context is 4096


async def limited(jobs: Iterable[Awaitable[Any]], at_a_time: int) -> list[Any]:
    gate = asyncio.Semaphore(at_a_time)

    async def one(job: Awaitable[Any]) -> Any:
        async with gate:
            return await job

    return await asyncio.gather(*(one(job) for job in jobs))


async def chat(client: httpx.AsyncClient, model: str, word: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": word}], "temperature": 0, "max_tokens": 12}
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


async def accuracy(client: httpx.AsyncClient, count: int) -> dict[str, float]:
    words, right = held_out_words(count, seed=1), {}
    for task, answer in TASKS.items():
        found = await limited((chat(client, "demo" if task == "base" else task, word) for word in words), CONCURRENT)
        right[task] = sum(text == answer(word) for text, word in zip(found, words, strict=True)) / count
    return right


async def generate(client: httpx.AsyncClient, prompt: str, adapter: str | None, new_tokens: int) -> int:
    """One native request of exactly `new_tokens`; returns the tokens that came."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    response = await client.post("/generate", json={"text": prompt, "lora_path": adapter, "sampling_params": sampling})
    response.raise_for_status()
    return int(response.json()["meta_info"]["completion_tokens"])


async def tokens_per_second(client: httpx.AsyncClient, at_a_time: int, requests: int, new_tokens: int = 128) -> float:
    words, adapters = held_out_words(requests, seed=2), itertools.cycle((None, *ADAPTERS))
    began = time.perf_counter()
    tokens = await limited((generate(client, f"{word}>", next(adapters), new_tokens) for word in words), at_a_time)
    return sum(tokens) / (time.perf_counter() - began)


async def time_to_first_token(client: httpx.AsyncClient, prompt: str, adapter: str | None) -> tuple[float, int]:
    """Milliseconds to the first streamed chunk, and how many prompt tokens came from the cache."""
    body = {"text": prompt, "lora_path": adapter, "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}}
    began, first, cached = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or (time.perf_counter() - began) * 1e3
                cached = json.loads(line[6:])["meta_info"]["cached_tokens"]
    return first, cached


async def prefix_cache(client: httpx.AsyncClient, repeats: int) -> dict[str, float]:
    rng, cold, warm, cached = random.Random(3), [], [], 0
    for i in range(repeats):
        adapter = (None, *ADAPTERS)[i % (len(ADAPTERS) + 1)]
        prompt = "".join(rng.choice(LETTERS) for _ in range(LONG_PROMPT))
        cold.append((await time_to_first_token(client, prompt + "abc>", adapter))[0])
        milliseconds, cached = await time_to_first_token(client, prompt + "xyz>", adapter)
        warm.append(milliseconds)
    return {"cold_ms": statistics.median(cold), "cached_ms": statistics.median(warm), "cached_tokens": cached}


async def measure(url: str, words: int, requests: int, repeats: int) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=CONCURRENT)) as client:
        right = await accuracy(client, words)
        await tokens_per_second(client, CONCURRENT, CONCURRENT, 16)  # warm up
        alone = await tokens_per_second(client, 1, max(1, requests // 16))
        together = await tokens_per_second(client, CONCURRENT, requests)
        prefix = await prefix_cache(client, repeats)
    return {"accuracy": right, "tok_s_1": alone, f"tok_s_{CONCURRENT}": together, **prefix}


def report(result: dict[str, Any], words: int) -> None:
    print(f"right of {words} held-out words through HTTP:")
    for task, share in result["accuracy"].items():
        print(f"  {task:8} {share:7.1%}")
    alone, together = result["tok_s_1"], result[f"tok_s_{CONCURRENT}"]
    print(f"output tokens/s: {alone:.0f} at 1, {together:.0f} at {CONCURRENT} concurrent (base and {len(ADAPTERS)} adapters mixed): {together / alone:.1f}x")
    print(
        f"time to first token, {LONG_PROMPT} shared characters: {result['cold_ms']:.0f} ms computed, {result['cached_ms']:.0f} ms with "
        f"{result['cached_tokens']} tokens from the prefix cache: {result['cold_ms'] / result['cached_ms']:.1f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that serves the demo as ./run serve does; started here if not given")
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--requests", type=int, default=256, help="requests of the batching measurement")
    parser.add_argument("--repeats", type=int, default=7, help="long prompts of the prefix cache measurement")
    args = parser.parse_args()
    with contextlib.nullcontext(args.url) if args.url else demo_server() as url:
        result = asyncio.run(measure(url, args.words, args.requests, args.repeats))
    report(result, args.words)
    settings = {"words": args.words, "requests": args.requests, "concurrent": CONCURRENT, "prompt": LONG_PROMPT}
    print(json.dumps({"bench": "demo", "commit": current_commit(), "versions": package_versions(), "settings": settings, **result}))


if __name__ == "__main__":
    main()
