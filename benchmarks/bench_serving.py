"""A serving benchmark over HTTP, for any server that speaks OpenAI's API: latencies, throughput and goodput of a load over adapters.

    ./run bench serving --max-concurrency 32                                          against the embedded demo, started and stopped here
    ./run bench serving --base-url http://127.0.0.1:8000 --model NAME --lora-name A B against a running server, any OpenAI-compatible one
    ./run bench serving --base-url ... --max-concurrency 1 16 64 --retention           one row each, of the base model and of the adapters
    ./run bench serving --serve "--model-path DIR --lora-paths a=DIR b=DIR"           starts our server with these flags

Options and figures have the names of SGLang's and vLLM's bench_serving. Prompts are random token ids of fixed length, answers have
fixed lengths too (ignore_eos). Requests keep --max-concurrency busy, or arrive by Poisson at --request-rate. ITL is measured
between the events of a stream, so a server that sends several tokens at once looks burstier than it computes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx
from tqdm import tqdm

from benchmarks.serving_load import DISTRIBUTIONS, Planned, Record, assign_adapters, format_summary, make_load, parse_goodput, summarize
from benchmarks.timing import Results
from tests.demo_server import demo_flags, running_server

KEYS = ("label", "model", "adapters", "popularity", "input", "output", "max_concurrency", "request_rate")
DEMO_VOCAB, OTHER_VOCAB = 90, 1000  # ids that every tokenizer has


async def ask(url: SplitResult, model: str, one: Planned, headers: dict[str, str], extra: dict[str, Any]) -> Record:
    """One streamed completion, on a connection of its own. Not with httpx, which takes longer for an event than the server does."""
    body = {
        "model": one.adapter or model, "prompt": one.input_ids, "max_tokens": one.output_len, "temperature": 0.0, "stream": True,
        "stream_options": {"include_usage": True}, **extra,
    }  # fmt: skip
    content, record, begin = json.dumps(body).encode(), Record(one.adapter, len(one.input_ids)), time.perf_counter()
    head = [f"POST {url.path}/v1/completions HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), f"Content-Length: {len(content)}", "", ""]
    usage: dict[str, Any] | None = None
    reader, writer = await asyncio.open_connection(url.hostname, url.port or {"https": 443}.get(url.scheme, 80), ssl=url.scheme == "https" or None)
    try:
        writer.write("\r\n".join(head).encode() + content)
        status = (await reader.readline()).split()[1].decode()
        fields = [line.lower() async for line in until_empty(reader)]
        pieces = chunks(reader) if any(line.startswith(b"transfer-encoding:") and b"chunked" in line for line in fields) else whole(reader)
        if status != "200":
            record.error = f"status {status}: {b''.join([piece async for piece in pieces]).decode(errors='replace')[:200]}"
            return record
        async for event in events(pieces):
            if event.get("choices"):
                record.arrived(time.perf_counter() - begin)
            usage = event.get("usage") or usage
            record.error = str(event["error"])[:200] if event.get("error") else record.error
    finally:
        writer.close()
    if record.error is None and (usage is None or not record.ttft):
        record.error = "the stream ended without tokens or without its usage"
    if record.error is None and usage is not None:
        record.output_len, record.prompt_len = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
    return record


async def until_empty(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a head."""
    while line := (await reader.readline()).strip():
        yield line


async def chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of a body in HTTP's chunked form."""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def whole(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of a body that ends with its connection."""
    while piece := await reader.read(1 << 16):
        yield piece


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


async def reload(client: httpx.AsyncClient, adapter: str) -> None:
    """Load and unload NAME=PATH."""
    name, _, path = adapter.partition("=")
    for call, body in (("load", {"lora_name": name, "lora_path": path}), ("unload", {"lora_name": name})):
        (await client.post(f"/v1/{call}_lora_adapter", json=body)).raise_for_status()


async def keep_loading(client: httpx.AsyncClient, adapter: str) -> int:
    """`reload` again and again until cancelled; how often."""
    loads = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await reload(client, adapter)
            loads += 1
    return loads


async def run_load(
    url: str, model: str, load: list[Planned], args: argparse.Namespace, concurrency: int | None, quiet: bool = False
) -> tuple[list[Record], float, int]:
    """All requests of `load`, the seconds that they took together, and how often an adapter was loaded meanwhile."""
    extra = {} if args.disable_ignore_eos else {"ignore_eos": True}
    extra |= json.loads(args.extra_request_body)
    key = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    parts = urlsplit(url)
    headers = {"Host": parts.netloc, "Content-Type": "application/json", "Connection": "close"} | key
    room = asyncio.Semaphore(concurrency or len(load))
    bar = tqdm(total=len(load), desc="requests", disable=quiet or args.disable_tqdm)

    async def one(planned: Planned) -> Record:
        await asyncio.sleep(max(begin + planned.at - time.perf_counter(), 0.0))
        async with room:
            try:
                record = await asyncio.wait_for(ask(parts, model, planned, headers, extra), args.timeout)
            except (OSError, ValueError, LookupError, EOFError, asyncio.TimeoutError) as error:  # no connection, or an answer that is not HTTP
                record = Record(planned.adapter, len(planned.input_ids), error=f"{type(error).__name__}: {error}")
        bar.update()
        return record

    async with httpx.AsyncClient(base_url=url, headers=key, timeout=args.timeout) as client:
        loading = None
        if args.load_meanwhile and not quiet:
            await reload(client, args.load_meanwhile)  # the first starts the process that reads files
            loading = asyncio.ensure_future(keep_loading(client, args.load_meanwhile))
            await asyncio.sleep(0)
        begin = time.perf_counter()
        records = await asyncio.gather(*(one(planned) for planned in load))
        seconds = time.perf_counter() - begin
        loads = 0
        if loading is not None:
            loading.cancel()
            loads = await loading
    bar.close()
    return list(records), seconds, loads


def served_models(url: str, args: argparse.Namespace) -> tuple[str, list[str]]:
    """The base model's name and the adapters' that /v1/models lists."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    response = httpx.get(f"{url}/v1/models", headers=headers, timeout=30)
    response.raise_for_status()
    cards = response.json()["data"]
    base = next((card["id"] for card in cards if not card.get("parent")), cards[0]["id"])
    return base, [card["id"] for card in cards if card.get("parent")]


def measure(url: str, args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Warm up, then run a load for each of --max-concurrency: rows for the results file, and what went wrong in each."""
    model, loaded = served_models(url, args)
    model = args.model or model
    names: list[str | None] = list(loaded) if args.lora_name == ["all"] else list(args.lora_name)
    names = [None if name in ("none", model) else name for name in names]
    rng = random.Random(args.seed)
    lengths = args.random_input_len, args.random_output_len, args.vocab_size
    if args.warmup_requests:
        warm = make_load([(names or [None])[i % max(len(names), 1)] for i in range(args.warmup_requests)], *lengths, random.Random(args.seed))
        asyncio.run(run_load(url, model, warm, args, args.warmup_requests, quiet=True))
    for concurrency in args.max_concurrency:
        count = args.num_prompts if args.prompts_per_slot is None or concurrency is None else args.prompts_per_slot * concurrency
        throughput = None
        for some in [[], names] if args.retention else [names]:
            adapters = assign_adapters(count, some, args.lora_request_distribution, args.lora_zipf_alpha, rng)
            load = make_load(adapters, *lengths, rng, rate=args.request_rate, range_ratio=args.random_range_ratio)
            records, seconds, loads = asyncio.run(run_load(url, model, load, args, concurrency))
            row = {
                "label": args.label, "model": model, "adapters": len(some), "popularity": args.lora_request_distribution if some else "none",
                "input": args.random_input_len, "output": args.random_output_len, "max_concurrency": concurrency,
                "request_rate": "inf" if args.request_rate == float("inf") else args.request_rate, "loads_meanwhile": loads,
                **summarize(records, seconds, parse_goodput(args.goodput)),
            }  # fmt: skip
            if args.retention:
                throughput = throughput or row["output_throughput"]
                row["retention"] = row["output_throughput"] / throughput
            yield row, [record.error for record in records if record.error is not None]


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """The address to ask: as given, or of a server that runs meanwhile."""
    if args.base_url:
        yield args.base_url.rstrip("/")
        return
    with running_server(*(shlex.split(args.serve) if args.serve else [*demo_flags(), "--log-level", "warning"])) as url:
        yield url


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--base-url", help="a running server; without it one is started")
    where.add_argument("--serve", metavar="FLAGS", help="start our server with these flags; without it, and without --base-url, the embedded demo's")
    parser.add_argument("--model", help="base model in requests; the first of /v1/models if not given")
    parser.add_argument("--api-key")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--random-input-len", type=int, default=64)
    parser.add_argument("--random-output-len", type=int, default=64)
    parser.add_argument("--random-range-ratio", type=float, default=1.0, help="lengths are drawn between this share of the above and these; 1 = fixed")
    parser.add_argument("--request-rate", type=float, default=float("inf"), help="requests a second (Poisson); inf = as many as may run")
    parser.add_argument("--max-concurrency", type=int, nargs="+", default=[None], help="most requests at a time, one run for each; no limit if not given")
    parser.add_argument("--prompts-per-slot", type=int, help="instead of --num-prompts: so many times --max-concurrency")
    parser.add_argument("--retention", action="store_true", help="run each load for the base model first: the share of its throughput that adapters keep")
    parser.add_argument("--lora-name", nargs="*", default=["all"], help="adapters to ask for; 'none' is the base model, 'all' (default) what /v1/models lists")
    parser.add_argument(
        "--lora-request-distribution", choices=DISTRIBUTIONS, default="uniform", help="zipf: the k-th name with weight k^-alpha; distinct: in turn"
    )
    parser.add_argument("--lora-zipf-alpha", type=float, default=1.0)
    parser.add_argument("--goodput", nargs="*", default=[], metavar="METRIC:MS", help="limits such as ttft:200 tpot:50 e2el:3000")
    parser.add_argument("--load-meanwhile", metavar="NAME=PATH", help="load and unload this adapter all the time during the run")
    parser.add_argument("--warmup-requests", type=int, default=8)
    parser.add_argument("--disable-ignore-eos", action="store_true", help="for servers that do not know ignore_eos; answers may then be shorter")
    parser.add_argument("--extra-request-body", default="{}", metavar="JSON", help="fields to add to every request")
    parser.add_argument("--vocab-size", type=int, help="prompts are ids below this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a request has failed")
    parser.add_argument("--output-file", type=Path, help="add the figures as a row to this JSON file")
    parser.add_argument("--label", default="", help="what the row is called in it")
    parser.add_argument("--disable-tqdm", action="store_true")
    args = parser.parse_args()
    try:
        parse_goodput(args.goodput)
    except ValueError as error:
        parser.error(str(error))
    args.vocab_size = args.vocab_size or (OTHER_VOCAB if args.base_url or args.serve else DEMO_VOCAB)
    return args


def main() -> int:
    args = parse_arguments()
    settings = {"warmup": args.warmup_requests, "seed": args.seed, "goodput": args.goodput}
    results = Results(args.output_file, "serving", KEYS, settings) if args.output_file is not None else None
    completed = True
    with server(args) as url:
        for row, errors in measure(url, args):
            print(format_summary(row))
            for error in errors[:5]:
                print(f"failed: {error}")
            if results is not None:
                results.add(row)
            rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            print(json.dumps({"bench": "serving"} | rounded), flush=True)
            completed &= row["completed"] > 0
    return 0 if completed else 1


if __name__ == "__main__":
    raise SystemExit(main())
