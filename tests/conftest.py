import gc
import os

import pytest

# Read by torch. Most problems here are too small for two threads (gradcheck took a third less CPU on one); tests of
# what threads do set their number. Threads that wait leave a busy machine to others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Read by inductor, which would start a process that imports torch to compile in, for a few small graphs. Its kernels
# without vectors compile faster: test_dense's compiled losses took 30 s of CPU instead of 37.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

# Read by Triton, and part of what its cache goes by: a seventh of a compilation's time goes into
# finding lines of Python in machine code, which is the same without.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

import interpreter_process
import progress
import torch
from fresh_process import FreshProcesses

from gssf_kernels import plan

# Their asserts too say what they compared.
pytest.register_assert_rewrite(
    "accuracy", "certified_cases", "dense_cases", "launch_counts", "row_panel_checks", "triton_checks"
)


class Failures:
    """Appends every failure to a file as it happens: a run that is killed has lost none."""

    def __init__(self, path):
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  # for as long as pytest runs

    def pytest_runtest_logreport(self, report):
        self.write(report, f"{report.when}, {report.duration:.1f} s")

    def pytest_collectreport(self, report):
        self.write(report, "collection")

    def write(self, report, when):
        if report.failed:
            self.file.write(f"== {report.nodeid} ({when})\n{report.longreprtext}\n\n")


def pytest_addoption(parser):
    parser.addoption("--failures", metavar="FILE", help="append each failure, with its traceback, as it happens")
    parser.addoption("--progress", action="store_true", help="say how far the tests are and how long they will take")
    parser.addoption("--save-durations", action="store_true", help=f"with --progress: into {progress.RECORD.name}")
    parser.addoption("--every-binary", action="store_true", help="all that bench/calls.py makes; see bench/covering.py")
    parser.addoption("--served-by", type=int, help="a pipe that says which tests to run: see interpreter_process.py")


def pytest_configure(config):
    path = config.getoption("--failures")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the process that started them
        config.pluginmanager.register(Failures(path))
    if config.getoption("--progress") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(progress.Progress(config))
    interpreter_process.register(config, config.getoption("--served-by"), torch.cuda.is_available())


@pytest.hookimpl(tryfirst=True)
def pytest_collection():
    """Tens of thousands of tests stay until the end: Python need not look at them again and again."""
    gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_itemcollected(item):
    """Tests of Triton kernels are tests of a card, but for the interpreter's process."""
    if item.get_closest_marker("triton") and not interpreter_process.HERE:
        item.add_marker(pytest.mark.gpu)


def pytest_collection_modifyitems(items):
    """Files that take long come first: with `--dist loadfile --no-loadscope-reorder` no worker is left with one.

    Tests marked gpu are collected everywhere, so that `-m gpu --collect-only` lists them, and run on a card.

    Those marked triton run without one too, if there is Triton: under its interpreter.
    """
    seconds = progress.recorded()
    items.sort(key=lambda item: -seconds.get(progress.file_of(item.nodeid), float("inf")))  # new files too
    for item in items:
        if item.get_closest_marker("triton"):
            if not interpreter_process.FOUND:
                item.add_marker(pytest.mark.skip(reason="there is no Triton"))
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_surroundings():
    """Every test starts from the same random state, and leaves the thread count as it was."""
    # torch.manual_seed keeps, for each kind of device that is not there, the stack of every call.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _small_tiles(request, monkeypatch):
    """Those that a test marked `triton` asks for."""
    marker = request.node.get_closest_marker("triton")
    if marker and marker.args:
        from triton_checks import use_small_tiles

        use_small_tiles(*marker.args, monkeypatch)


@pytest.fixture(scope="session")
def run_fresh():
    """run_fresh(code, *arguments): see fresh_process.py."""
    processes = FreshProcesses()
    yield processes
    processes.end()


@pytest.fixture(params=[1, 700, 1 << 22], ids=["chunks of 16 rows", "ragged chunks", "one chunk"])
def chunked(request, monkeypatch):
    """Every number of rows to a chunk gives the same results."""
    monkeypatch.setitem(plan.CHUNK_SCORES, "cpu", request.param)
    monkeypatch.setattr(plan, "MIN_CHUNK_ROWS", 16)
