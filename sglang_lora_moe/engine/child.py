"""The life of the engine process: started, waited for, ended; a request never comes here.

The child reads its configuration as one line from stdin and then holds on to stdin: when that ends, its parent has gone, and
so does it. What the frames on the socket say is known to `engine/process.py` alone.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from sglang_lora_moe.config import Config

ENTRY = "from sglang_lora_moe.engine.process import run_engine_process as run"
_END_SECONDS = 5.0  # for the child to end when it is told to


class EngineProcess:
    """The child, the socket to it, and the folder in which that lies."""

    def __init__(self, process: asyncio.subprocess.Process, socket: Any, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.process, self.socket, self._folder = process, socket, folder

    @classmethod
    async def start(cls, config: Config) -> "EngineProcess":
        """Start the child. A new interpreter, not a fork: it takes over no thread, socket or signal handler of the server."""
        folder = tempfile.TemporaryDirectory(prefix="sglang-lora-moe-")
        if len(folder.name) > 80:  # the address of a Unix socket has at most 107 characters
            folder = tempfile.TemporaryDirectory(prefix="sglang-lora-moe-", dir="/tmp")
        address = f"ipc://{folder.name}/engine"
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.bind(address)
        root = str(Path(__file__).parents[2])  # so that the package is found however the parent found it
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-c", f"import sys; {ENTRY}; sys.exit(run())"]
        waiting = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads of a step that spin at its many small barriers stall on a busy machine; the user's own choice wins
        environment = {**waiting, **os.environ, "PYTHONPATH": path}
        # its own session: a Ctrl-C in the terminal would else hit it before it has a handler
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, env=environment, start_new_session=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps({"config": dataclasses.asdict(config), "address": address}).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # it died already; whoever waits for it will see
            await process.stdin.drain()
        return cls(process, socket, folder)

    async def first_frame(self) -> bytes:
        """What the child says when it is ready or cannot be; RuntimeError if it ends without a word."""
        frame = asyncio.ensure_future(self.socket.recv())
        end = asyncio.ensure_future(self.process.wait())
        try:
            await asyncio.wait([frame, end], return_when=asyncio.FIRST_COMPLETED)
            if not frame.done():  # the reply of a failed start may come just after the end
                await asyncio.wait([frame], timeout=30 if self.process.returncode == 2 else 0.5)  # 2: it has sent one
            if not frame.done():
                raise RuntimeError(f"the engine process ended with status {self.process.returncode} while starting; its log says why")
            self._folder.cleanup()  # they are connected, and whoever is killed cleans up nothing
            return bytes(frame.result())
        finally:
            frame.cancel()
            end.cancel()

    async def end(self) -> None:
        """End the child and give back socket and folder."""
        if self.process.returncode is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                await asyncio.wait_for(self.process.wait(), _END_SECONDS)
            except asyncio.TimeoutError:
                self.process.kill()
                await self.process.wait()
        self.socket.close(linger=0)
        self._folder.cleanup()


def end_with_parent() -> None:
    """In the child: a thread that ends the process when stdin does."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin: an interpreter that ends cannot take the lock of a blocked reader
        pass
    os._exit(0)  # at once, also in the middle of a step: nobody is left to hear of it
