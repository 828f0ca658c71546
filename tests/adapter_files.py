"""Adapter directories of every layout for tiny models, and the models that they should amount to.

`write_adapter(layout, model_path, out_dir)` writes random adapters (A and B both non-zero). Layouts in PEFT_LAYOUTS are
written by PEFT itself; those in HAND_LAYOUTS are written key by key from explicit per-expert matrices, because the
installed PEFT neither writes nor reads them, with the dense update beside them (`reference_delta.safetensors`).
`merged_reference_model(model_path, adapter_path)` is transformers' model whose logits are base + adapter.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
DELTA_FILE = "reference_delta.safetensors"
PREFIX = "base_model.model."
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

PEFT_LAYOUTS: dict[str, dict[str, Any]] = {
    "target_parameters_3d": {"target_modules": [], "target_parameters": BOTH},
    "gate_up_only": {"target_modules": [], "target_parameters": BOTH[:1]},
    "down_only": {"target_modules": [], "target_parameters": BOTH[1:]},
    "experts_and_attention": {"target_modules": "ATTENTION", "target_parameters": BOTH},
    "attention_only": {"target_modules": "ATTENTION"},
    "all_linear": {"target_modules": "all-linear"},
    "router": {"target_modules": ["o_proj"], "target_parameters": [*BOTH, "ROUTER"]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "patterns": {
        "target_modules": ["o_proj"],
        "target_parameters": BOTH,
        "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 3, r"layers\.1\.mlp\.experts\.gate_up_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 11, "o_proj": 3},
    },
}


def write_adapter(layout: str, model_path: Path | str, out_dir: Path | str, *, rank: int = 8, alpha: float = 16, seed: int = 0, scale: float = 0.5) -> Path:
    """Write an adapter for the model at `model_path` into `out_dir` and return that path.

    `scale` is the size of the update relative to base weights of unit-gain layers (independent of rank and alpha).
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    if layout in PEFT_LAYOUTS:
        _write_with_peft(model, layout, directory, rank, alpha, generator, scale)
    elif layout in HAND_LAYOUTS:
        writer = HandWriter(model, rank, alpha, generator, scale)
        HAND_LAYOUTS[layout](writer)
        writer.save(directory, str(model_path))
    else:
        raise ValueError(f"unknown adapter layout {layout!r}; known: {', '.join([*PEFT_LAYOUTS, *HAND_LAYOUTS])}")
    return directory


def merged_reference_model(model_path: Path | str, adapter_path: Path | str) -> nn.Module:
    """transformers' model whose logits are base + adapter: explicit dense update where written beside, else PEFT's own forward."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    delta_file = Path(adapter_path) / DELTA_FILE
    if delta_file.exists():
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, delta in load_file(delta_file).items():
                parameters[name] += delta
        return model
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(adapter_path)).eval()


def attention_linears(model: nn.Module) -> list[str]:
    """Leaf names of the attention projections that adapters may target (MLA's kv_b_proj is absorbed and cannot be)."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if ".self_attn." in name and isinstance(module, nn.Linear)}
    return sorted(names - {"kv_b_proj"})


def router_parameter(model: nn.Module) -> str:
    return "mlp.router.weight" if any(name.endswith("mlp.router.weight") for name, _ in model.named_parameters()) else "mlp.gate.weight"


def _write_with_peft(model: nn.Module, layout: str, directory: Path, rank: int, alpha: float, generator: torch.Generator, scale: float) -> None:
    from peft import LoraConfig, get_peft_model

    settings = PEFT_LAYOUTS[layout] | {"r": rank, "lora_alpha": alpha}
    if settings["target_modules"] == "ATTENTION":
        settings["target_modules"] = attention_linears(model)
    if layout == "all_linear":
        settings["exclude_modules"] = ["kv_b_proj"] if any("kv_b_proj" in name for name, _ in model.named_modules()) else None
    settings["target_parameters"] = [router_parameter(model) if name == "ROUTER" else name for name in settings.get("target_parameters", [])] or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        randomise_lora(wrapped, generator, scale)
        wrapped.save_pretrained(str(directory))


@torch.no_grad()
def randomise_lora(model: nn.Module, generator: torch.Generator, scale: float) -> None:
    """Fill A and B of every PEFT layer so that the update's entries have the size `scale` / sqrt(inputs)."""
    module: Any
    for module in model.modules():
        for adapter, factor in module.scaling.items() if hasattr(module, "lora_embedding_A") else ():
            rank = module.r[adapter]
            embedding = adapter in module.lora_embedding_A
            a = module.lora_embedding_A[adapter] if embedding else module.lora_A[adapter].weight
            b = module.lora_embedding_B[adapter] if embedding else module.lora_B[adapter].weight
            a.copy_(torch.randn(a.shape, generator=generator) * (1.0 if embedding else a.shape[1] ** -0.5))
            b.copy_(torch.randn(b.shape, generator=generator) * scale / (factor * rank**0.5))


class HandWriter:
    """Collects keys of a hand-written file and the dense update that they stand for."""

    def __init__(self, model: nn.Module, rank: int, alpha: float, generator: torch.Generator, scale: float) -> None:
        self.model: Any = model
        self.rank, self.alpha, self.generator, self.scale = rank, alpha, generator, scale
        self.tensors: dict[str, Tensor] = {}
        self.delta: dict[str, Tensor] = {}
        self.config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "bias": "none",
            "task_type": "CAUSAL_LM",
            "rank_pattern": {},
            "alpha_pattern": {},
        }

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def experts(self) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self.model.named_modules() if hasattr(module, "gate_up_proj") and hasattr(module, "is_transposed")]

    def pair(self, inputs: int, outputs: int, rank: int | None = None, scaling: float | None = None) -> tuple[Tensor, Tensor]:
        """Random A [rank, inputs] and B [outputs, rank]."""
        rank, scaling = rank or self.rank, scaling or self.scaling
        a = torch.randn(rank, inputs, generator=self.generator) * inputs**-0.5
        b = torch.randn(outputs, rank, generator=self.generator) * self.scale / (scaling * rank**0.5)
        return a, b

    def put(self, name: str, a: Tensor | None = None, b: Tensor | None = None) -> None:
        for half, tensor in (("A", a), ("B", b)):
            if tensor is not None:
                self.tensors[f"{PREFIX}{name}.lora_{half}.weight"] = tensor.contiguous()

    def linear(self, suffix: str, rank: int | None = None) -> None:
        """A plain pair on every nn.Linear whose name ends in `suffix`."""
        for name, module in self.model.named_modules():
            if name.endswith(suffix) and isinstance(module, nn.Linear):
                scaling = self.scaling if rank is None else self.alpha / rank
                a, b = self.pair(module.in_features, module.out_features, rank, scaling)
                self.put(name, a, b)
                self.delta[f"{name}.weight"] = scaling * b @ a
                self.config["rank_pattern"] |= {} if rank is None else {suffix: rank}

    def add_expert_delta(self, name: str, experts: Any, gate: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None) -> None:
        """Dense updates gate, up [E, I, H] and down [E, H, I] in the module's own parameter layout."""
        if gate is not None or up is not None:
            gate = torch.zeros_like(up) if gate is None else gate  # type: ignore[arg-type]
            up = torch.zeros_like(gate) if up is None else up
            fused = torch.cat([gate, up], 1) if experts.is_concatenated else torch.stack([gate, up], 2).flatten(1, 2)
            self.delta[f"{name}.gate_up_proj"] = (fused.transpose(1, 2) if experts.is_transposed else fused).contiguous()
        if down is not None:
            self.delta[f"{name}.down_proj"] = (down.transpose(1, 2) if experts.is_transposed else down).contiguous()

    def sizes(self, experts: Any) -> tuple[int, int, int]:
        """(E, H, I) of an experts module."""
        shape = experts.down_proj.shape
        return (shape[0], shape[2], shape[1]) if experts.is_transposed else (shape[0], shape[1], shape[2])

    def save(self, directory: Path, base: str) -> None:
        save_file(self.tensors, directory / "adapter_model.safetensors")
        save_file(self.delta, directory / DELTA_FILE)
        (directory / "adapter_config.json").write_text(json.dumps(self.config | {"base_model_name_or_path": base}, indent=2))


def _expert_names(writer: HandWriter, name: str) -> tuple[str, tuple[str, str, str]]:
    """transformers 4's name of the experts and of gate, up, down."""
    if writer.model.config.model_type == "mixtral":
        return name.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
    return name, ("gate_proj", "up_proj", "down_proj")


def _per_expert_2d(writer: HandWriter) -> None:
    """transformers 4: a pair for each expert and projection; layer 0 lacks expert 1 (its targets were excluded), alphas differ by expert."""
    writer.linear("self_attn.q_proj")
    writer.linear("self_attn.o_proj")
    for index, (name, experts) in enumerate(writer.experts()):
        num_experts, hidden, inter = writer.sizes(experts)
        old_name, leaves = _expert_names(writer, name)
        deltas = [torch.zeros(num_experts, *shape) for shape in ((inter, hidden), (inter, hidden), (hidden, inter))]
        for expert in range(num_experts):
            if index == 0 and expert == 1:
                continue
            for leaf, delta in zip(leaves, deltas, strict=True):
                special = expert == 2 and leaf in ("up_proj", "w3", "down_proj")
                scaling = writer.scaling * 2.5 if special else writer.scaling
                if special:
                    writer.config["alpha_pattern"][rf"experts\.2\.{leaf}"] = writer.alpha * 2.5
                a, b = writer.pair(delta.shape[2], delta.shape[1], scaling=scaling)
                writer.put(f"{old_name}.{expert}.{leaf}", a, b)
                delta[expert] = scaling * b @ a
        writer.add_expert_delta(name, experts, deltas[0], deltas[1], deltas[2])


def _flipped(writer: HandWriter, expert_major: bool = False) -> None:
    """PEFT 0.18 on fused parameters: A spans the outputs and B the inputs. B columns are rank-major, or expert-major (Unsloth, Megatron)."""
    writer.config |= {"target_modules": [], "target_parameters": BOTH, "peft_version": "0.18.1"}
    if expert_major:
        writer.config["lora_B_layout"] = "grouped_by_expert"
    for name, experts in writer.experts():
        if experts.is_transposed:
            raise ValueError("PEFT never flips experts that are stored [E, in, out]")
        num_experts, hidden, inter = writer.sizes(experts)
        deltas = []
        for inputs, outputs, key in ((hidden, 2 * inter, f"{name}.base_layer"), (inter, hidden, name)):
            pairs = [writer.pair(inputs, outputs) for _ in range(num_experts)]
            columns = torch.stack([a.T for a, _ in pairs], 1 if expert_major else 2)  # [in, E, R] or [in, R, E]
            writer.put(key, torch.cat([b.T for _, b in pairs]), columns.flatten(1, 2))
            deltas.append(torch.stack([writer.scaling * b @ a for a, b in pairs]))
        writer.add_expert_delta(name, experts, deltas[0][:, :inter], deltas[0][:, inter:], deltas[1])


def _grouped_by_expert(writer: HandWriter) -> None:
    """Normal orientation with expert-major B columns, said so by `lora_B_layout`."""
    writer.config |= {"target_modules": [], "target_parameters": BOTH, "peft_version": "0.19.1", "lora_B_layout": "grouped_by_expert"}
    for name, experts in writer.experts():
        num_experts, hidden, inter = writer.sizes(experts)
        deltas = []
        for inputs, outputs, key in ((hidden, 2 * inter, f"{name}.base_layer"), (inter, hidden, name)):
            pairs = [writer.pair(inputs, outputs) for _ in range(num_experts)]
            writer.put(key, torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1))
            deltas.append(torch.stack([writer.scaling * b @ a for a, b in pairs]))
        gate, up = _halves(experts, deltas[0], inter)
        writer.add_expert_delta(name, experts, gate, up, deltas[1])


def _halves(experts: Any, fused: Tensor, inter: int) -> tuple[Tensor, Tensor]:
    """Rows of a fused gate_up [E, 2I, ..] in the module's order as (gate, up)."""
    return (fused[:, :inter], fused[:, inter:]) if experts.is_concatenated else (fused[:, 0::2], fused[:, 1::2])


def _native_3d(writer: HandWriter, stacked: bool = True) -> None:
    """`experts.gate_up_proj` A [E, 2R, H] (gate rows, then up rows) with B [E, 2I, R]; `experts.down_proj` A [E, R, I], B [E, H, R]."""
    for name, experts in writer.experts():
        num_experts, hidden, inter = writer.sizes(experts)
        rank, scaling = writer.rank, writer.scaling
        pairs = [writer.pair(hidden, 2 * inter, rank=2 * rank if stacked else rank) for _ in range(num_experts)]
        a = torch.stack([a for a, _ in pairs])
        b = torch.stack([b[:, :rank] for _, b in pairs])
        writer.put(f"{name}.gate_up_proj", a, b)
        b_gate, b_up = _halves(experts, b, inter)
        gate, up = scaling * b_gate @ a[:, :rank], scaling * b_up @ a[:, -rank:]
        down = [writer.pair(inter, hidden) for _ in range(num_experts)]
        writer.put(f"{name}.down_proj", torch.stack([a for a, _ in down]), torch.stack([b for _, b in down]))
        writer.add_expert_delta(name, experts, gate, up, torch.stack([scaling * b @ a for a, b in down]))


def _shared_outer(writer: HandWriter) -> None:
    """A of gate and up (one matrix) and B of down shared by all experts, [1, ..]; the inner sides per expert, 2D."""
    for name, experts in writer.experts():
        num_experts, hidden, inter = writer.sizes(experts)
        old_name, (gate_leaf, up_leaf, down_leaf) = _expert_names(writer, name)
        a13, b2 = writer.pair(hidden, 1)[0], writer.pair(1, hidden)[1]
        b_gate, b_up = (torch.stack([writer.pair(1, inter)[1] for _ in range(num_experts)]) for _ in range(2))
        a2 = torch.stack([writer.pair(inter, 1)[0] for _ in range(num_experts)])
        writer.put(f"{old_name}.{gate_leaf}", a=a13[None])
        writer.put(f"{old_name}.{up_leaf}", a=a13[None].clone())
        writer.put(f"{old_name}.{down_leaf}", b=b2[None])
        for expert in range(num_experts):
            writer.put(f"{old_name}.{expert}.{gate_leaf}", b=b_gate[expert])
            writer.put(f"{old_name}.{expert}.{up_leaf}", b=b_up[expert])
            writer.put(f"{old_name}.{expert}.{down_leaf}", a=a2[expert])
        s = writer.scaling
        writer.add_expert_delta(name, experts, s * b_gate @ a13, s * b_up @ a13, s * b2 @ a2)


def _tinker(writer: HandWriter) -> None:
    """`experts.w1/w2/w3` in 3D with shared outer sides; gate and up have their own A and are never interleaved."""
    for name, experts in writer.experts():
        num_experts, hidden, inter = writer.sizes(experts)
        deltas = []
        for leaf in ("w1", "w3"):
            a = writer.pair(hidden, 1)[0]
            b = torch.stack([writer.pair(1, inter)[1] for _ in range(num_experts)])
            writer.put(f"{name}.{leaf}", a[None], b)
            deltas.append(writer.scaling * b @ a)
        a2 = torch.stack([writer.pair(inter, 1)[0] for _ in range(num_experts)])
        b2 = writer.pair(1, hidden)[1]
        writer.put(f"{name}.w2", a2, b2[None])
        writer.add_expert_delta(name, experts, deltas[0], deltas[1], writer.scaling * b2 @ a2)


def _unsloth_projs(writer: HandWriter) -> None:
    """gpt-oss as Unsloth's 4-bit model names it: 2D pairs on `experts.gate_up_projs.{e}` (rows interleaved) and `experts.down_projs.{e}`."""
    for name, experts in writer.experts():
        num_experts, hidden, inter = writer.sizes(experts)
        deltas = []
        for leaf, inputs, outputs in (("gate_up_projs", hidden, 2 * inter), ("down_projs", inter, hidden)):
            pairs = [writer.pair(inputs, outputs) for _ in range(num_experts)]
            for expert, (a, b) in enumerate(pairs):
                writer.put(f"{name}.{leaf}.{expert}", a, b)
            deltas.append(torch.stack([writer.scaling * b @ a for a, b in pairs]))
        gate, up = _halves(experts, deltas[0], inter)
        writer.add_expert_delta(name, experts, gate, up, deltas[1])


def _gate_only(writer: HandWriter) -> None:
    """transformers 4 with target_modules=["gate_proj"]: no up, no down."""
    for name, experts in writer.experts():
        num_experts, hidden, inter = writer.sizes(experts)
        old_name, leaves = _expert_names(writer, name)
        pairs = [writer.pair(hidden, inter) for _ in range(num_experts)]
        for expert, (a, b) in enumerate(pairs):
            writer.put(f"{old_name}.{expert}.{leaves[0]}", a, b)
        writer.add_expert_delta(name, experts, gate=torch.stack([writer.scaling * b @ a for a, b in pairs]))


def _dense_mlp(writer: HandWriter) -> None:
    """Shared experts and dense layers by their linears' names (PEFT 0.21 drops these on fused models), with attention."""
    for suffix in ("gate_proj", "up_proj", "down_proj", "shared_expert_gate", "self_attn.o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"):
        writer.linear(suffix)


def _routed_and_shared(writer: HandWriter) -> None:
    """Routed experts whose gate and up have one A, beside a shared expert whose linears have ranks, and so scalings, of their own."""
    _native_3d(writer, stacked=False)
    for shared in ("shared_expert", "shared_experts"):
        for leaf, rank in (("gate_proj", 2 * writer.rank), ("up_proj", 3), ("down_proj", writer.rank + 1)):
            writer.linear(f"{shared}.{leaf}", rank)


def _shared_up(writer: HandWriter) -> None:
    """One linear of a shared expert and nothing else."""
    writer.linear("shared_expert.up_proj")


HAND_LAYOUTS: dict[str, Callable[[HandWriter], None]] = {
    "per_expert_2d": _per_expert_2d,
    "gate_only": _gate_only,
    "flipped": _flipped,
    "flipped_grouped": lambda writer: _flipped(writer, expert_major=True),
    "grouped_by_expert": _grouped_by_expert,
    "native_3d": _native_3d,
    "native_3d_dense": lambda writer: _native_3d(writer, stacked=False),
    "shared_outer": _shared_outer,
    "tinker": _tinker,
    "unsloth_projs": _unsloth_projs,
    "dense_mlp": _dense_mlp,
    "routed_and_shared": _routed_and_shared,
    "shared_up": _shared_up,
}


def edit_adapter(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """Apply `change(tensors, config)` to an adapter directory in place (for bad-input tests)."""
    tensors, config = load_file(path / "adapter_model.safetensors"), json.loads((path / "adapter_config.json").read_text())
    change(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def find_key(path: Path, pattern: str) -> str:
    """First tensor name of an adapter file that matches the regex `pattern`."""
    return next(name for name in sorted(load_file(path / "adapter_model.safetensors")) if re.search(pattern, name))
