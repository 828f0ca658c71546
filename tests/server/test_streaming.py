"""Disconnects abort, over a real connection; merging of streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import httpx
import pytest

from sglang_lora_moe.server.streaming import merge
from tests.server.conftest import http_server, send_raw, wait_for
from tests.server.fake_engine import FakeEngine

PAUSE = 0.05  # before each token, so that 500 of them take 25 seconds, whoever is held up meanwhile
SLOW = {"prompt": "hello", "max_tokens": 500, "temperature": 0}


@pytest.mark.parametrize("delay", [PAUSE, 30.0], ids=["in mid-stream", "before the first token"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_disconnect_aborts(stream: bool, delay: float) -> None:
    engine = FakeEngine(delay=delay)
    with http_server(engine) as url:
        connection = send_raw(url, "/v1/completions", SLOW | {"stream": stream})
        wait_for(lambda: engine.running)
        if stream and delay < 1:
            assert b"data: " in connection.recv(4096) + connection.recv(4096)
        connection.close()
        wait_for(lambda: engine.aborted)
        assert not engine.running


def test_disconnect_aborts_every_request_of_a_batch() -> None:
    engine = FakeEngine(delay=PAUSE)
    with http_server(engine) as url:
        connection = send_raw(url, "/generate", {"text": ["hello", "ab", "c"], "sampling_params": {"max_new_tokens": 500}, "stream": True})
        wait_for(lambda: len(engine.running) == 3)
        connection.recv(10)
        connection.close()
        wait_for(lambda: len(engine.aborted) == 3)
        assert not engine.running


def test_closing_the_client_stream_aborts_and_the_server_goes_on() -> None:
    engine = FakeEngine(delay=PAUSE)
    with http_server(engine) as url, httpx.Client(base_url=url) as client:
        with client.stream("POST", "/v1/completions", json=SLOW | {"stream": True}) as response:
            assert next(response.iter_lines()).startswith("data: ")
        wait_for(lambda: engine.aborted)
        assert client.post("/v1/completions", json=SLOW | {"max_tokens": 2}).json()["choices"][0]["text"] == "he"


def test_tokens_arrive_as_they_come() -> None:
    with http_server(FakeEngine(delay=0.05)) as url, httpx.stream("POST", f"{url}/v1/completions", json=SLOW | {"max_tokens": 6, "stream": True}) as response:
        pieces = [piece for piece in response.iter_raw() if piece]
    assert len(pieces) >= 6


def test_one_refused_prompt_ends_the_whole_batch() -> None:
    engine = FakeEngine(delay=0.01)
    with http_server(engine) as url:
        response = httpx.post(f"{url}/v1/completions", json=SLOW | {"prompt": ["hello", "x" * 600]})
        assert response.status_code == 400
        wait_for(lambda: not engine.running)


async def numbers(values: list[int], closed: list[int], pause: float = 0.0) -> AsyncGenerator[int, None]:
    try:
        for value in values:
            await asyncio.sleep(pause)
            if value < 0:
                raise ValueError(value)
            yield value
    finally:
        closed.append(values[0])


def test_merge_gives_all_items() -> None:
    async def run() -> list[tuple[int, int]]:
        return [item async for item in merge([numbers([1, 2], closed), numbers([3], closed), numbers([4, 5, 6], closed)])]

    closed: list[int] = []
    got = asyncio.run(run())
    assert sorted(got) == [(0, 1), (0, 2), (1, 3), (2, 4), (2, 5), (2, 6)] and sorted(closed) == [1, 3, 4]


def test_merge_closes_all_on_error_and_on_close() -> None:
    async def fails() -> None:
        with pytest.raises(ValueError):
            async for _ in merge([numbers([1, -1], closed), numbers([2] * 100, closed, 0.01)]):
                pass

    async def breaks() -> None:
        merged = merge([numbers([1, 1], closed), numbers([2] * 100, closed, 0.01)])
        async for _ in merged:
            break
        await merged.aclose()

    for scenario in (fails, breaks):
        closed: list[int] = []
        asyncio.run(scenario())
        assert sorted(closed) == [1, 2]
