"""The kernels after the linears of attention for many tokens, in CUDA: what adapters add to a linear is added on the way.

    rotate_rows   q, k, v of qkv + scaling * B s; norm and rotation of q and k; k and v to the cache       as ops/qk_norm_rope.py
    norm_rows     residual += x + scaling * B s; out = norm(residual)                                       as ops/rms_norm.py

Tensor cores add B s to the very registers that norm and rotation work on (csrc/norm_rope.cu), where Triton moves every tile through shared memory between the
two layouts. 16-bit types, heads of 128 columns and a Hopper GPU, rows of up to `most_columns`; others stay with Triton: `rotates` and `norms`.
"""

import torch

from sglang_lora_moe.ops import build, launch
from sglang_lora_moe.ops.library import define
from sglang_lora_moe.ops.lora_linear import LinearAddend

HEAD = 128
MOST_S = 768  # ranks and splits of s that a rotation takes: those of a tile lie in shared memory beside its rows
ROTATES_MIN = 128  # tokens from which it is faster than Triton's
_ADDED = "Tensor s, Tensor? row_scale, Tensor order, Tensor slots, Tensor pool, Tensor offset, Tensor rank, Tensor scaling, int part_stride"
define(
    "rotate_rows(Tensor qkv, Tensor(a!) q, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor kv_slots, Tensor positions, Tensor cos, Tensor sin, "
    f"Tensor? q_weight, Tensor? k_weight, {_ADDED}, float eps, bool overlap, int multiprocessors) -> ()"
)
define(f"norm_rows(Tensor x, Tensor(a!) residual, Tensor weight, Tensor(b!) out, {_ADDED}, float eps, bool overlap) -> ()")


def rotates(qkv: torch.Tensor, k_cache: torch.Tensor, cos: torch.Tensor, addend: LinearAddend) -> bool:
    """Whether `rotate_rows` can do this step and is the faster way, by measurement; norms over all heads are not asked for."""
    splits, _, _, width = addend.s.shape
    fits = k_cache.dtype == qkv.dtype and k_cache.shape[2] == HEAD and qkv.is_contiguous() and cos.is_contiguous() and cos.shape[1] % 4 == 0
    return fits and width % 4 == 0 and splits * width <= MOST_S and launch.has_wgmma(qkv.device) and qkv.shape[0] >= ROTATES_MIN and _readable(qkv, addend)


def norms(x: torch.Tensor, addend: LinearAddend) -> bool:
    """Whether `norm_rows` can do this step."""
    return x.shape[1] % 128 == 0 and x.shape[1] <= most_columns(addend.s.shape[3]) and _readable(x, addend)


def most_columns(width: int) -> int:
    """Of `norm_rows`, by the last size of s: a warp has 128 columns, and beyond rank 16 twice the registers."""
    return 4096 if width <= 16 else 2048


def _readable(x: torch.Tensor, addend: LinearAddend) -> bool:
    return x.is_cuda and x.dtype.itemsize == 2 and addend.order is not None and addend.tables.b.pool.dtype == x.dtype


def rotate_rows(qkv: torch.Tensor, q: torch.Tensor, buffers: tuple, weights: tuple, eps: float, addend: LinearAddend) -> None:
    """Fills q [M, Hq, 128] and the rows of the caches. `buffers`: k_cache, v_cache, kv_slots, positions, cos, sin; `weights` of q and k. As `qk_norm_rope`."""
    torch.ops.sglang_lora_moe.rotate_rows(qkv, q, *buffers, *weights, *_added(addend), eps, True, launch.multiprocessors(qkv.device))


def norm_rows(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, addend: LinearAddend) -> torch.Tensor:
    """residual [M, H] += x + what adapters add to x; its norm, in out."""
    torch.ops.sglang_lora_moe.norm_rows(x, residual, weight, out, *_added(addend), eps, True)
    return out


def _added(addend: LinearAddend) -> tuple:
    b = addend.tables.b
    if b.pool.is_cuda:
        build.load()
    return (addend.s, None, addend.order, addend.ordered_slots, b.pool, b.offset, b.rank, b.scaling, addend.tables.stride)
