"""The triton backend against the float32 reference: both families, with and without adapters, both hook styles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.moe_inputs import align_on_host, has_cuda_align
from sglang_lora_moe.lora.hooks import build_lora_hooks
from sglang_lora_moe.moe.backends import triton_lora
from sglang_lora_moe.moe.backends.triton import TritonRunnerCore
from sglang_lora_moe.moe.runner import LoRAHooks, MoeRunner, RunnerInput
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops.moe_grouped_gemm import GemmTile
from sglang_lora_moe.ops.moe_tiles import LayerTiles
from sglang_lora_moe.quantization.base import TritonQuantInfo
from tests.ops.moe_triton_cases import Case, make_case, reference, relative_error

SMALL = MoESpec(8, 2, 64, 48)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


class Poisoned(Workspace):
    """Scratch full of NaN, so that nothing unwritten can be read unnoticed."""

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        found = super().get(name, shape, dtype)
        return found.fill_(float("nan")) if dtype.is_floating_point else found.fill_(1 << 20)


class Core(TritonRunnerCore):
    def make_routing(self, inp: RunnerInput):
        routing = super().make_routing(inp)
        return routing if has_cuda_align() else align_on_host(routing)


class SeparateOps:
    """The LoRA functions without the addend: shrink, B13 in the activation kernel, B2 in the combine or an expand."""

    addend = None
    shrink, act_with_delta, combine_with_delta = (staticmethod(getattr(triton_lora, n)) for n in ("shrink", "act_with_delta", "combine_with_delta"))


def run(case: Case, tiles: LayerTiles | None = None, ops=triton_lora, workspace: Workspace | None = None) -> torch.Tensor:
    hooks: LoRAHooks | None = None if case.stacks is None else build_lora_hooks(case.stacks, ops)
    slots = 0 if case.stacks is None else case.stacks.a13.num_slots
    inp = RunnerInput(case.x, case.topk_ids, case.topk_weights, case.token_slots, workspace or Poisoned(case.x.device), case.spec, slots)
    return MoeRunner(Core(tiles)).run(inp, TritonQuantInfo(case.w13, case.w2, case.b13, case.b2), hooks)


def check(case: Case, tiles: LayerTiles | None = None, ops=triton_lora) -> None:
    found = run(case, tiles, ops)
    error = relative_error(found, reference(case))
    assert error <= TOLERANCE[case.x.dtype], f"relative error {error:.2e}"
    assert torch.equal(found, run(case, tiles, ops)), "two runs differ"


DTYPES = [torch.float32, torch.float16] if not torch.cuda.is_available() else [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 9, 21])
@pytest.mark.parametrize("routing", ["uniform", "holes"])
def test_base_layer_equals_reference(device, dtype, tokens, routing) -> None:
    torch.manual_seed(tokens)
    check(make_case(SMALL, tokens, dtype, device, routing=routing))


@pytest.mark.parametrize(
    "spec",
    [
        MoESpec(4, 1, 32, 32, activation="gelu"),
        MoESpec(4, 2, 32, 32, activation="gelu_tanh", gated=False),
        MoESpec(4, 2, 32, 32, activation="relu2", gated=False, has_bias=True),
        MoESpec(4, 2, 40, 24, has_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0),
        MoESpec(4, 1, 32, 32, activation="relu", router_weight_on="input"),
    ],
    ids=lambda s: f"{s.activation}-{s.gated}-{s.has_bias}",
)
@pytest.mark.parametrize("tokens", [2, 7])
def test_formulas(device, spec, tokens) -> None:
    torch.manual_seed(1)
    case = make_case(spec, tokens, torch.float32, device)
    found = run(case)
    scaled = replace(case, x=case.x * case.topk_weights, topk_weights=torch.ones_like(case.topk_weights)) if spec.router_weight_on == "input" else case
    assert relative_error(found, reference(scaled)) <= 1e-5


@pytest.mark.parametrize("ops", [triton_lora, SeparateOps], ids=["addend", "separate"])
@pytest.mark.parametrize("popularity", ["none", "identical", "uniform", "distinct", "zipf"])
@pytest.mark.parametrize("tokens", [2, 13])
def test_adapters_by_popularity(device, ops, popularity, tokens) -> None:
    torch.manual_seed(2)
    check(make_case(SMALL, tokens, torch.float32, device, ranks=[4, 0, 20, 16], routing="holes", popularity=popularity), ops=ops)


@pytest.mark.parametrize("ops", [triton_lora, SeparateOps], ids=["addend", "separate"])
@pytest.mark.parametrize("tokens", [2, 13])
def test_mixed_layouts(device, ops, tokens) -> None:
    """Split and shared A, shared-outer experts and a rank above one rank block in the same batch."""
    torch.manual_seed(3)
    layout = {"split": [True, False, True], "shared": [False, True, True]}
    check(make_case(SMALL, tokens, torch.float32, device, ranks=[40, 8, 1], **layout), ops=ops)
    check(make_case(SMALL, tokens, torch.float16, device, ranks=[40, 8, 1], **layout), ops=ops)


@pytest.mark.parametrize("routing", ["one", "few"])
def test_skewed_routing(device, routing) -> None:
    torch.manual_seed(4)
    check(make_case(SMALL, 40, torch.float16, device, ranks=[8, 4], routing=routing), LayerTiles(GemmTile(16, 16, 32, 4, 2), GemmTile(16, 32, 16, 4, 2, 1, 2)))


@pytest.mark.parametrize("load", ["base", "adapters"])
def test_many_tokens(device, load) -> None:
    """4,097 tokens on tall tiles with a half-height tail, walked in groups."""
    torch.manual_seed(9)
    tiles = LayerTiles(GemmTile(128, 16, 16, 4, 2, 1, 2, tail=True), GemmTile(128, 32, 16, 4, 2, 1, 3, tail=True), lora_block=64)
    case = make_case(MoESpec(3, 1, 16, 16), 4097, torch.float32, device, ranks=None if load == "base" else [4, 8], popularity="zipf")
    assert relative_error(run(case, tiles), reference(case)) <= 1e-5


def test_no_tma(device) -> None:
    torch.manual_seed(5)
    tiles = LayerTiles(GemmTile(16, 32, 32, 4, 2, tma=False), GemmTile(16, 32, 32, 4, 2, tma=False))
    check(make_case(MoESpec(4, 2, 56, 40), 9, torch.float16, device, ranks=[8, 4]), tiles)


QWEN = MoESpec(128, 8, 2048, 768)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16, 17, 64, 133, 256, 1024, 4097])
@pytest.mark.parametrize("layout", ["base", "r16", "r64x16", "mixed"])
def test_real_shape(device, tokens, layout) -> None:
    torch.manual_seed(tokens)
    ranks = {"base": None, "r16": [16] * 4, "r64x16": [64] * 16, "mixed": [16, 0, 1, 100, 8]}[layout]
    extra = {"split": [True, False, True, False, True], "shared": [False, True, False, True, False]} if layout == "mixed" else {}
    case = make_case(QWEN, tokens, torch.bfloat16, device, ranks=ranks, routing="holes" if layout == "mixed" else "uniform", **extra)
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("load", ["base", "adapters"])
@pytest.mark.parametrize("shape", [(128, 2048, 768, 8), (8, 4096, 14336, 2), (256, 7168, 256, 8), (32, 2880, 2880, 4)], ids=str)
def test_every_measured_tile(device, shape, load, tokens) -> None:
    """The launch shapes of the measured table, at the sizes they were measured for."""
    torch.manual_seed(tokens)
    experts, hidden, inter, top_k = shape
    check(make_case(MoESpec(experts, top_k, hidden, inter), tokens, torch.bfloat16, device, ranks=None if load == "base" else [16, 8, 16]))


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["one", "few", "holes"])
@pytest.mark.parametrize("popularity", ["none", "identical", "distinct", "zipf"])
@pytest.mark.parametrize("tokens", [3, 64, 700])
def test_real_shape_skewed(device, routing, popularity, tokens) -> None:
    torch.manual_seed(6)
    check(make_case(MoESpec(32, 4, 1024, 512), tokens, torch.bfloat16, device, ranks=[16] * 64, routing=routing, popularity=popularity))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 48, 600])
def test_bias_and_odd_sizes(device, tokens) -> None:
    torch.manual_seed(7)
    spec = MoESpec(32, 4, 2880, 2880, has_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0)
    check(make_case(spec, tokens, torch.bfloat16, device, ranks=[16, 32]))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 64, 600])
def test_graph_replay_follows_its_inputs(device, tokens) -> None:
    """A captured layer replayed on other tokens, experts and slots equals the eager layer on them."""
    torch.manual_seed(8)
    spec = MoESpec(32, 4, 1024, 512)
    case, other = (make_case(spec, tokens, torch.bfloat16, device, ranks=[16, 8, 64], popularity=p) for p in ("uniform", "zipf"))
    if not has_cuda_align() and tokens > 4:
        pytest.skip("the alignment op has no CUDA implementation in this process")
    workspace = Workspace(device)
    run(case, workspace=workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case, workspace=workspace)
    for name in ("x", "topk_ids", "topk_weights", "token_slots"):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    expected = run(replace(other, w13=case.w13, w2=case.w2, stacks=case.stacks))
    assert torch.equal(out, expected)
