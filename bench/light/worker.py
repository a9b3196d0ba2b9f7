"""Runs items in a process of its own: each is checked, and what was found goes out at once as a line of JSON.

    echo PLAN | python -m bench.light.worker

An exception ends the process: after an illegal access nothing more can be believed. `bench/first_light.py` starts it,
listens, and starts another for what is left. The plan: kind ("item" or "headline"), tasks, dry, planted ({item: its
fault}), code (the folder for kernels' code).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import gssf_kernels as gk
from bench import stub_driver
from bench.light import compare, headline
from bench.light.items import Item
from bench.light.record import Recorder
from gssf_kernels import plan
from gssf_kernels.device_path import DEVICE as NO_VALUES
from gssf_kernels.device_path import device_path

REPEATS = 3
ARCH = 90

_out = sys.stdout


def tell(event: str, **fields: Any) -> None:
    """One line for the parent."""
    _out.write(json.dumps({"event": event, **fields}) + "\n")
    _out.flush()


def speak_json() -> dict[str, Any]:
    """Findings go to a copy of standard output, all else to standard error; return the plan."""
    global _out
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return json.load(sys.stdin)


def poison(device: torch.device) -> None:
    """Fill all memory that PyTorch's allocator holds free with bytes that are NaN in every floating dtype."""
    held = [torch.empty(size, dtype=torch.uint8, device=device) for size in (256, 1 << 19, 1 << 20, 1 << 24, 1 << 28)]
    for segment in torch.cuda.memory_snapshot():
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                held.append(torch.empty(block["size"], dtype=torch.uint8, device=device))
    for memory in held:
        memory.fill_(0xFF)


@contextlib.contextmanager
def by_another_tile(**changes: Any) -> Iterator[None]:
    """Sweeps take their line of the table with changes."""
    of_table = plan.sweep_tile
    with mock.patch.object(plan, "sweep_tile", lambda *a, **k: of_table(*a, **k)._replace(**changes)):
        yield


@contextlib.contextmanager
def by_three_programs() -> Iterator[None]:
    """Sweeps are persistent, on three processors."""
    with mock.patch.object(plan, "processors", return_value=3), by_another_tile(persistent=1):
        yield


VARIATIONS: dict[str, Callable] = {
    "persistent=0": lambda: by_another_tile(persistent=0),
    "tma=False": lambda: by_another_tile(tma=False, persistent=0),
    "three programs": by_three_programs,
}


class Card:
    """Items run on the GPU."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.device = recorder, torch.device("cuda")

    def problem(self, item: Item) -> tuple[Item, tuple]:
        """(the item that is compared, its inputs)."""
        return item, item.inputs("cuda")

    def results(self, item: Item, inputs: tuple) -> compare.Results:
        poison(self.device)
        with self.recorder.watching():
            results = compare.results(item, gk, *inputs)
        torch.cuda.synchronize()
        return results

    def launch(self, item: Item) -> None:
        """`results` did."""


class Dry:
    """Kernels are compiled for the card and launched into a driver that does nothing; the CPU gives the results.

    Launches are of the item's own size, on tensors without values; results of fewer rows.
    """

    def __init__(self, recorder: Recorder, planted: dict[str, str]) -> None:
        self.recorder, self.planted = recorder, planted
        self.item: Item | None = None

    def problem(self, item: Item) -> tuple[Item, tuple]:
        self.item, small = item, item.reduced()
        return small, small.inputs("cpu")

    def results(self, item: Item, inputs: tuple) -> compare.Results:
        return self._with_fault(compare.results(item, gk, *inputs))

    def launch(self, item: Item) -> None:
        inputs = item.inputs(NO_VALUES)
        self.recorder.fails = self.planted.get(str(item)) == "exception"
        with stub_driver.installed(ARCH), device_path(ARCH, self.recorder.launch):
            compare.results(item, gk, *inputs)

    def _with_fault(self, results: compare.Results) -> compare.Results:
        """The results, with the fault that the plan asks for; a wrong tile is one of the persistent sweep's."""
        fault = self.planted.get(str(self.item))
        if fault == "nan":
            first = next(gradient for name, gradient in results.items() if name.startswith("d "))
            first[5, 3] = float("nan")
        if fault == "wrong tile" and plan.sweep_tile is _TABLE:
            results["row_score"][128:256] += 1.0
        return results


_TABLE = plan.sweep_tile


def check(item: Item, place: Card | Dry, code: Path) -> dict[str, Any]:
    """The finding of one item."""
    recorder = place.recorder
    recorder.clear()
    torch.set_float32_matmul_precision(item.precision)
    start = time.perf_counter()
    place.launch(item)
    compared, inputs = place.problem(item)
    first = place.results(compared, inputs)
    kernels, tile = recorder.summary(), recorder.tile()
    equal = all(compare.equal_bits(first, place.results(compared, inputs)) for _ in range(REPEATS - 1))
    exact, plain = compare.truth(compared, *inputs)
    verdicts = compare.judge(compared, inputs[0], first, exact, plain)
    worst = max(verdicts, key=lambda verdict: verdict.share)
    finding: dict[str, Any] = {"item": str(item), **item.fields(), "kernels": kernels}
    finding["error over allowed"] = _round(worst.share)
    finding |= {"result": worst.name, "equal bits": equal}
    if compared != item:
        finding["compared"] = str(compared)
    if item.family == "certified" and isinstance(place, Card):
        finding["the CPU's bits"] = bits_of_the_cpu(item, first)
    wrong = [verdict for verdict in verdicts if not verdict.share <= 1]
    if wrong or not equal:
        finding["mismatches"] = [compare.describe(verdict, first, exact, tile) for verdict in wrong[:3]]
        finding["code"] = recorder.save_code(code)
        finding["agree"] = _agreement(compared, place, inputs, exact, plain, first)
    finding["seconds"] = round(time.perf_counter() - start, 2)
    return finding


def _round(share: float) -> float | str:
    return round(share, 3) if share < float("inf") else "inf"


def _agreement(
    item: Item, place: Card | Dry, inputs: tuple, exact: compare.Results, plain: compare.Results, first: compare.Results
) -> dict[str, str]:
    """Whether other ways of going from tile to tile are right, or wrong in the same bits."""
    verdicts = {}
    for name, variation in VARIATIONS.items():
        try:
            with variation():
                results = place.results(item, inputs)
        except Exception as error:
            verdicts[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            continue
        right = all(verdict.share <= 1 for verdict in compare.judge(item, inputs[0], results, exact, plain))
        bits = "the same bits" if compare.equal_bits(first, results) else "other bits"
        verdicts[name] = "right" if right else f"wrong, {bits}"
    return verdicts


def bits_of_the_cpu(item: Item, ours: compare.Results) -> bool | None:
    """Whether certified mining gave the bits that it gives on the CPU; None where this CPU has no unit for it."""
    if gk.backends()["hardest_negatives"]["certified"] == "no":
        return None
    theirs = compare.results(item, gk, *item.inputs("cpu"))
    return compare.equal_bits({name: t.cpu() for name, t in ours.items() if not name.startswith("d ")}, theirs)


def main() -> int:
    plan = speak_json()
    recorder, code = Recorder(plan["dry"]), Path(plan["code"])
    place = Dry(recorder, plan.get("planted", {})) if plan["dry"] else Card(recorder)
    task: Item | headline.Headline
    for fields in plan["tasks"]:
        task = Item(*fields) if plan["kind"] == "item" else headline.Headline(*fields)
        tell("begin", item=str(task))
        try:
            if isinstance(task, Item):
                finding = check(task, place, code)
            else:
                finding = headline.run(task, recorder, plan["dry"], ARCH)
            tell("finding", kind=plan["kind"], **finding)
        except Exception as error:
            keys = [launch["hash"] for launch in recorder.last if "hash" in launch]
            tell(
                "exception",
                item=str(task),
                error=f"{type(error).__name__}: {error}"[:2000],
                traceback=traceback.format_exc()[-6000:],
                launches=list(recorder.last),
                code=recorder.save_code(code, keys),
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
