"""Reads adapters from their files in a process of its own, so that no step waits for the interpreter while one is read.

An adapter may have tens of thousands of tensors, and checking them is Python. The child reads, checks and packs; the packed image comes back as anonymous
shared memory, the rest as a pickle, over a pipe. One child serves all engines of a process; it is started when it is first needed, and again if it has died.
Where the system has no anonymous shared memory (not Linux) adapters are read in the calling thread.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

import torch

from sglang_lora_moe.lora.adapter import AdapterRules, read_adapter, read_tensors
from sglang_lora_moe.lora.packed import PackedAdapter, PoolLayout

PATIENCE = 900.0  # seconds for one adapter; its config's patterns may take for ever


class AdapterReader:
    """Reads the adapters of one model. `read` blocks, so it is called in a thread; AdapterError or OSError say what is wrong with the files."""

    def __init__(self, rules: AdapterRules, layout: PoolLayout) -> None:
        self.rules, self.layout = rules, layout
        self._pickled = pickle.dumps((rules, layout))
        self._beside = False

    def read_beside(self) -> None:
        """From now on read in the child. Before it, while an engine starts and nobody waits for steps, reading here is faster."""
        self._beside = hasattr(os, "memfd_create")

    def start(self) -> None:
        """Start the child now, so that the first adapter does not wait for it."""
        if self._beside:
            _child.ensure()

    def read(self, path: str) -> PackedAdapter:
        path = os.path.abspath(path)  # the child keeps the folder in which it was started
        return _child.read(self._pickled, self.layout.dtype, path) if self._beside else self.layout.pack(read_adapter(path, self.rules))

    def read_tensors(self, name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> PackedAdapter:
        """The adapter `name` whose files' content a program holds."""
        return self.layout.pack(read_tensors(name, tensors, config, self.rules))


# ---- the parent's side ----------------------------------------------------------------------------------------------
class _Child:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def ensure(self) -> None:
        with self._lock:
            self._connect()

    def read(self, rules_and_layout: bytes, dtype: torch.dtype, path: str) -> PackedAdapter:
        with self._lock:
            connection = self._connect()
            try:
                connection.send_bytes(pickle.dumps((rules_and_layout, path)))
                if not connection.poll(PATIENCE) and self._process is not None:
                    self._process.kill()
                answer = pickle.loads(connection.recv_bytes())
                if isinstance(answer, Exception):
                    raise answer
                fd = recv_handle(connection)
            except (EOFError, ConnectionError) as error:
                status = self._end()
                hint = f" (out of memory, or after {PATIENCE:g} s)" if status == -9 else ""
                raise RuntimeError(f"the reader ended with status {status}{hint} while it read {path}") from error
        packed, elements = answer
        try:
            return replace(packed, image=_map(fd, elements, dtype))
        finally:
            os.close(fd)

    def _connect(self) -> Connection:
        if self._connection is not None and self._process is not None and self._process.poll() is not None:
            self._end()
        if self._connection is None:
            ours, theirs = Pipe()
            path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
            command = [sys.executable, "-c", f"from sglang_lora_moe.lora.reader import run_child; run_child({theirs.fileno()})"]
            # its own session: a Ctrl-C in the terminal ends the parent, and the pipe's end then ends the child
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}, start_new_session=True
            )
            theirs.close()
            self._connection = ours
        return self._connection

    def _end(self) -> int | None:
        """Forget the child; its exit status."""
        assert self._connection is not None and self._process is not None
        self._connection.close()
        self._connection = None
        return self._process.wait()


_child = _Child()


# ---- the child ------------------------------------------------------------------------------------------------------
def run_child(fd: int) -> None:
    """Main function of the child: answer until the parent has gone."""
    os.nice(5)  # steps come first where cores are few
    torch.set_num_threads(1)  # its tensors are small, and the cores belong to the steps
    connection = Connection(fd)
    import_module("sglang_lora_moe.models.loader")  # whose functions rules hold: importing transformers takes seconds, which no adapter waits for
    with suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            rules_and_layout, path = pickle.loads(connection.recv_bytes())
            _answer(connection, path, *pickle.loads(rules_and_layout))


def _answer(connection: Connection, path: str, rules: AdapterRules, layout: PoolLayout) -> None:
    """Read one adapter and send it, or what is wrong with it."""
    memory = os.memfd_create("adapter")
    try:
        packed = layout.pack(read_adapter(path, rules), partial(_allocate, memory, dtype=layout.dtype))
        answer: Any = replace(packed, image=torch.empty(0, dtype=layout.dtype)), packed.image.numel()
    except Exception as error:  # whatever is in a file, the server goes on and says what happened
        answer = error if isinstance(error, ValueError | OSError) else RuntimeError(f"{type(error).__name__}: {error}")
    connection.send_bytes(pickle.dumps(answer))
    if not isinstance(answer, Exception):
        send_handle(connection, memory, os.getppid())
    os.close(memory)


def _allocate(memory: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """The anonymous shared memory `memory`, made as large as an image of `elements`."""
    os.ftruncate(memory, elements * dtype.itemsize)
    return _map(memory, elements, dtype)


# ---- both -----------------------------------------------------------------------------------------------------------
def _map(fd: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """The shared memory of `fd` as a tensor; it lives as long as a tensor on it, and keeps no descriptor open."""
    return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=elements, dtype=dtype)
