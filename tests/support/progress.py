"""How far the tests are and how long they will take: by what each file took when it was last recorded.

pytest --progress [--save-durations]
"""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

RECORD = Path(__file__).parents[1] / "durations.json"  # {file: seconds of all its tests}, on two quiet cores
EVERY_S = 10.0


def recorded():
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def file_of(name):
    """The file of a test's id, from the folder of tests."""
    return name.partition("::")[0].removeprefix("tests/")


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Lines in the place of dots; what fails is named at once."""

    def __init__(self, config, now=time.monotonic):
        self.config, self.now = config, now
        self.seconds = recorded()
        self.all = Counter()  # tests of each file
        self.done = Counter()
        self.took = Counter()  # seconds of each file
        self.failed = 0
        self.started = self.said = now()

    def pytest_collection_finish(self, session):
        self.begin(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.begin(ids)

    def begin(self, names):
        """Every worker of pytest-xdist collects all tests: the last to say so begins."""
        counts = Counter(map(file_of, names))
        if counts:
            self.all, self.started = counts, self.now()
            self.said = self.started

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self):
        category, *_ = yield
        return category, "", ""

    def pytest_runtest_logreport(self, report):
        file = file_of(report.nodeid)
        self.took[file] += report.duration
        if report.failed:
            self.failed += 1
            self.say(f"FAILED {report.nodeid} ({report.when})")

    def pytest_runtest_logfinish(self, nodeid):
        self.done[file_of(nodeid)] += 1
        if self.now() - self.said >= EVERY_S:
            self.said = self.now()
            self.say(self.line())

    def line(self):
        done, total, gone = self.done.total(), self.all.total(), self.now() - self.started
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{done:,} of {total:,} tests, {clock(gone)} gone, about {clock(self.left())} left{failed}"

    def left(self):
        """Seconds: what the record says is left, at the pace of what is done, once that is a hundredth."""
        known = sum(self.seconds.get(file, 0.0) for file in self.all)
        a_test = known / max(sum(count for file, count in self.all.items() if file in self.seconds), 1) or 1.0
        done = left = 0.0
        for file, count in self.all.items():
            seconds = self.seconds.get(file, a_test * count)
            share = self.done[file] / count
            done, left = done + seconds * share, left + seconds * (1 - share)
        gone = self.now() - self.started
        return left * gone / done if done > left / 100 else left

    def say(self, text):
        self.config.pluginmanager.get_plugin("terminalreporter").write_line(text)

    def pytest_sessionfinish(self):
        if self.config.getoption("--save-durations"):
            seconds_of = {file: round(seconds, 1) for file, seconds in self.took.most_common()}
            RECORD.write_text(json.dumps(seconds_of, indent=1) + "\n")
