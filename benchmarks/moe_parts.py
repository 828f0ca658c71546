"""Every kernel of one layer timed alone, to see where an add-on comes from. Overlap between kernels is not in these figures."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks import timing
from benchmarks.moe_inputs import LayerInputs, Setup, adapter_bytes, has_cuda_align, run_layer
from sglang_lora_moe.moe.backends import triton_lora
from sglang_lora_moe.moe.backends.triton import TritonRunnerCore


def layer_parts(inputs: LayerInputs) -> dict[str, list[Callable[[], object]]]:
    """Calls by part, one per input set, on intermediates that one real run of the layer left behind."""
    parts: dict[str, list[Callable[[], object]]] = {}

    def add(name: str, call: Callable[..., object], *args: object) -> None:
        parts.setdefault(name, []).append(functools.partial(call, *args))

    for i, inp in enumerate(inputs.inputs):
        weights, stacks = inputs.weights[i % len(inputs.weights)], inputs.stacks[i % len(inputs.stacks)]
        core = inputs.runner.core
        routing = core.make_routing(inp)
        low13 = triton_lora.addend(inp, inp.x, stacks, routing, "tokens")
        act = torch.randn(routing.num_pairs, inp.spec.intermediate_size, device=inp.x.device, dtype=inp.x.dtype)
        low2 = triton_lora.addend(inp, act, stacks, routing, "pairs")
        if routing.rows == "sorted" and has_cuda_align():
            add("align", _align, core, inp)
        add("shrink13", triton_lora.addend, inp, inp.x, stacks, routing, "tokens")
        add("gate_up", core.gate_up_activation, inp, routing, weights)
        add("gate_up+B", core.gate_up_activation, inp, routing, weights, low13)
        add("shrink2", triton_lora.addend, inp, act, stacks, routing, "pairs")
        finish = core.down_combine if routing.rows == "pair" else core.down
        add("down", finish, inp, act, routing, weights)
        add("down+B", finish, inp, act, routing, weights, low2)
        if routing.rows == "sorted":
            add("combine", core.combine, inp, core.down(inp, act, routing, weights), routing)
        add("layer", run_layer, inputs, i)
    return parts


def _align(core: TritonRunnerCore, inp) -> object:
    return core.make_routing(inp).alignment


def print_parts(setups: list[Setup], device: torch.device, deadline: timing.Deadline) -> None:
    for setup in setups:
        if deadline.reached():
            return
        inputs = LayerInputs.build(setup, device)
        found = {name: timing.time_calls(calls, budget_ms=12.0).us for name, calls in layer_parts(inputs).items()}
        floor = adapter_bytes(inputs) / 4.45e6
        line = "  ".join(f"{name} {us:.1f}" for name, us in found.items())
        print(f"{setup.shape.name} M={setup.tokens} r{setup.rank} A{setup.active}: {line}  (adapter floor {floor:.1f})", flush=True)
