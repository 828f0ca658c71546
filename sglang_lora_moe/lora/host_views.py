"""Matrix views of adapters for implementations that loop on the host. A slot's table entries are read once, then cached.

`Stack.host_cache` holds the result; the memory pool drops it when it writes the slot, so nothing here can go stale.
"""

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
        self._views: dict[int, tuple[torch.Tensor, ...]] = {}  # by expert: A transposed, or the parts of B transposed

    def a_t(self, expert: int = 0) -> torch.Tensor:
        """A transposed, [in, c * rank] float32 (a view where the pool is float32)."""
        views = self._views.get(expert)
        if views is None:
            shape = (self.dim, self.rank * (2 if self.split_a else 1))
            views = self._keep(expert, (self.pool.as_strided(shape, (1, self.dim), self._offset + expert * self._stride),))
        return views[0]

    def b_t(self, expert: int = 0) -> tuple[torch.Tensor, ...]:
        """B transposed, float32: one [rank, out], or with split A its two halves [rank, out / 2]."""
        views = self._views.get(expert)
        if views is None:
            b_t = self.rows(expert).t()
            views = self._keep(expert, b_t.chunk(2, dim=1) if self.split_a else (b_t,))
        return views

    def rows(self, expert: int = 0) -> torch.Tensor:
        """The matrix [dim, rank] as it lies in the pool: B, or an embedding's transposed A."""
        return self.pool.as_strided((self.dim, self.rank), (self.rank, 1), self._offset + expert * self._stride)

    def _keep(self, expert: int, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if views[0].dtype != torch.float32:
            return tuple(view.float() for view in views)  # copies: not worth keeping
        self._views[expert] = views
        return views


def slot_views(stack: Stack, slot: int) -> SlotViews:
    views: SlotViews | None = stack.host_cache.get(slot)
    if views is None:
        views = stack.host_cache[slot] = SlotViews(stack, slot)
    return views


def add_expand(y: torch.Tensor, s: torch.Tensor, b: SlotViews, expert: int = 0) -> None:
    """y [n, out] += scaling * B s, in place in float32; s [n, c * rank]. With split A each half of y has its half of s."""
    if not b.split_a:
        y.addmm_(s, b.b_t(expert)[0], alpha=b.scaling)
        return
    for y_half, s_half, b_t in zip(y.chunk(2, dim=1), s.chunk(2, dim=1), b.b_t(expert), strict=True):
        y_half.addmm_(s_half, b_t, alpha=b.scaling)
