"""One in nine of all binaries, chosen so that every value of every argument of every kernel is among them.

`bench/calls.py` makes over 1,800 binaries for two architectures, and each takes most of a second to compile. `make
test` compiles the calls that `covering` chooses, `make lowering` all of them. Values are those that Triton compiles in:
types, alignments, constants, warps and stages; each field of a bundle has its own. Every kernel, and every line of the
tile table with every dtype, is compiled for both architectures, every value for one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from bench import lowering, stub_driver
from bench.calls import CASES
from bench.case import Case

Call = tuple[int, Case]  # on this architecture


def every() -> list[Call]:
    return [(arch, case) for arch in lowering.ARCHITECTURES for case in CASES]


@functools.cache
def covering() -> list[Call]:
    """Again and again the call that adds the most values for each binary it adds, until no value is missing."""
    binaries = {call: values(*call) for call in every()}
    adds = {call: set().union(*of_call.values()) for call, of_call in binaries.items()}  # values, of those missing
    compiled: set[str] = set()
    chosen = []
    while adds:
        best = max(adds, key=lambda call: len(adds[call]) / max(len(binaries[call].keys() - compiled), 1))
        chosen.append(best)
        compiled.update(binaries[best])
        complete = adds[best]
        adds = {call: missing for call in adds if (missing := adds[call] - complete)}
    return chosen


@functools.cache
def values(arch: int, case: Case) -> dict[str, set]:
    """Of every binary that the call needs, by name: the values of its arguments. Nothing is compiled."""
    binaries: dict[str, set] = {}

    def seen(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        types = fields(tuple(compile["signature"].values()))
        launch = [("warps", compile["num_warps"]), ("stages", compile["num_stages"])]
        compiled_in = (*types, *launch, *compile["constants"].items(), *compile["configs"][0].items())
        of_binary: set[tuple] = {(fn.name, place, repr(value)) for place, value in compiled_in}
        binaries[f"{fn.name} {arch} {key}"] = of_binary | {(fn.name, arch)}
        return True  # it is not compiled

    with (
        lowering.before_compiling(seen),
        mock.patch.object(stub_driver.Target, "get_current_device", lambda target: -target.arch),  # it has no binaries
    ):
        for lowered in lowering.lower(case, arch):
            if lowered.line:  # every line with every dtype
                name = next(binary for binary in binaries if binary.startswith(f"{lowered.name} "))
                binaries[name].add((lowered.line, arch, case.product))
    return binaries


def fields(bundle: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(place, value) of everything in nested tuples."""
    if isinstance(bundle, tuple):
        for k, field in enumerate(bundle):
            yield from fields(field, (*place, k))
    else:
        yield place, bundle
