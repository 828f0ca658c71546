"""The triton backend against the float32 reference: both families, with and without adapters, both hook styles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.moe_inputs import align_on_host, has_cuda_align
from sglang_lora_moe.lora.hooks import build_lora_hooks
from sglang_lora_moe.moe.backends import triton_lora
from sglang_lora_moe.moe.backends.triton import TritonRunnerCore
from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.runner import MoeRunner, RunnerInput
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import moe_grouped_gemm
from sglang_lora_moe.ops.moe_grouped_gemm import GemmTile
from sglang_lora_moe.ops.moe_tiles import LayerTiles
from sglang_lora_moe.quantization.base import TritonQuantInfo
from tests.moe_cases import LAYOUTS, POPULARITIES, MoECase, full_grid, make_case, small_cases
from tests.references import assert_near, keep_error, ref_moe, relative_error

SMALL = {"experts": 8, "top_k": 2, "hidden": 64, "inter": 48}


class Poisoned(Workspace):
    """Scratch full of NaN, so that nothing unwritten can be read unnoticed."""

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        found = super().get(name, shape, dtype)
        return found.fill_(float("nan")) if dtype.is_floating_point else found.fill_(1 << 20)


class Core(TritonRunnerCore):
    def make_routing(self, inp: RunnerInput) -> Routing:
        routing = super().make_routing(inp)
        if not has_cuda_align():
            return align_on_host(routing)
        if routing.rows == "sorted":
            routing.alignment  # noqa: B018  # on the main stream, as cores without an addend do: their shrinks run beside the GEMM
        return routing


def run(case: MoECase, tiles: LayerTiles | None = None, workspace: Workspace | None = None, lora: bool = True) -> torch.Tensor:
    hooks = build_lora_hooks(case.stacks, triton_lora) if lora else None
    inp = case.runner_input(workspace or Poisoned(case.x.device), lora)
    return MoeRunner(Core(tiles)).run(inp, TritonQuantInfo(case.w13, case.w2, case.b13, case.b2), hooks)


def check(case: MoECase, tiles: LayerTiles | None = None, lora: bool = True) -> torch.Tensor:
    """Against the reference, and a second run against the first."""
    found, exact = run(case, tiles, lora=lora), ref_moe(case, lora).out
    kernel = f"triton layer, {'adapters' if lora else 'base'}"
    if lora and Core(tiles).make_routing(case.runner_input(Workspace(case.x.device))).rows == "sorted":
        keep_error(f"{kernel}, nothing rounded in the reference, {str(found.dtype).removeprefix('torch.')}", relative_error(found, exact))
        exact = ref_moe(case, lora, ("s", "act")).out
    assert_near(found, exact, kernel, case.name)
    assert torch.equal(found, run(case, tiles, lora=lora)), f"two runs differ: {case.name}"
    return found


DTYPES = [torch.float32, torch.float16] if not torch.cuda.is_available() else [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 9, 21])
@pytest.mark.parametrize("routing", ["uniform", "partial"])
def test_base_layer_equals_reference(device, dtype, tokens, routing) -> None:
    check(make_case(**SMALL, m=tokens, dtype=dtype, device=device, routing=routing, popularity="none"), lora=False)


@pytest.mark.parametrize(
    "spec",
    [
        MoESpec(4, 1, 32, 32, activation="gelu"),
        MoESpec(4, 2, 32, 32, activation="gelu_tanh", gated=False),
        MoESpec(4, 2, 32, 32, activation="relu2", gated=False, has_bias=True),
        MoESpec(4, 2, 40, 24, has_bias=True, swiglu_alpha=1.702, swiglu_limit=1.5),
        MoESpec(4, 1, 32, 32, activation="relu", router_weight_on="input"),
    ],
    ids=lambda s: f"{s.activation}-{s.gated}-{s.has_bias}",
)
@pytest.mark.parametrize("tokens", [2, 7])
@pytest.mark.parametrize("lora", [False, True], ids=["base", "adapters"])
def test_formulas(device, spec, tokens, lora) -> None:
    check(make_case(spec=spec, m=tokens, device=device, ranks=(8, 4), active=2), lora=lora)


@pytest.mark.parametrize("routing", ["uniform", "some_invalid", "partial"])
@pytest.mark.parametrize("short", [0, 512], ids=["combine", "down"])
def test_few_pairs_of_many_experts(device, monkeypatch, routing, short) -> None:
    """Where the combine adds B s of the second projection, but for few columns of act."""
    monkeypatch.setattr(triton_lora, "SHORT_DOWN", short)
    case = make_case(experts=32, top_k=3, hidden=72, inter=48, m=9, device=device, layouts=LAYOUTS, active=5, routing=routing)
    inp = case.runner_input(Workspace(case.x.device))
    assert triton_lora.combine_adds(case.stacks, Core().make_routing(inp))
    check(case)


def test_columns_of_several_rounds(device) -> None:
    """More columns of act than the second shrink has under way at once."""
    check(make_case(experts=16, top_k=2, hidden=32, inter=1100, m=5, ranks=(16, 3), active=3, slots=4, dtype=torch.float16, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "tokens"), [(MoESpec(128, 8, 2048, 768), m) for m in (5, 16, 40, 96)] + [(MoESpec(16, 4, 1024, 2880), 16)])
def test_replays_agree(spec, tokens) -> None:
    """Down starts beside its shrink, or gate_up when the alignment says so: hundreds of replays, each after another step that leaves other values
    behind, give the same bits."""
    device = torch.device("cuda")
    cases = [make_case(spec=spec, m=tokens, ranks=(16,), active=4, slots=4, dtype=torch.bfloat16, device=device, seed=s) for s in (0, 1)]
    workspace, graphs, outs = Workspace(device), [], []
    for case in cases:
        run(case, workspace=workspace)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outs.append(run(case, workspace=workspace))
    first = []
    for i in range(400):
        graphs[i % 2].replay()
        if i < 2:
            first.append(outs[i].clone())
        assert torch.equal(outs[i % 2], first[i % 2]), f"replay {i}"


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("tokens", [2, 13])
def test_adapters_by_popularity(device, popularity, tokens) -> None:
    check(make_case(**SMALL, m=tokens, device=device, ranks=(4, 0, 20, 16), layouts=("split",), routing="partial", popularity=popularity))


@pytest.mark.parametrize("tokens", [2, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mixed_layouts(device, tokens, dtype) -> None:
    """Split and shared A, shared-outer experts, one half alone and a rank above one rank block in the same batch."""
    check(make_case(**SMALL, m=tokens, dtype=dtype, device=device, ranks=(40, 8, 1), layouts=LAYOUTS, active=6, slots=7))


@pytest.mark.parametrize("routing", ["one_expert", "few_experts", "edges", "some_invalid", "all_invalid"])
def test_skewed_routing(device, routing) -> None:
    tiles = LayerTiles(GemmTile(16, 16, 32, 4, 2), GemmTile(16, 32, 16, 4, 2, 1, 2))
    check(make_case(**SMALL, m=40, dtype=torch.float16, device=device, ranks=(8, 4), routing=routing), tiles)


@pytest.mark.parametrize(("up", "down"), [((16, 32), (32, 32)), ((64, 32), (128, 32)), ((64, 32), (128, 128))], ids=["few", "ahead", "gate_up alone"])
def test_programs_that_begin_after_the_shrink(device, monkeypatch, up, down) -> None:
    """With and without the addend under way during the main loop, one adapter or two in a product, tiles with more of them."""
    monkeypatch.setattr(moe_grouped_gemm, "FIRST_ROUND", 1)
    tiles = LayerTiles(GemmTile(16, *up, 4, 2, 0), GemmTile(16, *down, 4, 2, 0))
    check(make_case(**SMALL, m=24, dtype=torch.float16, device=device, ranks=(16, 8, 5), layouts=("split", "dense"), active=5, slots=6), tiles)


@pytest.mark.parametrize("load", ["base", "adapters"])
def test_many_tokens(device, load) -> None:
    """4,097 tokens on tall tiles with a half-height tail, walked in groups."""
    tiles = LayerTiles(GemmTile(128, 16, 16, 4, 2, 1, 2, tail=True), GemmTile(128, 32, 16, 4, 2, 1, 3, tail=True), lora_block=64)
    case = make_case(spec=MoESpec(3, 1, 16, 16), m=4097, device=device, ranks=(4, 8), active=2, slots=2, popularity="zipf")
    assert_near(run(case, tiles, lora=load != "base"), ref_moe(case, load != "base").out, "triton layer")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_axes has all of these and more")
@pytest.mark.parametrize("arguments", list(small_cases()), ids=lambda a: " ".join(f"{k}={v}" for k, v in a.items()))
def test_every_axis(device, arguments: dict[str, Any]) -> None:
    """Tokens up to 133, popularities, layouts, routings, formulas, a rank above one rank block, odd widths: one axis at a time."""
    check(make_case(device=device, **arguments))


def test_no_tma(device) -> None:
    tiles = LayerTiles(GemmTile(16, 32, 32, 4, 2, tma=False), GemmTile(16, 32, 32, 4, 2, tma=False))
    check(make_case(spec=MoESpec(4, 2, 56, 40), m=9, dtype=torch.float16, device=device, ranks=(8, 4)), tiles)


# ---- the GPU: bfloat16, eager, two runs, and from a captured graph ---------------------------------------------------

QWEN = MoESpec(128, 8, 2048, 768)
MEDIUM = MoESpec(32, 4, 1024, 512)
BY_PAIR = 4  # up to here no alignment is needed


def check_on_gpu(lora: bool = True, tiles: LayerTiles | None = None, **arguments: Any) -> None:
    """`check`, then the same layer captured: three replays equal the eager run bit for bit."""
    case = make_case(**({"dtype": torch.bfloat16, "device": "cuda"} | arguments))
    found, workspace = check(case, tiles, lora=lora), Workspace("cuda")
    if not has_cuda_align() and case.x.shape[0] > BY_PAIR:
        return
    run(case, tiles, workspace=workspace, lora=lora)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case, tiles, workspace=workspace, lora=lora)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, found), f"a replay differs from the eager run: {case.name}"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 7, 16, 17, 64, 133, 256, 1024, 4097])
@pytest.mark.parametrize("load", ["base", "r16", "r64x16", "mixed"])
def test_real_shape(load: str, tokens: int) -> None:
    """Qwen3-30B-A3B."""
    loads: dict[str, dict[str, Any]] = {
        "base": {"popularity": "none", "slots": 1},
        "r16": {"ranks": (16,), "layouts": ("split",)},
        "r64x16": {"ranks": (64,), "layouts": ("split",), "active": 16, "slots": 16},
        "mixed": {"ranks": (16, 0, 1, 100, 8), "layouts": LAYOUTS, "active": 6, "slots": 6, "routing": "partial"},
    }
    check_on_gpu(load != "base", spec=QWEN, m=tokens, **loads[load])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("load", ["base", "adapters"])
@pytest.mark.parametrize("shape", [(128, 2048, 768, 8), (8, 4096, 14336, 2), (256, 7168, 256, 8), (32, 2880, 2880, 4)], ids=str)
def test_every_measured_tile(shape: tuple[int, ...], load: str, tokens: int) -> None:
    """The launch shapes of the measured table, at the sizes they were measured for."""
    experts, hidden, inter, top_k = shape
    adapters = {"popularity": "none", "slots": 1} if load == "base" else {"ranks": (16, 8, 16), "layouts": ("split",), "active": 3, "slots": 3}
    check_on_gpu(load != "base", spec=MoESpec(experts, top_k, hidden, inter), m=tokens, **adapters)


@pytest.mark.gpu
@pytest.mark.parametrize("most", [0, 16, 64])
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((128, 2048, 768, 8), 176), ((128, 2048, 768, 8), 384), ((128, 2048, 768, 8), 512), ((128, 2048, 768, 8), 900),
        ((8, 4096, 14336, 2), 128), ((8, 4096, 14336, 2), 384), ((256, 7168, 256, 8), 320),
        ((32, 2880, 2880, 4), 160), ((32, 2880, 2880, 4), 200), ((32, 2880, 2880, 4), 448),
    ],
    ids=str,
)  # fmt: skip
def test_edges_of_tables(shape: tuple[int, ...], tokens: int, most: int) -> None:
    """Launch shapes between those sizes, where ranks choose them too."""
    experts, hidden, inter, top_k = shape
    adapters: dict[str, Any] = {"ranks": (most, 8, 0), "layouts": ("split",), "active": 3, "slots": 3} if most else {"popularity": "none", "slots": 1}
    check_on_gpu(most > 0, spec=MoESpec(experts, top_k, hidden, inter), m=tokens, **adapters)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4097, 8200])
@pytest.mark.parametrize("ranks", [(64,), (32, 0, 8)], ids=str)
def test_few_adapters_of_high_rank(ranks: tuple[int, ...], tokens: int) -> None:
    """LoRA tiles of 144 rows, also beside base tiles of two blocks."""
    check_on_gpu(spec=QWEN, m=tokens, ranks=ranks, layouts=("split", "dense"), active=3, slots=4, routing="partial")


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [64, 128])
def test_one_adapter_of_high_rank_in_narrow_experts(rank: int) -> None:
    """Act of so few columns that its shrink, from rank 65 on a kernel of its own, is Triton's."""
    check_on_gpu(spec=MoESpec(256, 8, 7168, 256), m=4097, ranks=(rank,), layouts=("split",), active=1, slots=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 700])
def test_axes(tokens: int, dtype: torch.dtype) -> None:
    for arguments in full_grid(spec=MEDIUM, m=tokens, dtype=dtype):
        check_on_gpu(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 48, 600])
def test_bias_and_odd_sizes(tokens: int) -> None:
    spec = MoESpec(32, 4, 2880, 2880, has_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0)
    check_on_gpu(spec=spec, m=tokens, ranks=(16, 32), active=2, slots=2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 64, 600])
def test_graph_replay_follows_its_inputs(tokens: int) -> None:
    """A captured layer replayed on other tokens, experts and slots equals the eager layer on them."""
    if not has_cuda_align() and tokens > BY_PAIR:
        pytest.skip("the alignment op has no CUDA implementation in this process")
    shared: dict[str, Any] = {"spec": MEDIUM, "m": tokens, "dtype": torch.bfloat16, "device": "cuda", "ranks": (16, 8, 64), "active": 3, "slots": 3}
    case, other, workspace = make_case(**shared), make_case(**shared, popularity="zipf", routing="zipf", seed=1), Workspace("cuda")
    run(case, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case, workspace=workspace)
    for name in ("x", "topk_ids", "topk_weights", "token_slots"):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(out, run(replace(other, w13=case.w13, w2=case.w2, stacks=case.stacks)))
