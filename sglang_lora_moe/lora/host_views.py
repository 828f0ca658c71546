"""Matrix views of adapters for implementations that loop on the host. A slot's table entries are read once, then cached.

`Stack.host_cache` holds the result; the memory pool drops it when it writes the slot, so nothing here can go stale.
"""

from __future__ import annotations

import torch

from sglang_lora_moe.lora.stacks import Stack


class SlotViews:
    """One slot of one stack: plain numbers and, on demand, the transposed matrix of each expert."""

    def __init__(self, stack: Stack, slot: int) -> None:
        self.pool, self.dim = stack.pool, stack.dim
        self.rank = int(stack.rank[slot])
        self.scaling = float(stack.scaling[slot])
        self.split_a = bool(stack.split_a[slot])
        self._offset, self._stride = int(stack.offset[slot]), int(stack.expert_stride[slot])
        self._a: dict[int, torch.Tensor] = {}
        self._b: dict[int, torch.Tensor] = {}

    def a_t(self, expert: int = 0) -> torch.Tensor:
        """A transposed, [in, c * rank] float32 (a view where the pool is float32)."""
        view = self._a.get(expert)
        if view is None:
            shape = (self.dim, self.rank * (2 if self.split_a else 1))
            view = self._keep(self._a, expert, self.pool.as_strided(shape, (1, self.dim), self._offset + expert * self._stride))
        return view

    def b_t(self, expert: int = 0) -> torch.Tensor:
        """B transposed, [rank, out] float32."""
        view = self._b.get(expert)
        if view is None:
            view = self._keep(self._b, expert, self.rows(expert).t())
        return view

    def rows(self, expert: int = 0) -> torch.Tensor:
        """The matrix [dim, rank] as it lies in the pool: B, or an embedding's transposed A."""
        return self.pool.as_strided((self.dim, self.rank), (self.rank, 1), self._offset + expert * self._stride)

    def _keep(self, cache: dict[int, torch.Tensor], expert: int, view: torch.Tensor) -> torch.Tensor:
        if view.dtype != torch.float32:
            return view.float()  # a copy: not worth keeping
        cache[expert] = view
        return view


def slot_views(stack: Stack, slot: int) -> SlotViews:
    views: SlotViews | None = stack.host_cache.get(slot)
    if views is None:
        views = stack.host_cache[slot] = SlotViews(stack, slot)
    return views


def add_expand(y: torch.Tensor, s: torch.Tensor, b: SlotViews, expert: int = 0) -> None:
    """y [n, out] += scaling * B s, in place in float32; s [n, c * rank]. With split A each half of y has its half of s."""
    b_t = b.b_t(expert)
    if not b.split_a:
        y.addmm_(s, b_t, alpha=b.scaling)
        return
    half, rank = y.shape[1] // 2, b.rank
    y[:, :half].addmm_(s[:, :rank], b_t[:, :half], alpha=b.scaling)
    y[:, half:].addmm_(s[:, rank:], b_t[:, half:], alpha=b.scaling)
