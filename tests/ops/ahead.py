"""Programs whose end tests wait for, compilers above all: begun when tests are collected, they run beside other tests.

A module's `waits_for(item)` says which program one of its tests needs, `finished` waits for it. Tests that wait run last.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# What AddressSanitizer sees when memory is accessed, UBSan need not ask of every pointer as well: a third of the compilers' time.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow", "-fno-sanitize-recover=all"]
Command = tuple[str, ...]
Finished = subprocess.CompletedProcess[str]

if "COMPILED_FOR_TESTS" not in os.environ:  # processes of pytest-xdist share that of the process that began them
    _folder = tempfile.TemporaryDirectory(prefix="compiled-for-tests-")  # removed at exit
    os.environ["COMPILED_FOR_TESTS"] = _folder.name
FOLDER = Path(os.environ["COMPILED_FOR_TESTS"])
SHARED = "PYTEST_XDIST_WORKER" in os.environ
_programs = ThreadPoolExecutor(1 if SHARED else 2)
_begun: dict[Command, Future[None]] = {}
_own = FOLDER / f"process-{os.getpid()}"  # linked to what it runs
_own.write_text(str(os.getpid()))
_running: set[subprocess.Popen[str]] = set()


def command(*words: str | Path) -> Command:
    return tuple(map(str, words))


def emulated(driver: Path) -> Command:
    """`driver` as a program with sanitizers, with the kernels it includes running on csrc/emulator."""
    flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-cast-function-type", *SANITIZERS]
    return command("g++", *flags, f"-I{ROOT / 'csrc'}", "-x", "c++", driver, "-o", FOLDER / driver.stem)


def gates(module: str) -> Command:
    """A module that compiles Triton kernels ahead of time, which the interpreter in the tests' own process does not allow."""
    return command(sys.executable, "-m", f"tests.ops.{module}")


def begin(what: Command) -> Future[None]:
    """Run it after those begun before it, in one of the tests' processes, and once however often it is asked for."""
    if what not in _begun:
        _begun[what] = _programs.submit(_run, what)
    return _begun[what]


def finished(what: Command) -> Finished:
    """Wait for it, whichever process runs it. RuntimeError: that process has ended."""
    future, result = begin(what), _result(what)
    while not result.exists():
        if future.done():
            future.result()  # raises what kept it from being run
            runner = _claim(what).read_text()
            if not Path("/proc", runner).exists() and not result.exists():
                raise RuntimeError(f"process {runner} of the tests has ended, which ran {' '.join(what)}")
        time.sleep(0.05)
    return pickle.loads(result.read_bytes())


def stop() -> None:
    """Forget what was not begun, and end what runs, but for what another process may be waiting for."""
    _programs.shutdown(wait=SHARED, cancel_futures=True)
    for process in list(_running):
        process.kill()


def _result(what: Command) -> Path:
    return FOLDER / f"{hashlib.sha256(repr(what).encode()).hexdigest()}.result"


def _claim(what: Command) -> Path:
    return _result(what).with_suffix(".claim")


def _run(what: Command) -> None:
    try:
        os.link(_own, _claim(what))  # the first wins, and its claim is never seen empty
    except FileExistsError:
        return
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(FOLDER / "triton")}
    process = subprocess.Popen(["nice", "-n", "5", *what], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _running.add(process)
    out, err = process.communicate()
    _running.discard(process)
    part = _result(what).with_suffix(".part")
    part.write_bytes(pickle.dumps(Finished(what, process.returncode, out, err)))
    part.replace(_result(what))
