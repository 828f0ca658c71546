"""Activations of an expert, and the kernel that applies them to gate_up.

    act[row] = f(gate) * up        gate, up = halves of gate_up[row], in float32

`activate` is the one device function of all activations; the GEMM's epilogue uses it too.
"""

import torch
import triton
import triton.language as tl

from sglang_lora_moe.moe.routing import Routing
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.ops import launch
from sglang_lora_moe.ops.low_rank import pdl_wait

SILU, GELU, GELU_TANH, RELU, RELU2, CLAMPED_SWIGLU = (tl.constexpr(i) for i in range(1, 7))
_CODES = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}


def activation_code(spec: MoESpec) -> int:
    """The kernels' code of a spec's activation."""
    return 6 if spec.swiglu_limit is not None else _CODES[spec.activation]


@triton.jit
def activate(gate, up, ACT: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """float32 in, float32 out; `up` is ignored where not GATED. Formulas: `MoESpec`."""
    if ACT == CLAMPED_SWIGLU:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        value = gate * tl.sigmoid(ALPHA * gate)
    elif ACT == SILU:
        value = gate * tl.sigmoid(gate)
    elif ACT == GELU:
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACT == GELU_TANH:  # 0.5 (1 + tanh z) = sigmoid(2 z)
        value = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif ACT == RELU:
        value = tl.maximum(gate, 0.0)
    else:
        value = tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0)
    if GATED:
        value = value * up
    return value


@triton.jit
def _activation_kernel(
    gate_up_ptr, out_ptr, topk_ids_ptr, sorted_pairs_ptr,
    N, num_experts,
    BY_PAIR: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, blocks of N): one row of gate_up."""
    pdl_wait(PDL)
    HALVES: tl.constexpr = 2 if GATED else 1
    row = tl.program_id(0)
    pair = row if BY_PAIR else tl.load(sorted_pairs_ptr + row)
    expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    if (expert >= 0) & (expert < num_experts):
        ptrs = gate_up_ptr + row.to(tl.int64) * (HALVES * N) + rn
        gate = tl.load(ptrs, mask=rn < N, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(ptrs + N, mask=rn < N, other=0.0).to(tl.float32)
        value = activate(gate, up, ACT, GATED, ALPHA, LIMIT)
        tl.store(out_ptr + row.to(tl.int64) * N + rn, value.to(out_ptr.dtype.element_ty), mask=rn < N)


def moe_activation(gate_up: torch.Tensor, spec: MoESpec, routing: Routing, out: torch.Tensor) -> torch.Tensor:
    """gate_up [P, 2I or I] -> out [P, I], which it returns, both in routing order; rows of pairs without an expert stay as they are."""
    pairs, n = out.shape
    launch.expect("moe_activation: gate_up", gate_up, (pairs, spec.w13_rows), out.dtype, out.device)
    by_pair = routing.rows == "pair"
    block = min(1024, triton.next_power_of_2(n))
    _activation_kernel[(pairs, triton.cdiv(n, block))](
        gate_up, out, routing.topk_ids, None if by_pair else routing.sorted_pairs,
        n, spec.num_experts,
        BY_PAIR=by_pair, GATED=spec.gated, ACT=activation_code(spec), ALPHA=spec.swiglu_alpha or 0.0, LIMIT=spec.swiglu_limit or 0.0,
        BN=block, num_warps=4, **launch.options(out.device),
    )  # fmt: skip
    return out
