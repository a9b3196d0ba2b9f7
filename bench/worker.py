"""Measures, in a process of its own, what the plan on its standard input asks; events go out as lines of JSON.

    echo PLAN | python -m bench.worker

It holds no result: every verdict and every turn is told at once, so that nothing is lost if a variant takes this
process down. :mod:`bench.runner` starts it, listens and keeps the books. The events:

    ceilings  device, dtype, tflop_per_s, gb_per_s
    begin     variant, what: the worker is about to build, check or run it
    verdict   variant, status, note, version, errors, checked_rows
    turn      variant, forward_ms, backward_ms
    peak      variant, mib
    case      a new case begins       done  it is finished
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from typing import Any

import torch

from bench import ceilings, measure, peers
from bench.measure import Case
from bench.ops import OPS
from bench.problem import Variant

_out = sys.stdout


def tell(event: str, **fields: Any) -> None:
    """One line for the parent."""
    _out.write(json.dumps({"event": event, **fields}) + "\n")
    _out.flush()


def own(target: str) -> Variant:
    """A user's variant, given as ``module:function``."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def build(case: Case, name: str, user_variants: dict[str, str]) -> tuple[Variant | None, str, str]:
    """(variant or None, status, note)."""
    import gssf_kernels as gk

    if name in user_variants:
        return own(user_variants[name]), "ok", ""
    op = OPS[case.op]
    if name in op.variants:
        variant = op.variants[name]()
        return variant, "ok" if variant else "absent", "" if variant else f"not in gssf_kernels {gk.__version__}"
    adapter, device = peers.adapter(name), torch.device(case.device).type
    if device not in adapter.DEVICES:
        return None, "skipped", f"{adapter.PACKAGE} runs on {', '.join(adapter.DEVICES)} only"
    if peers.version(name) is None:
        return None, "skipped", f"{adapter.PACKAGE} is not installed (bench/requirements-peers.txt)"
    return adapter.VARIANTS[case.op](), "ok", ""


def version(name: str) -> str | None:
    """What to print beside a variant's name."""
    import gssf_kernels as gk

    if name in peers.PEERS:
        return peers.version(name)
    return gk.__version__ if name == "ours" else torch.__version__


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def candidates(case: Case, names: list[str], user_variants: dict[str, str]) -> dict[str, Variant]:
    """The variants that are there and right; a verdict is told for each of the others, and for these."""
    op, checker, right = OPS[case.op], None, {}
    for name in names:
        tell("begin", variant=name, what="check")
        verdict: dict[str, Any] = {"variant": name, "version": version(name)}
        try:
            variant, status, note = build(case, name, user_variants)
            verdict.update(status=status, note=note)
            if variant is not None:
                checker = checker or measure.Checker(op, case)
                checked = checker(variant)
                verdict.update(errors=checked.errors, checked_rows=checked.rows)
                if checked.why_wrong:
                    verdict.update(status="wrong", note=checked.why_wrong)
                else:
                    right[name] = variant
        except Exception as error:  # a peer may raise anything: it is a row, and the run goes on
            verdict.update(status="failed", note=reason(error))
        tell("verdict", **verdict)
    return right


def time_case(case: Case, names: list[str], plan: dict) -> None:
    """Turns, until the case's seconds are spent: at least min_turns, at most max_turns, after one to warm up."""
    op = OPS[case.op]
    if "torch._dynamo" in sys.modules:  # else no variant has compiled anything, and importing it takes seconds
        torch._dynamo.reset()
    right = candidates(case, names, plan["user_variants"])
    start, turns = time.perf_counter(), -1
    while right and turns < plan["max_turns"]:
        if turns >= plan["min_turns"] and time.perf_counter() - start > plan["seconds"]:
            break
        problem = op.inputs(case.shape, case.torch_dtype, torch.device(case.device), turns + 1)
        order = list(right)
        shift = turns % len(order)
        for name in order[shift:] + order[:shift]:
            tell("begin", variant=name, what="turn")
            try:
                forward_ms, backward_ms = measure.turn(op, case, right[name], problem)
            except Exception as error:  # out of memory at this size, say
                tell("verdict", variant=name, version=version(name), status="failed", note=reason(error))
                del right[name]
                continue
            if turns >= 0:
                tell("turn", variant=name, forward_ms=forward_ms, backward_ms=backward_ms)
        turns += 1
        if turns == 0:
            start = time.perf_counter()  # what warmed up does not count


def peak_case(case: Case, name: str, user_variants: dict[str, str]) -> None:
    """Peak memory of one step, in this fresh process."""
    variant, _, _ = build(case, name, user_variants)
    if variant is not None:
        tell("peak", variant=name, mib=measure.peak_mib(OPS[case.op], case, variant))


def main() -> None:
    global _out
    # Results go to a copy of standard output; what a variant prints itself joins standard error.
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    plan = json.load(sys.stdin)
    if "peak" in plan:
        peak_case(Case(*plan["peak"]["case"]), plan["peak"]["variant"], plan["user_variants"])
        return
    for index, entry in plan["cases"]:
        case = Case(*entry["case"])
        tell("case", index=index)
        found = ceilings.measure(torch.device(case.device), case.torch_dtype)
        tell("ceilings", device=case.device, dtype=case.dtype, **found._asdict())
        time_case(case, entry["variants"], {**plan, **entry})
        tell("done", index=index)


if __name__ == "__main__":
    main()
