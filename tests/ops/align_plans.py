"""The CUDA alignment under a plan of the caller's choice, past the operator: tests force every path, benchmarks compare them."""

from __future__ import annotations

import ctypes
import functools

import torch

from sglang_lora_moe.ops import build
from sglang_lora_moe.ops import moe_lora_align as op

Plan = tuple[int, int, int, int, int]  # one_block_pairs, cluster_pairs, pairs_per_block, overlap, most_bins
POINTERS = ("topk_ids", "token_slots", "sorted_pairs", "base_tiles", "lora_tiles", "counts", "workspace")
SIZES = ("ids_are_64bit", "tokens", "top_k", "experts", "slots", "base_block", "lora_block")


class Arguments(ctypes.Structure):  # MoeLoraAlign of csrc/moe_lora_align.h
    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int32) for name in SIZES), ("told", ctypes.c_void_p)]


class PlanStruct(ctypes.Structure):  # MoeLoraAlignPlan
    _fields_ = [(name, ctypes.c_int32) for name in ("one_block_pairs", "cluster_pairs", "pairs_per_block", "overlap", "most_bins")]


@functools.cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(build.library_path(build.device_architectures())))
    found.moe_lora_align.argtypes = [ctypes.POINTER(Arguments), PlanStruct, ctypes.c_void_p]
    return found


def align_with_plan(
    plan: Plan,
    ids: torch.Tensor,
    token_slots: torch.Tensor | None,
    sizes: tuple[int, int, int, int],  # experts, slots, base_block, lora_block
    buffers: op.Alignment,
    workspace: torch.Tensor,
) -> None:
    tensors = (ids, token_slots, buffers.sorted_pairs, buffers.base_tiles, buffers.lora_tiles, buffers.counts, workspace)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    experts, slots, base_block, lora_block = sizes
    arguments = Arguments(*pointers, int(ids.dtype == torch.int64), *ids.shape, experts, 0 if token_slots is None else slots, base_block, lora_block)
    code = library().moe_lora_align(ctypes.byref(arguments), PlanStruct(*plan), torch.cuda.current_stream().cuda_stream)
    assert code == 0, f"launch failed with CUDA error {code}"
