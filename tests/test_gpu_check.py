"""bench/gpu_check.sh without its programs: stand-ins on the PATH tell it of a card, and fail or hang where asked."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="coreutils' timeout not found")

# What the script asks of Python, answered by its words. HANG and FAIL hold the words that hang or fail.
PYTHON = r"""#!/usr/bin/env bash
words="$*"
for word in $HANG; do [[ $words != *$word* ]] || { echo "hanging"; exec sleep 60; }; done
for word in $FAIL; do [[ $words != *$word* ]] || { echo "broken at $word"; exit 3; }; done
case $words in
  *is_available*) exit "$NO_GPU" ;;
  *"import os, xdist"*) echo "-n 4" ;;
  *"import sys, torch, triton"*) echo "Python 3, torch 2, Triton 3" ;;
  *"bench suite"*) echo '{}' > "${@: -1}"; echo measured ;;
  *"bench report"*) stem=${@: -1}; stem=${stem%.json}
    echo "the table" > "$stem.md"; touch "$stem.png" "$stem-roofline.png"; echo "wrote it" ;;
  *bench.tune*) echo "$words" > "$4"; echo tuned ;;
  *bench.lowering*) echo "machine code" > "$4"; echo "393 binaries" ;;
  *"pip install"*) [[ $words != *broken*whl* ]] || exit 1; mkdir -p "${@: -2:1}"; touch "$SITE" ;;
  *bench.sanitize*) echo "64 calls, cache $PYTORCH_NO_CUDA_MEMORY_CACHING" ;;
  *pytest*) echo "12 passed, $words" ;;
  *) echo "did $words" ;;
esac
"""
SANITIZER = r"""#!/usr/bin/env bash
[ -z "$UNSUPPORTED" ] || { echo "========= Error: Device not supported"; exit 1; }
while [[ $1 == --* ]]; do case $1 in --tool | --error-exitcode) shift 2 ;; *) shift ;; esac; done
exec "$@"
"""


@pytest.fixture
def check(tmp_path):
    """check(*words, **environment) -> (exit status, {stage: its line}, the files in OUT, standard output)."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    card = "#!/bin/sh\necho 'NVIDIA H200, 580, 143771 MiB'\n"
    for name, text in (("fakepython", PYTHON), ("compute-sanitizer", SANITIZER), ("nvidia-smi", card), ("nvcc", card)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def run(*words, **environment):
        settings = {"NO_GPU": "0", "HANG": "", "FAIL": "", "UNSUPPORTED": "", "SITE": str(tmp_path / "installed")}
        settings |= {"PYTHON": "fakepython", "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}", **environment}
        out = tmp_path / "out"
        done = subprocess.run(
            ["bash", str(ROOT / "bench" / "gpu_check.sh"), str(out), *map(str, words)],
            env={**os.environ, **settings}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        lines = (out / "stages.txt").read_text().splitlines() if (out / "stages.txt").exists() else []
        stages = {name: rest.strip() for name, _, rest in (line.partition(":") for line in lines)}
        files = sorted(path.name for path in out.iterdir()) if out.exists() else []
        return done.returncode, stages, files, done.stdout + done.stderr

    return run


def ran(stages):
    return [name for name, line in stages.items() if line.startswith("ok")]


def test_all_of_it_on_a_card(check, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "one.whl").touch()
    status, stages, files, said = check("--wheels", wheels, "--tune")
    assert status == 0, said
    order = ["build", "backends", "wheels", "tests", "suite", "page", "tune"]
    order += ["cuda-build", "hopper", "memcheck", "racecheck", "more-tests"]
    assert ran(stages) == order
    assert "H200" in stages["GPU"]
    assert "-n 4" in stages["tests"]
    assert "cache 1" in stages["memcheck"]
    assert (tmp_path / "installed").exists()
    expected = ["cuda-quick-roofline.png", "cuda-quick.json", "cuda-quick.md", "cuda-quick.png"]
    assert files == [*expected, "log.txt", "stages.txt", "tiles.md"]
    assert len(files) <= 8
    assert "the table" in said
    assert "--seconds 140" in (tmp_path / "out" / "tiles.md").read_text()


def test_the_rest_goes_on_past_what_fails(check):
    status, stages, _, said = check(FAIL="durations racecheck bench.sanitize")
    assert status == 1
    assert stages["tests"].startswith("FAILED, status 3")
    assert "broken at durations" in stages["tests"]
    assert stages["memcheck"].startswith("FAILED, status 3")
    assert ran(stages) == ["build", "backends", "suite", "page", "cuda-build", "hopper"]
    assert "the table" in said


def test_what_hangs_takes_the_time_that_is_left_and_no_more(check):
    status, stages, _, _ = check(HANG="backends gssf_kernels", BUDGET_S="14")
    assert status == 1
    assert stages["build"].startswith("ok")
    assert stages["backends"].startswith("FAILED, out of time (1")
    for name in ("tests", "suite", "memcheck", "racecheck"):
        assert stages[name] == "NOT RUN, no time left"


def test_csrc_cuda_that_does_not_build(check):
    status, stages, _, _ = check(FAIL="build_ext")
    assert status == 1
    assert stages["cuda-build"].startswith("FAILED")
    assert stages["hopper"] == "NOT RUN, csrc/cuda was not built"
    assert "memcheck" in ran(stages)


def test_a_suite_that_measures_nothing(check):
    status, stages, files, said = check(FAIL="suite")
    assert status == 1
    assert stages["page"] == "NOT RUN, the suite measured nothing"
    assert "no table" in said
    assert "cuda-quick.json" not in files


def test_a_machine_that_keeps_the_sanitizer_out(check):
    status, stages, _, _ = check(UNSUPPORTED="1")
    assert status == 0
    for tool in ("memcheck", "racecheck"):
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
    status, stages, files, said = check("--tune", NO_GPU="1")
    assert status == 0, said
    assert ran(stages) == ["build", "backends", "machine-code"]
    for name in ("tests", "suite", "memcheck", "racecheck", "tune"):
        assert stages[name] == "NOT RUN, PyTorch sees no CUDA device"
    assert files == ["log.txt", "machine-code.md", "stages.txt"]
    assert "machine code" in said


def test_some_stages_alone(check):
    status, stages, _, _ = check("--only", "build,machine-code")
    assert status == 0
    assert ran(stages) == ["build", "machine-code"]
    assert not {"tests", "suite", "memcheck"} & set(stages)


@pytest.mark.parametrize("words", [("--wheels", "/nowhere"), ("--wheels",), ("--only",), ("--fast",), ("another",)])
def test_bad_words(check, words):
    status, stages, _, said = check(*words)
    assert status == 2
    assert stages == {}
    assert "usage" in said or "expected a folder" in said


def test_every_file_of_tests_that_a_card_runs_is_named():
    script = (ROOT / "bench/gpu_check.sh").read_text()
    call = re.compile(r"^where_triton_runs\(", re.MULTILINE)
    tests = {path.name for path in (ROOT / "tests").glob("test_*.py") if call.search(path.read_text())}
    tests |= {"test_cuda.py", "test_capture.py", "test_values.py", "test_hopper.py"}
    named = set(re.findall(r"tests/(test_\w+\.py)", script))
    assert len(tests) > 8
    assert named == tests
