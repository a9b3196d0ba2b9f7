"""Runs the tests marked `triton` where there is no GPU: in one process of Triton's interpreter for each pytest process.

That process is pytest too. It collects the same files, runs what it is asked for by id, and its reports become those of
the process that asked. It starts with the first such test and ends with the session.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from multiprocessing import connection
from typing import Any

import pytest

FOUND = importlib.util.find_spec("triton") is not None
HERE = os.environ.get("TRITON_INTERPRET") == "1"


class Served:
    """In the interpreter's process: runs the tests that are asked for."""

    def __init__(self, config: pytest.Config, descriptor: int) -> None:
        self.config = config
        self.pipe: Any = connection.Connection(descriptor)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for name, following in iter(self.pipe.recv, None):
            item = items[name]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=items.get(following))
            self.pipe.send(None)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.pipe.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


class Interpreter:
    """The process, seen from the one that asks."""

    def __init__(self, config: pytest.Config, files: list[str]) -> None:
        self.config = config
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # for as long as the process runs
        self.pipe, there = connection.Pipe()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["-m", "triton", f"--served-by={there.fileno()}", *files]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the package that this process imports, and no other
        self.process = subprocess.Popen(
            command, cwd=config.rootpath, env=environment, stdin=subprocess.DEVNULL, stdout=self.said,
            stderr=subprocess.STDOUT, pass_fds=[there.fileno()],
        )  # fmt: skip
        there.close()

    def run(self, name: str, following: str | None) -> list[pytest.TestReport]:
        """The reports of one test; EOFError or OSError where the process ended."""
        self.pipe.send((name, following))
        received = iter(self.pipe.recv, None)
        return [self.config.hook.pytest_report_from_serializable(config=self.config, data=data) for data in received]

    def last_words(self) -> str:
        self.process.wait()
        self.said.seek(0)
        return f"Triton's interpreter ended, status {self.process.returncode}:\n{self.said.read()[-4000:]}"

    def end(self) -> None:
        self.pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Asking:
    """In the process that has no GPU: hands tests marked `triton` over."""

    def __init__(self) -> None:
        self.interpreter: Interpreter | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not item.get_closest_marker("triton"):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports(item, nextitem):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        item.session._setupstate.teardown_exact(nextitem)  # what a test before it, of this process, left for its module
        return True

    def reports(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        if self.interpreter is None:
            marked = (other for other in item.session.items if other.get_closest_marker("triton"))
            self.interpreter = Interpreter(item.config, sorted({str(other.path) for other in marked}))
        following = nextitem.nodeid if nextitem and nextitem.get_closest_marker("triton") else None
        try:
            return self.interpreter.run(item.nodeid, following)
        except (EOFError, OSError):
            said = self.interpreter.last_words()
            self.interpreter = None  # the next test starts another
            report = pytest.TestReport(item.nodeid, item.location, {}, "failed", said, "call")
            return [report]

    def pytest_sessionfinish(self) -> None:
        if self.interpreter is not None:
            self.interpreter.end()


def register(config: pytest.Config, descriptor: int | None, card: bool) -> None:
    """What this process has to do with it; card: whether PyTorch sees a GPU."""
    if descriptor is not None:
        config.pluginmanager.register(Served(config, descriptor))
    elif FOUND and not HERE and not card:
        config.pluginmanager.register(Asking())
