"""Every kernel compiled ahead of time for sm_80 and sm_90, as the launchers would compile it: no GPU needed.

The launchers run on CPU tensors with a driver that names the target, and every launch is turned into a compilation.
What comes out must not spill, must fit the card's shared memory, and on sm_90 the 16-bit sweep must use wgmma.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from gssf_kernels.kernels import tiles  # noqa: E402
from gssf_kernels.kernels.hardest import hardest_negatives  # noqa: E402
from gssf_kernels.kernels.pairs import pair_scores, pair_scores_backward  # noqa: E402
from gssf_kernels.kernels.project import pairs_project_backward, project, project_backward  # noqa: E402
from gssf_kernels.kernels.relative import relative_negatives  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

SHARED_KIB = {80: 99, 90: 227}  # the lines of 80 serve 86 and 89 too, whose blocks have 99 KiB
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Target:
    """A driver that only names what to compile for; each architecture is a device with caches of its own."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request, monkeypatch):
    """compiled(launcher, ...) -> [(kernel name, compiled kernel)] for every launch."""
    arch, run, kernels = request.param, JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    def call(launcher, *args):
        kernels.clear()
        launcher(*args)
        return list(kernels)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(tiles, "architecture", lambda device: arch)
    monkeypatch.setattr(driver, "_active", Target(arch))
    call.arch = arch
    return call


def resources(kernel, tmp_path):
    """(registers a thread, stack bytes a thread) of the compiled kernel; a spill is on the stack."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def check(kernels, arch, expected, tmp_path):
    assert {name for name, _ in kernels} == expected
    for name, kernel in kernels:
        registers, stack = resources(kernel, tmp_path)
        shared = kernel.metadata.shared
        print(f"sm_{arch} {name}: {registers} registers, {stack} bytes of stack, {shared} bytes shared")
        assert stack == 0, name
        assert shared <= SHARED_KIB[arch] * 1024, name


every_product = pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest"), (torch.float16, "highest")],
    ids=["ieee", "tf32", "bf16", "fp16"],
)


def matrix_instruction(arch, tile, dtype, precision):
    """What the main loop must be made of."""
    if dtype == torch.float32 and precision == "highest":
        return "fma.rn.f32"
    return "wgmma.mma_async" if arch == 90 and tile.BN >= 64 else "mma.sync"


def check_sweep(compiled, launcher, arguments, kernels, tmp_path, dtype, size, ids, precision):
    """Compile a launcher that sweeps, at the table's line for size, and check its kernels and main loop."""
    N, D = {"small": (128, 256), "narrow": (1040, 256), "wide": (1040, 1024)}[size]
    x = torch.zeros(N, D, dtype=dtype)
    labels = torch.zeros(N, dtype=torch.int64) if ids else None
    y = x.clone() if ids else x  # the same side twice leaves tiles out
    found = compiled(launcher, x, y, labels, labels, *arguments)
    check(found, compiled.arch, kernels, tmp_path)
    line = "sums" if launcher is relative_negatives and size != "small" else size
    tile = tiles.SWEEP[compiled.arch, tiles.kind(dtype), line]
    ptx = dict(found)["sweep_kernel"].asm["ptx"]
    assert matrix_instruction(compiled.arch, tile, dtype, precision) in ptx
    assert ("cp.async.bulk.tensor" if tile.tma else "cp.async") in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)


every_size = pytest.mark.parametrize(
    ("size", "ids"),
    [("small", True), ("narrow", True), ("wide", True), ("wide", False)],
    ids=["small", "narrow", "wide", "wide without ids"],
)


@every_size
@every_product
def test_hardest_negatives(compiled, dtype, precision, size, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    kernels = {"sweep_kernel", "merge_kernel"}
    check_sweep(compiled, hardest_negatives, (), kernels, tmp_path, dtype, size, ids, precision)


@every_size
@every_product
@pytest.mark.parametrize("beta", [None, 10.0], ids=["distances", "powers"])
def test_relative_negatives(compiled, beta, dtype, precision, size, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    kernels, arguments = {"sweep_kernel", "merge_kernel", "terms_kernel"}, (torch.tensor(0.1), beta)
    check_sweep(compiled, relative_negatives, arguments, kernels, tmp_path, dtype, size, ids, precision)


def test_every_line_of_the_sweep_table_is_compiled():
    sizes, kinds = {"small", "narrow", "wide", "sums"}, {"half", "tf32", "ieee"}
    assert set(tiles.SWEEP) == {(arch, kind, size) for arch in SHARED_KIB for kind in kinds for size in sizes}
    assert set(tiles.PROJECT) == kinds


@pytest.mark.parametrize("D", [100, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_scores(compiled, dtype, D, tmp_path):
    a, index = torch.zeros(40, D, dtype=dtype), torch.zeros(80, dtype=torch.int64)
    check(compiled(pair_scores, a, a, index, index), compiled.arch, {"pair_scores_kernel"}, tmp_path)
    backward = compiled(pair_scores_backward, torch.zeros(80), index, index, a, a, [True, True])
    check(backward, compiled.arch, {"segment_sum_kernel"}, tmp_path)


@pytest.mark.parametrize(("block_size", "permuted"), [(3, True), (16, False), (16, True), (100, False), (1024, True)])
@every_product
def test_project(compiled, dtype, precision, block_size, permuted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    D = 1024 // block_size * block_size
    x, diag = torch.zeros(80, D, dtype=dtype), torch.zeros(D, dtype=dtype)
    blocks = torch.zeros(D // block_size, block_size, block_size, dtype=dtype)
    permutation = torch.arange(D) if permuted else None
    check(compiled(project, x, diag, blocks, permutation, True), compiled.arch, {"project_kernel"}, tmp_path)
    backward = compiled(project_backward, x, x, diag, blocks, permutation, True, [True] * 3)
    check(backward, compiled.arch, {"project_kernel", "parameter_kernel"}, tmp_path)
    if dtype != torch.float32:  # there the gathered gradient is of another dtype than x
        index = torch.zeros(80, dtype=torch.int64)
        weights = (diag, blocks, permutation)
        backward = compiled(pairs_project_backward, torch.zeros(80), index, index, x, x, *weights, True, [True] * 3)
        check(backward, compiled.arch, {"segment_sum_kernel", "project_kernel", "parameter_kernel"}, tmp_path)
