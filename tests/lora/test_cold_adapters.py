"""Adapters that are not where they are needed: on disk, on their way to host memory or to a slot, or replaced while they run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from sglang_lora_moe.core import Abort, EngineMessage, LoadAdapter, Reply, RequestError, SamplingParams, Submit, TokenOutput, UnloadAdapter
from sglang_lora_moe.engine.engine import Engine
from sglang_lora_moe.lora import reader as reader_module
from sglang_lora_moe.lora.adapter_config import CONFIG_FILE
from tests.adapter_files import edit_adapter, write_adapter
from tests.books import check_core
from tests.engine.models import make_engine, model_path, other_adapter_path
from tests.lora.test_manager import ids_of

PROMPT = [1, 5, 9, 20, 21, 22, 23, 24, 25, 26]
GREEDY = {"temperature": 0.0, "max_new_tokens": 10, "ignore_eos": True}


def cold_engine(limit: int = 1, slots: int = 1, count: int = 3, **config: Any) -> Engine:
    """Adapters a0, a1, ... of which host memory keeps `limit`, the last ones."""
    engine = make_engine(adapters=(), max_loras_per_batch=slots, max_loaded_loras=limit, max_lora_rank=4, **config)
    for i in range(count):
        engine.load_lora_adapter(f"a{i}", str(other_adapter_path(i)))
    return engine


@pytest.fixture
def cold() -> Iterator[Engine]:
    with cold_engine() as engine:
        yield engine
        check_core(engine.core)


def expected(seed: int | None, count: int = 10) -> list[int]:
    """The answer to PROMPT of an engine in which nothing is ever cold."""
    if seed not in _answers:
        with make_engine(adapters=(), max_lora_rank=4) as engine:
            if seed is not None:
                engine.load_lora_adapter("a", str(other_adapter_path(seed)))
            _answers[seed] = engine.generate(input_ids=PROMPT, sampling_params=GREEDY | {"max_new_tokens": 40}, lora_path="a" if seed is not None else None)[
                "output_ids"
            ]
    return _answers[seed][:count]


_answers: dict[int | None, list[int]] = {}


def submit(rid: str, adapter: str | None, count: int = 10) -> Submit:
    return Submit(rid, PROMPT, SamplingParams(temperature=0.0, max_new_tokens=count, ignore_eos=True), adapter)


def reply(messages: list[EngineMessage], rid: str) -> Reply | None:
    return next((message for message in messages if isinstance(message, Reply) and message.rid == rid), None)


def send(engine: Engine, *messages: Any) -> list[EngineMessage]:
    return [answer for message in messages for answer in engine.core.handle(message)]


def drive(engine: Engine, until: Callable[[list[EngineMessage]], bool] | None = None) -> list[EngineMessage]:
    """Step until nothing is left to do, or `until` of what was said is true; the books must be even all the time."""
    said: list[EngineMessage] = []
    end = time.monotonic() + 60
    while not (until(said) if until else not (engine.core.has_work or engine.core.is_loading)):
        assert time.monotonic() < end, f"no end: {engine.core.stats()}"
        said += engine.core.step()
        check_core(engine.core)
    return said


class Gate:
    """Stands before a function that another thread calls: counts the calls and lets them through when it is open."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.open, self.calls = function, threading.Event(), 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        assert self.open.wait(60)
        return self.function(*arguments)


def gated(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate before `owner`'s method, open again at the end of the test."""
    gate = Gate(getattr(owner, name))
    monkeypatch.setattr(owner, name, gate)
    yield gate
    gate.open.set()


@pytest.fixture
def reading(cold: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The reader of `cold`, which reads only when the gate is open."""
    assert cold.core.lora is not None
    yield from gated(cold.core.lora.reader, "read", monkeypatch)


def states(engine: Engine) -> dict[str, str]:
    return {record["name"]: record["state"] for record in engine.core.stats()["adapters"]}


# ---- read again -----------------------------------------------------------------------------------------------------
def test_more_adapters_than_host_memory_holds(cold: Engine) -> None:
    assert states(cold) == {"a0": "resident", "a1": "disk", "a2": "host"}
    for name, seed in (("a1", 1), ("a2", 2), ("a0", 0), ("a1", 1)):
        assert cold.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path=name)["output_ids"] == expected(seed)
        assert states(cold)[name] == "resident" and list(states(cold).values()).count("disk") >= 1
    mixed = cold.generate(input_ids=[PROMPT] * 8, sampling_params=GREEDY, lora_path=["a0", "a1", "a2", None] * 2)
    assert [result["output_ids"] for result in mixed] == [expected(seed) for seed in (0, 1, 2, None)] * 2


def test_others_go_on_while_an_adapter_is_read_once_for_all_who_wait(cold: Engine, reading: Gate) -> None:
    said = send(cold, submit("c1", "a1"), submit("base", None, 20), submit("warm", "a0"), submit("c2", "a1"))
    said += drive(cold, lambda now: len(ids_of(now, "base")) == 20 and len(ids_of(now, "warm")) == 10)
    assert states(cold)["a1"] == "loading" and cold.core.is_stalled is False
    assert not ids_of(said, "c1") and not ids_of(said, "c2")
    said += send(cold, submit("base2", None)) + drive(cold, lambda now: len(ids_of(now, "base2")) == 10)
    assert cold.core.step() == [] and cold.core.is_stalled  # whoever is left waits for the adapter
    reading.open.set()
    said += drive(cold)
    assert ids_of(said, "c1") == ids_of(said, "c2") == expected(1) and ids_of(said, "warm") == expected(0)
    assert reading.calls == 1


def test_abort_while_an_adapter_is_read(cold: Engine, reading: Gate) -> None:
    send(cold, submit("c1", "a1"), submit("c2", "a1"))
    drive(cold, lambda now: reading.calls == 1)
    (aborted,) = send(cold, Abort("c1"))
    assert isinstance(aborted, TokenOutput) and aborted.finish_reason == "abort"
    send(cold, Abort("c2"), submit("c3", "a1"))
    reading.open.set()
    assert ids_of(drive(cold), "c3") == expected(1) and reading.calls == 1


def test_unload_while_an_adapter_is_read_waits_for_those_who_wait(cold: Engine, reading: Gate) -> None:
    said = send(cold, submit("c", "a1"))
    said += drive(cold, lambda now: reading.calls == 1)
    said += send(cold, UnloadAdapter("u", "a1"), submit("late", "a1"))
    late = reply(said, "late")
    assert late is not None and late.status == 404 and reply(said, "u") is None
    reading.open.set()
    said += drive(cold)
    unloaded = reply(said, "u")
    assert ids_of(said, "c") == expected(1) and unloaded is not None and unloaded.data["freed_device_bytes"] > 0


def test_unload_while_an_adapter_is_read_that_nobody_waits_for_any_more(cold: Engine, reading: Gate) -> None:
    send(cold, submit("c", "a1"))
    drive(cold, lambda now: reading.calls == 1)
    said = send(cold, Abort("c"), UnloadAdapter("u", "a1"))
    unloaded = reply(said, "u")
    assert unloaded is not None and unloaded.error is None and unloaded.data["freed_bytes"] == 0
    reading.open.set()
    assert drive(cold) == [] and "a1" not in states(cold)
    assert cold.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="a2")["output_ids"] == expected(2)


def own_copy(seed: int, folder: Path) -> Path:
    return Path(shutil.copytree(other_adapter_path(seed), folder))


@pytest.mark.parametrize("damage, text", [("gone", "expected a directory"), ("changed", "have changed since it was loaded.*load_inplace")])
def test_a_failed_read_answers_those_who_wait(tmp_path: Path, damage: str, text: str) -> None:
    path = own_copy(6, tmp_path / "x")
    with cold_engine() as engine:
        engine.load_lora_adapter("x", str(path))
        engine.load_lora_adapter("y", str(other_adapter_path(4)))  # host memory keeps this one
        if damage == "gone":
            path.rename(tmp_path / "elsewhere")
        else:
            edit_adapter(path, lambda tensors, config: config.update(lora_alpha=3))
        said = send(engine, submit("c1", "x"), submit("c2", "x"), submit("ok", "a0"), submit("base", None)) + drive(engine)
        for rid in ("c1", "c2"):
            refused = reply(said, rid)
            assert refused is not None and refused.status == 500 and refused.code == "adapter_unreadable" and not ids_of(said, rid)
            with pytest.raises(RequestError, match=text):
                refused.raise_error()
        assert ids_of(said, "ok") == expected(0) and ids_of(said, "base") == expected(None)
        with pytest.raises(RequestError, match=text):
            engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="x")
        if damage == "gone":
            (tmp_path / "elsewhere").rename(path)
        else:
            edit_adapter(path, lambda tensors, config: config.update(lora_alpha=8))
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="x")["output_ids"] == expected(6)
        check_core(engine.core)


@pytest.mark.parametrize("names", [("copy", "x"), ("x", "copy")])
def test_a_revision_is_read_from_whichever_of_its_names_still_has_it(tmp_path: Path, names: tuple[str, str]) -> None:
    with cold_engine() as engine:
        for name in names:
            engine.load_lora_adapter(name, str(own_copy(6, tmp_path / name)))
        engine.load_lora_adapter("y", str(other_adapter_path(4)))  # host memory keeps this one
        edit_adapter(tmp_path / "x", lambda tensors, config: config.update(lora_alpha=3))
        assert states(engine)["copy"] == "disk"
        answers = engine.generate(input_ids=[PROMPT] * 2, sampling_params=GREEDY, lora_path=list(names))
        assert [answer["output_ids"] for answer in answers] == [expected(6)] * 2
        check_core(engine.core)


def test_a_load_that_is_refused_sends_nobody_to_disk(cold: Engine) -> None:
    before = states(cold)
    assert "host" in before.values()
    with pytest.raises(RequestError, match="other content"):
        cold.load_lora_adapter("a1", str(other_adapter_path(4)))
    with pytest.raises(RequestError, match="may be pinned"):
        cold.load_lora_adapter("p", str(other_adapter_path(4)), pinned=True)
    assert states(cold) == before


# ---- on the way into a slot -----------------------------------------------------------------------------------------
@pytest.fixture
def copying(cold: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Copies into slots of `cold`, which pass only when the gate is open."""
    assert cold.core.lora is not None
    yield from gated(cold.core.lora._loader, "_copy", monkeypatch)


def test_others_go_on_while_a_slot_is_filled(cold: Engine, copying: Gate) -> None:
    said = send(cold, submit("new", "a2"), submit("base", None, 30))
    said += drive(cold, lambda now: len(ids_of(now, "base")) == 30)
    said += drive(cold, lambda now: copying.calls == 1)
    assert not ids_of(said, "new") and states(cold)["a2"] == "loading"
    copying.open.set()
    assert ids_of(drive(cold), "new") == expected(2)


def test_abort_and_unload_while_a_slot_is_filled(cold: Engine, copying: Gate) -> None:
    send(cold, submit("new", "a2"))
    drive(cold, lambda now: copying.calls == 1)
    said = send(cold, Abort("new"), UnloadAdapter("u", "a2"))
    assert reply(said, "u") is None and cold.core.stats()["adapters_unloading"] == ["a2"]
    check_core(cold.core)
    copying.open.set()
    unloaded = reply(drive(cold), "u")
    assert unloaded is not None and unloaded.data["freed_device_bytes"] > 0
    assert cold.core.stats()["slots_used"] == 0 and cold.core.stats()["adapters_unloading"] == []


def test_unload_of_a_name_that_is_being_loaded_comes_after_the_load(cold: Engine, reading: Gate) -> None:
    said = send(cold, LoadAdapter("l", "new", str(other_adapter_path(5))), UnloadAdapter("u", "new"), UnloadAdapter("again", "new"))
    assert said == []
    reading.open.set()
    said += drive(cold)
    loaded, unloaded, again = reply(said, "l"), reply(said, "u"), reply(said, "again")
    assert loaded is not None and loaded.error is None and unloaded is not None and unloaded.error is None
    assert again is not None and again.status == 404 and "new" not in states(cold)


def test_an_unload_between_two_loads_is_done_between_them(cold: Engine, reading: Gate) -> None:
    first, second = (LoadAdapter(rid, "new", str(other_adapter_path(seed))) for rid, seed in (("l", 5), ("l2", 6)))
    said = send(cold, first, UnloadAdapter("u", "new"), second)
    reading.open.set()
    said += drive(cold)
    answers = [message for message in said if isinstance(message, Reply)]
    assert [(answer.rid, answer.error) for answer in answers] == [("l", None), ("u", None), ("l2", None)]
    assert answers[0].data["revision"] == answers[1].data["revision"] != answers[2].data["revision"] and "new" in states(cold)


# ---- new weights under a name ---------------------------------------------------------------------------------------
def test_new_weights_in_place_while_requests_run() -> None:
    with cold_engine(limit=8, slots=2, count=1) as engine:
        with pytest.raises(RequestError, match="load_inplace=true"):
            engine.load_lora_adapter("a0", str(other_adapter_path(1)))
        first = engine.core.stats()["adapters"][0]["revision"]
        said = send(engine, submit("old", "a0", 30), submit("old2", "a0", 25))
        said += drive(engine, lambda now: len(ids_of(now, "old")) > 3)
        said += send(engine, LoadAdapter("l", "a0", str(other_adapter_path(1)), load_inplace=True))
        assert engine.core.lora is not None
        engine.core.lora._loads[0].adapter.result()  # a busy machine may take longer to read and copy it than the requests run
        said += engine.core.step()
        for fill in engine.core.lora._fills.values():
            fill.done.result()
        said += drive(engine, lambda now: reply(said + now, "l") is not None)
        assert not any(isinstance(message, TokenOutput) and message.finish_reason for message in said)
        assert engine.core.stats()["adapters_unloading"] == ["a0"]  # the old weights, which two requests still use
        said += send(engine, submit("new", "a0", 30)) + drive(engine)
        assert ids_of(said, "old") == expected(0, 30) and ids_of(said, "old2") == expected(0, 25) and ids_of(said, "new") == expected(1, 30)
        (record,) = engine.core.stats()["adapters"]
        loaded = reply(said, "l")
        assert loaded is not None and loaded.data["already_loaded"] is False and record["revision"] == loaded.data["revision"] != first
        assert engine.core.stats()["slots_used"] == 1 and engine.core.stats()["adapters_unloading"] == []
        check_core(engine.core)


def test_a_request_whose_adapter_was_replaced_on_disk_may_be_sent_again(cold: Engine, reading: Gate, tmp_path: Path) -> None:
    """It had not begun, and nothing has the old weights any more: 503, which clients send again."""
    path = own_copy(6, tmp_path / "x")
    reading.open.set()
    cold.load_lora_adapter("x", str(path))
    cold.load_lora_adapter("y", str(other_adapter_path(4)))  # host memory keeps this one
    reading.open.clear()
    said = send(cold, submit("first", "a1"), submit("old", "x")) + cold.core.step()
    assert states(cold)["x"] == states(cold)["a1"] == "loading"
    shutil.copytree(other_adapter_path(5), path, dirs_exist_ok=True)
    said += send(cold, LoadAdapter("l", "x", str(path), load_inplace=True))
    reading.open.set()
    said += drive(cold)
    refused, loaded = reply(said, "old"), reply(said, "l")
    assert loaded is not None and loaded.error is None and refused is not None and refused.status == 503 and "send it again" in (refused.error or "")
    said += send(cold, submit("again", "x")) + drive(cold)
    assert ids_of(said, "again") == expected(5) and ids_of(said, "first") == expected(1)


def test_a_replaced_adapter_keeps_its_slot_for_a_request_that_is_retracted(tmp_path: Path) -> None:
    """Nothing could bring it back: it has left host memory for the new weights, and its files are theirs by now."""
    path = own_copy(0, tmp_path / "x")
    with cold_engine(count=0, max_total_tokens=72) as engine:
        engine.load_lora_adapter("x", str(path))
        said = send(engine, submit("base", None, 40), submit("old", "x", 30)) + drive(engine, lambda now: len(ids_of(now, "old")) > 3)
        shutil.copytree(other_adapter_path(1), path, dirs_exist_ok=True)
        said += send(engine, LoadAdapter("l", "x", str(path), load_inplace=True))
        assert engine.core.lora is not None
        engine.core.lora._loads[0].adapter.result()
        said += engine.core.step() + send(engine, submit("new", "x"))
        assert reply(said, "l") is not None and len(ids_of(said, "old")) < 10
        said += drive(engine)
        assert engine.core.stats()["retractions"] > 0
        assert (ids_of(said, "base"), ids_of(said, "old"), ids_of(said, "new")) == (expected(None, 40), expected(0, 30), expected(1))
        check_core(engine.core)


def test_the_prefix_cache_never_mixes_revisions_of_a_name() -> None:
    with cold_engine(limit=8, slots=2, count=1) as engine:

        def ask() -> tuple[list[int], int]:
            result = engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="a0")
            return result["output_ids"], result["meta_info"]["cached_tokens"]

        assert ask() == (expected(0), 0)
        assert ask() == (expected(0), 8)
        engine.load_lora_adapter("a0", str(other_adapter_path(1)), load_inplace=True)
        assert ask() == (expected(1), 0)  # nothing of the old weights' pages
        assert ask() == (expected(1), 8)
        engine.load_lora_adapter("a0", str(other_adapter_path(0)), load_inplace=True)
        assert ask() == (expected(0), 8)  # the old weights again: their pages are right again


class Sharded(torch.Tensor):
    """As torch's DTensor is one: no plain tensor with all values."""


def test_weights_from_tensors() -> None:
    path = other_adapter_path(1)
    tensors, config = load_file(path / "adapter_model.safetensors"), json.loads((path / CONFIG_FILE).read_text())
    with make_engine(adapters=(), max_loras_per_batch=1, max_lora_rank=4, max_loaded_loras=2) as engine:
        loaded = engine.load_lora_adapter_from_tensors("t", tensors, config)
        assert loaded["revision"] == engine.load_lora_adapter("file", str(path))["revision"] and loaded["path"] == ""
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="t")["output_ids"] == expected(1)
        for tensor in tensors.values():
            tensor.zero_()  # the caller's tensors are not kept
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="t")["output_ids"] == expected(1)
        with pytest.raises(RequestError, match="load_inplace=true"):
            engine.load_lora_adapter_from_tensors("t", tensors, config)
        engine.load_lora_adapter_from_tensors("t", tensors.items(), config, load_inplace=True)
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="t")["output_ids"] == expected(None)
        key = next(iter(tensors))
        for tensor, found in (
            (tensors[key].numpy(), "ndarray on "),
            (tensors[key].to("meta"), "Tensor on meta"),
            (tensors[key].as_subclass(Sharded), "Sharded on cpu"),
        ):
            with pytest.raises(RequestError, match=f"tensors of bad: {key}: expected a torch.Tensor with all values, found {found}"):
                engine.load_lora_adapter_from_tensors("bad", tensors | {key: tensor}, config)
        for change, text in (
            (lambda: tensors[key].fill_(torch.nan), f"tensors of bad: {key}: expected finite weights"),
            (lambda: config.update(use_dora=True), "config_dict of bad: use_dora"),
        ):
            change()
            with pytest.raises(RequestError, match=text):
                engine.load_lora_adapter_from_tensors("bad", tensors, config)
        assert set(states(engine)) == {"t", "file"}
        check_core(engine.core)


def test_weights_from_tensors_with_the_config_that_peft_holds() -> None:
    """Which has a set where adapter_config.json has a list."""
    path = other_adapter_path(1)
    config = LoraConfig.from_pretrained(path, target_modules=["q_proj"]).to_dict()
    assert isinstance(config["target_modules"], set)
    with make_engine(adapters=(), max_loras_per_batch=1, max_lora_rank=4) as engine:
        engine.load_lora_adapter_from_tensors("t", load_file(path / "adapter_model.safetensors"), config)
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="t")["output_ids"] == expected(1)
        config["ensure_weight_tying"], config["target_modules"] = True, {"q_proj", "lm_head"}
        with pytest.raises(RequestError, match="config_dict of u: ensure_weight_tying"):
            engine.load_lora_adapter_from_tensors("u", {}, config)


def test_weights_from_tensors_stay_in_host_memory() -> None:
    path = other_adapter_path(1)
    tensors, config = load_file(path / "adapter_model.safetensors"), json.loads((path / CONFIG_FILE).read_text())
    with make_engine(adapters=(), max_loras_per_batch=1, max_lora_rank=4, max_loaded_loras=1) as engine:
        engine.load_lora_adapter_from_tensors("t", tensors, config)
        engine.load_lora_adapter("file", str(other_adapter_path(0)))
        assert states(engine) == {"t": "resident", "file": "disk"}
        tensors = {name: tensor * 2 for name, tensor in tensors.items()}
        with pytest.raises(RequestError, match="--max-loaded-loras"):
            engine.load_lora_adapter_from_tensors("u", tensors, config)
        engine.load_lora_adapter_from_tensors("t", tensors, config, load_inplace=True)  # takes the place of what nobody uses
        assert states(engine) == {"t": "resident", "file": "disk"}
        engine.unload_lora_adapter("t")
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="file")["output_ids"] == expected(0)
        check_core(engine.core)


def test_what_cannot_be_read_again_because_of_weights_from_tensors_is_answered() -> None:
    path = other_adapter_path(1)
    tensors, config = load_file(path / "adapter_model.safetensors"), json.loads((path / CONFIG_FILE).read_text())
    with cold_engine() as engine:
        engine.load_lora_adapter_from_tensors("t", tensors, config)
        with pytest.raises(RequestError, match="'a2' cannot be read again: .* --max-loaded-loras") as error:
            engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="a2")
        assert (error.value.status, error.value.code) == (503, "adapter_unreadable")
        engine.unload_lora_adapter("t")
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="a2")["output_ids"] == expected(2)
        check_core(engine.core)


def test_a_pinned_adapter_leaves_host_memory_to_others() -> None:
    with cold_engine(slots=2, count=0) as engine:
        engine.load_lora_adapter("p", str(other_adapter_path(0)), pinned=True)
        for name, seed in (("q", 1), ("r", 2), ("p", 0)):
            if seed:
                engine.load_lora_adapter(name, str(other_adapter_path(seed)))
            assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path=name)["output_ids"] == expected(seed)
            assert states(engine)["p"] == "resident"
        check_core(engine.core)


# ---- the child that reads -------------------------------------------------------------------------------------------
def test_the_child_imports_what_it_needs_first_and_ends_quietly(cold: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cold.core.lora is not None
    reader = cold.core.lora.reader
    imported: list[str] = []
    for owner, name, value in ((reader_module, "import_module", imported.append), (os, "nice", int), (torch, "set_num_threads", int)):
        monkeypatch.setattr(owner, name, value)
    for asked in (False, True):  # the parent goes while it waits, and while it reads
        ours, theirs = Pipe()
        if asked:
            ours.send_bytes(pickle.dumps((reader._pickled, str(other_adapter_path(1)))))
        ours.close()
        reader_module.run_child(os.dup(theirs.fileno()))
    assert imported == [type(reader.rules.rename.__self__).__module__] * 2  # type: ignore[attr-defined]


def test_the_child_reads_the_same_and_is_replaced_when_it_dies(cold: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cold.core.lora is not None and hasattr(os, "memfd_create")
    reader = cold.core.lora.reader
    beside = reader.read(str(other_adapter_path(1)))
    here = reader_module.AdapterReader(reader.rules, reader.layout).read(str(other_adapter_path(1)))
    assert torch.equal(beside.image, here.image) and (beside.revision, beside.stacks, beside.targets) == (here.revision, here.stacks, here.targets)
    child = reader_module._child._process
    assert child is not None and child.pid != os.getpid()
    with pytest.raises(ValueError, match="expected a directory"):
        reader.read("/nowhere")
    os.kill(child.pid, signal.SIGSTOP)  # so that it ends with a question unanswered
    connection: Any = reader_module._child._connection
    send = connection.send_bytes
    monkeypatch.setattr(connection, "send_bytes", lambda question: (send(question), os.kill(child.pid, signal.SIGKILL)))
    with pytest.raises(RuntimeError, match=r"ended with status -9 \(out of memory.* while it read"):
        reader.read(str(other_adapter_path(1)))
    assert torch.equal(reader.read(str(other_adapter_path(1))).image, here.image)


def test_an_adapter_that_takes_for_ever_is_given_up(cold: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = "(.*)" + ".*" * 12 + r"\1[0-9A-Z]"  # until PATTERN_SECONDS
    endless = edit_adapter(write_adapter("attention_only", model_path(), tmp_path / "x", rank=4), lambda _, config: config.update(rank_pattern={pattern: 4}))
    assert cold.core.lora is not None
    cold.core.lora.reader.start()
    monkeypatch.setattr(reader_module, "PATIENCE", 3.0)
    with pytest.raises(RequestError, match="ended with status -9 .* or after 3 s"):
        cold.load_lora_adapter("x", str(endless))
    monkeypatch.undo()
    cold.load_lora_adapter("x", str(other_adapter_path(1)))


def test_a_path_means_the_folder_of_the_program(cold: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that in which the child was started."""
    for folder, seed in (("one", 5), ("two", 6)):
        own_copy(seed, tmp_path / folder / "x")
    found = []
    for folder in ("one", "two"):
        monkeypatch.chdir(tmp_path / folder)
        found.append(cold.load_lora_adapter(folder, "x")["path"])
        assert cold.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path=folder)["output_ids"] == expected(5 + len(found) - 1)
    assert found == [str(tmp_path / folder / "x") for folder in ("one", "two")]


def test_target_modules(tmp_path: Path) -> None:
    path = write_adapter("target_parameters_3d", model_path(), tmp_path / "x", rank=4, seed=3)
    with make_engine(adapters=(), max_lora_rank=4, lora_target_modules=["experts"]) as engine, make_engine(adapters=(), max_lora_rank=4) as whole:
        assert engine.core.lora is not None and whole.core.lora is not None
        assert engine.core.lora.pool.pool.nbytes < whole.core.lora.pool.pool.nbytes
        engine.load_lora_adapter("x", str(path))
        whole.load_lora_adapter("x", str(path))
        answers = [one.generate(input_ids=PROMPT, sampling_params=GREEDY, lora_path="x")["output_ids"] for one in (engine, whole)]
        assert answers[0] == answers[1] != expected(None)
    with make_engine(adapters=(), max_lora_rank=4, lora_target_modules=["qkv_proj"]) as engine:
        with pytest.raises(RequestError, match="--lora-target-modules experts too"):
            engine.load_lora_adapter("x", str(path))
        assert {name.rpartition(".")[2] for name in engine.core.lora.pool.layout.targets} == {"q_proj", "k_proj", "v_proj"}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="--lora-target-modules w9: this model has no such module; it has .*q_proj"):
        make_engine(adapters=(), lora_target_modules=["w9"])
