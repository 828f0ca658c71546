"""Start the server, on the embedded demo or other models, as a process of its own, for tests and benchmarks that speak HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"
START_SECONDS = 120


def demo_flags() -> list[str]:
    """What `./run serve` without arguments serves."""
    adapters = [str(config.parent) for config in sorted(DEMO.glob("*/adapter_config.json"))]
    return ["--model-path", str(DEMO / "base"), "--served-model-name", "demo", "--enable-lora", "--lora-paths", *adapters]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def demo_server(*extra_flags: str) -> contextlib.AbstractContextManager[str]:
    """`running_server` of the embedded demo."""
    return running_server(*demo_flags(), *extra_flags)


@contextlib.contextmanager
def running_server(*flags: str) -> Iterator[str]:
    """The address of a healthy server with these flags, which is stopped at the end; its log is shown if it does not come up."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_lora_moe.launch_server", "--port", str(port), *flags]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}  # threads as `./run serve` has them
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        try:
            while not is_healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"the server did not come up (exit status {process.poll()}):\n{log.read()[-4000:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
