"""Scratch memory of one device. Nothing in it outlives the layer that asked for it.

Buffers are named: two names never overlap. A buffer grows to the largest size asked for; the model runner makes one step of
the largest size before it measures free memory and before it captures graphs. What still grows later (a kernel of small steps
alone) leaves its old memory to the graphs that were captured with it.
"""

import math

import torch

_ALIGN = 256  # bytes; enough for any vector load and for tensor descriptors


class Workspace:
    """Named scratch of one device. On a CPU every `get` is a fresh allocation, which is what the allocator is good at."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._buffers: dict[str, torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []  # graphs may replay into them
        self._cuda = self.device.type == "cuda"

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of whatever it held last, at first all bits set; a later `get` of the same name returns the same memory."""
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
            buffer = self._buffers[name] = torch.full((-(-nbytes // _ALIGN) * _ALIGN,), 255, dtype=torch.uint8, device=self.device)
        return buffer[:nbytes].view(dtype).view(shape)
