"""The server as a process: what it prints, how it starts and how it ends. The engine is a fake one."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_lora_moe.launch_server import main
from sglang_lora_moe.server import serve

PROGRAM = """
import asyncio, sys
from sglang_lora_moe.server import serve
from tests.server.fake_engine import FakeEngine

class Engine(FakeEngine):
    async def shutdown(self):
        print("engine stopped", flush=True)

async def run():
    engine = Engine(delay=float(sys.argv[1]))
    await engine.load_adapter("a", "/a")
    serve.FINISH_SECONDS = float(sys.argv[2])
    if len(sys.argv) > 3:
        asyncio.get_running_loop().call_later(float(sys.argv[3]), setattr, engine, "healthy", False)
    code = await serve.run_server(engine, serve._listen("127.0.0.1", 0))
    await engine.shutdown()
    return code

sys.exit(asyncio.run(run()))
"""
ROOT = Path(__file__).parents[2]


class Served:
    """A running server, its first line and URL."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = next((word for word in self.line.split() if word.startswith("http")), "")

    def end(self, number: int | None = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit status, further output, errors."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err

    def post(self, answers: list[Any], **body: Any) -> threading.Thread:
        """A request that was seen to run, in a thread; its answer comes to `answers`."""
        running = 0
        while not running:  # another where this process was held up until it had ended
            answers.clear()
            thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{self.url}/v1/completions", json={"prompt": "hello"} | body, timeout=60)))
            thread.start()
            while not running and not answers:
                running = httpx.get(f"{self.url}/server_info", timeout=60).json()["stats"]["running"]
        return thread


@pytest.fixture
def served() -> Iterator[type[Served]]:
    started: list[Served] = []

    class Tracked(Served):
        def __init__(self, *arguments: str) -> None:
            super().__init__(*arguments)
            started.append(self)

    yield Tracked
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_starts_and_ends_cleanly(served: type[Served], number: int) -> None:
    server = served("0", "5")
    assert server.line.startswith("Ready: http://127.0.0.1:") and server.line.endswith("serves base, adapters: a (rank 8)\n")
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    code, out, err = server.end(number)
    assert (code, out) == (0, "engine stopped\n") and "Traceback" not in err, err


def test_running_requests_finish_after_the_signal(served: type[Served]) -> None:
    server, answers = served("0.02", "30"), []  # type: tuple[Served, list[Any]]
    thread = server.post(answers, max_tokens=40)
    code, _, err = server.end()
    thread.join()
    assert code == 0 and "Traceback" not in err, err
    assert answers[0].json()["choices"][0]["finish_reason"] == "length"


def test_requests_that_take_too_long_are_aborted(served: type[Served]) -> None:
    server, answers = served("0.05", "0.3"), []  # type: tuple[Served, list[Any]]
    thread = server.post(answers, max_tokens=400)
    code, _, err = server.end()
    thread.join()
    assert code == 0 and "Traceback" not in err, err
    assert answers[0].json()["choices"][0]["finish_reason"] == "abort"


def test_ends_when_the_engine_died(served: type[Served]) -> None:
    code, _, err = served("0", "0.1", "0.5").end(None)
    assert code == 1 and "Traceback" not in err, err


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, json\nfrom sglang_lora_moe.launch_server import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as error:\n    assert error.code == 0\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'fastapi', 'uvicorn') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [] and "--max-loras-per-batch" in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model-path is required"),
        (["--model-path", "/nowhere", "--port", "70000"], "--port"),
        (["--model-path", "/nowhere", "--max-loras-per-batch", "0"], "--max-loras-per-batch"),
        (["--model-path", "/nowhere", "--moe-runner-backend", "magic"], "--moe-runner-backend"),
        (["--model-path", "/nowhere", "--lora-paths", "a=/x", "a=/y"], "--lora-paths"),
        (["--model-path", "/nowhere", "--api-key", ""], "--api-key must not be empty"),
        (["--model-path", "/nowhere", "--api-key", "k", "--admin-api-key", ""], "--admin-api-key must not be empty"),
    ],
)
def test_wrong_flags(flags: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2 and words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model-path", "/nowhere"], "/nowhere"),
        (["--model-path", "/nowhere", "--chat-template", "/no/template"], "--chat-template"),
        (["--model-path", "/nowhere", "--lora-paths", "a:b=/x"], "a:b"),
        (["--model-path", "/nowhere/", "--lora-paths", "nowhere=/x"], "'nowhere' is the name of the base model"),
        (["--model-path", "/nowhere", "--host", "256.0.0.1"], "--host 256.0.0.1"),
    ],
)
def test_what_cannot_start_says_one_sentence(flags: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, *([] if "--port" in flags else ["--port", "0"])]) == 2
    err = capfd.readouterr().err.strip()
    assert words in err and "Traceback" not in err and len(err.splitlines()) == 1, err


def test_a_port_that_is_taken(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--model-path", "/nowhere", "--port", port]) == 2
    assert f"--port {port}" in capfd.readouterr().err


def test_a_port_is_taken_while_its_server_loads() -> None:
    with serve._listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: Address already in use"):
            serve._listen("127.0.0.1", port)


def test_a_server_starts_while_connections_of_the_last_one_linger(served: type[Served]) -> None:
    server = served("0", "5")
    port = int(server.url.rpartition(":")[2])
    with httpx.Client(timeout=60) as client:
        assert client.get(f"{server.url}/health").status_code == 200
        assert server.end()[0] == 0  # it closes the connection first, which keeps the port for a minute
    with serve._listen("127.0.0.1", port) as first:
        with pytest.raises(ValueError, match="Address already in use"):  # as where none lingers
            serve._listen("127.0.0.1", port)
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as run_server does when it has loaded
        first.listen()
