"""LoRAMemoryPool: what is written is what the tables lead to; overwriting, clearing, refusals, bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sglang_lora_moe.lora import slot_loader
from sglang_lora_moe.lora.host_views import slot_views
from sglang_lora_moe.lora.memory_pool import LoRAMemoryPool
from sglang_lora_moe.lora.slot_loader import SlotLoader
from sglang_lora_moe.lora.stacks import EmbeddingStacks, ExpertStacks
from sglang_lora_moe.lora.targets import EmbeddingTarget, ExpertTarget, LinearTarget
from sglang_lora_moe.lora.weights import EmbeddingLoRA, ExpertLoRA, LinearLoRA
from sglang_lora_moe.moe.spec import MoESpec
from tests.moe_cases import LAYOUTS, make_expert_lora
from tests.references import stack_matrix
from tests.slots import write_slot

SPEC = MoESpec(num_experts=3, top_k=2, hidden_size=20, intermediate_size=6)
TARGETS = (
    EmbeddingTarget("embed_tokens", 11, 20),
    LinearTarget("q_proj", 20, 7),
    ExpertTarget("experts", 3, 20, 6),
    LinearTarget("lm_head", 20, 11),
)


def noise(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(shape) * std


def make_adapter(rank: int, layout: str = "split", only: tuple[str, ...] = ("embed_tokens", "q_proj", "experts", "lm_head")) -> dict[str, Any]:
    modules = {
        "embed_tokens": EmbeddingLoRA(noise(rank, 11), noise(20, rank), 0.25),
        "q_proj": LinearLoRA(noise(rank, 20), noise(7, rank), 0.5),
        "experts": make_expert_lora(SPEC, rank, layout, noise, scaling=2.0),
        "lm_head": LinearLoRA(noise(rank, 20), noise(11, rank), 1.0),
    }
    return {name: modules[name] for name in only}


def make_pool(dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoRAMemoryPool:
    return LoRAMemoryPool(TARGETS, 3, 8, dtype, device)


def assert_holds(pool: LoRAMemoryPool, slot: int, adapter: Any) -> None:
    """Reading through the tables gives the adapter's tensors, and rank 0 where it has none."""
    for target in TARGETS:
        stacks, module = pool.stacks_for(target.name), adapter.get(target.name)
        if module is None:
            assert all(int(stack.rank[slot]) == 0 for stack in vars(stacks).values())
        elif isinstance(stacks, ExpertStacks):
            for name, stack in vars(stacks).items():
                expected = getattr(module, name)
                for expert in range(3):
                    found = stack_matrix(stack, slot, expert, name.startswith("a"))
                    if expected is None:
                        assert found is None
                        continue
                    assert found is not None and torch.equal(found.cpu(), expected[expert % expected.shape[0]].to(pool.dtype).float())
                if expected is not None:
                    assert float(stack.scaling[slot]) == (module.scaling13 if name.endswith("13") else module.scaling2)
        else:
            shown_a = module.a.t() if isinstance(stacks, EmbeddingStacks) else module.a
            found_a = stack_matrix(stacks.a, slot, 0, not isinstance(stacks, EmbeddingStacks))
            found_b = stack_matrix(stacks.b, slot, 0, False)
            assert found_a is not None and found_b is not None and float(stacks.b.scaling[slot]) == module.scaling
            assert torch.equal(found_a.cpu(), shown_a.to(pool.dtype).float()) and torch.equal(found_b.cpu(), module.b.to(pool.dtype).float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_and_read_back(layout: str, dtype: torch.dtype) -> None:
    pool = make_pool(dtype)
    adapters = {0: make_adapter(8, layout), 1: make_adapter(3, layout), 2: make_adapter(1, layout, only=("experts", "lm_head"))}
    for slot, adapter in adapters.items():
        written = write_slot(pool, slot, adapter)
        assert written == pool.region_bytes_used(slot) <= pool.layout.slot_bytes
    for slot, adapter in adapters.items():
        assert_holds(pool, slot, adapter)
        for target in TARGETS:
            for stack in vars(pool.stacks_for(target.name)).values():
                for table in (stack.offset, stack.expert_stride):
                    assert int(table[slot]) * dtype.itemsize % 16 == 0, "matrices start on 16 bytes"


def test_largest_adapter_fills_the_region_exactly() -> None:
    pool = make_pool()
    assert write_slot(pool, 1, make_adapter(8, "split")) == pool.layout.slot_bytes
    assert write_slot(pool, 1, make_adapter(8, "shared_outer")) < pool.layout.slot_bytes
    assert pool.pool.nbytes == 3 * pool.layout.slot_bytes


def test_overwrite_leaves_no_residue_and_no_trace_elsewhere() -> None:
    pool, fresh = make_pool(), make_pool()
    neighbours = {0: make_adapter(8), 2: make_adapter(8, "dense")}
    for slot, adapter in neighbours.items():
        write_slot(pool, slot, adapter)
    write_slot(pool, 1, make_adapter(8, "split"))
    b13 = pool.stacks_for("experts").b13
    assert slot_views(b13, 1).rank == 8
    small = make_adapter(2, "gate_up_only", only=("experts", "q_proj"))
    assert write_slot(pool, 1, small) == write_slot(fresh, 1, small)
    assert slot_views(b13, 1).rank == 2, "views on the host are those of the new adapter"
    assert_holds(pool, 1, small)
    for target in TARGETS:  # the tables are those of a pool that never held the large one
        for ours, theirs in zip(vars(pool.stacks_for(target.name)).values(), vars(fresh.stacks_for(target.name)).values(), strict=True):
            for name in ("offset", "expert_stride", "rank", "scaling", "split_a"):
                assert getattr(ours, name)[1] == getattr(theirs, name)[1], name
    for slot, adapter in neighbours.items():
        assert_holds(pool, slot, adapter)


def test_clear() -> None:
    pool, keep = make_pool(), make_adapter(4)
    write_slot(pool, 0, keep)
    write_slot(pool, 1, make_adapter(8))
    pool.clear(1)
    assert pool.region_bytes_used(1) == 0
    assert_holds(pool, 1, {})
    assert_holds(pool, 0, keep)


def change(adapter: Any, name: str, **fields: Any) -> Any:
    return adapter | {name: replace(adapter[name], **fields)}


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: make_adapter(9), r"embed_tokens A: expected rank in 1..8, got 9"),
        (lambda: change(make_adapter(4), "q_proj", b=noise(6, 4)), r"q_proj B: expected shape \(7, 4\), got \(6, 4\)"),
        (lambda: change(make_adapter(4), "q_proj", a=noise(5, 20)), r"q_proj B: expected shape \(7, 5\), got \(7, 4\)"),
        (lambda: change(make_adapter(4, "dense"), "experts", a13=noise(2, 4, 20)), r"experts A13: expected shape \(3, 4, 20\), got \(2, 4, 20\)"),
        (lambda: change(make_adapter(4), "experts", b2=None), r"experts: adapter has A2 or B2 without the other"),
        (lambda: {"q_proj": ExpertLoRA()}, r"q_proj is a LinearTarget, the adapter has a ExpertLoRA for it"),
        (lambda: {"k_proj": None}, r"adapter has weights for k_proj, which is not a target"),
    ],
)
def test_refusals_leave_the_pool_as_it_was(make: Any, sentence: str) -> None:
    pool, held = make_pool(), make_adapter(5)
    write_slot(pool, 1, held)
    before = pool.pool.clone()
    with pytest.raises(ValueError, match=sentence):
        write_slot(pool, 1, make())
    assert torch.equal(pool.pool, before) and pool.region_bytes_used(1) > 0
    assert_holds(pool, 1, held)


def test_slot_out_of_range() -> None:
    pool = make_pool()
    for call in (lambda: write_slot(pool, 3, make_adapter(1)), lambda: pool.clear(-1)):
        with pytest.raises(AssertionError, match="slot (3|-1) of 3"):
            call()


@pytest.mark.parametrize("piece_bytes", [256, 1024, 32 << 20])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_arrive_beside_the_steps(dtype: torch.dtype, device: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied in pieces by another thread, over what other adapters left; neighbours stay as they are."""
    monkeypatch.setattr(slot_loader, "PIECE_BYTES", piece_bytes)
    pool = make_pool(dtype, device)
    loader = SlotLoader(pool.device)
    adapters = {slot: make_adapter(rank, layout) for slot, rank, layout in ((0, 8, "split"), (1, 3, "dense"), (2, 5, "shared_outer"))}

    def fill(slot: int, adapter: Any) -> None:
        image, stacks = pool.layout.pack_modules(adapter)
        loader.start(pool.region(slot), image).result()
        pool.bind(slot, image.numel(), stacks)

    for slot, adapter in adapters.items():
        fill(slot, adapter)
    fill(0, adapters[2])
    for slot, adapter in ((0, adapters[2]), (1, adapters[1]), (2, adapters[2])):
        assert_holds(pool, slot, adapter)
    loader.close()
