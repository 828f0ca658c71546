"""Runs the server: engine process, HTTP application, signals, and a quiet end.

A start that cannot succeed says one sentence and returns 2. SIGINT or SIGTERM stops accepting, lets running requests
finish for a while, aborts the rest (they end with finish_reason "abort"), stops the engine process and returns 0.
"""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from sglang_lora_moe.config import Config
from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.process import AsyncEngine
from sglang_lora_moe.server.app import create_app
from sglang_lora_moe.server.chat import read_template
from sglang_lora_moe.server.model_names import check_adapter_name

FINISH_SECONDS = 5.0  # for running requests after a signal
ABORT_SECONDS = 5.0  # for them to end after they were aborted
logger = logging.getLogger(__name__)


def serve(config: Config) -> int:
    """Serve until a signal comes; the exit status."""
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return asyncio.run(_serve(config))
    except asyncio.CancelledError:  # SIGTERM before the HTTP server took over
        return 130


async def _serve(config: Config) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # as asyncio.run does for SIGINT
    try:
        read_template(config.chat_template)
        for name, _, _ in config.lora_specs():
            check_adapter_name(name, config.base_name)
        listener = _listen(config.host, config.port)  # first, because loading a model for a port that is taken is vain
        engine = await AsyncEngine.start(config)
    except (ValueError, OSError, RequestError, RuntimeError) as error:
        print(f"sglang-lora-moe: {error}", file=sys.stderr)
        return 2
    try:
        return await run_server(engine, listener)
    finally:
        await engine.shutdown()


async def run_server(engine: AsyncEngine, listener: socket.socket) -> int:
    """Serve `engine` on `listener` until a signal (0) or the end of the engine (1)."""
    config = engine.config
    settings = uvicorn.Config(
        create_app(engine), log_config=None, log_level=config.log_level, access_log=config.log_level in ("debug", "info"), ws="none", lifespan="off",
        timeout_graceful_shutdown=int(FINISH_SECONDS + ABORT_SECONDS),
    )  # fmt: skip
    server = _Server(settings)
    watcher = asyncio.ensure_future(_watch(server, engine))
    adapters = ", ".join(f"{record['name']} (rank {record['rank']})" for record in await engine.adapters())
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for the next server: connections of this one will linger
    listener.listen()
    print(f"Ready: {address} serves {engine.model_info['served_model_name']}, adapters: {adapters or 'none'}", flush=True)
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
    return 0 if engine.healthy else 1


class _Server(uvicorn.Server):
    """uvicorn, which after its clean end does not raise the signal once more."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


async def _watch(server: _Server, engine: AsyncEngine) -> None:
    """Stop the server when its engine has died; when it stops, abort the requests that take too long."""
    while not server.should_exit:
        await asyncio.sleep(0.2)
        if not engine.healthy:
            logger.error("the engine has ended: stopping the server")
            server.should_exit = True
            return
    await asyncio.sleep(FINISH_SECONDS)
    await engine.abort("")


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; ValueError names the flags."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(address)  # without SO_REUSEADDR, by which two servers that load their models could both have it
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger there
            listener.bind(address)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # or else a second server, started now too, could have it as well
        return listener
    except OSError as error:
        raise ValueError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}") from error
