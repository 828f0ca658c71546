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
from typing import Any

ROOT = Path(__file__).parent.parent.parent
# What AddressSanitizer sees when memory is accessed, UBSan need not ask of every pointer as well: a third of the compilers' time.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow", "-fno-sanitize-recover=all"]
Command = tuple[str, ...]
Finished = subprocess.CompletedProcess[str]

_folder = tempfile.TemporaryDirectory(prefix="compiled-for-tests-")  # removed at exit
FOLDER = Path(_folder.name)
_programs = ThreadPoolExecutor(2)
_tests_wait = FOLDER / "tests-wait"  # once it is there two run at once; before, one beside the tests
_begun: dict[Command, Future[Finished]] = {}
_running: set[subprocess.Popen[str]] = set()
_starter = 0  # the process that begins programs, where it is another: tests/beside.py


def command(*words: str | Path) -> Command:
    return tuple(map(str, words))


def emulated(driver: Path) -> Command:
    """`driver` as a program with sanitizers, with the kernels it includes running on csrc/emulator."""
    flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-cast-function-type", *SANITIZERS]
    return command("g++", *flags, f"-I{ROOT / 'csrc'}", "-x", "c++", driver, "-o", FOLDER / driver.stem)


def gates(module: str) -> Command:
    """A module that compiles Triton kernels ahead of time, which the interpreter in the tests' own process does not allow."""
    return command(sys.executable, "-m", f"tests.ops.{module}")


def begin(what: Command) -> Future[Finished]:
    """Run it after those begun before it, and once however often it is asked for."""
    if not _begun:
        _programs.submit(_wait)  # is one of the two
    if what not in _begun:
        _begun[what] = _programs.submit(_run, what)
    return _begun[what]


def finished(what: Command) -> Finished:
    if _starter:
        if not _result(what).exists():
            hurry()
        while not _result(what).exists():
            if os.getppid() != _starter:
                os._exit(1)  # nobody is left to report to
            time.sleep(0.05)
        return pickle.loads(_result(what).read_bytes())
    future = begin(what)
    if not future.done():
        hurry()
    return future.result()


def hurry() -> None:
    """One of the tests' processes does nothing but wait."""
    _tests_wait.touch()


def _wait() -> None:
    while not _tests_wait.exists():
        time.sleep(0.2)


def begun_by(process: int) -> None:
    """In a process of its own: what it asks for, this other one has begun."""
    global _starter
    _starter = process


def write(path: Path, content: Any) -> None:
    """For another process, which sees all of it or nothing."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(content))
    part.replace(path)


def stop() -> None:
    """End what runs and forget the rest."""
    _programs.shutdown(wait=False, cancel_futures=True)
    hurry()
    for process in list(_running):
        process.kill()


def _result(what: Command) -> Path:
    return FOLDER / f"{hashlib.sha256(repr(what).encode()).hexdigest()}.result"


def _run(what: Command) -> Finished:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(FOLDER / "triton")}
    process = subprocess.Popen(["nice", "-n", "5", *what], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _running.add(process)
    out, err = process.communicate()
    _running.discard(process)
    done = Finished(what, process.returncode, out, err)
    write(_result(what), done)
    return done
