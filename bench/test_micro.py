"""The CPU micro-benchmarks for pytest-benchmark: ``pytest bench/``, with its ``--benchmark-compare`` and the rest.

One group per op and size; in a group, plain PyTorch beside ours. Each is held to fp64 truth before it is timed.
"""

import pytest
import torch

from bench import measure
from bench.measure import Case
from bench.ops import OPS

CASES = [
    Case(op, n, 512, 32, "float32", "cpu")
    for op, sizes in {
        "triplet": (128, 1024),
        "hardest_negatives": (128, 1024),
        "info_nce": (128, 1024),
        "sigmoid": (128, 1024),
        "sum_hinge": (128, 1024),
        "distillation": (128, 1024),
        "top_scores": (1024,),
        "project": (1024, 8192),
        "pair_scores": (1024, 8192),
    }.items()
    for n in sizes
]


@pytest.mark.parametrize("name", ["ours", "naive"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case, name, benchmark):
    """Forward, and backward where there is one."""
    op = OPS[case.op]
    variant = op.variants[name]()
    if variant is None:
        pytest.skip(f"no {case.op} of ours in this version")
    verdict = measure.Checker(op, case)(variant)
    assert verdict.why_wrong is None, verdict.why_wrong
    problem = op.inputs(case.shape, case.torch_dtype, torch.device("cpu"), 0)
    benchmark.group = str(case)

    def step():
        for leaf in problem.leaves():
            leaf.grad = None
        output = measure.forward(op, variant, problem)
        if op.differentiable:
            measure.backward(problem, output)

    benchmark(step)
