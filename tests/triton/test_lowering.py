"""Every kernel compiled ahead of time for sm_80 and sm_90, as the launchers would compile it: no GPU needed.

`bench/calls.py` has the list, `bench/lowering.py` says how. What comes out must not spill, must fit the card, and must
do its products and copies by the instructions that the tile table counts on. `bench/covering.py` chooses one in
nine, which are compiled here; `make lowering` compiles all of them (`--every-binary`).
"""

import multiprocessing
import os
import re
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

from kernel_modules import MODULES
from triton.runtime.jit import JITFunction

from bench import covering, lowering
from bench.calls import CASES
from gssf_kernels.triton import tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

KIB = 1024
SHARED = {80: 99 * KIB, 90: 227 * KIB}  # of a block; the lines of 80 serve 86 and 89 too, which have 99 KiB
REGISTERS = 1 << 16  # of a multiprocessor
KERNELS = sorted({kernel for case in CASES for kernel in case.kernels})
PERSISTENT = "hardest_negatives narrow", "hardest_negatives wide"
# The kernels nearest to the limits.
NEAREST = [
    (arch, next(case for case in CASES if (case.name, case.product) == (name, product)))
    for arch, name, product in (
        (90, "hardest_negatives wide with ids", "bf16"),
        (80, "project_backward b=3", "ieee"),
        (90, "relative_negatives wide with ids beta=10.0", "tf32"),
    )
]


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """{(architecture, case): what it compiled to}: by a process for each core, which leave it in Triton's cache."""
    calls = covering.every() if request.config.getoption("--every-binary") else covering.covering()
    with_ids = [f"{name} with ids" for name in PERSISTENT]
    calls = list(dict.fromkeys([*calls, *NEAREST, *((90, case) for case in CASES if case.name in with_ids)]))
    places, claims = [(arch, CASES.index(case)) for arch, case in calls], str(tmp_path_factory.mktemp("claims"))
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(lowering.fill_cache, [claims] * workers, [places] * workers))
    return {(arch, case): lowering.lower(case, arch) for arch, case in calls}


@pytest.fixture(scope="module")
def binaries(compiled):
    """{(architecture, kernel): [(case, what it compiled to)]}, each binary once for each op that launches it."""
    of_kernels = defaultdict(dict)
    for (arch, case), kernels in compiled.items():
        for lowered in kernels:
            op = case.name.partition(" ")[0]
            of_kernels[arch, lowered.name].setdefault((lowered.kernel.hash, lowered.line, op), (case, lowered))
    return {kernel: list(of_kernel.values()) for kernel, of_kernel in of_kernels.items()}


every_architecture = pytest.mark.parametrize("arch", lowering.ARCHITECTURES, ids=lambda arch: f"sm_{arch}")


@compiles
@every_architecture
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_spills_and_all_fits(binaries, arch, kernel):
    assert binaries[arch, kernel]
    for case, lowered in binaries[arch, kernel]:
        used, what = lowering.resources(lowered), f"sm_{arch} {kernel} of {case}"
        print(f"{what}: {used}")
        assert used.stack == used.local == 0, f"{what} spills: {used}"
        assert used.registers <= 255
        assert -(-used.registers // 8) * 8 * lowered.threads <= REGISTERS, f"{what} cannot start: {used}"
        assert used.shared <= SHARED[arch], f"{what}: {used}"
        # Sums of whole numbers are the same in every order; of floats they are not.
        atomics = re.findall(r"\b(?:atom|red)\.[\w.:]+", lowered.kernel.asm["ptx"])
        whole = [name for name in atomics if re.search(r"\.add\.[us]64$", name)]
        assert atomics == whole, f"{what} has atomics: {atomics}"
        assert not atomics or case.name.startswith("score_counts")


@compiles
def test_calls_launch_what_their_line_says(compiled):
    for (arch, case), kernels in compiled.items():
        assert {lowered.name for lowered in kernels} == set(case.kernels), (arch, case)


@compiles
@every_architecture
def test_the_sweep_is_made_of_what_its_line_says(binaries, arch):
    for case, lowered in binaries[arch, "sweep_kernel"]:
        tile, ptx = tiles.SWEEP[lowered.line[1:]], lowered.kernel.asm["ptx"]
        scalar = lowered.line[2] == "ieee"  # and not what the inputs are: certified mining of fp32 sweeps bf16
        assert ("fma.rn.f32" if scalar else "wgmma.mma_async" if arch == 90 else "mma.sync") in ptx, case
        assert ("cp.async.bulk.tensor" if tile.tma else "cp.async") in ptx, case


@compiles
def test_no_load_or_store_of_a_spill_in_the_machine_code(compiled):
    """The counts above, seen once from the other side: in the instructions of the kernels nearest to the limits."""
    for call in NEAREST:
        for lowered in compiled[call]:
            counts = lowering.instructions(lowered)
            assert counts["all"] > 100
            assert counts["STL"] == counts["LDL"] == counts["atomics"] == 0
            if lowered.name == "sweep_kernel":
                assert counts["wgmma"] > 0
                assert counts["TMA"] > 0
                assert counts["HMMA"] == counts["LDGSTS"] == 0


@compiles
def test_a_spill_would_be_seen(monkeypatch):
    """A tile far too large for its warps."""
    (case,) = (case for case in CASES if str(case) == "hardest_negatives-wide-ieee")
    monkeypatch.setitem(tiles.SWEEP, (80, "ieee", "wide"), tiles.Sweep(128, 128, 16, 4, 3))
    lowered = next(kernel for kernel in lowering.lower(case, 80) if kernel.name == "sweep_kernel")
    assert lowering.resources(lowered).stack > 0
    counts = lowering.instructions(lowered)
    assert counts["STL"] > 0
    assert counts["LDL"] > 0


@compiles
def test_the_narrow_tile_of_hopper_fits_twice(compiled):
    """As its line says."""
    kernels = [kernels for (_, case), kernels in compiled.items() if case.name.startswith("hardest_negatives narrow")]
    narrow = [lowered for call in kernels for lowered in call if lowered.line[1:3] == (90, "half")]
    assert narrow
    for lowered in narrow:
        used = lowering.resources(lowered)
        assert 2 * used.registers * lowered.threads <= REGISTERS
        assert 2 * (used.shared + KIB) <= 228 * KIB


@compiles
@pytest.mark.parametrize("name", PERSISTENT)
@pytest.mark.parametrize("product", ["tf32", "bf16", "fp16"])
def test_a_persistent_program_fetches_ahead_of_its_epilogue(compiled, name, product):
    """One loop over tiles and channels, in which the copies of steps to come stand before a complete tile's epilogue.

    And products that do not wait for one another, which they do when ptxas finds a sum read too early.
    """
    calls = [
        of_call
        for (arch, case), of_call in compiled.items()
        if arch == 90 and case.name.startswith(name) and case.product == product
    ]
    assert calls
    for of_call in calls:
        check_order(next(lowered for lowered in of_call if lowered.name == "sweep_kernel"))


def check_order(lowered):
    looped = lowered.kernel.asm["ttgir"].partition("scf.for ")[2]
    if not tiles.SWEEP[lowered.line[1:]].persistent:
        assert looped.index("scf.yield") < looped.index('"tt.reduce"')  # the epilogue comes after the loop
        return
    assert "scf.for " not in looped
    assert looped.rindex("tt.store") < looped.rindex("scf.yield")
    assert looped.rindex("async_tma_copy") < looped.index('"tt.reduce"')
    steps = "warp_group_dot ", "pendings = 1", "async_tma_copy", "pendings = 0", '"tt.reduce"', "tt.store"
    places = [looped.index(step) for step in steps]
    assert places == sorted(places)
    code = lowering.tool("nvdisasm", lowered.kernel.asm["cubin"], "-c")
    waits = re.findall(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d)", code)
    assert waits == ["1", "0", "0"]  # of a step, of a tile, and at the end


@compiles
def test_a_part_of_the_binaries_has_every_value():
    every, chosen = (
        [set().union(*of_calls) for of_calls in zip(*(covering.needs(*call) for call in calls), strict=True)]
        for calls in (covering.every(), covering.covering())
    )
    (every_binary, every_value), (binaries, values) = every, chosen
    assert values == every_value
    assert {value for value in values if len(value) == 2} == {(name, arch) for name in KERNELS for arch in SHARED}
    assert 8 * len(binaries) < len(every_binary)


@compiles
def test_every_kernel_line_and_dtype_is_compiled(compiled):
    kernels, lines = set(), set()
    for (arch, case), of_call in compiled.items():
        for lowered in of_call:
            kernels.add(lowered.name)
            if lowered.line:
                rounded = case.product == "ieee" and lowered.line[2:3] == ("half",)  # by certified mining
                lines.add((lowered.line, arch, "bf16" if rounded else case.product))
    defined = {name for module in MODULES for name, value in vars(module).items() if isinstance(value, JITFunction)}
    assert kernels == {name for name in defined if name.endswith("_kernel")}
    kinds = {"ieee": ["ieee"], "tf32": ["tf32"], "half": ["bf16", "fp16"]}
    expected = {(("SWEEP", *key), key[0], product) for key in tiles.SWEEP for product in kinds[key[1]]}
    expected -= {(("SWEEP", arch, "half", "row panels"), arch, "fp16") for arch in lowering.ARCHITECTURES}  # bf16 alone
    expected |= {
        (("PROJECT", key), arch, product)
        for key in tiles.PROJECT
        for product in kinds[key]
        for arch in lowering.ARCHITECTURES
    }
    assert lines == expected


def test_no_size_is_compiled_in_where_it_is_one():
    """As a number it would have none of a tensor's methods, and its loops would be other ones: see `sweep.py`."""
    kernels = {f for module in MODULES for f in vars(module).values() if isinstance(f, JITFunction)}
    sizes = [
        (kernel.__name__, parameter)
        for kernel in kernels
        if kernel.__name__.endswith("_kernel")
        for parameter in kernel.params
        if parameter.name in ("N", "M", "D", "R", "K", "E")
    ]
    assert len(sizes) > 40
    for name, parameter in sizes:
        assert parameter.do_not_specialize or parameter.annotation_type == "i32", (name, parameter.name)


def test_every_cell_of_the_table_is_there():
    sizes, kinds = ("small", "narrow", "wide", "sums"), ("half", "tf32", "ieee")
    assert set(tiles.SWEEP) == {
        (arch, kind, size) for arch in lowering.ARCHITECTURES for kind in kinds for size in sizes
    } | {(arch, "half", "row panels") for arch in lowering.ARCHITECTURES}
    assert set(tiles.PROJECT) == set(tiles.RELATIONS) == set(kinds)
    assert set(tiles.POSITIVES) == {"half", "ieee"}
