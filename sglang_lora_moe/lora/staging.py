"""Writing many host tensors into one device buffer in few copies, through a ring of two pinned host buffers."""

from __future__ import annotations

import torch

STAGING_BYTES = 32 << 20


class StagedWriter:
    """Collects matrix sets for `target` (flat) and writes them in stream order. Offsets must ascend between flushes.

    Sets on the target's own device are copied straight to their place. Sets from the host are packed into a pinned buffer and
    go over in copies of up to STAGING_BYTES; the two buffers alternate, so the host fills one while the other is read.
    """

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target
        self._staged = target.is_cuda
        self._ring: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0
        self._start = self._end = 0  # the piece of `target` that the current buffer holds

    def add(self, offset: int, stride: int, matrices: torch.Tensor) -> None:
        """target[offset + i * stride :] = matrices[i] for matrices [n, rows, cols]; gaps between matrices are unspecified."""
        count, elements = matrices.shape[0], matrices[0].numel()
        if not self._staged or matrices.device == self.target.device:
            self.target.as_strided((count, *matrices.shape[1:]), (stride, matrices.shape[2], 1), offset).copy_(matrices)
            return
        capacity = STAGING_BYTES // self.target.element_size()
        done = 0
        while done < count:
            place = offset + done * stride
            if self._end > self._start and place != self._end:  # sets from the device lie in between
                self.flush()
            fit = (self._start + capacity - place) // stride if self._end > self._start else capacity // stride
            if stride > capacity:  # one matrix larger than the ring: an embedding's A
                self.flush()
                self.target[place : place + elements].view(matrices.shape[1:]).copy_(matrices[done])
                done += 1
                continue
            if fit <= 0:
                self.flush()
                continue
            if self._end == self._start:
                self._start = self._end = place
                self._buffer()
            taken = min(fit, count - done)
            view = self._ring[self._turn][0].as_strided((taken, *matrices.shape[1:]), (stride, matrices.shape[2], 1), place - self._start)
            view.copy_(matrices[done : done + taken])
            self._end = place + taken * stride
            done += taken

    def flush(self) -> None:
        """Send what is collected. Returns before the copy is done; later work of the same stream sees it."""
        if self._end == self._start:
            return
        buffer, event = self._ring[self._turn]
        self.target[self._start : self._end].copy_(buffer[: self._end - self._start], non_blocking=True)
        event.record()
        self._turn = 1 - self._turn
        self._start = self._end = 0

    def _buffer(self) -> None:
        """Make the current staging buffer free to fill."""
        if not self._ring:
            elements = STAGING_BYTES // self.target.element_size()
            self._ring = [(torch.empty(elements, dtype=self.target.dtype, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
            return
        self._ring[self._turn][1].synchronize()
