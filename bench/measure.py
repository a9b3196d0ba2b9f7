"""Is it right, then how long: the checks and the timed turns of one case.

A case is an op at one shape, dtype and device, computed by several variants. Each is first held to fp64 truth on a
problem of the same channels (:data:`CHECK_ROWS` rows at most). Then they take turns on fresh inputs in one process,
so that a noisy neighbour hits all alike, and are compared turn by turn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.clock import clock
from bench.problem import Op, Problem, Shape, Variant

CHECK_ROWS = 1000  # odd to every tile size
# A variant may be ten times as far from the truth as plain PyTorch is in the same dtype, and these few roundings
# more; plain PyTorch itself may be no further than the ceiling, or the op's own definition here is at fault.
ALLOWED_TIMES_NAIVE = 10
ROUNDINGS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CEILING = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


class Case(NamedTuple):
    """What is measured together. Names only, so that it travels as JSON."""

    op: str
    n: int
    d: int
    block: int
    dtype: str  # as in torch: "float32"
    device: str

    @property
    def shape(self) -> Shape:
        return Shape(self.n, self.d, self.block)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.op} N={self.n} D={self.d} {self.dtype} {self.device}"


def forward(op: Op, variant: Variant, problem: Problem):
    """The op's output: with gradients to come if it has any, without graph if not."""
    with torch.set_grad_enabled(op.differentiable):
        return variant(problem)


def backward(problem: Problem, output: Tensor) -> None:
    """Gradients into the problem's leaves."""
    upstream = problem.upstream
    output.backward(None if upstream is None else upstream.to(output.dtype))


def results(op: Op, variant: Variant, problem: Problem, exact: Problem) -> list[Tensor]:
    """Everything a variant gives, to be compared: outputs, and the gradient of every leaf."""
    for leaf in problem.leaves():
        leaf.grad = None
    output = forward(op, variant, problem)
    if not op.differentiable:
        return [t.double() for t in (op.outcome(output, exact) if op.outcome else output)]
    backward(problem, output)
    missing = [k for k, leaf in enumerate(problem.leaves()) if leaf.grad is None]
    if missing:
        raise RuntimeError(f"no gradient for input {missing[0]} of {len(problem.leaves())}")
    return [output.detach().double(), *(leaf.grad.double() for leaf in problem.leaves())]  # type: ignore[union-attr]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative error of each result, in norm; infinite where shapes differ or NaN appears."""
    if [t.shape for t in found] != [t.shape for t in truth]:
        return [float("inf")]
    distance = [float((f - t).norm() / t.norm().clamp_min(1e-300)) for f, t in zip(found, truth, strict=True)]
    return [d if d == d else float("inf") for d in distance]


class Verdict(NamedTuple):
    """A variant against the truth."""

    errors: list[float]  # of the outputs, then of each gradient
    why_wrong: str | None
    rows: int  # of the problem that was checked


class Checker:
    """Holds the variants of one case to fp64 truth."""

    def __init__(self, op: Op, case: Case) -> None:
        self.op, self.rows = op, min(case.n, CHECK_ROWS)
        self.problem = op.inputs(case.shape._replace(n=self.rows), case.torch_dtype, torch.device(case.device), 12345)
        self.exact = self.problem.double()
        self.truth = results(op, op.truth, self.exact, self.exact)
        dtype = case.torch_dtype
        naive = op.variants["naive"]()
        assert naive is not None
        self.naive_errors = errors(results(op, naive, self.problem, self.exact), self.truth)
        if max(self.naive_errors) > CEILING[dtype]:
            raise RuntimeError(f"plain PyTorch itself is off fp64 truth by {max(self.naive_errors):.1e}")
        self.allowed = [ALLOWED_TIMES_NAIVE * e + ROUNDINGS[dtype] for e in self.naive_errors]

    def __call__(self, variant: Variant) -> Verdict:
        found = errors(results(self.op, variant, self.problem, self.exact), self.truth)
        if len(found) != len(self.allowed):
            return Verdict(found, "outputs of other shapes than the truth's", self.rows)
        bad = [(e, a) for e, a in zip(found, self.allowed, strict=True) if not e <= a]
        why = f"relative error {bad[0][0]:.1e}, allowed {bad[0][1]:.1e}" if bad else None
        return Verdict(found, why, self.rows)


def turn(op: Op, case: Case, variant: Variant, problem: Problem) -> tuple[float, float]:
    """(forward ms, backward ms) of one step."""
    for leaf in problem.leaves():
        leaf.grad = None
    held = []
    stages = [lambda: held.append(forward(op, variant, problem))]
    if op.differentiable:
        stages.append(lambda: backward(problem, held[0]))
    took = clock_of(case).time_ms(*stages)
    return took[0], took[1] if op.differentiable else 0.0


_clocks: dict[str, object] = {}


def clock_of(case: Case):
    """One clock per device: CUDA's holds the buffer that flushes the L2."""
    if case.device not in _clocks:
        _clocks[case.device] = clock(torch.device(case.device))
    return _clocks[case.device]


def peak_mib(op: Op, case: Case, variant: Variant) -> float:
    """Extra memory of one step, gradients included; run it in a fresh process, after a small problem's warm-up."""
    device = torch.device(case.device)
    small = op.inputs(case.shape._replace(n=min(case.n, 256)), case.torch_dtype, device, 1)
    turn(op, case, variant, small)
    problem = op.inputs(case.shape, case.torch_dtype, device, 0)

    def step() -> None:
        output = forward(op, variant, problem)
        if op.differentiable:
            backward(problem, output)

    return clock_of(case).peak_mib(step)
