"""Is it right, then how long: the checks and the timed turns of one case.

A case is an op at one shape, dtype and device, computed by several variants. Each is first held to fp64 truth: to the
op's definition on a problem of the same channels (:data:`CHECK_ROWS` rows at most), and then, row by row, at the
shape that is timed (:mod:`bench.whole`). Then they take turns on fresh inputs in one process, so that a noisy neighbour
hits all alike, and are compared turn by turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench import whole
from bench.clock import clock
from bench.problem import Op, Problem, Shape, Variant

CHECK_ROWS = 1000  # odd to every tile size
# A variant may be ten times as far from the truth as plain PyTorch is in the same dtype, and these few roundings
# besides; plain PyTorch itself may be no further than the ceiling, or the op's own definition here is at fault.
ALLOWED_TIMES_NAIVE = 10
ROUNDINGS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CEILING = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
# At the timed shape the worst of N rows counts, and a row that lacks one of hundreds of tiles is off by a few percent
# of its norm: less is allowed there, and never more than the ceiling, or for a row ROW_CEILING of a typical one. (Of
# distillation's slopes, which are signs, low precision flips some.)
TIMED_TIMES_NAIVE = 4
TIMED_ROUNDINGS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ROW_CEILING = 0.3
NAIVE_MATRICES = 8  # N x N matrices, in bytes of fp32, that plain PyTorch was seen to hold at its peak


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
    grad_out = problem.upstream
    output.backward(None if grad_out is None else grad_out.to(output.dtype))


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


def errors(outputs: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative error of each result, in norm; infinite where shapes differ or NaN appears."""
    if [t.shape for t in outputs] != [t.shape for t in truth]:
        return [float("inf")]
    distance = [float((f - t).norm() / t.norm().clamp_min(1e-300)) for f, t in zip(outputs, truth, strict=True)]
    return [d if d == d else float("inf") for d in distance]


class Verdict(NamedTuple):
    """A variant against the truth."""

    errors: list[float]  # of the outputs, then of each gradient
    why_wrong: str | None
    rows: int  # of the problem that was checked


class Checker:
    """Holds the variants of one case to fp64 truth."""

    def __init__(self, op: Op, case: Case) -> None:
        self.op, rows = op, min(case.n, CHECK_ROWS)
        self.problem = op.inputs(case.shape._replace(n=rows), case.torch_dtype, torch.device(case.device), 12345)
        self.exact = self.problem.double()
        self.truth = results(op, op.truth, self.exact, self.exact)
        dtype = case.torch_dtype
        naive_errors = errors(results(op, plain(op), self.problem, self.exact), self.truth)
        if max(naive_errors) > CEILING[dtype]:
            raise RuntimeError(f"plain PyTorch itself is off fp64 truth by {max(naive_errors):.1e}")
        self.allowed = [ALLOWED_TIMES_NAIVE * e + ROUNDINGS[dtype] for e in naive_errors]
        self.timed = TimedShape(op, case)

    def __call__(self, variant: Variant) -> Verdict:
        relative_errors = errors(results(self.op, variant, self.problem, self.exact), self.truth)
        if len(relative_errors) != len(self.allowed):
            return Verdict(relative_errors, "outputs of other shapes than the truth's", len(self.problem.x))
        bad = [(e, a) for e, a in zip(relative_errors, self.allowed, strict=True) if not e <= a]
        if bad:
            return Verdict(
                relative_errors, f"relative error {bad[0][0]:.1e}, allowed {bad[0][1]:.1e}", len(self.problem.x)
            )
        return Verdict(relative_errors, self.timed.why_wrong(variant), len(self.timed.problem.x))


class TimedShape:
    """Holds variants to fp64 truth at the shape that is timed: every row, and sums over all."""

    def __init__(self, op: Op, case: Case) -> None:
        self.op, self.n = op, case.n
        self.problem, self.exact, self.truth = self.made(case, case.n)
        fits = case.n
        while fits > CHECK_ROWS and not naive_fits(fits, case.device):
            fits //= 2  # its errors hardly depend on N
        problem, exact, truth = (self.problem, self.exact, self.truth) if fits == case.n else self.made(case, fits)
        naive_errors = self.errors(results(op, plain(op), problem, exact), truth)
        ceilings = [ROW_CEILING if isinstance(t, whole.Rows) else CEILING[case.torch_dtype] for t in truth]
        roundings = TIMED_ROUNDINGS[case.torch_dtype]
        self.allowed = [min(TIMED_TIMES_NAIVE * e, c) + roundings for e, c in zip(naive_errors, ceilings, strict=True)]

    def made(self, case: Case, n: int) -> tuple[Problem, Problem, whole.Expected]:
        """(a problem of n rows, the same in fp64, what must come out)."""
        problem = self.op.inputs(case.shape._replace(n=n), case.torch_dtype, torch.device(case.device), 12345)
        exact = problem.double()
        if self.op.whole is not None:
            return problem, exact, self.op.whole(exact, case.torch_dtype)
        truth = results(self.op, self.op.truth, exact, exact)
        return problem, exact, [whole.Rows(t) if t.dim() and len(t) == n else t for t in truth]

    @staticmethod
    def errors(outputs: list[Tensor], truth: whole.Expected) -> list[float]:
        return [whole.error(f, t) for f, t in zip(outputs, truth, strict=True)]

    def why_wrong(self, variant: Variant) -> str | None:
        outputs = results(self.op, variant, self.problem, self.exact)
        if len(outputs) != len(self.truth):
            return f"at N = {self.n}: {len(outputs)} results, expected {len(self.truth)}"
        for k, (e, allowed) in enumerate(zip(self.errors(outputs, self.truth), self.allowed, strict=True)):
            if not e <= allowed:
                of = "the worst row of " if isinstance(self.truth[k], whole.Rows) else ""
                return f"at N = {self.n}: {of}result {k} is off by {e:.1e}, allowed {allowed:.1e}"
        return None


def plain(op: Op) -> Variant:
    """Plain PyTorch's variant, which every op has."""
    naive = op.variants["naive"]()
    assert naive is not None
    return naive


def naive_fits(n: int, device: str) -> bool:
    """Whether plain PyTorch's matrices of n rows fit the memory that is free."""
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(torch.device(device))[0]
    else:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    return NAIVE_MATRICES * n * n * 4 <= free


def turn(op: Op, case: Case, variant: Variant, problem: Problem) -> tuple[float, float]:
    """(forward ms, backward ms) of one step."""
    for leaf in problem.leaves():
        leaf.grad = None
    outputs = []
    stages = [lambda: outputs.append(forward(op, variant, problem))]
    if op.differentiable:
        stages.append(lambda: backward(problem, outputs[0]))
    stage_ms = clock_of(case).time_ms(*stages, of=(case, variant))
    return stage_ms[0], stage_ms[1] if op.differentiable else 0.0


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
