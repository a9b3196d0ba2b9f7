"""The lines of `pytest --progress`, and the process that runs tests of Triton kernels where there is no GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from progress import Progress, file_of, recorded

ROOT = Path(__file__).parents[2]


def test_time_left_is_what_the_record_says_at_the_pace_of_what_is_done():
    at, said = [100.0], []
    reporter = SimpleNamespace(write_line=said.append)
    config = SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=lambda name: reporter))
    progress = Progress(config, now=lambda: at[0])
    progress.seconds = {"ops/a.py": 30.0, "b.py": 10.0}
    progress.begin(["tests/ops/a.py::x", "tests/ops/a.py::y", "tests/b.py::z"])
    assert progress.line() == "0 of 3 tests, 0:00 gone, about 0:40 left"
    at[0] += 75
    progress.pytest_runtest_logfinish("tests/ops/a.py::x")  # fifteen of forty seconds, which took five times as long
    assert said == ["1 of 3 tests, 1:15 gone, about 2:05 left"]
    at[0] += 1
    progress.pytest_runtest_logfinish("tests/b.py::z")
    assert len(said) == 1
    progress.pytest_runtest_logreport(SimpleNamespace(nodeid="tests/c.py::w", duration=1.0, failed=True, when="call"))
    assert said[1:] == ["FAILED tests/c.py::w (call)"]
    new = Progress(config, now=lambda: at[0])
    new.seconds = {"b.py": 10.0}
    new.begin(["tests/b.py::z", "tests/b.py::y", "tests/c.py::new"])  # of which there is no record: as long as others
    assert new.left() == 15.0
    at[0] += 200
    new.seconds = {"b.py": 1000.0}
    new.begin([f"tests/b.py::{k}" for k in range(1000)])
    new.started -= 200
    new.pytest_runtest_logfinish("tests/b.py::0")  # which waited for what all need: it says nothing of the others
    assert new.left() == 999.0


def test_files_that_take_long_come_first(request):
    seconds = recorded()
    assert seconds["triton/test_lowering.py"] > 100 > seconds["ops/test_errors.py"] > 0
    results = [seconds.get(file_of(item.nodeid), float("inf")) for item in request.session.items]
    assert results == sorted(results, reverse=True)


PLANTED = """
import os
import pytest

pytestmark = pytest.mark.triton

@pytest.fixture(scope="module")
def made():
    return []

def test_interpreted():
    assert os.environ["TRITON_INTERPRET"] == "1"

@pytest.mark.parametrize("n", [1, 2])
def test_one_process_runs_all(n, made):
    made.append(os.getpid())
    assert len(made) == n
    assert set(made) == {os.getpid()}

def test_fails():
    assert 1 + 1 == 3

def test_is_skipped():
    pytest.skip("for a reason")

def test_takes_its_process_down():
    os._exit(7)

def test_another_process_goes_on():
    pass
"""


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_what_the_interpreter_s_process_finds_is_reported(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "test_planted.py").write_text(PLANTED)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-v", "test_planted.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert re.search(r"2 failed, 4 passed, 1 skipped", done.stdout), done.stdout + done.stderr
    assert "assert (1 + 1) == 3" in done.stdout
    assert "for a reason" in done.stdout
    assert "Triton's interpreter ended, status 7" in done.stdout
    assert "test_planted.py::test_takes_its_process_down FAILED" in done.stdout
