"""The shapes that decide, each alone on the card: first checked at the timed shape, then timed.

Ours eager and as replays of a CUDA graph, beside plain PyTorch where it fits and torch's bare product of the same
shape, in turns. The share of the bare product is what the op's least products would take at its speed, over our time.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import measure, stub_driver
from bench.light.record import Recorder
from bench.ops import OPS
from bench.problem import Problem, Shape, Variant, product_flop
from gssf_kernels import plan
from gssf_kernels.device_path import DEVICE as NO_VALUES
from gssf_kernels.device_path import device_path

TURNS = 3, 15
SECONDS = 1.5  # of turns, a shape
REDUCED_ROWS = 256  # without a card


class Headline(NamedTuple):
    """One op at one shape. Travels between processes as JSON."""

    op: str
    n: int
    d: int
    dtype: str
    small: bool = False  # the fused route of a small problem beside the composite one

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.n}x{self.d}"

    def case(self, device: str, n: int) -> measure.Case:
        return measure.Case(self.op, n, self.d, 32, self.dtype, device)


HEADLINES = [
    Headline("triplet", 2048, 512, "bfloat16"),
    Headline("triplet", 8192, 512, "bfloat16"),
    Headline("hardest_negatives", 8192, 1024, "bfloat16"),
    Headline("info_nce", 16384, 512, "bfloat16"),
    Headline("sigmoid", 16384, 768, "bfloat16"),
    Headline("goal_nca_sig_ms", 8192, 512, "bfloat16"),
    Headline("hardest_negatives", 16384, 1024, "float32"),  # certified mining
    Headline("triplet", 128, 1024, "float32", small=True),
    Headline("info_nce", 128, 1024, "float32", small=True),
    Headline("hardest_negatives", 8192, 256, "bfloat16"),
    Headline("hardest_negatives", 32768, 1024, "bfloat16"),
    Headline("triplet", 2048, 512, "float32"),
    Headline("triplet", 8192, 512, "float32"),
    Headline("triplet", 128, 1024, "bfloat16", small=True),
    Headline("info_nce", 128, 1024, "bfloat16", small=True),
    Headline("sigmoid", 65536, 768, "bfloat16"),
]


@contextlib.contextmanager
def composite_route():
    """Small problems go by the kernels of large ones."""
    with mock.patch.object(plan, "SMALL", 0):
        yield


def launch_without_card(headline: Headline, recorder: Recorder, arch: int) -> None:
    """The whole step at the timed shape, into the driver that does nothing."""
    op = OPS[headline.op]
    case = headline.case("cpu", REDUCED_ROWS)
    problem = op.inputs(case.shape, case.torch_dtype, torch.device("cpu"), 0)
    large = _without_values(problem, REDUCED_ROWS, headline.n)
    variant = op.variants["ours"]()
    assert variant is not None
    routes: list[Callable] = [contextlib.nullcontext, *([composite_route] if headline.small else [])]
    for route in routes:
        with stub_driver.installed(arch), device_path(arch, recorder.launch), route():
            output = measure.forward(op, variant, large)
            if op.differentiable:
                measure.backward(large, output)


def _without_values(problem: Problem, few: int, n: int) -> Problem:
    """The problem with n rows in place of few, on the device without values."""

    def enlarged(value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return value.to(NO_VALUES)
        if not isinstance(value, torch.Tensor):
            return value
        shape = [n if size == few and k == 0 else size for k, size in enumerate(value.shape)]
        return torch.empty(shape, dtype=value.dtype, device=NO_VALUES, requires_grad=value.requires_grad)

    return Problem(*map(enlarged, problem))


def run(headline: Headline, recorder: Recorder, dry: bool, arch: int) -> dict[str, Any]:
    """The finding of one shape."""
    op = OPS[headline.op]
    recorder.clear()
    if dry:
        launch_without_card(headline, recorder, arch)
    device = "cpu" if dry else "cuda"
    n = min(headline.n, REDUCED_ROWS) if dry else headline.n
    case = headline.case(device, n)
    variants: dict[str, Callable[[], Variant | None]] = {"ours": op.variants["ours"], "plain": op.variants["naive"]}
    finding: dict[str, Any] = {"item": str(headline)}
    checker = measure.Checker(op, case)
    ours = variants["ours"]()
    assert ours is not None
    if dry:
        verdict = checker(ours)
    else:
        with recorder.watching():
            verdict = checker(ours)
    finding |= {"kernels": recorder.summary(), "errors": verdict.errors, "checked rows": verdict.rows}
    if dry:
        finding["compared"] = str(case)
    if verdict.why_wrong:
        return {**finding, "wrong": verdict.why_wrong}
    del checker
    steps = _steps(headline, case, variants)
    finding["left out"] = {name: step for name, step in steps.items() if isinstance(step, str)}
    times = _turns({name: step for name, step in steps.items() if not isinstance(step, str)})
    finding["ms"] = {name: _spread(ms) for name, ms in times.items()}
    finding["share"] = _share(op, case.shape, finding["ms"])
    return finding


def _steps(headline: Headline, case: measure.Case, variants: dict) -> dict[str, Callable[[], float] | str]:
    """What takes turns: a function that gives the milliseconds of one step, or why it is left out."""
    op, device = OPS[headline.op], torch.device(case.device)
    problem = op.inputs(case.shape, case.torch_dtype, device, 1)
    clock = measure.clock_of(case)

    def step(variant: Variant) -> None:
        output = measure.forward(op, variant, problem)
        if op.differentiable:
            for leaf in problem.leaves():
                leaf.grad = None
            measure.backward(problem, output)

    def timed(variant: Variant, route: Callable = contextlib.nullcontext) -> Callable[[], float]:
        def eager() -> float:
            with route():
                return clock.time_ms(lambda: step(variant), of=eager)[0]

        return eager

    def replayed(variant: Variant, route: Callable = contextlib.nullcontext) -> Callable[[], float]:
        if device.type == "cpu":
            return timed(variant, route)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with route(), torch.cuda.stream(side):
            for _ in range(2):
                step(variant)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with route(), torch.cuda.graph(graph):
            step(variant)
        return lambda: clock.time_ms(graph.replay, of=graph)[0]

    ours, plain = variants["ours"](), variants["plain"]()
    a, b = (torch.randn(case.n, case.d, device=device).to(case.torch_dtype) for _ in range(2))
    makers: dict[str, Callable[[], Callable[[], float]]] = {
        "ours": lambda: timed(ours),
        "ours replayed": lambda: replayed(ours),
        "plain": lambda: timed(plain),
        "bare product": lambda: lambda: clock.time_ms(lambda: torch.mm(a, b.mT), of="bare product")[0],
    }
    if headline.small:
        makers["composite"] = lambda: timed(ours, composite_route)
        makers["composite replayed"] = lambda: replayed(ours, composite_route)
        makers["plain replayed"] = lambda: replayed(plain)
    steps: dict[str, Callable[[], float] | str] = {}
    for name, make in makers.items():
        try:
            once = make()
            once()  # compiles, warms up, and shows whether it fits
            steps[name] = once
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            steps[name] = "out of memory"
    return steps


def _turns(steps: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Milliseconds of each, in rotated turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    start, turn = time.perf_counter(), 0
    while turn < TURNS[0] or (turn < TURNS[1] and time.perf_counter() - start < SECONDS):
        order = list(steps)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name].append(steps[name]())
        turn += 1
    return times


def _spread(ms: list[float]) -> list[float]:
    """Median, least, most, and how many."""
    return [round(statistics.median(ms), 4), round(min(ms), 4), round(max(ms), 4), len(ms)]


def _share(op: Any, shape: Shape, ms: dict[str, list[float]]) -> float | None:
    """Of ours (replayed, where a graph holds it) the part that the least products take at the bare product's speed."""
    if "bare product" not in ms or "ours replayed" not in ms:
        return None
    work = op.work(shape, 2)
    products = (work.forward_flop + work.backward_flop) / product_flop(shape)
    return round(products * ms["bare product"][0] / ms["ours replayed"][0], 3)
