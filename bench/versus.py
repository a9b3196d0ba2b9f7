"""Different ops side by side on the same inputs: what does this loss cost, next to that one?

Each is first held to its own fp64 truth; then they take turns, and the ratios to the first are taken turn by turn.
"""

from __future__ import annotations

import sys
import time

import torch

from bench import measure, report, results
from bench.measure import Case
from bench.ops import OPS


def table(cases: list[Case], way: str, seconds: float, command: str) -> str:
    """Markdown: the time of each case computed by ``way`` ("ours", "naive", …), and its ratio to the first's."""
    variants = {}
    for case in cases:
        variant = OPS[case.op].variants[way]()
        if variant is None:
            raise results.ResultError(f"--way: there is no {case.op} of {way} in this version")
        verdict = measure.Checker(OPS[case.op], case)(variant)
        if verdict.why_wrong:
            raise results.ResultError(f"{case}, {way}: {verdict.why_wrong}; not timed")
        variants[case] = variant
    times: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    start = said = time.perf_counter()
    turns = 0
    while turns < 4 or time.perf_counter() - start < seconds:  # the first warms up
        for case in cases[turns % len(cases) :] + cases[: turns % len(cases)]:
            op = OPS[case.op]
            problem = op.inputs(case.shape, case.torch_dtype, torch.device(case.device), turns)
            times[case].append(measure.turn(op, case, variants[case], problem))
        turns += 1
        if time.perf_counter() - said > 5:
            said = time.perf_counter()
            print(f"{said - start:.0f} s of {seconds:.0f}, turn {turns}", file=sys.stderr, flush=True)
    lines = []
    first = [sum(turn) for turn in times[cases[0]][1:]]
    for case in cases:
        forward, backward = ([turn[k] for turn in times[case][1:]] for k in (0, 1))
        both = [sum(turn) for turn in times[case][1:]]
        ratios = results.spread([t / f for t, f in zip(both, first, strict=True)])
        spreads = [report.between(results.spread(times_ms)) for times_ms in (forward, backward, both)]
        lines.append([f"`{case.op}`", *spreads, report.between(ratios, "×")])
    c = cases[0]
    title = f"N = {c.n}, D = {c.d}, {c.dtype}, {c.device}, {way}, {turns - 1} turns: median (10th–90th percentile)"
    head = ["op", "forward, ms", "backward, ms", "both, ms", "times the first"]
    return f"{report.provenance(results.new(command))}\n\n{title}\n\n{report.table(head, lines)}"
