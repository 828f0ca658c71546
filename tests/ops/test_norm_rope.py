"""Norm, rotation and residual of many tokens with adapters: on the emulator under AddressSanitizer and UBSan; on a GPU the operators themselves."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.targets import LinearTarget
from sglang_lora_moe.lora.weights import LinearLoRA
from sglang_lora_moe.ops.lora_linear import LinearAddend, PartTables
from sglang_lora_moe.ops.norm_rope import most_columns, norm_rows, rotate_rows
from tests.moe_cases import Noise, generator
from tests.ops import emulator
from tests.references import ref_linear, relative_error
from tests.slots import write_slot

DRIVER = Path(__file__).parent / "norm_rope_driver.cpp"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HQ, HKV, D, K, POSITIONS = 5, 2, 128, 64, 300
EPS = 1e-5
# Tokens, largest rank, splits of s: of 16, 32 and 64 ranks the rotation has B in registers, not of more, nor beside so much s.
CASES = [(1, 16, 1), (600, 16, 2), (70, 24, 3), (33, 40, 9), (20, 64, 12), (20, 72, 2)]


def emulate(driver: Path) -> emulator.Operators:
    """The operators on CPU tensors are the emulated kernels."""
    order = 0

    def run(rotates: bool, inputs: tuple, sizes: tuple, has_norm: bool, added: tuple, outputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal order
        order += 1
        s, row_scale, slot_order, slots, pool, offset, rank, scaling, stride, eps, *_ = added
        entries = (s.shape[2] - 1) * stride + rank.numel()
        tables = [t.as_strided((entries,), (1,)) for t in (offset, rank, scaling)]
        shape = (s.shape[2], s.shape[0], s.shape[3])
        bf16 = inputs[0].dtype == torch.bfloat16
        fields = (order % 4, rotates, *sizes, bf16, has_norm, row_scale is not None, *shape, stride, entries)
        head = struct.pack("17ifq", *map(int, fields), eps, pool.numel())
        written = emulator.answer(driver, head, *inputs, s, row_scale, slot_order, slots, pool, *tables)
        place = 0
        for out in outputs:
            size = out.numel() * out.element_size()
            out.copy_(torch.frombuffer(written[place : place + size], dtype=out.dtype).view(out.shape))
            place += size

    def rotate(qkv, q, k_cache, v_cache, kv_slots, positions, cos, sin, q_weight, k_weight, *added) -> None:
        sizes = (q.shape[0], q.shape[1], k_cache.shape[1], k_cache.shape[0], *cos.shape, 0)
        run(True, (qkv, kv_slots, positions, cos, sin, q_weight, k_weight), sizes, q_weight is not None, added, (q, k_cache, v_cache))

    def norm(x, residual, weight, out, *added) -> None:
        run(False, (x, residual, weight), (x.shape[0], 0, 0, 0, 0, 0, x.shape[1]), False, added, (residual, out))

    return {"rotate_rows": rotate, "norm_rows": norm}


def make_addend(parts: dict[str, int], k: int, m: int, max_rank: int, splits: int, noise: Noise) -> tuple[LinearAddend, torch.Tensor]:
    """(addend, what it adds float32 [m, rows]): slot 1 touches the last part alone, slot 3 has a rank that is no multiple of anything."""
    pool = LoRAMemoryPool([LinearTarget(name, k, rows) for name, rows in parts.items()], 5, max_rank, noise.dtype, DEVICE)
    pool.pool.fill_(float("nan"))
    for slot, rank in enumerate((16, max_rank, 1, 7)):
        names = list(parts)[-1:] if slot == 1 else list(parts)
        write_slot(pool, slot, {n: LinearLoRA(noise(rank, k, std=k**-0.5), noise(parts[n], rank, std=rank**-0.5), 0.5 + slot) for n in names})
    slots = torch.randint(-1, 4, (m,), generator=noise.generator, device=DEVICE, dtype=torch.int32)
    slots[0] = 3
    ordered, order = slots.sort(stable=True)
    stacks = [pool.stacks_for(name) for name in parts]
    tables = PartTables([(stack, sum(list(parts.values())[:i]), rows) for i, (stack, rows) in enumerate(zip(stacks, parts.values(), strict=True))])  # type: ignore[misc]
    s = torch.full((splits, m, len(parts), tables.a.shrink_width), float("nan"), device=DEVICE)
    x = noise(m, k)
    share = torch.rand(splits, device=DEVICE) + 0.1
    for token, slot in enumerate(slots.tolist()):
        for part, stack in enumerate(stacks if slot >= 0 else []):
            rank, offset = int(stack.a.rank[slot]), int(stack.a.offset[slot])
            low = pool.pool[offset : offset + rank * k].view(rank, k).float() @ x[token].float()
            s[:, token, part, :rank] = low * (share / share.sum())[:, None]
    delta = ref_linear(x, torch.zeros(sum(parts.values()), k, dtype=noise.dtype, device=DEVICE), None, stacks, slots)
    return LinearAddend(s, tables, slots, order.int(), ordered), delta


def rotated(qkv: torch.Tensor, weights: tuple, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = qkv.view(qkv.shape[0], -1, D)
    qk = heads[:, : HQ + HKV].float()
    if weights[0] is not None:
        weight = torch.cat([weights[0].expand(HQ, D), weights[1].expand(HKV, D)]).float()
        qk = (qk * torch.rsqrt(qk.pow(2).mean(-1, keepdim=True) + EPS) * weight).to(qkv.dtype).float()
    (a, b), cos, sin = qk.chunk(2, -1), cos[:, None, : D // 2], sin[:, None, : D // 2]
    qk = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(qkv.dtype)
    return qk[:, :HQ], qk[:, HQ:], heads[:, HQ + HKV :]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("m", "max_rank", "splits"), CASES)
def test_rotation(m: int, max_rank: int, splits: int, normed: bool, dtype: torch.dtype) -> None:
    noise = Noise(generator(m, DEVICE), dtype)
    parts = {"q": HQ * D, "k": HKV * D, "v": HKV * D}
    addend, delta = make_addend(parts, K, m, max_rank, splits, noise)
    qkv, weights = noise(m, (HQ + 2 * HKV) * D), (noise(D) + 1, noise(D) + 1) if normed else (None, None)
    cos, sin = (torch.randn(POSITIONS, D, generator=noise.generator, device=DEVICE) for _ in range(2))
    positions = torch.randint(0, POSITIONS, (m,), generator=noise.generator, device=DEVICE)
    kv_slots = torch.randperm(m + 3, device=DEVICE)[:m]
    want_qkv, q = (qkv.float() + delta.float()).to(dtype), torch.full((m, HQ, D), float("nan"), dtype=dtype, device=DEVICE)
    caches = tuple(torch.zeros(m + 3, HKV, D, dtype=dtype, device=DEVICE) for _ in range(2))
    rotate_rows(qkv, q, (*caches, kv_slots, positions, cos, sin), weights, EPS, addend)
    for found, want in zip((q, *(cache[kv_slots] for cache in caches)), rotated(want_qkv, weights, cos[positions], sin[positions]), strict=True):
        assert relative_error(found, want) < 5e-3
    assert relative_error(qkv, want_qkv) > 0.05, "the adapters do nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [128, 640, None])
@pytest.mark.parametrize(("m", "max_rank", "splits"), CASES)
def test_norm(m: int, max_rank: int, splits: int, columns: int | None, dtype: torch.dtype) -> None:
    """None: as many as there may be."""
    noise = Noise(generator(m, DEVICE), dtype)
    columns = columns or most_columns(max_rank)
    addend, delta = make_addend({"o": columns}, K, m, max_rank, splits, noise)
    x, residual, weight = noise(m, columns), noise(m, columns), noise(columns) + 1
    total = ((x.float() + delta.float()).to(dtype).float() + residual.float()).to(dtype)
    want = total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + EPS) * weight.float()
    assert relative_error(x + residual, total) > 0.05, "the adapters do nothing"
    out = torch.full_like(x, float("nan"))
    norm_rows(x, residual, weight, out, EPS, addend)
    assert relative_error(residual, total) < 5e-3
    assert relative_error(out, want) < 5e-3
