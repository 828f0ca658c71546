"""Asynchronous plumbing: watch the client while working, merge the streams of a batch, send server-sent events.

Whatever ends early (client gone, error, shutdown) closes the source iterators, which is how the engine learns that a request is over.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.front import Chunk
from sglang_lora_moe.server.errors import ClientGone, error_object, logger
from sglang_lora_moe.server.job import ResponseFormat

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, or `ClientGone` (with `work` cancelled and ended) once the client closes its connection.

    The body must have been read: then the next message that `receive` gives is the disconnect.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(i, item) of all streams in the order of arrival. The first error ends all; closing this closes them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as items:
            async for item in items:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T | BaseException | None]] = asyncio.Queue()

    async def pump(i: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    queue.put_nowait((i, item))
            queue.put_nowait((i, None))
        except Exception as error:  # raised again by the consumer below
            queue.put_nowait((i, error))

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            i, got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                running -= 1
            else:
                yield i, got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends `first` and then `rest` as server-sent events, then [DONE]; closes `rest` in every case.

    The first item is awaited by the caller, so that a refusal still is an HTTP status; later errors are an error event.
    """

    def __init__(self, first: tuple[int, Chunk] | None, rest: AsyncGenerator[tuple[int, Chunk], None], answer: ResponseFormat) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Content-Type": "text/event-stream; charset=utf-8"})
        self._first, self._rest, self._answer = first, rest, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._pump(send))
        except ClientGone:
            return
        finally:
            await self._rest.aclose()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            if self._first is not None:
                await self._send(send, self._answer.events(*self._first))
                async for prompt, chunk in self._rest:
                    await self._send(send, self._answer.events(prompt, chunk))
            await self._send(send, self._answer.last_events())
        except RequestError as error:
            await self._send(send, [{"error": error_object(error.message, error.status, error.param, error.code)}])
        except OSError:
            raise  # the connection broke while sending
        except Exception as error:
            logger.exception("a stream failed")
            await self._send(send, [{"error": error_object(f"internal error: {type(error).__name__}", 500)}])
        await send({"type": "http.response.body", "body": DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, events: Iterable[dict[str, Any]]) -> None:
        body = "".join(f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n" for event in events)
        if body:
            await send({"type": "http.response.body", "body": body.encode(), "more_body": True})
