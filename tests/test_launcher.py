"""Every launch of `bench/calls.py` through Triton's own launcher, into a CUDA driver that does nothing.

What the interpreter and the compiler never see is how arguments are packed: tuples with None among them, numbers,
tensor descriptors. The driver is a small C library that says yes to everything and counts launches.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"),
]

ANSWERS = {
    "cuGetErrorString": '(int e, const char** text) { *text = "a driver that does nothing"; return 0; }',
    "cuPointerGetAttribute": "(unsigned long long* d, int a, unsigned long long p) { *d = p; return 0; }",
    "cuCtxGetCurrent": "(void** context) { *context = (void*)1; return 0; }",
    "cuDriverGetVersion": "(int* version) { *version = 13000; return 0; }",
    "cuLaunchKernelEx": "() { ++launches; return 0; }",
}

RUN = """
import ctypes, sys
from unittest import mock
import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
launches = ctypes.c_long.in_dll(ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL), "launches")
from bench import lowering
from bench.calls import CASES
from bench.case import PRODUCTS
from gssf_kernels.kernels import tiles

class Utils:
    def __init__(self):
        self.real = nvidia.CudaUtils()
    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 32, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}
    def __getattr__(self, name):
        return getattr(self.real, name)

class Driver(lowering._Target):
    launcher_cls = nvidia.CudaLauncher
    def __init__(self, arch):
        super().__init__(arch)
        self.utils = Utils()

for arch in lowering.ARCHITECTURES:
    with (
        mock.patch.object(driver, "_active", Driver(arch)),
        mock.patch.multiple(tiles, architecture=lambda device: arch, processors=lambda device: 132),
    ):
        for case in CASES:
            before, product = launches.value, "ieee" if PRODUCTS[case.product][1] == "highest" else "tf32"
            with mock.patch.object(tiles, "fp32_products", lambda device: product):
                case.launcher(*case.arguments())
            assert launches.value - before >= len(case.kernels), case
print(launches.value, "launches")
"""


def test_every_argument_is_packed(tmp_path):
    folder = Path(triton.__file__).parent / "backends" / "nvidia"
    asked = set(re.findall(r"\bcu[A-Z]\w*", (folder / "driver.c").read_text() + (folder / "driver.py").read_text()))
    names = {name.removesuffix("_t").removesuffix("Handle") for name in asked} | set(ANSWERS)
    lines = ["long launches = 0;", *(f"int {name}{ANSWERS.get(name, '() { return 0; }')}" for name in sorted(names))]
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text("\n".join(lines))
    flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([COMPILER, *flags, "-o", library, source], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    places = {"PYTHONPATH": str(ROOT), "TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-c", RUN, str(library)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **places}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 600
