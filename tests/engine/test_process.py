"""The engine process and `AsyncEngine`: the same answers as in-process, control, aborts, crashes, the parent's death."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from sglang_lora_moe.config import Config
from sglang_lora_moe.core import (
    Abort,
    FlushCache,
    FrontMessage,
    GetStats,
    LoadAdapter,
    LogprobOptions,
    Reply,
    RequestError,
    SamplingParams,
    Submit,
    TokenLogprob,
    TokenOutput,
    UnloadAdapter,
)
from sglang_lora_moe.engine import child
from sglang_lora_moe.engine.front import Chunk, GenerateRequest
from sglang_lora_moe.engine.process import AsyncEngine, decode_from_engine, decode_to_engine, encode, encode_from_engine, encode_message
from tests.engine.models import adapter_path, model_path, other_adapter_path, reference_greedy

T = TypeVar("T")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_new_tokens=480, ignore_eos=True)
MANY = 32  # samples of LONG, which run for seconds: longer than anybody is held up


def config(**fields: Any) -> Config:
    return Config(model_path=str(model_path()), **({"page_size": 4, "max_total_tokens": 4096} | fields))


class Session:
    """An engine and the event loop it lives in."""

    def __init__(self, **fields: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = self.run(AsyncEngine.start(config(**fields)))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 180))

    def close(self) -> None:
        self.run(self.engine.shutdown())
        self.loop.close()

    async def collect(self, **fields: Any) -> list[Chunk]:
        return [chunk async for chunk in self.engine.generate(GenerateRequest(**({"input_ids": [1, 5, 9], "sampling": GREEDY} | fields)))]

    async def settled(self) -> dict[str, Any]:
        """Stats, once nothing runs any more."""
        while True:
            stats = await self.engine.stats()
            if not stats["running"] + stats["waiting"]:
                return stats
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    made = Session(lora_paths=[f"r8={adapter_path('r8')}", f"r4={adapter_path('r4')}"], max_loras_per_batch=2, max_lora_rank=8)
    yield made
    made.close()


def ids_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def test_messages_survive_their_encoding() -> None:
    sampling = SamplingParams(seed=2**62, logit_bias={5: -1.5}, stop_token_ids=[7])
    sent: list[FrontMessage] = [
        Submit("a", [1, 2], sampling, "x", LogprobOptions(3, 0)),
        Abort(""),
        Abort("a", "stop"),
        LoadAdapter("b", "n", "/p", True),
        UnloadAdapter("c", "n"),
        FlushCache("d"),
        GetStats("e"),
    ]
    assert decode_to_engine(encode([encode_message(message) for message in sent])) == sent
    said = [
        TokenOutput("a", [3], 2, 1, "stop", 3, [TokenLogprob(3, -0.5, [(3, -0.5), (4, -math.inf)])], [TokenLogprob(1, None)]),
        Reply("b", {"x": [1, {"y": None}]}, "no", 404, "p", "c", 5),
    ]
    assert decode_from_engine(encode_from_engine(list(said))) == said[::-1]  # refusals come before what other samples of the request have said
    strange = Reply("b", {"warnings": ["\ud800"]}, "\udce9.bin")  # as files may name things
    assert decode_from_engine(encode_from_engine([said[0], strange])) == [Reply("b", {"warnings": ["?"]}, "?.bin"), said[0]]


def test_answers_equal_transformers(session: Session) -> None:
    async def several() -> list[list[Chunk]]:
        names = [None, "r8", "r4"] * 3
        return await asyncio.gather(*(session.collect(adapter=name, input_ids=[1, 5, 9 + i], stream=i % 2 == 0) for i, name in enumerate(names)))

    for i, chunks in enumerate(session.run(several())):
        assert ids_of(chunks) == reference_greedy([None, "r8", "r4"][i % 3], [1, 5, 9 + i], 12, ignore_eos=True)
        assert chunks[-1].finish_reason == "length" and (len(chunks) > 1) == (i % 2 == 0)


def test_a_long_prompt_stops_nobody(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that take the tokenizer long are tokenized beside the event loop, and refused there if they are too long."""

    enough = threading.Event()

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        assert enough.wait(50), "the event loop waits for the tokenizer"
        return [1] * len(text)

    async def turns_meanwhile() -> int:
        request = GenerateRequest(prompt="a" * 600)
        refused, turns = asyncio.ensure_future(anext(session.engine.generate(request, in_thread=True))), 0
        while not refused.done():
            await asyncio.sleep(0.001)
            turns += 1
            if turns > 5:
                enough.set()
        with pytest.raises(RequestError, match="the prompt has 600 tokens; .* exceeds the 512 ") as error:
            refused.result()
        assert error.value.code == "context_length_exceeded"
        return turns

    monkeypatch.setattr(session.engine._front.tokenizer, "encode", encode)
    assert session.run(turns_meanwhile()) > 5


def test_facts_of_the_model(session: Session) -> None:
    engine = session.engine
    assert engine.healthy and engine.tokenizer.encode("a")
    assert engine.config.device == "cpu" and engine.config.dtype == "float32" and engine.config.context_length == 512
    info = engine.model_info
    assert (info["max_model_len"], info["vocab_size"], info["eos_token_ids"], info["served_model_name"]) == (512, 128, [2], model_path().name)
    assert info["architectures"] == ["Qwen3MoeForCausalLM"]


def test_control(session: Session) -> None:
    async def unload_waits() -> bool:
        """For a running request; False if that ended before the engine heard of the unload."""
        engine = session.engine
        loaded = await engine.load_adapter("new", str(other_adapter_path(0)))
        assert not loaded["already_loaded"] and (await engine.load_adapter("new", str(other_adapter_path(0))))["already_loaded"]
        with pytest.raises(RequestError, match="other content") as error:
            await engine.load_adapter("new", str(other_adapter_path(1)))
        assert (error.value.status, error.value.param) == (400, "name")
        assert {record["name"] for record in await engine.adapters()} == {"r8", "r4", "new"}
        running = engine.generate(GenerateRequest(input_ids=[1, 5, 9], sampling=LONG, adapter="new", stream=True))
        await anext(running)
        calls = (engine.unload_adapter("new"), session.collect(adapter="new"), engine.stats())  # the engine hears of them in this order, before its next step
        unload, late, stats = [asyncio.create_task(call) for call in calls]
        with pytest.raises(RequestError) as error:
            await late
        assert error.value.status == 404 and "r4, r8" in error.value.message
        assert [chunk async for chunk in running][-1].finish_reason == "length"
        assert (await unload)["freed_bytes"] > 0
        assert (await engine.flush_cache())["flushed_pages"] > 0
        return (await stats)["adapters_unloading"] == ["new"]

    assert any(session.run(unload_waits()) for _ in range(10)), "each request had ended before the unload"


def test_values_without_an_encoding_are_refused(session: Session) -> None:
    with pytest.raises(RequestError, match="surrogates not allowed"):
        session.run(session.engine.load_adapter("\ud800", "/x"))
    with pytest.raises(RequestError, match="surrogates not allowed"):
        session.run(session.collect(adapter="\ud800"))
    assert session.engine.healthy and session.run(session.settled())


def test_refusals_come_before_the_first_chunk(session: Session) -> None:
    for fields, param in (({"sampling": SamplingParams(top_p=2.0)}, "top_p"), ({"input_ids": [1] * 600}, "input_ids"), ({"input_ids": [500]}, "input_ids")):
        with pytest.raises(RequestError) as error:
            session.run(session.collect(**fields))
        assert (error.value.status, error.value.param) == (400, param)
    session.run(session.settled())


def test_closing_the_iterator_aborts(session: Session) -> None:
    async def work() -> None:
        before = Counter((await session.engine.stats())["finished"])
        stream = session.engine.generate(GenerateRequest(input_ids=[1, 5], sampling=LONG, n=MANY, stream=True))
        await stream.__anext__()
        await stream.aclose()
        stats = await session.settled()
        ends = Counter(stats["finished"]) - before
        assert ends.total() == MANY and ends["abort"] > MANY // 2 and stats["kv_pages_used"] == 0

    session.run(work())


def test_cancelled_tasks_abort(session: Session) -> None:
    async def work() -> None:
        tasks = [asyncio.create_task(session.collect(sampling=LONG, stream=True)) for _ in range(5)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await session.settled())["kv_pages_used"] == 0

    session.run(work())


@pytest.mark.parametrize("rid", ["mine", ""])
def test_abort_by_id(session: Session, rid: str) -> None:
    async def work() -> None:
        task = asyncio.create_task(session.collect(sampling=LONG, rid="mine", n=MANY))
        while (await session.engine.stats())["running"] == 0:
            await asyncio.sleep(0.001)
        await session.engine.abort("another")
        await session.engine.abort(rid)
        await session.engine.abort(rid)
        chunks = await task
        ends = Counter(chunk.finish_reason for chunk in chunks if chunk.completion_tokens < LONG.max_new_tokens)
        assert len(chunks) == MANY and set(ends) == {"abort"} and ends["abort"] > MANY // 2
        stream = session.engine.generate(GenerateRequest(input_ids=[1], sampling=LONG, rid="mine", n=MANY, stream=True))
        await stream.__anext__()
        with pytest.raises(RequestError, match="running already"):
            await session.collect(rid="mine")
        await stream.aclose()
        await session.settled()

    session.run(work())


@pytest.mark.parametrize("rid", ["long", ""])
def test_abort_of_what_is_being_tokenized(session: Session, monkeypatch: pytest.MonkeyPatch, rid: str) -> None:
    aborting = threading.Event()
    monkeypatch.setattr(session.engine._front.tokenizer, "encode", lambda text, **options: [1, 5, 9] if aborting.wait(50) else [])

    async def work() -> None:
        stream = session.engine.generate(GenerateRequest(prompt="a", sampling=LONG, rid="long", n=2), in_thread=True)
        task = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)  # it has begun
        abort = asyncio.create_task(session.engine.abort(rid))
        await asyncio.sleep(0)
        aborting.set()
        await abort
        chunks = [await task, *[chunk async for chunk in stream]]
        assert [(chunk.finish_reason, chunk.completion_tokens < 480) for chunk in chunks] == [("abort", True)] * 2
        await session.settled()

    session.run(work())


def test_a_crash_fails_everything_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    crashed = threading.Event()
    monkeypatch.setattr(session.engine._front.tokenizer, "encode", lambda text, **options: [1, 5, 9] if crashed.wait(50) else [])

    async def work() -> None:
        tokenized = asyncio.create_task(anext(session.engine.generate(GenerateRequest(prompt="a"), in_thread=True)))
        stream = session.engine.generate(GenerateRequest(input_ids=[1, 5], sampling=LONG, n=MANY, stream=True))
        await stream.__anext__()
        os.kill(session.engine.child.process.pid, signal.SIGKILL)
        with pytest.raises(RequestError, match="ended with status -9") as error:
            async for _ in stream:
                pass
        assert error.value.status == 500 and not session.engine.healthy
        crashed.set()
        for call in (tokenized, session.engine.stats(), session.collect()):
            with pytest.raises(RequestError) as error:
                await call
            assert error.value.status == 503

    session.run(work())
    session.close()


def test_a_start_that_cannot_succeed_says_why() -> None:
    async def work() -> list[Any]:
        bad: list[dict[str, Any]] = [{"lora_paths": ["x=/nowhere"]}, {"max_total_tokens": 2}]
        return await asyncio.gather(*(AsyncEngine.start(config(**fields)) for fields in bad), return_exceptions=True)

    adapter, cache = asyncio.run(work())
    assert isinstance(adapter, ValueError) and "--lora-paths: x: " in str(adapter) and "/nowhere" in str(adapter)
    assert isinstance(cache, ValueError) and "--max-total-tokens 2" in str(cache)


def test_kernels_that_cannot_be_built_are_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = "build.build_engine = lambda config: (_ for _ in ()).throw(BuildError('no CUDA compiler'))"
    monkeypatch.setattr(child, "ENTRY", f"from sglang_lora_moe.engine import build; from sglang_lora_moe.ops.build import BuildError; {failing}; {child.ENTRY}")
    with pytest.raises(ValueError, match="^no CUDA compiler$"):
        asyncio.run(AsyncEngine.start(config()))


PARENT = """
import asyncio, os, sys
from sglang_lora_moe.config import Config
from sglang_lora_moe.engine.process import AsyncEngine
async def main():
    engine = await AsyncEngine.start(Config(model_path=sys.argv[1], max_total_tokens=512))
    print(engine.child.process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_the_child_ends_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(model_path())], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 120
    while is_running(child):
        assert time.monotonic() < deadline, "the engine process outlived its parent"
        time.sleep(0.02)
