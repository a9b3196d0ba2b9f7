"""csrc/cuda compiled by nvcc with setup.py's flags: what the machine code holds, what it asks of PyTorch. No GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

REGISTERS, WARPGROUP = 65536, 128  # of a processor of Hopper, threads
KERNELS = {"hopper_hardest.cu": 6, "hopper_log_sums.cu": 5}  # sweeps of bf16 and fp16 by two shapes, merge; ranges

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")


def nvcc_flags() -> list[str]:
    """What setup.py gives nvcc."""
    code = """
import runpy, setuptools
setuptools.setup = lambda **arguments: None
print(*runpy.run_path("setup.py")["NVCC_FLAGS"], sep="\\n")
"""
    environment = {**os.environ, "GSSF_SKIP_NATIVE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.stdout.split()


def disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, else the one that Triton carries."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(carried) if carried.exists() else None)


class Compiled:
    """An object file, and what ptxas said of its kernels."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self.object = folder / f"{source.stem}.o"
        includes = [f"-I{path}" for path in include_paths()]
        flags = [*nvcc_flags(), "-Xptxas", "-v", *includes]
        done = subprocess.run(
            ["nvcc", *flags, "-c", str(source), "-o", str(self.object)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        self.report = done.stderr
        entry = r"Compiling entry function '(\S+)' for 'sm_90a'\n((?:.*\n)*?.*Used .*)"
        self.kernels = dict(re.findall(entry, done.stderr))

    def dump(self, what: str) -> str:
        """What cuobjdump says."""
        tool = disassembler()
        if tool is None:
            pytest.skip("no cuobjdump: neither in the CUDA toolkit nor with Triton")
        return subprocess.run([tool, what, str(self.object)], capture_output=True, text=True, check=True).stdout

    def instructions(self) -> dict[str, str]:
        """kernel: its machine code."""
        functions = self.dump("-sass").split("Function : ")[1:]
        return {name: code for name, _, code in (text.partition("\n") for text in functions)}

    def launch_bounds(self) -> dict[str, tuple[int, int]]:
        """kernel: (threads of a block, registers of a thread at most), as the object file tells the driver."""
        matches = {}
        for section in re.split(r"^\.nv\.info\.", self.dump("-elf"), flags=re.MULTILINE)[1:]:
            values = {}
            for attribute in ("MAX_THREADS", "MAXREG_COUNT"):
                at = re.search(rf"EIATTR_{attribute}\n.*\n\s*Value:\s*(0x[0-9a-f]+)", section)
                values[attribute] = int(at[1], 16) if at else 0
            matches[section.partition("\n")[0].strip()] = values["MAX_THREADS"], values["MAXREG_COUNT"]
        return matches


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.name)
def compiled(request, tmp_path_factory):
    return Compiled(request.param, tmp_path_factory.mktemp("cuda"))


def constant(name: str) -> int:
    return int(re.search(rf"\b{name} = (\d+)", (ROOT / "csrc/cuda/sweep.h").read_text())[1])


def test_there_is_something_to_compile():
    assert [path.name for path in SOURCES] == list(KERNELS)


def test_nothing_spills(compiled):
    """Nor does ptxas warn: of wgmma that it serialises (C7510) or of setmaxnreg that it ignores (C7508)."""
    assert len(compiled.kernels) == KERNELS[compiled.source.name], compiled.report
    assert "warning" not in compiled.report.lower(), compiled.report
    assert not re.search(r"\bC75(08|10)\b", compiled.report), compiled.report
    for name, usage in compiled.kernels.items():
        print(f"sm_90a {name}: {re.search('Used .*', usage)[0]}")
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in usage, name
        registers = int(re.search(r"Used (\d+) registers", usage)[1])
        assert "sweep" in name or registers <= 64, name


def test_registers_are_what_warpgroups_exchange(compiled):
    """setmaxnreg takes effect only where registers have a cap at entry, and moves what the block entered with.

    It waits until the registers that it asks for have been given up: were they more, for ever.
    """
    code, bounds = compiled.instructions(), compiled.launch_bounds()
    sweeps = {name: usage for name, usage in compiled.kernels.items() if "sweep_kernel" in name}
    assert len(sweeps) == 4
    for name, usage in sweeps.items():
        at_entry = int(re.search(r"Used (\d+) registers", usage)[1])
        threads, cap = bounds[name]
        assert threads == 3 * WARPGROUP, name
        assert at_entry == cap == REGISTERS // threads // 8 * 8, name  # of which registers are given out
        given_up = [int(x, 16) for x in re.findall(r"USETMAXREG\.DEALLOC\.CTAPOOL (0x[0-9a-f]+)", code[name])]
        asked_for = [int(x, 16) for x in re.findall(r"USETMAXREG\.TRY_ALLOC\.CTAPOOL \w+, (0x[0-9a-f]+)", code[name])]
        assert given_up == [constant("kLoaderRegisters")], name
        assert asked_for == [constant("kConsumerRegisters")], name
        assert given_up[0] < at_entry < asked_for[0], name
        assert WARPGROUP * (given_up[0] + 2 * asked_for[0]) <= threads * at_entry <= REGISTERS, name
        assert all(count % 8 == 0 and 24 <= count <= 256 for count in (*given_up, *asked_for)), name
    header = (ROOT / "csrc/cuda/sweep.h").read_text()
    assert f"kLoaderRegisters + 2 * kConsumerRegisters <= 3 * {at_entry}," in header  # what is asserted there is so


def test_sweep_is_made_of_wgmma_and_bulk_tensor_copies(compiled):
    sweeps = {name: code for name, code in compiled.instructions().items() if "sweep_kernel" in name}
    assert len(sweeps) == 4
    matches = set()
    for name, code in sweeps.items():
        matches |= set(re.findall(r"HGMMA\.\w+(?:\.\w+)*", code))
        assert "UTMALDG.2D" in code, name
        assert "USETMAXREG" in code, name
        assert "SYNCS.PHASECHK" in code, name
        assert not re.search(r"(?<![.\w])(LDL|STL|HMMA|ATOM|ATOMG|RED)\b", code), name
        most = max(int(number) for number in re.findall(r"\bR(\d+)\b", code))
        assert constant("kLoaderRegisters") < most < constant("kConsumerRegisters"), name
    expected = {f"HGMMA.64x{columns}x16.F32{kind}" for columns in (128, 256) for kind in ("", ".BF16")}
    assert matches == expected


def test_only_the_stable_abi_is_used(compiled):
    """PyTorch by C functions alone, and those as of 2.10: newer headers show no others (TORCH_TARGET_VERSION)."""
    done = subprocess.run(["nm", "-u", "-C", str(compiled.object)], capture_output=True, text=True, check=True)
    wanted = [line.split()[-1] if "(" not in line else line[2:].strip() for line in done.stdout.splitlines()]
    torch_functions = [name for name in wanted if re.match(r"(aoti_)?torch_\w+$", name)]
    registers = "STABLE_TORCH_LIBRARY_IMPL" in compiled.source.read_text()
    assert torch_functions
    assert ("torch_library_impl" in torch_functions) == registers
    others = [name for name in wanted if not name.removeprefix("U ").startswith("gssf::")]  # our own take its tensors
    assert not [name for name in others if re.search(r"\b(at|c10|torch)::", name)]
    assert not [name for name in wanted if re.match(r"cu[A-Z]", name)]  # the driver is not linked against
    assert "#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))" in compiled.source.read_text()
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
