"""bench/gpu_check.sh without its programs: stand-ins on the PATH tell it of a card, and fail or hang where asked.

And what its stages rest on: which tests a card runs, the file of failures, the order in which kernels are looked at.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="coreutils' timeout not found")

# What the script asks of Python, answered by its words. HANG and FAIL hold the words that hang or fail.
PYTHON = r"""#!/usr/bin/env bash
words="$*"
for word in $HANG; do [[ $words != *$word* ]] || { echo "hanging"; exec sleep 60; }; done
for word in $FAIL; do [[ $words != *$word* ]] || { echo "broken at $word"; exit 3; }; done
if [ -n "$REAL" ]; then
  case $words in
    *"import xdist"* | *"import pytest_timeout"*) exec "$REAL" "$@" ;;
    *"-m pytest"*) exec "$REAL" "$@" --collect-only ;;
  esac
fi
case $words in
  *is_available*) exit "$NO_GPU" ;;
  *"import xdist"* | *"import pytest_timeout"*) exit 0 ;;
  *"import sys, torch, triton"*) echo "Python 3, torch 2, Triton 3" ;;
  *"bench suite"*) echo '{}' > "${@: -1}"; echo measured ;;
  *"bench report"*) stem=${@: -1}; stem=${stem%.json}
    echo "the table" > "$stem.md"; touch "$stem.png" "$stem-roofline.png"; echo "wrote it" ;;
  *bench.tune*) echo "$words" > "$6"; echo tuned ;;
  *bench.lowering*) echo "machine code" > "$4"; echo "393 binaries" ;;
  *"pip install"*) [[ $words != *broken*whl* ]] || exit 1; mkdir -p "${@: -2:1}"; touch "$SITE" ;;
  *bench.sanitize*) echo "64 calls, cache $PYTORCH_NO_CUDA_MEMORY_CACHING" ;;
  *pytest*) echo "a trace" > "$OUT/failures.txt"; echo "12 passed, threads $OMP_NUM_THREADS, $words" ;;
  *"-m gssf_kernels") printf "extension    %s\ncsrc/cuda    %s\n" "$EXTENSION" "$CSRC_CUDA"; seq 100000 ;;
  *) echo "did $words" ;;
esac
"""
SANITIZER = r"""#!/usr/bin/env bash
[ -z "$UNSUPPORTED" ] || { echo "========= Error: Device not supported"; exit 1; }
while [[ $1 == --* ]]; do case $1 in --tool | --error-exitcode) shift 2 ;; *) shift ;; esac; done
exec "$@"
"""


def script(tmp_path):
    """check(*words, **environment) -> (exit status, {stage: its line}, the files in OUT, its output)."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    card = "#!/bin/sh\necho 'NVIDIA H200, 580, 143771 MiB'\n"
    for name, text in (("fakepython", PYTHON), ("compute-sanitizer", SANITIZER), ("nvidia-smi", card), ("nvcc", card)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def run(*words, **environment):
        settings = {
            "NO_GPU": "0",
            "HANG": "",
            "FAIL": "",
            "UNSUPPORTED": "",
            "REAL": "",
            "SITE": str(tmp_path / "installed"),
        }
        out = tmp_path / "out"
        settings |= {"EXTENSION": "not loaded (none)", "CSRC_CUDA": "not built", "OUT": str(out)}
        settings |= {"PYTHON": "fakepython", "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}", **environment}
        done = subprocess.run(
            ["bash", str(ROOT / "bench" / "gpu_check.sh"), str(out), *map(str, words)],
            env={**os.environ, **settings}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        lines = (out / "stages.txt").read_text().splitlines() if (out / "stages.txt").exists() else []
        stages = {name: rest.strip() for name, _, rest in (line.partition(":") for line in lines)}
        files = sorted(path.name for path in out.iterdir()) if out.exists() else []
        return done.returncode, stages, files, done.stdout + done.stderr

    return run


@pytest.fixture
def check(tmp_path):
    return script(tmp_path)


def ran(stages):
    return [name for name, line in stages.items() if line.startswith("ok")]


# By a test's marks: is it of the stage `tests`, is it of `hopper`?
ON_CARD = (lambda marks: "gpu" in marks and "hopper" not in marks), (lambda marks: "hopper" in marks)
ORDER = ["build", "backends", "tests", "cuda-build", "hopper", "memcheck", "tune", "suite", "page"]


def test_all_of_it_on_a_card(check, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "one.whl").touch()
    status, stages, files, said = check("--wheels", wheels)
    assert status == 0, said
    assert ran(stages) == ["build", "backends", "wheels", *ORDER[2:]]
    assert "H200" in stages["GPU"]
    assert (tmp_path / "installed").exists()
    expected = ["cuda-quick-roofline.png", "cuda-quick.json", "cuda-quick.md", "cuda-quick.png"]
    assert files == [*expected, "failures.txt", "log.txt", "stages.txt", "tiles.md"]
    assert len(files) <= 8
    assert "the table" in said
    assert "a trace" in said
    log = (tmp_path / "out" / "log.txt").read_text()
    workers = len(os.sched_getaffinity(0))
    for marks in ("gpu and not hopper", "hopper"):
        (words,) = (line for line in log.splitlines() if line.startswith("12 passed") and line.endswith(f"-m {marks}"))
        assert f"-n {workers} --dist worksteal --timeout=60 --timeout-method=thread -m" in words
        assert f"--failures={tmp_path / 'out' / 'failures.txt'}" in words
        assert "threads 1" in words
        assert not re.search(r"-k|-x|test_\w+\.py", words)
    assert "cache 1" in stages["memcheck"]
    tuned = (tmp_path / "out" / "tiles.md").read_text()
    assert "--lines half-narrow,tf32-narrow,tf32-wide,half-wide" in tuned
    assert "--seconds 100" in tuned
    assert "--without compile" in log


def test_pytest_understands_what_it_is_asked(check, collected):
    """By the words of the script, in this tree; what is collected is what a card runs."""
    files = "tests/triton/test_tiles.py", "tests/native/test_hopper.py"
    status, stages, _, said = check("--only", "tests,hopper", REAL=sys.executable, PYTEST_ADDOPTS=" ".join(files))
    assert status == 0, said
    counts = [int(re.search(r"(\d+)/\d+ tests collected", stages[name])[1]) for name in ("tests", "hopper")]
    marks = {name: test.marks for name, test in collected[1].items()}
    assert counts == [sum(of_card(m) and name.startswith(files) for name, m in marks.items()) for of_card in ON_CARD]
    assert sum(map(ON_CARD[0], marks.values())) > 3000
    assert 200 < sum(map(ON_CARD[1], marks.values())) < 1000


def test_a_build_that_loads_is_kept(check):
    status, stages, _, said = check(EXTENSION="loaded", CSRC_CUDA="built", FAIL="build_ext")
    assert status == 0, said
    assert stages["build"] == "kept, the extension that is there loads"
    assert stages["cuda-build"] == "kept, the extension that is there has csrc/cuda"
    assert "hopper" in ran(stages)
    status, stages, _, _ = check("--only", "build,cuda-build", EXTENSION="loaded", CSRC_CUDA="built")
    assert ran(stages) == ["build", "cuda-build"]
    assert "build_ext --inplace" in stages["build"]


def test_the_rest_goes_on_past_what_fails(check):
    status, stages, _, said = check(FAIL="not_hopper hopper bench.sanitize")
    assert status == 1
    assert stages["tests"].startswith("FAILED, status 3")
    assert "broken at hopper" in stages["tests"]
    assert stages["memcheck"].startswith("FAILED, status 3")
    assert ran(stages) == ["build", "backends", "cuda-build", "tune", "suite", "page"]
    assert "the table" in said


@pytest.fixture(scope="module")
def out_of_time(tmp_path_factory):
    """Two runs, of hanging tests and of a hanging suite; side by side, because both wait until their time is up."""
    tests, suite = (script(tmp_path_factory.mktemp(name)) for name in ("tests", "suite"))
    with ThreadPoolExecutor(2) as pool:
        runs = (
            pool.submit(tests, HANG="--failures", BUDGET_S="14"),
            pool.submit(suite, "--only", "backends,suite", HANG="suite", BUDGET_S="42"),
        )
        return [run.result() for run in runs]


def test_what_hangs_takes_the_time_that_is_left_and_no_more(out_of_time):
    status, stages, _, _ = out_of_time[0]
    assert status == 1
    assert ran(stages) == ["build", "backends"]
    assert stages["tests"].startswith("FAILED, out of time (1")
    for name in ("cuda-build", "memcheck", "tune", "suite"):
        assert stages[name] == "NOT RUN, no time left"
    assert stages["hopper"] == "NOT RUN, csrc/cuda was not built"


def test_a_suite_that_is_cut_off_is_no_failure(out_of_time):
    status, stages, _, _ = out_of_time[1]
    assert status == 0
    assert stages["suite"].startswith("stopped, as time ran out, 1")


def test_csrc_cuda_that_does_not_build(check):
    status, stages, _, _ = check(FAIL="build_ext")
    assert status == 1
    assert stages["cuda-build"].startswith("FAILED")
    assert stages["hopper"] == "NOT RUN, csrc/cuda was not built"
    assert "memcheck" in ran(stages)


def test_a_suite_that_measures_nothing(check):
    status, stages, files, _ = check(FAIL="suite")
    assert status == 1
    assert stages["page"] == "NOT RUN, the suite measured nothing"
    assert "cuda-quick.json" not in files


def test_a_machine_that_keeps_the_sanitizer_out(check):
    for words, tool in (((), "memcheck"), (("--only", "racecheck"), "racecheck")):
        status, stages, _, _ = check(*words, UNSUPPORTED="1")
        assert status == 0
        assert stages[tool].startswith("NOT RUN, compute-sanitizer: ========= Error: Device not supported")


def test_a_wheel_that_does_not_fit_is_left_out(check, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("broken.whl", "fine.whl"):
        (wheels / name).touch()
    status, stages, _, said = check("--wheels", wheels, "--only", "wheels,suite")
    assert status == 0, said
    assert ran(stages) == ["wheels", "suite"]
    assert stages["wheels"].endswith("1 of 2 wheels installed")


def test_without_a_card(check):
    status, stages, files, said = check(NO_GPU="1")
    assert status == 0, said
    assert ran(stages) == ["build", "backends", "machine-code"]
    for name in ("tests", "hopper", "memcheck", "tune", "suite"):
        assert stages[name] == "NOT RUN, PyTorch sees no CUDA device"
    assert files == ["failures.txt", "log.txt", "machine-code.md", "stages.txt"]
    assert "machine code" in said


def test_some_stages_alone(check, tmp_path):
    status, stages, _, _ = check("--only", "build,racecheck,machine-code")
    assert status == 0
    assert ran(stages) == ["build", "racecheck", "machine-code"]
    assert not {"tests", "suite", "memcheck"} & set(stages)
    status, stages, _, _ = check("--only", "tune,suite", "--lines", "half-wide", "--compile")
    assert ran(stages) == ["tune", "suite"]
    assert "--lines half-wide" in (tmp_path / "out" / "tiles.md").read_text()
    assert "--without" not in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize(
    "words", [("--wheels", "/nowhere"), ("--wheels",), ("--only",), ("--lines",), ("--tune",), ("a",)]
)
def test_bad_words(check, words):
    status, stages, _, said = check(*words)
    assert status == 2
    assert stages == {}
    assert "usage" in said or "expected a folder" in said


# Which tests a card runs.

# Collects as on this machine, or with CARD as where PyTorch sees a card; writes every test, its marks, and whether it
# uses a card: its source a CUDA device by name, or it is marked triton.
COLLECTOR = r"""
import inspect, json, os, re, torch

if os.environ["CARD"]:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.mem_get_info = lambda device=None: (80 << 30, 80 << 30)

USES = re.compile(r"device=.cuda|device=CUDA|\.cuda\(|\.to\((.cuda.|CUDA)|torch\.cuda\.(Stream|CUDAGraph|synchronize)")

uses_cuda = {}

def pytest_collection_finish(session):
    with open(os.environ["LISTED"], "w") as out:
        for item in session.items:
            if item.function not in uses_cuda:
                uses_cuda[item.function] = bool(USES.search(inspect.getsource(item.function)))
            marks = [mark.name for mark in item.iter_markers()]
            uses = "triton" in marks or uses_cuda[item.function]
            out.write(json.dumps([item.nodeid, marks, uses]) + "\n")
"""


class Collected(NamedTuple):
    marks: list
    uses_cuda: bool


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Every test as {its id: Collected}: of this machine, and of one with a card."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "collector.py").write_text(COLLECTOR)
    lists = []
    for card in ("", "1"):
        environment = {**os.environ, "CARD": card, "LISTED": str(folder / "listed"), "TRITON_INTERPRET": ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(folder)])
        command = [sys.executable, "-m", "pytest", "-p", "collector", "-p", "no:cacheprovider", "-q", "--collect-only"]
        command.append("--assert=plain")  # rewriting assertions takes half of the time
        done = subprocess.run([*command, "tests"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        rows = map(json.loads, (folder / "listed").read_text().splitlines())
        lists.append({name: Collected(*about) for name, *about in rows})
    return lists


def test_what_runs_on_a_card_is_marked(collected):
    here, there = ({name for name, test in tests.items() if "gpu" in test.marks} for tests in collected)
    assert here == there
    assert len(there) > 3500
    assert not [name for name, test in collected[1].items() if test.uses_cuda and "gpu" not in test.marks]

    def of(file):
        return {name for name in collected[1] if name.startswith(f"tests/{file}.py::")}

    files = {name.partition("::")[0] for name, test in collected[1].items() if "triton" in test.marks}
    assert len(files) > 12
    for module in ("triton/test_cuda", "triton/test_persistent", "ops/test_hardest_negatives", "ops/test_project"):
        assert of(module)
        assert of(module) <= there, module
    assert of("ops/test_values") & there == {name for name in of("ops/test_values") if name.endswith("-cuda]")}
    on_card = ("test_no_step_waits_on_a_card", "test_a_captured_step_gives")
    expected = {name for name in of("ops/test_capture") if name.partition("::")[2].startswith(on_card)}
    assert of("ops/test_capture") & there == expected
    no_card = ("ops/test_errors", "ops/test_autograd", "losses/test_sigmoid", "triton/test_lowering")
    for module in (*no_card, "bench/test_bench", "bench/test_gpu_check"):
        assert of(module)
        assert not of(module) & there, module
    assert not [name for name in there if "test_hopper" in name and "emulated" in name]


def test_no_test_of_a_card_is_lost_for_its_name(collected):
    """As nine were when tests were chosen by name."""
    assert sum("cpu" in name for name, test in collected[1].items() if "gpu" in test.marks) >= 9


# What fails is written down at once.

PLANTED = """
import os, pathlib, time
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 + 1 == 3

def test_takes_its_process_down():
    os._exit(7)

@pytest.mark.parametrize("k", range(6))
def test_hangs(k):
    pathlib.Path(f"hanging-{os.getpid()}").touch()
    time.sleep(100)
"""


# After a worker has died, an interrupt may catch pytest-xdist while it replaces the worker, and then it never ends.
@pytest.mark.parametrize(("by", "crash"), [(signal.SIGINT, False), (signal.SIGKILL, True)], ids=["INT", "KILL"])
def test_failures_are_kept_by_a_run_that_is_stopped(by, crash, tmp_path):
    pytest.importorskip("xdist")
    pytest.importorskip("pytest_timeout")
    (tmp_path / "test_planted.py").write_text(PLANTED if crash else PLANTED.replace("os._exit(7)", "pass"))
    failures = tmp_path / "failures.txt"
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", f"--failures={failures}"]
    command += ["-n", "2", "--dist", "worksteal", "--timeout=90", "--timeout-method=thread", "test_planted.py"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "support"))),
    }
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 90
    while len(list(tmp_path.glob("hanging-*"))) < 2 or failures.read_text().count("== test_planted.py::") < 1 + crash:
        assert time.monotonic() < until
        time.sleep(0.2)
    os.killpg(run.pid, by)
    said, _ = run.communicate(timeout=60)
    text = failures.read_text()
    assert re.search(r"^== test_planted.py::test_fails \(call, \d", text, re.MULTILINE)
    assert "assert (1 + 1) == 3" in text
    assert crash == bool(re.search(r"^== test_planted.py::test_takes_its_process_down \(", text, re.MULTILINE))
    assert "test_passes" not in text
    if by == signal.SIGINT:
        assert "1 failed" in said


def test_a_file_that_does_not_import_is_a_failure(tmp_path):
    (tmp_path / "test_planted.py").write_text("import nothing_of_this_name")
    failures = tmp_path / "failures.txt"
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", f"--failures={failures}"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "support"))),
    }
    done = subprocess.run([*command, "test_planted.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "== test_planted.py (collection)" in failures.read_text()
    assert "nothing_of_this_name" in failures.read_text()


# The order in which compute-sanitizer meets the kernels.


def test_what_is_known_to_go_wrong_is_looked_at_first():
    pytest.importorskip("triton")
    from bench import sanitize
    from bench.calls import CASES

    calls = sanitize.calls()
    first = calls[: next(k for k, case in enumerate(calls) if case.product == "ieee")]
    assert {kernel for case in first for kernel in case.kernels} >= {"gradients_kernel", "relation_loss_kernel"}
    assert {case.product for case in first} == {"bf16", "tf32", "fp16"}
    launchers = {case.name.partition(" ")[0] for case in CASES if sanitize.FIRST & set(case.kernels)}
    assert len(first) == 3 * len(launchers | {"hardest_negatives"})
    assert len(set(map(str, calls))) == len(calls)
    assert {k for case in calls for k in case.kernels} == {k for case in CASES for k in case.kernels}
