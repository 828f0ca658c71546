"""How the whole server starts and ends: signals, keys, a full queue, processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import wait_for
from tests.server.launched import PROMPT, ROOT, Server, alive, children_of


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts servers of a test's own, and ends what still runs."""
    started: list[Server] = []

    def begin(*flags: str) -> Server:
        started.append(Server(*flags))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_full_queue_keys_and_ctrl_c(start: Callable[..., Server], files: tuple[Path, Path]) -> None:
    server = start("--model-path", str(files[0]), "--max-running-requests", "1", "--max-queued-requests", "1", "--api-key", "k")
    assert httpx.get(server.url + "/v1/models", timeout=60).status_code == 401
    headers = {"Authorization": "Bearer k"}
    body = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}
    answers: list[httpx.Response] = []
    threads: list[threading.Thread] = []

    def refused() -> list[httpx.Response]:
        """The refused ones, once there are three; until then three requests are there at a time: one that runs, one in the queue, one too many."""
        now = list(answers)
        full = [answer for answer in now if answer.status_code == 503]
        if len(full) < 3 and len(threads) < len(now) + 3:
            ask = lambda: answers.append(httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=60))  # noqa: E731
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
        return full if len(full) == 3 else []

    for answer in wait_for(refused):
        assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["type"] == "server_error"
    code, err = server.end(signal.SIGINT, group=True)  # as a terminal does
    for thread in threads:
        thread.join()
    assert code == 0 and "Traceback" not in err and "KeyboardInterrupt" not in err, err
    assert sorted(answer.status_code for answer in answers) == [200] * (len(threads) - 3) + [503] * 3 and len(threads) >= 5
    assert not any(map(alive, server.children))


def ends_quietly_while_loading(model: Path, number: int) -> bool:
    """A signal to a server that loads; False if it was ready before."""
    command = [sys.executable, "-m", "sglang_lora_moe.launch_server", "--port", "0", "--model-path", str(model)]
    # a shell's background jobs, of which the tests may be one, ignore SIGINT, and what they start inherits that
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    wait_for(lambda: children_of(process.pid))
    children = children_of(process.pid)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (0 if "Ready" in out else 130) and "Traceback" not in err, err
    assert not any(map(alive, children))
    return "Ready" not in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_quiet_end_while_loading(files: tuple[Path, Path], number: int) -> None:
    assert any(ends_quietly_while_loading(files[0], number) for _ in range(10))


def test_server_ends_when_its_engine_is_killed(start: Callable[..., Server], files: tuple[Path, Path]) -> None:
    server = start("--model-path", str(files[0]))
    for child in server.children:
        os.kill(child, signal.SIGKILL)
    code, err = server.end(None)
    assert code == 1 and "Traceback" not in err, err


def test_engine_ends_when_its_server_is_killed(
    start: Callable[..., Server], files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("s")  # short, as addresses of sockets are
    monkeypatch.setenv("TMPDIR", str(folder))
    server = start("--model-path", str(files[0]))
    server.process.kill()
    wait_for(lambda: not any(map(alive, server.children)))
    assert not list(folder.glob("sglang-lora-moe-*")), "the socket's folder is left over"


def test_an_adapter_that_cannot_be_loaded_stops_the_start(start: Callable[..., Server], files: tuple[Path, Path]) -> None:
    code, err = start("--model-path", str(files[0]), "--lora-paths", "x=/no/where").end(None)
    lines = [line for line in err.splitlines() if line.startswith("sglang-lora-moe: ")]
    assert code == 2 and len(lines) == 1 and "--lora-paths: x" in lines[0] and "/no/where" in lines[0] and "Traceback" not in err, err
