"""Copies packed adapters into slots of the device pool beside the steps, in a thread of its own.

The engine's thread only says which image goes where and looks whether it has arrived. On a GPU the pieces go through a
ring of pinned buffers and over a side stream: the thread fills one buffer while others are on their way, without holding
the interpreter's lock, and no step waits for them. On a CPU the thread copies straight into the pool.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor

import torch

PIECE_BYTES = 32 << 20
RING = 3
# Of the cores, for copies to pinned memory. On 16 cores and an H200, 1.7 GB took 69 ms with all of them and 79 with four, but with all the
# steps' own work on the host was kept waiting by up to 11 ms
THREADS = max(1, min(4, (os.cpu_count() or 1) // 4))


class SlotLoader:
    """One copy after the other, in the order of asking."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "adapter-copy", initializer=torch.set_num_threads, initargs=(THREADS,))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ring: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = -1
        self.trash: list[torch.Tensor] = []  # what was discarded and not freed yet

    def start(self, region: torch.Tensor, image: torch.Tensor) -> Future[None]:
        """Copy `image` [n] to the begin of `region`. Done when the bytes are there; steps launched before may still read what they replace."""
        free = torch.cuda.Event() if self._stream is not None else None
        if free is not None:
            free.record()
        return self._thread.submit(self._copy, region[: image.numel()], image, free)

    def discard(self, image: torch.Tensor) -> None:
        """Take over an image that the caller forgets: to give back gigabytes takes a while."""
        self.trash.append(image)

    def empty_trash(self) -> None:
        """Free what was discarded, in the thread. Not at once, for the caller of `discard` still holds it then, and would free it itself."""
        if self.trash:
            trash, self.trash = self.trash, []
            self._thread.submit(trash.clear)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    @torch.inference_mode()
    def _copy(self, region: torch.Tensor, image: torch.Tensor, free: torch.cuda.Event | None) -> None:
        step = PIECE_BYTES // image.element_size()
        pieces = zip(region.split(step), image.split(step), strict=True)
        if self._stream is None or free is None:
            for target, source in pieces:
                target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            for target, source in pieces:
                if source.device == target.device or source.is_pinned():
                    target.copy_(source, non_blocking=True)
                    continue
                buffer, sent = self._next_buffer()
                buffer = buffer[: source.numel() * source.element_size()].view(source.dtype)
                buffer.copy_(source)
                target.copy_(buffer, non_blocking=True)
                sent.record()
            self._stream.synchronize()

    def _next_buffer(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """A pinned buffer whose last copy is over."""
        if len(self._ring) < RING:
            self._ring.append((torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
            return self._ring[-1]
        self._turn = (self._turn + 1) % RING
        buffer, sent = self._ring[self._turn]
        sent.synchronize()
        return buffer, sent
