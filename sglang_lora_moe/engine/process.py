"""The engine in a process of its own, and `AsyncEngine`, which the server talks to.

    AsyncEngine (event loop: text)  --- ZeroMQ PAIR over ipc, msgpack frames --->  engine process (steps: tensors)

A frame to the engine is a list of [type, message]; a frame from it holds the outputs and replies of one step. When the child ends unasked, `healthy` is False
and whatever waits for it fails. How it is started and ended is in `engine/child.py`. This is the only file that knows an encoding.
"""

import asyncio
import dataclasses
import json
import logging
import signal
import sys
import threading
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from sglang_lora_moe.config import Config
from sglang_lora_moe.core import Abort, EngineMessage, FlushCache, FrontMessage, GetStats, LoadAdapter, Reply, RequestError, Submit, TokenOutput, UnloadAdapter
from sglang_lora_moe.engine.child import EngineProcess, end_with_parent
from sglang_lora_moe.engine.front import Chunk, Failure, Front, GenerateRequest
from sglang_lora_moe.engine.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from sglang_lora_moe.engine.engine_core import EngineCore

logger = logging.getLogger(__name__)

_READY = "ready"  # rid of the child's first reply
_LOAD_POLL_MS = 1  # while an adapter is on its way and nothing runs
_FRONT_TYPES: tuple[type[Any], ...] = (Submit, Abort, LoadAdapter, UnloadAdapter, FlushCache, GetStats)


# ---- encoding -------------------------------------------------------------------------------------------------------
class _EngineFrame(msgspec.Struct, array_like=True):
    outputs: list[TokenOutput]
    replies: list[Reply]


encode = msgspec.msgpack.Encoder().encode
_front_decoder = msgspec.msgpack.Decoder(list[tuple[int, msgspec.Raw]])
_message_decoders = [msgspec.msgpack.Decoder(kind) for kind in _FRONT_TYPES]
_engine_decoder = msgspec.msgpack.Decoder(_EngineFrame)


def encode_message(message: FrontMessage) -> msgspec.Raw:
    """One message of a frame. RequestError for values that have no encoding, such as lone surrogates in a text."""
    try:
        return msgspec.Raw(encode((_FRONT_TYPES.index(type(message)), message)))
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(f"a value of the request cannot be passed on: {error}") from error


def decode_to_engine(frame: bytes) -> list[FrontMessage]:
    return [_message_decoders[kind].decode(raw) for kind, raw in _front_decoder.decode(frame)]


def encode_from_engine(messages: list[EngineMessage]) -> bytes:
    outputs = [message for message in messages if isinstance(message, TokenOutput)]
    replies = [message for message in messages if isinstance(message, Reply)]
    try:
        return encode(_EngineFrame(outputs, replies))
    except UnicodeEncodeError:  # names of files, or in them, may be no Unicode
        text = json.dumps([dataclasses.asdict(reply) for reply in replies], ensure_ascii=False).encode(errors="replace")
        return encode(_EngineFrame(outputs, [Reply(**fields) for fields in json.loads(text)]))


def decode_from_engine(frame: bytes) -> list[EngineMessage]:
    decoded = _engine_decoder.decode(frame)
    return [*decoded.replies, *decoded.outputs]  # a request that is refused says nothing before


# ---- the child ------------------------------------------------------------------------------------------------------
def run_engine_process() -> int:
    """Main function of the child: build the engine, say so, serve until the parent goes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they often go to the whole group; the parent ends this process when it is ready to
        signal.signal(number, signal.SIG_IGN)
    start = json.loads(sys.stdin.buffer.readline())
    config = Config(**start["config"])
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    sys.setswitchinterval(0.0005)  # a thread that moves an adapter never keeps the steps from the interpreter for longer
    threading.Thread(target=end_with_parent, name="parent-watch", daemon=True).start()
    socket = zmq.Context().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(start["address"])

    from sglang_lora_moe.engine.build import build_engine

    try:
        core, resolved, model_info = build_engine(config)
    except (ValueError, OSError, RequestError) as error:
        logger.debug("the engine could not be built", exc_info=True)
        socket.send(encode_from_engine([Reply(_READY, error=str(error))]))
        socket.close(linger=1000)
        return 2
    socket.send(encode_from_engine([Reply(_READY, {"config": dataclasses.asdict(resolved), "model_info": model_info})]))
    if core.lora is not None:
        core.lora.reader.start()
    serve_engine(core, socket)
    return 0


def serve_engine(core: "EngineCore", socket: zmq.Socket[bytes]) -> None:
    """The loop: take in what has come, compute a step, send what is new; wait only when there is nothing to do."""
    while True:
        messages: list[EngineMessage] = []
        can_step = core.has_work and not core.is_stalled
        waits_for_adapter = core.has_work or core.is_loading
        timeout = 0 if can_step else _LOAD_POLL_MS if waits_for_adapter else None  # ms; None: until a message comes
        while socket.poll(timeout):
            for message in decode_to_engine(socket.recv()):
                messages += core.handle(message)
            timeout = 0
        messages += core.step()
        if messages:
            socket.send(encode_from_engine(messages))


# ---- the parent -----------------------------------------------------------------------------------------------------
class AsyncEngine:
    """The engine process, seen from the server's event loop: all that the server knows of an engine. Made by `start`.

    Refusals are `RequestError`s, raised by the awaited call, or by the first step of the iterator that `generate` returns.
    """

    def __init__(self, child: EngineProcess, config: Config, model_info: dict[str, Any], tokenizer: Any) -> None:
        self.config, self.model_info, self.tokenizer = config, model_info, tokenizer
        self.child = child
        self._front = Front(tokenizer, model_info["vocab_size"], model_info["eos_token_ids"], model_info["max_model_len"])
        self._queues: dict[str, asyncio.Queue[Chunk | Failure]] = {}  # by request: what its stream has not taken yet
        self._tokenizing: dict[asyncio.Task[list[int]], str] = {}  # in threads, for these requests, which the engine does not know yet
        self._replies: dict[str, asyncio.Future[Reply]] = {}  # by control message: who waits for its reply
        self._outbox: asyncio.Queue[msgspec.Raw] = asyncio.Queue()  # to the engine, sent by a task
        self._tasks: list[asyncio.Task[None]] = []
        self._death: RequestError | None = None  # why nothing can be asked any more
        self._controls = 0
        self.num_outputs = 0  # of all requests so far, by which to see that the engine works

    @classmethod
    async def start(cls, config: Config) -> "AsyncEngine":
        """Start the engine process and wait until it has loaded everything. ValueError or RuntimeError if it cannot."""
        config.validate()
        child = await EngineProcess.start(config)
        tokenizer = asyncio.create_task(asyncio.to_thread(load_tokenizer, config))
        try:
            (reply,) = decode_from_engine(await child.first_frame())
            assert isinstance(reply, Reply) and reply.rid == _READY
            if reply.error is not None:
                raise ValueError(reply.error)
            engine = cls(child, Config(**reply.data["config"]), reply.data["model_info"], await tokenizer)
        except BaseException:
            tokenizer.cancel()
            await child.end()
            raise
        engine._tasks = [asyncio.create_task(task) for task in (engine._receive(), engine._send(), engine._watch())]
        return engine

    @property
    def healthy(self) -> bool:
        return self._death is None

    # ---- requests ---------------------------------------------------------------------------------------------------
    async def generate(self, request: GenerateRequest, in_thread: bool = False) -> AsyncGenerator[Chunk, None]:
        """Chunks of all `request.n` samples as they come; closing the iterator aborts the request. `in_thread`: tokenize beside the event loop."""
        ids = None
        if in_thread:
            task = asyncio.create_task(asyncio.to_thread(self._front.tokenize, request))
            self._tokenizing[task] = request.rid
            task.add_done_callback(self._tokenizing.pop)
            ids = await task
        self._check_alive()
        messages = self._front.submit(request, ids)
        queue: asyncio.Queue[Chunk | Failure] = asyncio.Queue()
        self._queues[request.rid] = queue
        left = request.n
        try:
            for raw in [encode_message(message) for message in messages]:
                self._outbox.put_nowait(raw)
            while left:
                event = await queue.get()
                if isinstance(event, Failure):
                    raise event.error
                left -= event.finish_reason is not None
                yield event
        finally:
            del self._queues[request.rid]
            for abort in self._front.forget(request.rid):
                self._outbox.put_nowait(encode_message(abort))

    async def abort(self, rid: str) -> None:
        """Abort one request ("" = all); its stream ends with finish_reason "abort". Waits for requests that are being tokenized."""
        for task in [task for task, name in self._tokenizing.items() if rid in ("", name)]:
            await asyncio.wait([task])
        for message in self._front.aborts(rid):
            self._outbox.put_nowait(encode_message(message))

    # ---- control ----------------------------------------------------------------------------------------------------
    async def load_adapter(self, name: str, path: str, pinned: bool = False, load_inplace: bool = False) -> dict[str, Any]:
        """`load_inplace`: other content replaces what the name stands for; requests that run keep what they began with."""
        return await self._control(LoadAdapter("", name, path, pinned, load_inplace))

    async def unload_adapter(self, name: str) -> dict[str, Any]:
        """Returns when the last running request of the adapter has ended and its memory is free."""
        return await self._control(UnloadAdapter("", name))

    async def adapters(self) -> list[dict[str, Any]]:
        """One dict per loaded adapter, as `LoRAManager.describe` says it."""
        return (await self.stats())["adapters"]

    async def flush_cache(self) -> dict[str, Any]:
        return await self._control(FlushCache(""))

    async def stats(self) -> dict[str, Any]:
        return await self._control(GetStats(""))

    async def shutdown(self) -> None:
        """End the engine process; what still runs fails."""
        self._fail(RequestError("the server is shutting down", 503))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.child.end()

    async def _control(self, message: LoadAdapter | UnloadAdapter | FlushCache | GetStats) -> dict[str, Any]:
        """Send a control message and wait for its reply; RequestError if the engine refuses or ends."""
        self._check_alive()
        self._controls += 1
        message.rid = f"control/{self._controls}"
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[message.rid] = future
        try:
            self._outbox.put_nowait(encode_message(message))
            reply = await future
        finally:
            del self._replies[message.rid]
        reply.raise_error()
        return reply.data

    # ---- tasks ------------------------------------------------------------------------------------------------------
    async def _receive(self) -> None:
        """Hand what the engine says to those who wait for it."""
        while True:
            for message in decode_from_engine(await self.child.socket.recv()):
                self.num_outputs += isinstance(message, TokenOutput)
                for event in self._front.on_message(message):
                    if isinstance(event, Abort):
                        self._outbox.put_nowait(encode_message(event))
                    elif isinstance(event, Reply):
                        future = self._replies.get(event.rid)
                        if future is not None and not future.done():
                            future.set_result(event)
                    elif event.rid in self._queues:
                        self._queues[event.rid].put_nowait(event)

    async def _send(self) -> None:
        """Send everything that is in the outbox in one frame."""
        while True:
            messages = [await self._outbox.get()]
            while not self._outbox.empty():
                messages.append(self._outbox.get_nowait())
            await self.child.socket.send(encode(messages))

    async def _watch(self) -> None:
        """Fail everything when the process ends, or a task above does."""
        ends = [asyncio.ensure_future(self.child.process.wait()), *self._tasks[:2]]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if ends[0] in done:
            text = f"the engine process has ended with status {self.child.process.returncode}"
        else:
            error = next(iter(done)).exception()
            text = f"the connection to the engine process failed: {error!r}"
        logger.error(text)
        self._fail(RequestError(text, 500, code="engine_dead"))

    def _check_alive(self) -> None:
        if self._death is not None:
            raise RequestError(self._death.message, 503, code=self._death.code)

    def _fail(self, error: RequestError) -> None:
        if self._death is None:
            self._death = error
        for rid, queue in self._queues.items():
            queue.put_nowait(Failure(rid, error))
        for future in self._replies.values():
            if not future.done():
                future.set_exception(error)
