"""A CUDA driver that does nothing, so that kernels are compiled and launched on a machine without a GPU.

It is a small C library that says yes to everything and counts launches. Triton's own launcher packs every argument for
it, tensor descriptors and tuples included; the binaries are those of the real card. It has to be on the library path
before Triton starts, so a process is started with `environment(folder)` and then calls `install`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from gssf_kernels import plan

PROCESSORS = 132  # of an H100 or H200
LIBRARY = "libcuda.so.1"
_VARIABLE = "GSSF_STUB_DRIVER"

# PyTorch built for CUDA meets the library too: it is told that there is no device.
_ANSWERS = {
    "cuInit": "(unsigned flags) { return 100; }",
    "cuGetErrorString": '(int e, const char** text) { *text = "a driver that does nothing"; return 0; }',
    "cuPointerGetAttribute": "(unsigned long long* d, int a, unsigned long long p) { *d = p; return 0; }",
    "cuCtxGetCurrent": "(void** context) { *context = (void*)1; return 0; }",
    "cuDriverGetVersion": "(int* version) { *version = 13000; return 0; }",
    "cuLaunchKernelEx": "() { ++launches; return 0; }",
}


def compiler() -> str | None:
    """The C compiler that builds it, and Triton's launchers; None if there is none."""
    return shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")


def environment(folder: Path) -> dict[str, str]:
    """Build the library in folder; return the environment of a process that is to find it."""
    sources = Path(triton.__file__).parent / "backends" / "nvidia"
    text = "".join((sources / name).read_text() for name in ("driver.c", "driver.py"))
    names = {name.removesuffix("_t").removesuffix("Handle") for name in re.findall(r"\bcu[A-Z]\w*", text)}
    lines = ["long launches = 0;"]
    lines += [f"int {name}{_ANSWERS.get(name, '() { return 0; }')}" for name in sorted(names | set(_ANSWERS))]
    source = folder / "driver.c"
    source.write_text("\n".join(lines))
    command = [str(compiler()), "-shared", "-fPIC", "-w", f"-Wl,-soname,{LIBRARY}", "-o", str(folder / LIBRARY)]
    subprocess.run([*command, str(source)], check=True)
    with contextlib.suppress(FileExistsError):
        (folder / "libcuda.so").symlink_to(LIBRARY)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": path, _VARIABLE: str(folder / LIBRARY)}


class Target:
    """A driver that only names what to compile for; each architecture is a device with caches of its own."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class _Utils:
    """Triton's, but for loading a binary, which would ask the card."""

    def __init__(self) -> None:
        self.real = nvidia.CudaUtils()

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class Driver(Target):
    """Launches by Triton's launcher, into the library."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, arch: int) -> None:
        super().__init__(arch)
        self.utils = _Utils()


def launches() -> int:
    """How many there have been in this process, counted by the library."""
    return ctypes.c_long.in_dll(ctypes.CDLL(os.environ[_VARIABLE], mode=ctypes.RTLD_GLOBAL), "launches").value


@contextlib.contextmanager
def installed(arch: int, processors: int = PROCESSORS) -> Iterator[None]:
    """Kernels are compiled for arch and launched into the library."""
    launches()  # loads it before Triton does
    with (
        mock.patch.object(driver, "_active", Driver(arch)),
        mock.patch.multiple(plan, architecture=lambda device: arch, processors=lambda device: processors),
    ):
        yield
