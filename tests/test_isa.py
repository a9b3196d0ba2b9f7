"""Every instruction set's build of the CPU kernels agrees with the plain one, on this processor."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_instruction_sets_agree(tmp_path):
    kernels = "".join(f'#include "vector_{name}.h"\n' for name in ("epilogues", "pairs", "project", "dense"))
    (tmp_path / "all_kernels.h").write_text(kernels)
    includes = [f"-I{path}" for path in (*include_paths(), ROOT / "csrc", tmp_path)]
    binary = tmp_path / "isa_agree"
    library = Path(torch.__file__).parent / "lib"
    command = ["g++", "-O2", "-std=c++20", "-w", *includes, str(ROOT / "tests" / "isa_agree.cpp"), "-o", str(binary)]
    command += [f"-L{library}", "-lc10", f"-Wl,-rpath,{library}"]
    subprocess.run(command, check=True)
    done = subprocess.run([str(binary)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "plain ran" in done.stdout
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert "x86-64-v4 agrees" in done.stdout
        assert "x86-64-v3 agrees" in done.stdout
