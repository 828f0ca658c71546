"""Scratch memory of one device, and its side stream. Nothing in it outlives the layer that asked for it.

Buffers are named: two names never overlap, so work on the main and on the side stream stays apart as long as it uses
different names. A buffer grows to the largest size asked for; the model runner makes one step of the largest size before
it measures free memory and before it captures graphs. What still grows later (a kernel of small steps alone) leaves its
old memory to the graphs that were captured with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_ALIGN = 256  # bytes; enough for any vector load and for tensor descriptors


class Workspace:
    """Named scratch of one device. On a CPU every `get` is a fresh allocation, which is what the allocator is good at."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._buffers: dict[str, torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []  # graphs may replay into them
        self._cuda = self.device.type == "cuda"
        self._side: torch.cuda.Stream | None = torch.cuda.Stream(self.device) if self._cuda else None
        if self._side is not None:
            self._forked, self._done = torch.cuda.Event(), torch.cuda.Event()
        self._pending = False  # side work that the main stream has not waited for

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; a later `get` of the same name returns the same memory."""
        if not self._cuda:
            return torch.empty(shape, dtype=dtype, device=self.device)
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            if torch.cuda.is_current_stream_capturing():
                have = 0 if buffer is None else buffer.numel()
                raise RuntimeError(f"workspace buffer {name!r} has {have} bytes but {nbytes} are needed during graph capture: run the largest step first")
            if buffer is not None:
                self._outgrown.append(buffer)
            buffer = self._buffers[name] = torch.empty(-(-nbytes // _ALIGN) * _ALIGN, dtype=torch.uint8, device=self.device)
        return buffer[:nbytes].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def side(self) -> AbstractContextManager[None]:
        """Run what is launched inside on the side stream, after everything launched on the main stream so far."""
        return nullcontext() if self._side is None else self._fork(self._side)

    @contextmanager
    def _fork(self, side: torch.cuda.Stream) -> Iterator[None]:
        self._forked.record()
        side.wait_event(self._forked)
        with torch.cuda.stream(side):
            yield
            self._done.record()
        self._pending = True

    def join(self) -> None:
        """Make the main stream wait for the side work, before it reads a result of it. Free where there is none."""
        if self._pending:
            torch.cuda.current_stream(self.device).wait_event(self._done)
            self._pending = False
