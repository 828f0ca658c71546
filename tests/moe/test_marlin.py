"""The marlin backend: what it refuses anywhere, and on a GPU the whole layer against the float32 reference, with and without adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_lora_moe.lora.hooks import build_lora_hooks
from sglang_lora_moe.moe.backends import get_moe_runner_backend, make_core, make_lora_ops
from sglang_lora_moe.moe.backends.marlin import MarlinRunnerCore, choose_plan
from sglang_lora_moe.moe.backends.marlin_lora import FOLLOWING_ROWS, _first_tile
from sglang_lora_moe.moe.runner import MoeRunner
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.moe.workspace import Workspace
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.marlin_moe import EVERYWHERE, SHAPES, fuses_activation, marlin_moe_repack
from sglang_lora_moe.quantization.base import TritonQuantInfo
from sglang_lora_moe.quantization.unquantized import UnquantizedMethod
from sglang_lora_moe.quantization.wna16 import WNA16Scheme, WNA16Weight, dequantize
from sglang_lora_moe.quantization.wna16_method import WNA16Method
from tests.moe.test_triton import Poisoned
from tests.moe_cases import LAYOUTS, MoECase, full_grid, make_case
from tests.quantize import quantize
from tests.references import assert_near, keep_error, ref_moe, relative_error

SPEC = MoESpec(8, 2, 128, 96)
BIASED = MoESpec(8, 2, 128, 96, has_bias=True, swiglu_alpha=1.702, swiglu_limit=1.5)
UNGATED = MoESpec(8, 2, 128, 96, activation="relu2", gated=False)


@dataclass
class Quantized:
    """Stands in for a quantization method: canonical tensors on any device."""

    info: TritonQuantInfo
    name: str = "int4"
    backends: tuple[str, ...] = ("marlin",)

    def get_marlin_quant_info(self, layer: Any) -> TritonQuantInfo:
        return self.info


def quantized(case: MoECase, bits: int = 4, group: int = 32, symmetric: bool = True) -> tuple[MoECase, Quantized]:
    """The case with weights that are exactly what the quantized ones mean."""
    w13, w2 = (quantize(w, bits, group, symmetric, case.x.dtype) for w in (case.w13, case.w2))
    exact = replace(case, w13=dequantize(w13, case.x.dtype), w2=dequantize(w2, case.x.dtype))
    return exact, Quantized(TritonQuantInfo(w13, w2, case.b13, case.b2))


def run(case: MoECase, info: Any, core: MarlinRunnerCore, lora: bool = True, workspace: Workspace | None = None) -> torch.Tensor:
    hooks = build_lora_hooks(case.stacks, make_lora_ops("marlin")) if lora else None
    return MoeRunner(core).run(case.runner_input(workspace or Workspace(case.x.device), lora), info, hooks)


def test_refuses_cpu_and_16_bit_weights() -> None:
    method = WNA16Method(WNA16Scheme(4, 32, True, "compressed-tensors"))
    with pytest.raises(ValueError, match="the marlin MoE backend needs a CUDA device, and the model is on cpu"):
        get_moe_runner_backend("marlin", "cpu", method)
    assert get_moe_runner_backend("marlin", "cuda", method) == "marlin" == get_moe_runner_backend("auto", "cuda", method)
    with pytest.raises(ValueError, match="marlin MoE backend"):
        get_moe_runner_backend("marlin", "cuda", UnquantizedMethod())
    with pytest.raises(ValueError, match="cannot run on the marlin MoE backend"):
        UnquantizedMethod().get_marlin_quant_info(SimpleNamespace())
    _, quant = quantized(make_case(spec=SPEC, m=2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs, the weights are on cpu; use --moe-runner-backend torch_native"):
        make_core("marlin").quant_info(quant, SimpleNamespace())


@pytest.mark.parametrize(("experts", "dim", "other"), [(128, 2048, (48, 104, 128, 136, 512)), (256, 7168, (40, 112, 128, 136, 512)), (8, 4096, (32, 64))])
def test_first_shrink_has_other_tiles_at_measured_pairs(monkeypatch: pytest.MonkeyPatch, experts: int, dim: int, other: tuple[int, ...]) -> None:
    def tile(pairs: int, width: int = 32) -> Any:
        routing: Any = SimpleNamespace(num_pairs=pairs, num_experts=experts, lora_block=16)
        a: Any = SimpleNamespace(dim=dim, shrink_width=width)
        return _first_tile(a, routing, torch.device("cpu"))

    assert all(tile(pairs) is None for pairs in other)  # which only Hopper has
    monkeypatch.setattr(launch, "has_wgmma", lambda device: True)
    assert all(tile(pairs) is not None and tile(pairs, 64) is None for pairs in other)
    assert not any(map(tile, (16, 1024)))
    assert dim <= 2048 or not any(map(tile, (256, 440)))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (WNA16Weight(torch.zeros(1, 16, 2, dtype=torch.int32), torch.ones(1, 16, 1), None, 4, 16), "bfloat16 or float16"),
        (WNA16Weight(torch.zeros(1, 16, 4, dtype=torch.int32), torch.ones(1, 16, 2).half(), None, 4, 16), "groups of 16"),
        (WNA16Weight(torch.zeros(1, 12, 4, dtype=torch.int32), torch.ones(1, 12, 1).half(), None, 4, 32), "12 x 32"),
    ],
)
def test_repack_refuses_what_the_kernel_cannot_read(weight: WNA16Weight, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        marlin_moe_repack(weight)


def test_plans_fit_their_tiles() -> None:
    """Both GEMMs of a layer share one alignment, so one token block."""
    for spec in (MoESpec(128, 8, 2048, 768), MoESpec(8, 2, 4096, 14336), MoESpec(256, 8, 7168, 256), MoESpec(32, 4, 2880, 2880)):
        for tokens in (1, 2, 4, 5, 16, 64, 256, 1024, 4096, 16384):
            for hopper in (False, True):
                plan = choose_plan(spec, tokens, hopper)
                assert SHAPES[plan.gate_up].block_tokens == SHAPES[plan.down].block_tokens
                assert hopper or max(plan.gate_up, plan.down) < EVERYWHERE


@pytest.mark.parametrize(
    ("spec", "last"),
    [(MoESpec(128, 8, 2048, 768), 320), (MoESpec(32, 4, 2880, 2880), 160), (MoESpec(256, 8, 7168, 256), 736), (MoESpec(8, 2, 4096, 14336), 96)],
)
def test_wgmma_begins_where_it_measured_faster(spec: MoESpec, last: int) -> None:
    """By rows of an expert; elsewhere than on Hopper tiles of 32 rows go on to 24."""
    assert choose_plan(spec, last, True).gate_up == choose_plan(spec, 24 * spec.num_experts // spec.top_k, False).gate_up == 2
    assert choose_plan(spec, last + 1, True).gate_up == EVERYWHERE


# ---- the GPU: eager, two runs, and from a captured graph --------------------------------------------------------------


def check_on_gpu(lora: bool = True, bits: int = 4, symmetric: bool = True, group: int = 32, **arguments: Any) -> None:
    """Against the reference, on poisoned scratch; a second run and three replays equal the first bit for bit."""
    case, quant = quantized(make_case(**({"dtype": torch.bfloat16, "device": "cuda"} | arguments)), bits, group, symmetric)
    core, workspace = MarlinRunnerCore(), Workspace("cuda")
    info = core.quant_info(quant, SimpleNamespace())  # type: ignore[arg-type]
    found = run(case, info, core, lora, Poisoned("cuda"))
    kernel, exact = f"marlin layer, {'adapters' if lora else 'base'}", ref_moe(case, lora).out
    if lora:
        keep_error(f"{kernel}, nothing rounded in the reference, {str(found.dtype).removeprefix('torch.')}", relative_error(found, exact))
        fused = ("act",) if choose_plan(case.spec, case.x.shape[0], True).by_pair else ("s", "act", "down")
        stored = fused if fuses_activation(case.spec) else ("s", "gate_up", "act", "down")
        exact = ref_moe(case, lora, stored).out
    assert_near(found, exact, kernel, case.name)
    assert torch.equal(found, run(case, info, core, lora, workspace)), f"two runs differ: {case.name}"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case, info, core, lora, workspace)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, found), f"a replay differs from the eager run: {case.name}"


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [SPEC, BIASED, UNGATED], ids=["silu", "clamped with bias", "ungated"])
@pytest.mark.parametrize("lora", [False, True], ids=["base", "adapters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_layer_equals_reference(spec: MoESpec, lora: bool, dtype: torch.dtype) -> None:
    for tokens, bits, symmetric in ((1, 4, True), (3, 8, False), (17, 4, False), (64, 8, True), (300, 4, True), (1000, 4, False), (4097, 4, True)):
        check_on_gpu(lora, bits, symmetric, spec=spec, m=tokens, dtype=dtype, layouts=LAYOUTS, active=5, routing="partial")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 17, 64, 700])
def test_gpu_axes(tokens: int) -> None:
    """Popularity by routing, layouts by rank, slots from 1 to 64: one shape of tiles after the other."""
    for arguments in full_grid(spec=MoESpec(32, 4, 1024, 512), m=tokens):
        check_on_gpu(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 1024, 4097])
@pytest.mark.parametrize("shape", [(128, 2048, 768, 8), (2, 4096, 14336, 1), (256, 7168, 256, 8), (32, 2880, 2880, 4)], ids=str)
def test_gpu_real_shapes(shape: tuple[int, ...], tokens: int) -> None:
    """Of Mixtral two experts, which is enough float32 to quantize for processes that share a GPU."""
    experts, hidden, inter, top_k = shape
    for lora in (False, True):
        adapters: dict[str, Any] = {"ranks": (16, 0, 64), "layouts": ("split",), "active": 3, "slots": 3}
        check_on_gpu(lora, group=32 if hidden % 128 else 128, spec=MoESpec(experts, top_k, hidden, inter), m=tokens, **adapters)


@pytest.mark.gpu
@pytest.mark.parametrize("inter", [256, 768])
def test_gpu_one_adapter_of_high_rank(inter: int) -> None:
    """LoRA tiles of 144 rows, but where the shrink of act, with few columns, is Triton's."""
    check_on_gpu(spec=MoESpec(128, 8, 2048, inter), group=128, m=2049, ranks=(64,), layouts=("split",), active=1, slots=1)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [(16,), (16, 0, 7, 1), (8, 15)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["silu", "clamped with bias"])
def test_gpu_shrink_within_gate_up(biased: bool, ranks: tuple[int, ...]) -> None:
    """Many experts, up to rank 16, by wgmma: gate_up makes s of down."""
    spec = replace(BIASED if biased else SPEC, num_experts=128, top_k=8, hidden_size=576, intermediate_size=448 if biased else 224)
    bf16, fp16 = torch.bfloat16, torch.float16
    for tokens, bits, dtype in ((800, 4, bf16), (900, 8, bf16), (1100, 8, fp16), (2100, 4, bf16), (4097, 4, bf16)):
        adapters: dict[str, Any] = {"ranks": ranks, "layouts": LAYOUTS, "active": 5, "slots": 7, "routing": "partial"}
        check_on_gpu(True, bits, dtype == torch.bfloat16, spec=spec, m=tokens, dtype=dtype, **adapters)
        assert choose_plan(spec, tokens, True).gate_up == EVERYWHERE and tokens * spec.top_k >= FOLLOWING_ROWS * spec.num_experts


@pytest.mark.gpu
def test_gpu_shrink_of_many_adapters_within_gate_up() -> None:
    """More adapters in a tile than a stage has room for; as many as gate_up takes, whose lists of records are longest; and with 17 more."""
    for slots, tokens, bits in ((12, 800, 4), (16, 2300, 4), (16, 2300, 8), (17, 2300, 4)):
        check_on_gpu(True, bits, spec=MoESpec(128, 8, 1024, 256), m=tokens, ranks=(16, 3), active=slots, slots=slots)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["uniform", "some_invalid", "partial"])
def test_gpu_few_pairs_of_many_experts(routing: str) -> None:
    """Where the combine adds B s of the second projection."""
    for tokens in (5, 15):
        check_on_gpu(spec=MoESpec(128, 8, 1024, 512), m=tokens, routing=routing, layouts=LAYOUTS, active=5)
    check_on_gpu(spec=MoESpec(32, 4, 2880, 512), m=12, routing=routing, layouts=LAYOUTS, active=5)  # long rows: a launch shape of its own


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 33, 500])
def test_gpu_graph_replay_follows_its_inputs(tokens: int) -> None:
    case, quant = quantized(make_case(spec=SPEC, m=tokens, dtype=torch.bfloat16, device="cuda", ranks=(4, 16)))
    core, workspace = MarlinRunnerCore(), Workspace("cuda")
    info = core.quant_info(quant, SimpleNamespace())  # type: ignore[arg-type]
    run(case, info, core, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(case, info, core, workspace=workspace)
    other = make_case(spec=SPEC, m=tokens, dtype=torch.bfloat16, device="cuda", ranks=(4, 16), popularity="zipf", routing="zipf", seed=1)
    for name in ("x", "topk_ids", "topk_weights", "token_slots"):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(found, run(case, info, core, workspace=Workspace("cuda")))
