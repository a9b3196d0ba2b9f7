"""Builds the optional compiled part of gssf_kernels; everything else stands in pyproject.toml.

Environment: GSSF_SKIP_NATIVE=1 builds none; FORCE_CUDA=1 builds csrc/cuda too; MAX_JOBS and TORCH_CUDA_ARCH_LIST are
PyTorch's own.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CPU_FLAGS = [
    "-std=c++20",  # PyTorch 2.11 and older would ask for C++17
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
]
# Python's own flags have -g, which doubles the time to compile PyTorch's headers and makes the library 36 MB large.
if not any(flag.startswith("-g") for name in ("CFLAGS", "CXXFLAGS") for flag in os.environ.get(name, "").split()):
    CPU_FLAGS.append("-g0")
# wgmma and setmaxnreg are sm_90a's alone; PyTorch adds no architecture where one is named.
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a"]


def native_build() -> dict:
    """setup() arguments for the extension, or none with one line saying why and what to do."""
    if os.environ.get("GSSF_SKIP_NATIVE", "0") not in ("", "0"):
        return without("GSSF_SKIP_NATIVE is set")
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return without(
            "PyTorch is not visible to this build (pip isolates builds); for the compiled CPU kernels install "
            "torch first, then run: pip install --no-build-isolation ."
        )
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"])):
        return without("no C++ compiler was found; install g++ and run: pip install --no-build-isolation .")

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    cuda_sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    # Only where asked for: nothing is dispatched to csrc/cuda yet (docs/gpu-kernels.md), so that a failing nvcc costs
    # nobody the CPU kernels.
    with_cuda = bool(cuda_sources) and os.environ.get("FORCE_CUDA", "0") not in ("", "0")
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    extension = kind(
        "gssf_kernels._C",
        sources + (cuda_sources if with_cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path) for path in (ROOT / "csrc").glob("**/*.h" if with_cuda else "*.h")],
        extra_compile_args={"cxx": CPU_FLAGS, "nvcc": NVCC_FLAGS} if with_cuda else {"cxx": CPU_FLAGS},
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def without(reason: str) -> dict:
    print(f"gssf_kernels: building without compiled kernels: {reason}", file=sys.stderr)
    return {}


setup(**native_build())
