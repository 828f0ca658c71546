"""The MoE backend in Triton, for NVIDIA GPUs from sm_80 on: 16-bit (and float32) and int4 and int8 weights as stored.

Two families by number of tokens (`ops/moe_tiles.py`): *per pair*, where nothing is sorted and every pair reads its own expert, and *grouped*, over the tiles of
one alignment. In both the activation and the low-rank addend are part of the gate_up kernel's epilogue; down takes its addend before its store, and per pair
also sums over k. On sm_90 grouped GEMMs of many tokens are a CUDA kernel of the same contract (`ops/moe_wgmma_gemm.py`).
"""

from typing import Any

import torch
from torch import nn

from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import MoeRunnerCore, RunnerInput
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.fused_moe_lora import AT_ONCE
from sglang_lora_moe.ops.low_rank import LowRank
from sglang_lora_moe.ops.moe_combine import moe_combine
from sglang_lora_moe.ops.moe_grouped_gemm import grouped_gemm
from sglang_lora_moe.ops.moe_lora_align import MAX_TOLD_PAIRS
from sglang_lora_moe.ops.moe_pair_gemv import GemvTile, pair_down, pair_gate_up
from sglang_lora_moe.ops.moe_tiles import MEASURED_MEMORY, LayerTiles, choose_integer_tiles, choose_tiles, fitting
from sglang_lora_moe.ops.moe_wgmma_gemm import WgmmaTile, wgmma_gemm
from sglang_lora_moe.quantization.base import QuantMethod, TritonQuantInfo
from sglang_lora_moe.quantization.wna16 import WNA16Weight


class TritonRunnerCore(MoeRunnerCore):
    """MoeRunnerCore over `TritonQuantInfo`. `tiles` fixes the launch shapes (benchmarks); None chooses by size."""

    name = "triton"

    def __init__(self, tiles: LayerTiles | None = None) -> None:
        self.tiles = tiles
        self.integers = False  # whether the weights have 4 or 8 bits, which the grouped kernel alone reads; of all layers that share the core

    def quant_info(self, quant_method: QuantMethod, layer: nn.Module) -> TritonQuantInfo:
        info = quant_method.get_triton_quant_info(layer)
        self.integers = isinstance(info.w13, WNA16Weight)
        return info

    def make_routing(self, inp: RunnerInput) -> Routing:
        tiles = self._tiles(inp)
        routing = Routing(
            inp.topk_ids, inp.token_slots, inp.spec.num_experts, inp.num_slots,
            base_block=tiles.gate_up.m, lora_block=tiles.lora_block, rows="pair" if tiles.by_pair else "sorted", workspace=inp.workspace,
        )  # fmt: skip
        if isinstance(tiles.gate_up, WgmmaTile) and isinstance(tiles.down, WgmmaTile):
            routing.wgmma = tiles.gate_up
        elif inp.spec.intermediate_size > AT_ONCE and inp.token_slots is not None and inp.spec.num_experts < routing.num_pairs <= MAX_TOLD_PAIRS:
            routing.aligned, routing.beside = inp.workspace.get("lora.aligned", (1,), torch.int32), True
        return routing

    def gate_up_activation(self, inp: RunnerInput, routing: Routing, quant_info: TritonQuantInfo, addend: LowRank | None = None) -> torch.Tensor:
        out = inp.workspace.get("moe.act", (routing.num_pairs, inp.spec.intermediate_size), inp.x.dtype)
        tiles = self._tiles(inp)
        if isinstance(tiles.gate_up, GemvTile):
            return pair_gate_up(inp.x, _plain(quant_info.w13), quant_info.b13, routing.topk_ids, out, tiles.gate_up, activation=inp.spec, addend=addend)
        options: dict[str, Any] = {"top_k": routing.top_k, "gather": True, "scatter": False, "activation": inp.spec, "addend": addend}
        if isinstance(tiles.gate_up, WgmmaTile):
            following = None if addend is None else addend.following
            options["report"] = (addend is None or following is not None) and isinstance(tiles.down, WgmmaTile)
            routing.reports = tiles.gate_up.reports(out.shape[1]) + (following is not None) if options["report"] else 0
            return wgmma_gemm(inp.x, _plain(quant_info.w13), quant_info.b13, routing.alignment, out, tiles.gate_up, **options)
        options["told_ptr"] = routing.told if routing.beside and routing.aligned is None else routing.aligned
        return grouped_gemm(inp.x, quant_info.w13, quant_info.b13, routing.alignment, out, tiles.gate_up, **options)

    def down(self, inp: RunnerInput, act: torch.Tensor, routing: Routing, quant_info: TritonQuantInfo, addend: LowRank | None = None) -> torch.Tensor:
        """[P, H] in pair order: the down GEMM scatters. Per pair it is part of `down_combine` alone."""
        out = inp.workspace.get("moe.down", (routing.num_pairs, inp.spec.hidden_size), inp.x.dtype)
        tiles = self._tiles(inp)
        assert not isinstance(tiles.down, GemvTile), "per pair, down and the sum over k are one kernel"
        options: dict[str, Any] = {"top_k": routing.top_k, "gather": False, "scatter": True, "addend": addend}
        if addend is not None and addend.of_combine is not None:
            args = addend.token_args(inp.topk_ids, inp.topk_weights, inp.spec.num_experts)
            options |= {"addend": None, "beside": True, "sums": None if addend.summed is None else (addend.summed, inp.x.shape[0], args)}
        if isinstance(tiles.down, WgmmaTile):
            options["behind"], routing.reports = routing.reports, 0
            return wgmma_gemm(act, _plain(quant_info.w2), quant_info.b2, routing.alignment, out, tiles.down, **options)
        return grouped_gemm(act, quant_info.w2, quant_info.b2, routing.alignment, out, tiles.down, told_ptr=routing.told, **options)

    def combine(self, inp: RunnerInput, down: torch.Tensor, routing: Routing, addend: LowRank | None = None) -> torch.Tensor:
        return moe_combine(down, inp.topk_ids, inp.topk_weights, inp.spec.num_experts, torch.empty_like(inp.x), addend)

    def down_combine(self, inp: RunnerInput, act: torch.Tensor, routing: Routing, quant_info: TritonQuantInfo, addend: LowRank | None = None) -> torch.Tensor:
        tiles = self._tiles(inp)
        if not isinstance(tiles.down, GemvTile):
            return self.combine(inp, self.down(inp, act, routing, quant_info, addend), routing, addend and addend.of_combine)
        out = torch.empty_like(inp.x)
        return pair_down(act, _plain(quant_info.w2), quant_info.b2, inp.topk_ids, inp.topk_weights, out, tiles.down, addend=addend)

    def _tiles(self, inp: RunnerInput) -> LayerTiles:
        if self.integers:
            return self.tiles or choose_integer_tiles(inp.spec, inp.x.shape[0], inp.x.element_size())
        tiles = self.tiles or choose_tiles(inp.spec, inp.x.shape[0], inp.x.element_size(), inp.max_rank, launch.has_wgmma(inp.x.device))
        return tiles if launch.shared_memory(inp.x.device) >= MEASURED_MEMORY else fitting(tiles, inp.spec.gated, launch.shared_memory(inp.x.device))


def _plain(weight: torch.Tensor | WNA16Weight) -> torch.Tensor:
    assert isinstance(weight, torch.Tensor), "the kernels per pair and by wgmma do not read integer weights"
    return weight
