"""Loading and unloading adapters in a running engine: answers, errors, bytes, slots, and what requests see of it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_lora_moe.core import Abort, EngineMessage, LoadAdapter, Reply, RequestError, SamplingParams, Submit, TokenOutput, UnloadAdapter
from sglang_lora_moe.engine.engine import Engine
from tests.adapter_files import edit_adapter, write_adapter
from tests.books import check_core
from tests.engine.models import adapter_path, make_engine, model_path, other_adapter_path, reference_greedy

GREEDY = {"temperature": 0.0, "max_new_tokens": 10, "ignore_eos": True}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine(adapters=(), max_loras_per_batch=2, max_lora_rank=16) as made:
        yield made
        check_core(made.core)


def submit(rid: str, adapter: str | None, count: int = 10) -> Submit:
    return Submit(rid, [1, 5, 9], SamplingParams(temperature=0.0, max_new_tokens=count, ignore_eos=True), adapter)


def drive(engine: Engine, messages: list[Any], steps: float = math.inf) -> list[EngineMessage]:
    """Send messages, then step until nothing is left to do or `steps` are over."""
    said = [answer for message in messages for answer in engine.core.handle(message)]
    end = time.monotonic() + 60
    while steps and (engine.core.has_work or engine.core.is_loading):
        assert time.monotonic() < end, f"no end: {engine.core.stats()}"
        said += engine.core.step()
        check_core(engine.core)
        steps -= 1
    return said


def replies(messages: list[EngineMessage]) -> dict[str, Reply]:
    return {message.rid: message for message in messages if isinstance(message, Reply)}


def ids_of(messages: list[EngineMessage], rid: str) -> list[int]:
    return [token for message in messages if isinstance(message, TokenOutput) and message.rid == rid for token in message.token_ids]


def test_load_use_unload(engine: Engine) -> None:
    path = adapter_path("r8")
    loaded = engine.load_lora_adapter("a", str(path))
    assert loaded["already_loaded"] is False and loaded["rank"] == 8 and loaded["resident"] and len(loaded["revision"]) == 64
    assert engine.generate(input_ids=[1, 5, 9], sampling_params=GREEDY, lora_path="a")["output_ids"] == reference_greedy("r8", [1, 5, 9], 10, ignore_eos=True)
    (record,) = engine.get_server_info()["adapters"]
    assert (record["name"], record["path"], record["running"], record["pinned"]) == ("a", str(path), 0, False)
    assert engine.load_lora_adapter("a", str(path))["already_loaded"] is True
    lora = engine.core.lora
    assert lora is not None
    slot = lora.slots.slot_of(loaded["revision"])
    assert slot is not None
    device = lora.pool.region_bytes_used(slot)
    freed = engine.unload_lora_adapter("a")
    assert freed["freed_host_bytes"] == loaded["nbytes"] and freed["freed_device_bytes"] == device > 0
    assert freed["freed_bytes"] == loaded["nbytes"] + device and lora.pool.region_bytes_used(slot) == 0
    with pytest.raises(RequestError, match="no adapter 'a' is loaded") as error:
        engine.unload_lora_adapter("a")
    assert error.value.status == 404


def test_other_content_under_a_loaded_name_is_refused(engine: Engine) -> None:
    first = engine.load_lora_adapter("a", str(other_adapter_path(0)))
    with pytest.raises(RequestError, match=f"revision {first['revision']}") as error:
        engine.load_lora_adapter("a", str(other_adapter_path(1)))
    assert error.value.status == 400
    assert engine.load_lora_adapter("b", str(other_adapter_path(1)))["revision"] != first["revision"]


def test_copies_of_a_directory_have_one_revision(engine: Engine, tmp_path: Path) -> None:
    copies = [write_adapter("per_expert_2d", model_path(), tmp_path / name, rank=4, seed=5) for name in ("x", "y")]
    one, two = (engine.load_lora_adapter(path.name, str(path)) for path in copies)
    assert one["revision"] == two["revision"] and engine.get_server_info()["slots_used"] == 1
    assert engine.unload_lora_adapter("x")["freed_bytes"] == 0  # y still needs the weights
    assert engine.unload_lora_adapter("y")["freed_bytes"] > 0


def test_a_bad_adapter_is_refused_and_leaves_no_trace(engine: Engine, tmp_path: Path) -> None:
    engine.load_lora_adapter("good", str(other_adapter_path(0)))
    before = engine.get_server_info()
    bad = write_adapter("per_expert_2d", model_path(), tmp_path / "bad", rank=4)
    edit_adapter(bad, lambda tensors, config: tensors.pop(sorted(tensors)[0]))
    high = write_adapter("per_expert_2d", model_path(), tmp_path / "high", rank=17)
    for path, text in ((bad, "lora_"), (high, "17"), (tmp_path / "missing", "missing")):
        with pytest.raises(RequestError, match=text) as error:
            engine.load_lora_adapter("new", str(path))
        assert (error.value.status, error.value.param) == (400, "path") and str(path) in error.value.message
    assert engine.get_server_info() == before
    assert engine.generate(input_ids=[1, 5, 9], sampling_params=GREEDY, lora_path="good")["meta_info"]["completion_tokens"] == 10


def test_pinned_adapters_stay_resident(engine: Engine) -> None:
    engine.load_lora_adapter("p", str(other_adapter_path(0)), pinned=True)
    with pytest.raises(RequestError, match="at most 1 of 2 adapter slots") as error:
        engine.load_lora_adapter("q", str(other_adapter_path(1)), pinned=True)
    assert error.value.param == "pinned"
    for i in (1, 2, 3):
        engine.load_lora_adapter(f"a{i}", str(other_adapter_path(i)))
        engine.generate(input_ids=[1, 5, 9], sampling_params=GREEDY, lora_path=f"a{i}")
    resident = {record["name"] for record in engine.get_server_info()["adapters"] if record["resident"]}
    assert resident == {"p", "a3"}
    engine.unload_lora_adapter("p")
    engine.load_lora_adapter("q", str(other_adapter_path(0)), pinned=True)


def test_unload_waits_for_running_requests_and_refuses_new_ones(engine: Engine) -> None:
    engine.load_lora_adapter("a", str(other_adapter_path(0)))
    said = drive(engine, [submit("running", "a", 20), submit("queued", "a", 5)], steps=3)
    said += drive(engine, [UnloadAdapter("u", "a"), submit("late", "a"), UnloadAdapter("twice", "a")], steps=4)
    answers = replies(said)
    assert "u" not in answers and answers["late"].status == 404 and answers["twice"].status == 404
    info = engine.core.stats()
    assert info["adapters_unloading"] == ["a"] and info["adapters"] == []
    said += drive(engine, [])
    assert len(ids_of(said, "running")) == 20 and len(ids_of(said, "queued")) == 5
    assert replies(said)["u"].data["freed_bytes"] > 0 and engine.core.stats()["slots_used"] == 0
    last = max(i for i, message in enumerate(said) if isinstance(message, TokenOutput))
    assert said.index(replies(said)["u"]) > last - 2


def test_unload_ends_when_the_last_request_is_aborted(engine: Engine) -> None:
    engine.load_lora_adapter("a", str(other_adapter_path(0)))
    said = drive(engine, [submit("r", "a", 200), UnloadAdapter("u", "a")], steps=3)
    assert "u" not in replies(said)
    said += drive(engine, [Abort("r"), Abort("r")])
    assert replies(said)["u"].error is None and not engine.core.has_work


def test_a_name_may_get_new_content_while_the_old_one_drains(engine: Engine) -> None:
    engine.load_lora_adapter("a", str(other_adapter_path(0)))
    alone = ids_of(drive(engine, [submit("alone", "a", 30)]), "alone")
    said = drive(engine, [submit("old", "a", 30)], steps=2)
    said += drive(engine, [UnloadAdapter("u", "a"), LoadAdapter("l", "a", str(other_adapter_path(1)))], steps=1)
    while engine.core.is_loading:
        said += engine.core.step()
    said += drive(engine, [submit("new", "a", 30)])
    assert replies(said)["l"].error is None and replies(said)["u"].error is None
    assert ids_of(said, "old") == alone  # finishes on the revision it started with
    assert ids_of(said, "new") != alone and ids_of(said, "new") == ids_of(drive(engine, [submit("again", "a", 30)]), "again")


def test_loading_does_not_stop_running_requests(engine: Engine) -> None:
    drive(engine, [submit("r", None, 50)], steps=2)
    said = engine.core.handle(LoadAdapter("l", "a", str(other_adapter_path(2))))
    said += engine.core.step()
    assert ids_of(said, "r")  # the step was computed, whether the file was read or not
    said += drive(engine, [])
    assert replies(said)["l"].error is None


def test_lora_root(tmp_path: Path) -> None:
    inside = write_adapter("per_expert_2d", model_path(), tmp_path / "root" / "a", rank=4)
    with make_engine(adapters=(), lora_root=str(tmp_path / "root"), max_lora_rank=16) as rooted:
        rooted.load_lora_adapter("a", str(inside))
        with pytest.raises(RequestError, match="root"):
            rooted.load_lora_adapter("b", str(other_adapter_path(1)))


def test_a_bad_adapter_at_start_says_which(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--lora-paths: x: .*{tmp_path}"):
        Engine(model_path=str(model_path()), lora_paths=[f"x={tmp_path}"], max_total_tokens=256)


class Soak:
    """Random requests, aborts, loads, reloads in place and unloads on one engine, and what came of them."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.core, self.rng = engine, engine.core, random.Random(7)
        self.prompts = [[1] + [self.rng.randrange(3, 98) for _ in range(self.rng.randrange(2, 60))] for _ in range(6)]
        self.seeds: dict[str, int] = {}  # loaded name -> seed of its content
        self.asked: dict[str, tuple[int | None, int, int]] = {}  # request -> seed of its adapter, prompt, tokens
        self.out: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.aborts = self.reloads = 0

    def take(self, messages: list[EngineMessage]) -> None:
        for message in messages:
            if isinstance(message, TokenOutput):
                self.out[message.rid] += message.token_ids
                if message.finish_reason:
                    self.ended[message.rid] = message.finish_reason
            else:
                assert message.error is None, message

    def submit(self) -> None:
        name = self.rng.choice([None, *self.seeds])
        which, count = self.rng.randrange(len(self.prompts)), self.rng.randrange(1, 25)
        rid = f"r{len(self.asked)}"
        self.asked[rid], self.out[rid] = (self.seeds[name] if name else None, which, count), []
        self.take(self.core.handle(Submit(rid, self.prompts[which], SamplingParams(temperature=0.0, max_new_tokens=count, ignore_eos=True), name)))

    def load(self, name: str) -> None:
        self.reloads += name in self.seeds
        self.seeds[name] = self.rng.randrange(4)
        path = str(other_adapter_path(self.seeds[name]))
        self.take(self.core.handle(LoadAdapter(f"load {name}", name, path, pinned=name == "n0", load_inplace=True)))
        while self.core.is_loading:
            self.take(self.core.step())

    def round(self) -> None:
        """Some of everything, and a step."""
        rng = self.rng
        for _ in range(rng.randrange(3)):
            self.submit()
        if rng.random() < 0.15 and len(self.seeds) < 5:
            self.load(f"n{rng.randrange(6)}")
        if rng.random() < 0.1 and self.seeds:
            name = rng.choice(list(self.seeds))
            del self.seeds[name]
            self.take(self.core.handle(UnloadAdapter(f"unload {name}", name)))
        if rng.random() < 0.2 and self.core.scheduler.requests:
            self.aborts += 1
            self.take(self.core.handle(Abort(rng.choice(list(self.core.scheduler.requests)))))
        self.take(self.core.step())
        check_core(self.core)

    @property
    def is_enough(self) -> bool:
        return len(self.asked) > 100 and self.aborts > 10 and self.reloads > 3 and self.core.stats()["retractions"] > 0

    def check_answers(self) -> None:
        """Every finished answer is its solo run."""
        solo: dict[tuple[int | None, int], list[int]] = {}
        for seed in range(4):
            self.engine.load_lora_adapter(f"s{seed}", str(other_adapter_path(seed)))
        for rid, (seed_or_base, which, count) in self.asked.items():
            if self.ended[rid] == "length":
                key = (seed_or_base, which)
                if key not in solo:
                    self.engine.flush_cache()
                    params = {"temperature": 0.0, "max_new_tokens": 25, "ignore_eos": True}
                    adapter = None if seed_or_base is None else f"s{seed_or_base}"
                    solo[key] = self.engine.generate(input_ids=self.prompts[which], sampling_params=params, lora_path=adapter)["output_ids"]
                assert self.out[rid] == solo[key][:count], rid


@pytest.mark.parametrize("most_loaded", [None, 3])  # with the limit some wait on disk, and are read again
def test_soak(most_loaded: int | None) -> None:
    limits: dict[str, Any] = {"max_loras_per_batch": 2, "max_loaded_loras": most_loaded, "max_total_tokens": 200, "max_running_requests": 12}
    with make_engine(adapters=(), max_lora_rank=16, **limits) as engine:
        soak = Soak(engine)
        for rounds in range(1500):
            if rounds >= 150 and soak.is_enough:  # requests end while an adapter is read: the slower that is, the fewer are there at a time
                break
            soak.round()
        while engine.core.has_work:
            soak.take(engine.core.step())
        check_core(engine.core)
        stats = engine.core.stats()
        assert stats["kv_pages_used"] == 0 and stats["slots_running"] == 0 and stats["adapters_unloading"] == []
        assert len(soak.ended) == len(soak.asked) and soak.is_enough, (len(soak.asked), soak.aborts, soak.reloads, stats["retractions"])
        for name in list(soak.seeds):
            engine.unload_lora_adapter(name)
        assert engine.core.stats()["slots_used"] == 0
        soak.check_answers()
