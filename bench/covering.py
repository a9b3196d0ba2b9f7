"""One in nine of all binaries, chosen so that every value of every argument of every kernel is among them.

`bench/calls.py` makes over 1,800 binaries for two architectures, and each takes most of a second to compile. `make
test` compiles the calls that `covering` chooses, `make lowering` all of them. Values are those that Triton compiles in:
types, alignments, constants, warps and stages; each field of a bundle has its own. Every kernel, and every line of the
tile table with every dtype, is compiled for both architectures, every value for one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from bench import lowering, stub_driver
from bench.calls import CASES
from bench.case import Case

Call = tuple[int, Case]  # on this architecture


class Needs(NamedTuple):
    """The binaries that a call needs, by name, and the values that they have compiled in, each with its kernel."""

    binaries: frozenset[str]
    values: frozenset[tuple]


def every() -> list[Call]:
    return [(arch, case) for arch in lowering.ARCHITECTURES for case in CASES]


@functools.cache
def covering() -> list[Call]:
    """Again and again the call that adds the most values for each binary it adds, until no value is missing."""
    missing = {call: needs(*call).values for call in every()}
    compiled: set[str] = set()
    chosen = []
    while missing:
        best = max(missing, key=lambda call: len(missing[call]) / max(len(needs(*call).binaries - compiled), 1))
        chosen.append(best)
        compiled |= needs(*best).binaries
        missing = {call: left for call, values in missing.items() if (left := values - needs(*best).values)}
    return chosen


@functools.cache
def needs(arch: int, case: Case) -> Needs:
    """What the call needs; nothing is compiled."""
    binaries: set[str] = set()
    values: set[tuple] = set()

    def note(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        types = fields(tuple(compile["signature"].values()))
        launch = [("warps", compile["num_warps"]), ("stages", compile["num_stages"])]
        compiled_in = (*types, *launch, *compile["constants"].items(), *compile["configs"][0].items())
        binaries.add(f"{fn.name} {arch} {key}")
        values.update((fn.name, place, repr(value)) for place, value in compiled_in)
        values.add((fn.name, arch))
        return True  # it is not compiled

    with (
        lowering.before_compiling(note),
        mock.patch.object(stub_driver.Target, "get_current_device", lambda target: -target.arch),  # it has no binaries
    ):
        lines = {lowered.line for lowered in lowering.lower(case, arch) if lowered.line}
    values.update((line, arch, case.product) for line in lines)
    return Needs(frozenset(binaries), frozenset(values))


def fields(bundle: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(place, value) of everything in nested tuples."""
    if isinstance(bundle, tuple):
        for k, field in enumerate(bundle):
            yield from fields(field, (*place, k))
    else:
        yield place, bundle
