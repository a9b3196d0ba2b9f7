"""No launch asks for more programs than CUDA allows, whatever the sizes: on tensors without values, of any size.

A grid has 2³¹ - 1 programs along its first dimension and 65,535 along the others. That programs still make what they
should is for the tests of each kernel, under the interpreter.
"""

import device_ops
import pytest
import torch
from kernel_modules import MODULES

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from gssf_kernels import plan
from gssf_kernels.device_path import DEVICE, DevicePath, device_path

MOST = (2**31 - 1, 65_535, 65_535)
MILLION = 1_000_000


def zeros(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def half(*shape):
    return zeros(*shape, dtype=torch.bfloat16)


def places(count):
    return zeros(count, dtype=torch.int64)


def lines(*sizes):
    return [zeros(size) for size in sizes]


def chunk(rows, columns):
    """What the passes over a chunk of scores take."""
    s, one, row, col = zeros(rows, columns), zeros(), zeros(rows), zeros(columns)
    scaled = ("scaled", [], None, None, None, None, 0, False)
    return {
        "logsumexp_pass": (s, one, *scaled, row, row, col, col),
        "softmax_pass": (s, one, *scaled, row, row, row, col, col, col, row),
        "score_sums_pass": (s, one, one, row, row, col, col, places(rows), places(columns), 0, "softplus", "negate",
                            True, zeros(3, rows), zeros(2, columns)),
        "relation_pass": (s, s, s, one, "abs", True, zeros(3, rows)),
    }  # fmt: skip


def passes(rows, columns):
    for name, arguments in chunk(rows, columns).items():
        getattr(device_ops, name)(*arguments)


def projections(n, d, width=32, normalize=False):
    """All of them, of n rows of d channels in blocks of width."""
    x, weights = half(n, d), (half(d), half(d // width, width, width), places(d), normalize)
    every = [True] * 4
    device_ops.project(x, None, *weights)
    device_ops.project_backward_of_x(x, x, *weights, every[:3])
    device_ops.project(x, x, *weights, True)
    device_ops.project_backward(x, x, zeros(n), x, x, *weights, every)
    device_ops.project_backward_of_pairs(zeros(n), places(n), places(n), x, x, *weights, every[:3])
    device_ops.hardest_negatives_backward(*lines(n, n, n), places(n), places(n), x, x, *weights, every)


def gathers(n, d):
    """Scores of pairs and their gradients."""
    x, index, both = half(n, d), places(n), [True, True]
    device_ops.pair_scores(x, x, index, index)
    device_ops.pair_scores_backward(zeros(n), index, index, x, x, both)
    device_ops.backward_without_metric(*lines(n, n, n), index, index, x, x, both)
    device_ops.batch_hard_backward(zeros(), *lines(n, n), index, index, x, 0.2, "mean")
    device_ops.hardest_positives(x, index)


def sweeps(make, n, m, d):
    a, b = make(n, d), make(m, d)
    device_ops.hardest_negatives(a, b, places(n), places(m))
    device_ops.relative_negatives(a, b, None, None, zeros(), 10.0)


def row_panels(n, m, d):
    a, b, both = half(n, d), half(m, d), [True, True]
    device_ops.logsumexp_scores(a, b, None, 2.0)
    device_ops.logsumexp_scores_backward(*lines(n, m, min(n, m)), a, b, None, 2.0, *lines(n, n, m, m), [True] * 3)
    device_ops.total(a, b, None, None, 1.0, 0.0, None, None, "softplus", "negate", False, share=0.5, needs=both)


def fragments(n, m, d, regions=36, words=32):
    """Late interaction, with stored places and without."""
    a, b, masks = half(n, regions, d), half(m, words, d), (None, None)
    device_ops.late_interaction(a, b, *masks, True, False)
    device_ops.late_interaction_backward(zeros(n, m), None, a, b, *masks, True, [True, True])


def search(n, m, d, k, columns=True):
    """The k best of rows and, with columns, of columns, in as many sweeps as the lists of each need."""
    device_ops.top_scores(half(n, d), half(m, d), k, None, None, False, None, columns)


def small(n, m, d):
    """What takes few scores, of many channels or many rows of one side."""
    a, b, both = zeros(n, d), zeros(m, d), [True, True]
    device_ops.hardest_terms(a, b, None, None, "hinge", [0.2], "none")
    device_ops.hardest_terms(a, b, None, None, "goal nca sig", [1.0, 2.0, 3.0, 0.5], "none")
    device_ops.info_nce(a, b, None, 2.0, None, None, 0.1, True, "none")
    device_ops.info_nce_backward(
        zeros(n), a, b, None, 2.0, None, None, 0.1, True, "none", *lines(n, n, m, m, 0, 0), [True] * 3
    )
    term = (None, None, 1.0, 0.0, None, None, "hinge", "exclude", True)
    device_ops.total(a, b, *term, share=0.5, needs=both)
    device_ops.rows(a, b, *term)
    device_ops.rows_backward(zeros(n), a, b, *term, positive_score=zeros(n), needs=both)


def square(n, d):
    """And of few rows of one side."""
    x = zeros(n, d)
    device_ops.batch_hard(x, places(n), 0.2, "none")
    device_ops.relation_loss(x, x, x, None, None, 0.5, 0.5, [1.0, 1.0, 1.0], "abs", True)
    device_ops.hardest_terms(x, x, None, None, "goal nca sig_ms", [1.0, 2.0, 3.0, 0.5, 0.1, 0.1], "none")


def formulas(n):
    """Terms of so many anchors."""
    line = zeros(n)
    for formula, statistics, constants in (
        ("hinge", [line] * 3, [0.2]),
        ("info_nce", [line] * 6, []),
        ("goal nca sig", [line] * 3, [1.0, 2.0, 3.0, 0.5]),
    ):
        device_ops.anchor_terms(formula, statistics, constants, "none")
        device_ops.anchor_terms_backward(line, formula, statistics, constants, "none")
    device_ops.anchor_terms_backward(line, "weights", [zeros(4, n), line], [], "none")


def scaled(n, d):
    gradient = zeros(n, d)
    device_ops.total_backward(
        *(zeros() for _ in range(3)), gradient, gradient, gradient, gradient, None, None, 1.0, 0.5
    )


CASES = {
    "passes over many columns": lambda: passes(16, 5 * MILLION),
    "passes over more": lambda: passes(16, 2**31 - 64),
    "passes over many rows": lambda: passes(1 << 26, 1),
    "projections of many channels": lambda: projections(64, 5 * MILLION),
    "projections of many channels to unit length": lambda: projections(2000, 5 * MILLION, normalize=True),
    "projections of many rows": lambda: projections(3 * MILLION, 64),
    "projections in one block": lambda: projections(64, 46_336, 46_336),
    "gathers of many channels": lambda: gathers(2000, 9 * MILLION),
    "gathers of many rows": lambda: gathers(50 * MILLION, 300),
    "gathers of more": lambda: gathers(1 << 30, 64),
    "mining among many rows": lambda: sweeps(half, 4096, 1 << 30, 64),
    "mining of many rows": lambda: sweeps(half, 200_000, 200_000, 64),
    "certified mining among many rows": lambda: sweeps(zeros, 4096, 1 << 26, 64),
    "dense losses among many rows": lambda: row_panels(256, 1 << 28, 64),
    "dense losses of many rows": lambda: row_panels(100_000, 5 * MILLION, 64),
    "few scores of many channels": lambda: small(64, 64, 9 * MILLION),
    "few scores of one row": lambda: small(1, plan.SMALL, 1024),
    "few scores of one side": lambda: square(512, 9 * MILLION),
    "late interaction of many pictures": lambda: fragments(3 * MILLION, 16, 64),
    "late interaction of many captions": lambda: fragments(16, 3 * MILLION, 64),
    "late interaction of many channels": lambda: fragments(64, 64, 5 * MILLION),
    "late interaction of many of both": lambda: fragments(1 << 18, 1 << 16, 64, words=200),
    "search of many rows among many": lambda: search(2 * MILLION, 3 * MILLION, 64, 10),
    "search among many rows": lambda: search(64, 1 << 30, 64, 200, columns=False),  # columns would be 21,000 launches
    "search of many columns": lambda: search(64, 1 << 22, 64, 200),
    "search of many channels": lambda: search(64, 64, 9 * MILLION, 10),
    "formulas": lambda: formulas(2**31 - 4096),
    "gradients scaled": lambda: scaled(1 << 31, 512),
}


@pytest.fixture(scope="module")
def asked():
    """{case: the (kernel, grid) of its launches}"""
    results: dict[str, list] = {}
    for name, call in CASES.items():
        launched = results.setdefault(name, [])

        def note(path, kernel, *arguments, grid, warmup, launched=launched, **options):
            launched.append((kernel.__name__, grid))

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(DevicePath, "note", note)
            with device_path():
                call()
    return results


@pytest.mark.parametrize("name", CASES)
def test_every_grid_is_within_what_cuda_allows(name, asked):
    assert asked[name]
    for kernel, grid in asked[name]:
        assert all(0 < size <= most for size, most in zip(grid, MOST, strict=False)), (kernel, grid)


def test_sizes_are_such_that_a_grid_could_fail(asked):
    """More than 65,535 of each kernel that has a program for every tile of something."""
    largest: dict[str, int] = {}
    for launched in asked.values():
        for kernel, grid in launched:
            largest[kernel] = max(largest.get(kernel, 0), *grid)
    by_tiles = {name for name in largest if name.endswith(("project_kernel", "sides_kernel", "gradient_kernel"))}
    by_tiles |= {
        "late_interaction_kernel",
        "segment_sum_kernel",
        "scan_kernel",
        "batch_scan_kernel",
        "chunk_kernel",
        "relation_pass_kernel",
    }
    assert all(largest[name] >= 65_535 for name in by_tiles), largest


def test_every_kernel_is_asked_for(asked):
    names = {n for module in MODULES for n, f in vars(module).items() if isinstance(f, JITFunction)}
    assert {kernel for launched in asked.values() for kernel, _ in launched} == {
        name for name in names if name.endswith("_kernel")
    }


def test_more_weights_than_places_reach_are_declined():
    """Of 2³¹ and more, whose places in a tile are 32-bit: plain PyTorch takes them."""
    with device_path() as path:
        x, weights = half(64, 46_341), (None, half(1, 46_341, 46_341), None, False)
        needs, indices = [True] * 4, [places(64)] * 2
        for name, arguments in (
            ("project", (x, None, *weights)),
            ("project_backward", (x, None, zeros(0), x, None, *weights, needs)),
            ("project", (x, x, *weights)),
            ("project_backward", (x, x, zeros(64), x, x, *weights, needs)),
            ("hardest_negatives_backward", (*lines(64, 64, 64), *indices, x, x, *weights, needs)),
        ):
            assert device_ops.route(name, *arguments) == "composite"
        assert not path.launches
