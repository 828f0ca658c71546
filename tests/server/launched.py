"""`launch_server` as a user starts it, over a tiny model and real adapter files."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

from tests.adapter_files import write_adapter
from tests.server.conftest import wait_for
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
ADAPTERS = {"a": ("target_parameters_3d", 8), "b": ("per_expert_2d", 4), "c": ("shared_outer", 16), "d": ("experts_and_attention", 6)}
PROMPT = "Mixtures of experts"


class Server:
    """`launch_server` as a process in its own group; `url` is there once it is ready."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "sglang_lora_moe.launch_server", "--port", "0", "--log-level", "warning", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which the tests' own process ignores where a script runs it with &
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.line)
        self.url = found.group() if found else ""
        self.children = children_of(self.process.pid)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def get(self, path: str) -> Any:
        return self.client.get(path).json()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def generate(self, **body: Any) -> Any:
        response = self.post("/generate", **({"sampling_params": {"temperature": 0, "max_new_tokens": 12}} | body))
        assert response.status_code == 200, response.text
        return response.json()

    def start(self, **body: Any) -> tuple[threading.Thread, list[httpx.Response]]:
        """A request in a thread and where its answer comes: it runs now, or has ended already where this process was held up."""
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(self.post("/generate", **body)))
        thread.start()
        wait_for(lambda: self.stats()["running"] or answers)
        return thread, answers

    def stats(self) -> dict[str, Any]:
        return dict(self.get("/server_info")["stats"])

    def is_idle(self) -> bool:
        stats = self.stats()
        return not (stats["running"] or stats["waiting"] or stats["kv_pages_used"])

    def end(self, number: int | None = signal.SIGTERM, group: bool = False) -> tuple[int, str]:
        """Exit status and what was said on stderr."""
        if number is not None and group:
            os.killpg(self.process.pid, number)
        elif number is not None:
            self.process.send_signal(number)
        try:
            _, err = self.process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # nothing of a failed test goes on beside the others
            raise
        return self.process.returncode, err


def children_of(pid: int) -> list[int]:
    """Children of a process that still run something (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def make_files(directory: Path) -> tuple[Path, Path]:
    """(model, directory of adapters)."""
    model = make_tiny_model("qwen3_moe", directory)
    for i, (name, (layout, rank)) in enumerate(ADAPTERS.items()):
        write_adapter(layout, model, directory / "adapters" / name, rank=rank, seed=i)
    write_adapter("attention_only", model, directory / "adapters" / "high", rank=32)
    return model, directory / "adapters"
