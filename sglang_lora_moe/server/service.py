"""What the routes share: one engine, its names, templates and metrics, and the way from a job to a response."""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.front import LONG_TEXT, Chunk
from sglang_lora_moe.engine.process import AsyncEngine
from sglang_lora_moe.server.chat import ChatRenderer, read_template
from sglang_lora_moe.server.job import Job
from sglang_lora_moe.server.logprobs import TokenText
from sglang_lora_moe.server.metrics import Metrics
from sglang_lora_moe.server.model_names import ModelNames
from sglang_lora_moe.server.streaming import EventStream, merge, until_disconnect


class Service:
    """Everything one app holds: its routes are made over it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.names = ModelNames(engine)
        self.metrics = Metrics(self.names.base)
        self.tokens = TokenText(engine.tokenizer)
        self.chat = ChatRenderer(engine.tokenizer, read_template(engine.config.chat_template))
        self.max_samples = engine.config.max_queued_requests + engine.config.max_running_requests  # that can ever wait and run together
        self._jobs: dict[str, list[str]] = {}  # running job -> the ids of its requests

    async def respond(self, request: Request, job: Job) -> Response:
        """Run `job` and answer it, whole or as a stream; the job ends when the client goes away. RequestErrors name the fields of the job's protocol."""
        count, chunks = sum(one.n for one in job.requests), self._chunks(job)
        try:
            if count > self.max_samples:  # refused before the engine does any work for them
                raise RequestError(f"n: {count} samples of one request are more than --max-queued-requests lets wait", param="n")
            if job.stream:
                first = await until_disconnect(request.receive, anext(chunks, None))
                return EventStream(first, chunks, job.format)
            await until_disconnect(request.receive, _collect(job, chunks))
            return JSONResponse(job.format.whole())
        except RequestError as error:
            engine_name = error.param or ""
            error.param = job.fields.get(engine_name, error.param)
            if error.message.startswith(f"{engine_name}:"):
                error.message = f"{error.param}{error.message.removeprefix(engine_name)}"
            raise

    async def abort(self, rid: str) -> None:
        """Abort the request, or all requests of the batch, that runs under `rid`; "" aborts everything."""
        for one in self._jobs.get(rid, [rid]):
            await self.engine.abort(one)

    async def _chunks(self, job: Job) -> AsyncGenerator[tuple[int, Chunk], None]:
        """(prompt, chunk) of all the job's requests as they come; `abort` knows the job while it runs."""
        if job.rid in self._jobs:
            raise RequestError(f"rid: a request with the id {job.rid!r} is running already", param="rid")
        self._jobs[job.rid] = [request.rid for request in job.requests]
        is_long = sum(len(request.prompt or "") for request in job.requests) > LONG_TEXT
        streams = [self.metrics.observe(request, self.engine.generate(request, in_thread=is_long)) for request in job.requests]
        try:
            async with aclosing(merge(streams)) as items:
                async for item in items:
                    yield item
        finally:
            del self._jobs[job.rid]


def new_id() -> str:
    return uuid.uuid4().hex


async def _collect(job: Job, chunks: AsyncGenerator[tuple[int, Chunk], None]) -> None:
    async with aclosing(chunks) as items:
        async for prompt, chunk in items:
            job.format.add(prompt, chunk)
