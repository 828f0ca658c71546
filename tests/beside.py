"""Two processes run the tests: what only computes runs beside what starts servers and waits for them.

The folders in COMPUTE are the second process's, forked once tests are collected. It does not matter to their tests where they
run; the first process takes the rest, then parts of modules that the second has not begun, and reports for both.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops import ahead

COMPUTE = ("tests/moe/", "tests/ops/")
WORTH_IT = 200  # tests of either kind
PART = 32  # tests of a module, so that the two end together; set-up of modules is done once in each
Parts = list[list[pytest.Item]]


class Second:
    """The second process and its parts, each of which the process runs that is first to make the file `claim`."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.pid, self.ended = parts, 0, False

    def claim(self, index: int) -> bool:
        try:
            (ahead.FOLDER / f"claim-{index}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def reports(self, index: int) -> Path:
        return ahead.FOLDER / f"reports-{index}"

    def fork(self, session: pytest.Session) -> None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # before the fork: threads of OpenMP would not survive it
        session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # one for both
        self.pid = os.fork()
        if self.pid:
            return
        try:
            self.work(session)
        except BaseException:  # whatever it is, nothing of the first process's may go on here
            (ahead.FOLDER / "second-failed").write_text(traceback.format_exc())
        finally:
            os._exit(0)

    def work(self, session: pytest.Session) -> None:
        """In the second process: run parts, keep what is reported."""
        os.nice(5)
        ahead.begun_by(os.getppid())
        recorder, plugins = Recorder(session.config), session.config.pluginmanager
        capture = plugins.getplugin("capturemanager")
        capture._global_capturing = None  # its files are the first process's
        capture.start_global_capturing()
        capture.suspend_global_capture()
        plugins.unregister(name="terminalreporter")
        plugins.register(recorder)
        recorder.taken()  # warnings of before
        session.config.option.maxfail = 0  # the first process's to judge
        for index, items in enumerate(self.parts):
            if self.claim(index):
                run(session, items)
                ahead.write(self.reports(index), recorder.taken())

    def wait(self, index: int) -> list[tuple[str, Any]]:
        """What the second process reported of a part, once it has run it."""
        ahead.hurry()
        while not self.reports(index).exists():
            if self.ended:
                failed = ahead.FOLDER / "second-failed"
                module = self.parts[index][0].nodeid.partition("::")[0]
                raise RuntimeError(f"the second process ended in {module}: {failed.read_text() if failed.exists() else 'killed'}")
            self.ended = os.waitpid(self.pid, os.WNOHANG)[0] != 0  # its last file is looked for once more
            time.sleep(0.05)
        return pickle.loads(self.reports(index).read_bytes())

    def end(self) -> None:
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class Recorder:
    """Keeps reports and warnings, as hooks are called with them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.found = config, []  # type: ignore[var-annotated]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.found.append(("report", self.config.hook.pytest_report_to_serializable(config=self.config, report=report)))

    def pytest_warning_recorded(self, warning_message: Any, when: str, nodeid: str, location: Any) -> None:
        what = str(warning_message.message), warning_message.category, warning_message.filename, warning_message.lineno
        self.found.append(("warning", (what, {"when": when, "nodeid": nodeid, "location": location})))

    def taken(self) -> list[tuple[str, Any]]:
        found, self.found = self.found, []
        return found


def run(session: pytest.Session, items: list[pytest.Item]) -> None:
    """As pytest's own loop does."""
    for item, following in itertools.zip_longest(items, items[1:]):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        stop(session)


def stop(session: pytest.Session) -> None:
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def show(session: pytest.Session, items: list[pytest.Item], found: list[tuple[str, Any]]) -> None:
    """Report what ran in the second process as if it had run here."""
    hook = session.config.hook
    reports: dict[str, list[pytest.TestReport]] = {item.nodeid: [] for item in items}
    for kind, content in found:
        if kind == "warning":
            what, options = content
            hook.pytest_warning_recorded.call_historic(kwargs={"warning_message": warnings.WarningMessage(*what), **options})
        else:
            report = hook.pytest_report_from_serializable(config=session.config, data=content)
            reports[report.nodeid].append(report)
    for item in items:
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports[item.nodeid]:
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        stop(session)


def is_compute(item: pytest.Item) -> bool:
    return item.nodeid.startswith(COMPUTE)


second: Second | None = None


@pytest.hookimpl(tryfirst=True)  # before compilers are begun, by threads
def pytest_collection_finish(session: pytest.Session) -> None:
    global second
    options = session.config.option
    alone = options.collectonly or options.usepdb or session.testsfailed or torch.cuda.is_available() or (os.cpu_count() or 1) == 1
    if alone or hasattr(session.config, "workerinput") or getattr(options, "numprocesses", None):
        return
    computing = list(filter(is_compute, session.items))
    if min(len(computing), len(session.items) - len(computing)) >= WORTH_IT:
        modules = [list(items) for _, items in itertools.groupby(computing, key=lambda item: item.path)]
        second = Second([items[i : i + PART] for items in modules for i in range(0, len(items), PART)])
        second.fork(session)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    if second is None:
        return (yield)
    everything, session.items = session.items, [item for item in session.items if not is_compute(item)]
    try:
        result = yield
        theirs = []
        for index, items in enumerate(second.parts):
            if second.claim(index):
                run(session, items)
            else:
                theirs.append(index)
        for index in theirs:
            show(session, second.parts[index], second.wait(index))
        return result
    finally:
        session.items = everything
        second.end()
