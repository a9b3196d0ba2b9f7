"""top_scores: against loops over single scores in fp64, on the CPU, in plain PyTorch and by Triton."""

import sys
from pathlib import Path

import device_ops
import pytest
import torch
from interpreted import DEVICE, DTYPES
from triton_checks import INF, NAN, few

import gssf_kernels as gk
from gssf_kernels.ops.top_scores import TopScoresCall, merged

ROOT = Path(__file__).parents[2]
# (N, M, D, k): one of everything; fewer candidates than k; more rows and columns than a tile of the CPU.
SHAPES = [(1, 1, 1, 1), (3, 5, 4, 7), (20, 33, 17, 5), (40, 150, 9, 40)]
LARGE = (530, 1100, 12, 9)
LEAVES_OUT = ["nothing", "ids", "self", "limit", "all"]


def problem(n, m, d, k, leaves_out, columns, seed=0):
    """A call on whole numbers: scores are exact, and many are equal."""
    g = torch.Generator().manual_seed(seed + n * m + k)
    a, b = (torch.randint(-2, 3, (count, d), generator=g).float() for count in (n, m))
    call = TopScoresCall(a, b, k, columns=columns)
    if leaves_out in ("ids", "all"):
        call = call._replace(**{name: torch.randint(0, 4, (len(t),), generator=g) for name, t in
                                (("a_ids", a), ("b_ids", b))})  # fmt: skip
    if leaves_out in ("self", "all"):
        call = call._replace(exclude_self=True)
    if leaves_out in ("limit", "all"):
        call = call._replace(row_limit=torch.randint(-1, 5, (n,), generator=g).float())
    return call


def candidates(call):
    """[N, M] scores in fp64, None for those that are left out."""
    s = (call.a.double() @ call.b.double().T).tolist()
    a_ids, b_ids, limit = (None if t is None else t.tolist() for t in (call.a_ids, call.b_ids, call.row_limit))
    for i, row in enumerate(s):
        for j in range(len(row)):
            same_id = a_ids is not None and a_ids[i] == b_ids[j]
            too_large = limit is not None and row[j] > limit[i]
            if same_id or too_large or (call.exclude_self and i == j):
                row[j] = None
    return s


def best(rows, k):
    """(values, indices), sorted one by one."""
    values, indices = [], []
    for row in rows:
        order = sorted((-score, j) for j, score in enumerate(row) if score is not None)[:k]
        values.append([-score for score, _ in order] + [-INF] * (k - len(order)))
        indices.append([j for _, j in order] + [-1] * (k - len(order)))
    return torch.tensor(values).double(), torch.tensor(indices)


def loops(call):
    rows = candidates(call)
    columns = [[row[j] for row in rows] for j in range(len(call.b))]
    return *best(rows, call.k), *(best(columns, call.k) if call.columns else ())


def check(results, call, expected):
    if not call.columns:
        assert results[2].shape == results[3].shape == (0, call.k)
    for ours, right in zip(results, expected, strict=False):
        assert torch.equal(ours.cpu().double(), right.double())


def op(*arguments):
    return torch.ops.gssf.top_scores(*arguments)


def composite(*arguments):
    return device_ops.composite("top_scores", *arguments)


CALLS = [(leaves_out, columns) for leaves_out in LEAVES_OUT for columns in (False, True)]
both_sides = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns too"])


@pytest.mark.parametrize("run", [op, composite])
@pytest.mark.parametrize(
    ("shape", "leaves_out", "columns"),
    [*((shape, *rest) for shape in SHAPES for rest in CALLS), (LARGE, "nothing", True), (LARGE, "all", True)],
)
def test_on_the_cpu(shape, leaves_out, columns, run):
    call = problem(*shape, leaves_out, columns)
    expected = loops(call)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        limit = call.row_limit
        if limit is not None and dtype == torch.float64:
            limit = limit.double()
        check(run(*call._replace(a=call.a.to(dtype), b=call.b.to(dtype), row_limit=limit)), call, expected)


@pytest.mark.parametrize("leaves_out", LEAVES_OUT)
def test_the_definition(leaves_out):
    """Whole numbers: a score that equals the limit stays."""
    call = problem(20, 33, 6, 5, leaves_out, True)
    ids = {"a_ids": call.a_ids, "b_ids": call.b_ids, "exclude_same_id": call.a_ids is not None}
    options = ids | {"exclude_self": call.exclude_self, "max_score": call.row_limit, "columns": True}
    check(gk.reference.top_scores(call.a, call.b, call.k, **options), call, loops(call))


@pytest.mark.usefixtures("chunked")
def test_the_composite_in_chunks_of_rows():
    """Columns are merged, with the places that their rows have in all of a."""
    for leaves_out in ("nothing", "all"):
        call = problem(45, 33, 17, 5, leaves_out, True)
        check(composite(*call), call, loops(call))


@few
@pytest.mark.parametrize(
    ("shape", "leaves_out", "columns"),
    [
        ((1, 1, 1, 1), "nothing", True),
        ((3, 5, 4, 7), "all", True),
        ((20, 33, 17, 5), "ids", True),
        ((20, 33, 17, 5), "limit", True),
        ((17, 33, 4, 4), "self", False),
        ((20, 150, 9, 40), "nothing", False),
        ((20, 150, 9, 40), "all", False),
    ],
)
def test_by_triton(shape, leaves_out, columns):
    """k = 5 takes one list of each row, k = 40 three sweeps of several splits."""
    call = problem(*shape, leaves_out, columns)
    expected = loops(call)
    for dtype in DTYPES:
        moved = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in call]
        check(device_ops.top_scores(moved[0].to(dtype), moved[1].to(dtype), *moved[2:])[:4], call, expected)


@pytest.mark.parametrize("run", [op, composite])
def test_wide_rows_on_the_cpu(run):
    """b is packed in chunks of a single tile's columns."""
    call = problem(9, 1300, 8192, 30, "all", True)
    expected = loops(call)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        limit = call.row_limit.double() if dtype == torch.float64 else call.row_limit
        check(run(*call._replace(a=call.a.to(dtype), b=call.b.to(dtype), row_limit=limit)), call, expected)


def hard(k, d=6, m=90):
    """Rows of NaN, of infinities, of -0, all equal and all the best in one place."""
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(8, d, generator=g), torch.randn(m, d, generator=g)
    b[5, 0], b[50, 0], b[7, 1], a[6] = NAN, INF, -INF, 0
    a[1, 2], a[2], a[3] = NAN, 0, -0.0
    b[60:80] = b[60]
    a[4] = b[60] * 100
    a[0, :2], a[4, :2], a[5, :2] = 0.5, 1, 0.0
    return TopScoresCall(a, b, k, columns=True)


def assert_as_defined(results, call):
    expected = gk.reference.top_scores(call.a, call.b, call.k, columns=True)
    for ours, right in zip(results, expected, strict=False):
        torch.testing.assert_close(ours.cpu(), right, equal_nan=True)


@pytest.mark.parametrize("k", [1, 4, 30, 100])
def test_what_is_no_number_on_the_cpu(k):
    assert_as_defined(op(*hard(k)), hard(k))
    assert_as_defined(composite(*hard(k)), hard(k))


@few
@pytest.mark.parametrize("k", [1, 4, 30])
def test_what_is_no_number_by_triton(k):
    call = hard(k)
    assert_as_defined(device_ops.top_scores(call.a.to(DEVICE), call.b.to(DEVICE), *call[2:])[:4], call)


@pytest.mark.parametrize("rows", ["random", "duplicated", "huge", "tiny"])
def test_against_topk_in_fp64(rows):
    """Values to rounding; places, but for those that rounding may exchange."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 40, generator=g), torch.randn(1200, 40, generator=g)
    if rows == "duplicated":
        b = b[torch.randint(0, 100, (1200,), generator=g)]
    scale = {"huge": 1e17, "tiny": 1e-17}.get(rows, 1.0)
    a, b = a * scale, b * scale
    s = a.double() @ b.double().T
    values, indices = gk.top_scores(a, b, 25)
    size = float(s.abs().max())
    assert float((values - s.topk(25).values).abs().max()) < 1e-6 * size
    assert float((values - s.gather(1, indices)).abs().max()) < 1e-6 * size
    assert all(len(set(row)) == 25 for row in indices.tolist())
    ties = values[:, 1:] == values[:, :-1]
    assert (indices[:, 1:] > indices[:, :-1])[ties].all()  # equal rows tie exactly, lowest first
    assert ties.any() == (rows == "duplicated")


def test_threads_change_nothing():
    call = problem(700, 1300, 20, 30, "all", True)
    call = call._replace(a=call.a + 1 / 3, b=call.b - 1 / 7)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(op(*call)[:4])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@both_sides
def test_gradients(columns):
    """Those of the same scores, picked out of the matrix; places without a score have none."""
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 7, generator=g, dtype=torch.float64, requires_grad=True) for n in (9, 6))
    results = gk.top_scores(a, b, 8, exclude_self=True, columns=columns)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in results[::2]]
    weights = [torch.where(t.isinf(), torch.nan, w) for t, w in zip(results[::2], weights, strict=True)]
    ours = torch.autograd.grad(results[::2], (a, b), weights)
    s = a @ b.T
    picked = [s.gather(1, results[1].clamp_min(0))]
    if columns:
        picked.append(s.T.gather(1, results[3].clamp_min(0)))
    weights = [torch.where(t.isinf(), 0, w) for t, w in zip(results[::2], weights, strict=True)]
    for x, y in zip(ours, torch.autograd.grad(picked, (a, b), weights), strict=True):
        torch.testing.assert_close(x, y)
    (da,) = torch.autograd.grad(gk.top_scores(a, b, 2).values.sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(da.sum(), b)


def test_metric_and_cosines():
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(9, 8, generator=g), torch.randn(11, 8, generator=g)
    metric = gk.StructuredSimilarity(8, 4)
    with torch.no_grad():
        metric.blocks.copy_(torch.randn(metric.blocks.shape, generator=g))
    for options in ({"metric": metric}, {"normalize": True}):
        ours, right = gk.top_scores(x, y, 3, **options), gk.reference.top_scores(x, y, 3, **options)
        torch.testing.assert_close(ours.values, right.values)
        assert torch.equal(ours.indices, right.indices)


def test_no_rows_and_no_candidates():
    for n, m in ((0, 4), (3, 0), (0, 0)):
        values, indices, col_values, col_indices = gk.top_scores(torch.ones(n, 2), torch.ones(m, 2), 2, columns=True)
        assert (values == -INF).all()
        assert (indices == -1).all()
        assert values.shape == indices.shape == (n, 2)
        assert (col_values == -INF).all()
        assert col_indices.shape == (m, 2)


def test_merged_lists():
    values = torch.tensor([[3.0, 1.0, 3.0, NAN, -INF], [2.0, 2.0, 2.0, 1.0, 0.0]])
    indices = torch.tensor([[8, 2, 4, 9, -1], [7, 3, 5, 1, 2]])
    value, index = merged(values, indices, 3)
    torch.testing.assert_close(value, torch.tensor([[NAN, 3.0, 3.0], [2.0, 2.0, 2.0]]), equal_nan=True)
    assert index.tolist() == [[9, 4, 8], [3, 5, 7]]
    value, index = merged(values[:, :2], indices[:, :2], 3)
    assert index.tolist() == [[8, 2, -1], [3, 7, -1]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected a whole number >= 1, got 0"),
        ({"k": 1025}, ValueError, "k: expected at most 1024, got 1025"),
        ({"k": 2.5}, TypeError, "k: expected a whole number"),
        ({"b": torch.ones(5, 3)}, ValueError, "b: expected 4 columns"),
        ({"b": torch.ones(5, 4).double()}, (TypeError, ValueError), "b: expected"),
        ({"a_ids": torch.arange(3)}, ValueError, "b_ids: expected ids too"),
        ({"a_ids": torch.arange(2), "b_ids": torch.arange(5)}, ValueError, r"a_ids: expected shape \[3\]"),
        ({"a_ids": torch.arange(3), "b_ids": torch.arange(5)}, ValueError, "exclude_same_id=True"),
        ({"exclude_same_id": True}, ValueError, "a_ids, b_ids: expected ids"),
        ({"exclude_self": 1}, TypeError, "exclude_self: expected True or False"),
        ({"columns": None}, TypeError, "columns: expected True or False"),
        ({"max_score": NAN}, ValueError, "max_score: expected a finite number"),
        ({"max_score": torch.ones(5)}, ValueError, r"max_score: expected a number or shape \[3\]"),
        ({"max_score": "1"}, TypeError, "max_score: expected a number"),
        ({"metric": 3}, TypeError, "metric: expected"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"a": torch.ones(3, 4), "b": torch.ones(5, 4), "k": 2, **change}
    with pytest.raises(error, match=message):
        gk.top_scores(**arguments)


def test_explained():
    """Without the extension, too, and on a card that is not there."""
    x, y = torch.randn(300, 64), torch.randn(2000, 64)
    on_cpu = gk.explain(gk.top_scores, x, y, 10)
    assert on_cpu.forward.flops == 2 * 300 * 2000 * 64
    on_card = gk.explain(gk.top_scores, x.to("meta"), y.to("meta"), 200, columns=True)
    assert on_card.forward.flops == 2 * 2 * 300 * 2000 * 64
    assert on_card.forward.ops[0].route == "sweep"
    ranked = gk.explain(gk.ranks, x, y)
    assert ranked.forward.ops[-1].name == "score_counts"
    assert ranked.forward.flops == 2 * 300 * 2000 * 64


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_memory(run_fresh):
    """In a fresh process: 4096 x 65536 scores are 1 GiB, and b 64 MiB.

    Held are 16 MiB of b, packed (and on bf16 units as much again, rounded), tiles and results.
    """
    code = """
import torch
import gssf_kernels as gk
from bench.clock import CpuClock
torch.set_num_threads(2)
a, b = torch.randn(4096, 256), torch.randn(65536, 256)
gk.top_scores(a[:2], b[:2], 2)
print(CpuClock(torch.device("cpu")).peak_mib(lambda: gk.top_scores(a, b, 10)))
"""
    done = run_fresh(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    copies = 1 if gk.backends()["hardest_negatives"]["certified"] == "no" else 2
    assert float(done.stdout) < copies * 16 + 12
