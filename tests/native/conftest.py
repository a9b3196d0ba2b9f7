"""Builds the module `internals` from the C++ sources of this folder, once a session, and gives it to the tests."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
LIBRARIES = Path(torch.__file__).parent / "lib"

# As setup.py's, but for -O1, which takes a third of the time to compile, and the warnings, which the extension's build
# shows. hopper_emulated.cpp, which computes for longer than it compiles, asks for -O3, and
# jumps from stack to stack, which glibc's checks do not allow.
FLAGS = "-O1 -U_FORTIFY_SOURCE -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -w"

NINJA = """
cxx = {cxx}
flags = {flags} {includes}
rule header
  command = $cxx $flags -MD -MF $out.d -x c++-header -c $in -o $out
  depfile = $out.d
  deps = gcc
rule compile
  command = $cxx $flags -MD -MF $out.d -include bindings.h -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out {libraries}
build bindings.h.gch: header {folder}/bindings.h
"""


def build_file(includes):
    """What ninja reads: bindings.h as a precompiled header, each source, and the module that they make."""
    text = NINJA.format(
        cxx="g++",
        flags=FLAGS,
        includes=" ".join(f"-isystem {path}" for path in includes) + f" -I. -I{FOLDER} -I{ROOT / 'csrc'}",
        libraries=f"-L{LIBRARIES} -ltorch_cpu -lc10 -Wl,-rpath,{LIBRARIES}",
        folder=FOLDER,
    )
    sources = sorted(FOLDER.glob("*.cpp"))
    text += "".join(f"build {path.stem}.o: compile {path} | bindings.h.gch\n" for path in sources)
    return text + f"build internals.so: link {' '.join(f'{path.stem}.o' for path in sources)}\n"


@pytest.fixture(scope="session")
def internals():
    """The module `internals` (module.cpp); sources that have not changed since the last session are not compiled again.

    With pytest-xdist each worker asks for it: the first builds, the others wait for its lock.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    pybind11, _ = (pytest.importorskip(name) for name in ("pybind11", "ninja"))
    versions = f"{sys.implementation.cache_tag}-torch-{torch.__version__}-pybind11-{pybind11.__version__}"
    folder = ROOT / "build" / "native" / versions
    folder.mkdir(parents=True, exist_ok=True)
    text = build_file([pybind11.get_include(), sysconfig.get_paths()["include"], *include_paths()])
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(text)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", jobs]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        spec = importlib.util.spec_from_file_location("internals", folder / "internals.so")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["plain", "v3", "v4"])
def kernels(request, internals):
    """The kernels of an instruction set, where this processor has it."""
    if request.param not in internals.instruction_sets:
        pytest.skip(f"this processor does not have x86-64-{request.param}")
    return getattr(internals, request.param)


@pytest.fixture(params=[np.float32, np.float64], ids=["fp32", "fp64"])
def dtype(request):
    return request.param


@pytest.fixture
def assert_near():
    """assert_near(result, truth): they differ by rounding in the result's dtype, relative to all of the truth."""

    def check(result, truth):
        truth = np.asarray(truth, np.float64)
        assert result.shape == truth.shape
        limit = {np.float32: 1e-6, np.float64: 1e-14}[result.dtype.type]
        assert np.linalg.norm(result - truth) < limit * np.linalg.norm(truth)

    return check
