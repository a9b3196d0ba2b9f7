"""Every Triton kernel compiled ahead of time for sm_80 and sm_90, as the launchers would compile it: no GPU needed.

    python -m bench.lowering [--out PAGE.md] [--only TEXT]

The launchers run on CPU tensors with a driver that only names the target, and every launch is turned into a
compilation. `bench/calls.py` is the list. The tests hold every binary to it (no spills, registers, shared memory); run
as a program it lists what the machine code of each is made of.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench import stub_driver
from bench.calls import CASES
from bench.case import PRODUCTS, Case
from bench.report import table
from gssf_kernels import _library, plan
from gssf_kernels.triton import tiles

ARCHITECTURES = (80, 90)
# Kernels whose tile is a line of the table.
ON_A_LINE = ("sweep_kernel", "project_kernel", "parameter_kernel", "sides_kernel")
PROCESSORS = 4  # of the card that is not there
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Lowered(NamedTuple):
    """A compiled kernel, and the line of the tile table it takes: ("SWEEP", 90, "half", "wide"), or () for none."""

    name: str
    kernel: Any  # triton's CompiledKernel
    line: tuple

    @property
    def threads(self) -> int:
        return 32 * self.kernel.metadata.num_warps


def no_product(x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> None:
    """In the place of a library's product, which is not compiled here; the CPU may have none of bf16 and fp32."""


def lower(case: Case, arch: int) -> list[Lowered]:
    """What the case's launches compile to."""
    lowered_kernels: list[Lowered] = []
    line: tuple = ()
    run, sweep_tile, project_tile = JITFunction.run, plan.sweep_tile, plan.project_tile

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        lowered_kernels.append(Lowered(self.__name__, compiled, line if self.__name__ in ON_A_LINE else ()))

    def seen(tile, which):
        nonlocal line
        (key,) = (key for key, entry in getattr(tiles, which).items() if entry is tile)
        line = (which, *(key if isinstance(key, tuple) else (key,)))
        return tile

    with contextlib.ExitStack() as stack:
        for place, name, instead in (
            (JITFunction, "run", compile_only),
            (plan, "architecture", lambda device: arch),
            (plan, "processors", lambda device: PROCESSORS),
            (plan, "sweep_tile", lambda *a: seen(sweep_tile(*a), "SWEEP")),
            (plan, "project_tile", lambda *a: seen(project_tile(*a), "PROJECT")),
            (driver, "_active", stub_driver.Target(arch)),
            (plan, "fp32_products", lambda device: "ieee" if PRODUCTS[case.product][1] == "highest" else "tf32"),
            (_library, "product", no_product),
        ):
            stack.enter_context(mock.patch.object(place, name, instead))
        case.launcher(*case.arguments())
    return lowered_kernels


@contextlib.contextmanager
def before_compiling(hook: Any) -> Iterator[None]:
    """What Triton asks before it compiles; it compiles nothing where the answer is True."""
    with (
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook),
        # What Triton writes for a hook that stores it: 3.6 cannot, where a function is among the constants.
        mock.patch.object(triton.runtime.jit, "serialize_specialization_data", return_value=""),
    ):
        yield


def fill_cache(claims: str, calls: list[tuple[int, int]]) -> None:
    """Lower what no other process with this folder of claims has begun; others find it in Triton's cache on disk.

    calls: architecture and place among CASES.
    """

    def claim(*what: Any) -> bool:
        name = hashlib.sha256(repr(what).encode()).hexdigest()
        try:
            (Path(claims) / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def is_anothers(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        return not claim(fn.module, fn.name, compile["device"], key)

    with before_compiling(is_anothers):
        for arch, place in calls:
            if claim(arch, place):
                with contextlib.suppress(Exception):  # whoever wants this case's code sees why there is none
                    lower(CASES[place], arch)


def tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of CUDA's tools, as Triton brings them, says of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Resources(NamedTuple):
    """What one thread, and one block, of a kernel takes."""

    registers: int
    stack: int  # bytes; a spilled register is here
    local: int  # bytes
    shared: int  # bytes, of the block


def resources(lowered: Lowered) -> Resources:
    """From the binary, and shared memory from the launch."""
    usage = tool("cuobjdump", lowered.kernel.asm["cubin"], "-res-usage")
    registers_and_stack = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers_and_stack["REG"],
        registers_and_stack["STACK"],
        registers_and_stack["LOCAL"],
        lowered.kernel.metadata.shared,
    )


# Kinds of machine instructions: the matrix units (HGMMA is wgmma), copies that pass by the registers (LDGSTS is
# cp.async, UTMALDG the tensor copy), atomics, and spills.
OPCODES = {
    "HMMA": r"HMMA",
    "wgmma": r"[HQI]GMMA",
    "FFMA": r"FFMA",
    "LDGSTS": r"LDGSTS",
    "TMA": r"UTMALDG",
    "atomics": r"(?:ATOMG?|RED|ATOM)\b",
    "STL": r"STL",
    "LDL": r"LDL",
}
NUMBERS = ("registers", "stack", "shared", "instructions", *OPCODES)  # of a binary, as the page has them
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


def instructions(lowered: Lowered) -> Counter[str]:
    """How many machine instructions there are, by kind; "all" of them."""
    opcodes = Counter(_INSTRUCTION.findall(tool("nvdisasm", lowered.kernel.asm["cubin"], "-c")))
    counts = Counter({"all": opcodes.total()})
    for kind, pattern in OPCODES.items():
        counts[kind] = sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))
    return counts


def listed(cases: list[Case], arch: int, lines: dict[tuple, list[str]]) -> None:
    """Add a line of the page for every binary, and say how far it is."""
    said = time.perf_counter()
    for count, case in enumerate(cases):
        for lowered in lower(case, arch):
            key = (lowered.name, arch, lowered.kernel.hash)
            if key not in lines:
                used, made_of = resources(lowered), instructions(lowered)
                numbers = (used.registers, used.stack, used.shared, *(made_of[kind] for kind in ("all", *OPCODES)))
                names = (f"`{lowered.name}`", f"sm_{arch}{'a' if arch >= 90 else ''}")
                lines[key] = [*names, " ".join(map(str, lowered.line)), str(case), *map(str, numbers)]
        if time.perf_counter() - said > 10:
            said = time.perf_counter()
            print(f"sm_{arch}: {count + 1} of {len(cases)} calls", file=sys.stderr, flush=True)


def summary(lines: list[list[str]]) -> str:
    """A line for every kernel and target: how many binaries, and the range of each number over them."""
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for line in lines:
        groups.setdefault((line[0], line[1]), []).append([int(number) for number in line[4:]])
    ranges = []
    for names, rows in sorted(groups.items()):
        spans = [(min(column), max(column)) for column in zip(*rows, strict=True)]
        shown = [str(low) if low == high else f"{low}–{high}" for low, high in spans]
        ranges.append([*names, str(len(rows)), *shown])
    return table(["kernel", "target", "binaries", *NUMBERS], ranges)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lowering", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the page to write; printed otherwise")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # ends as gently
    cases = [case for case in CASES if arguments.only in str(case)]
    lines: dict[tuple, list[str]] = {}
    finished = False
    try:
        for arch in ARCHITECTURES:
            listed(cases, arch, lines)
        finished = True
    except KeyboardInterrupt:
        print("interrupted: what was compiled is listed")
    rows = [line for _, line in sorted(lines.items())]
    title = "# Machine code of every kernel, compiled ahead of time"
    head = ["kernel", "target", "line of the table", "call", *NUMBERS]
    note = "" if finished else "Out of time: not all of it.\n\n"
    page = f"{title}\n\n{note}{summary(rows)}\n\n{table(head, rows)}\n"
    if arguments.out:
        arguments.out.write_text(page)
    else:
        print(page)
    spilled = [4 + NUMBERS.index(kind) for kind in ("stack", "STL", "LDL")]
    spilling = sum(any(line[k] != "0" for k in spilled) for line in rows)
    print(f"{len(rows)} binaries of Triton {triton.__version__}, {spilling} of them spill")
    return 1 if spilling else 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main())
