"""Workspace: named scratch that never overlaps, and grows."""

from __future__ import annotations

import pytest
import torch

from sglang_lora_moe.moe.workspace import Workspace


def test_cpu_scratch_is_fresh() -> None:
    workspace = Workspace("cpu")
    first, second = workspace.get("a", (3, 4), torch.float32), workspace.get("a", (3, 4), torch.float32)
    assert first.shape == (3, 4) and first.is_contiguous() and first.data_ptr() != second.data_ptr()


@pytest.mark.gpu
def test_gpu_scratch_is_reused_and_grows() -> None:
    workspace = Workspace("cuda")
    large = workspace.get("a", (100, 3), torch.float32)
    small = workspace.get("a", (10,), torch.bfloat16)
    other = workspace.get("b", (10,), torch.int64)
    assert large.data_ptr() == small.data_ptr() != other.data_ptr()
    assert workspace.get("a", (1000,), torch.float32).numel() == 1000
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="has 4096 bytes but 40000 are needed during graph capture"), torch.cuda.graph(graph):
        workspace.get("a", (10000,), torch.float32)


@pytest.mark.gpu
def test_gpu_graphs_keep_what_a_buffer_has_outgrown() -> None:
    """A graph captured before a buffer grew must not write to memory that has another owner since."""
    workspace = Workspace("cuda")
    workspace.get("a", (1 << 20,), torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        workspace.get("a", (1 << 20,), torch.float32).fill_(1.0)
    workspace.get("a", (1 << 22,), torch.float32)
    others = [torch.zeros(1 << 20, device="cuda") for _ in range(4)]
    graph.replay()
    assert not any(bool(other.any()) for other in others)
