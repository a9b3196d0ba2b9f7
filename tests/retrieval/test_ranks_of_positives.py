"""ranks, and the counts they are made of: against loops over single scores, on the CPU, in plain PyTorch, by Triton."""

import device_ops
import pytest
import torch
from interpreted import DEVICE, DTYPES
from triton_checks import INF, NAN, few

import gssf_kernels as gk
from gssf_kernels import backends
from gssf_kernels.ops import pairing
from gssf_kernels.ops.score_counts import ScoreCountsCall

# (N, M, D): one of everything; nothing on an edge of a tile; more rows and columns than a tile of the CPU.
SHAPES = [(1, 1, 1), (3, 5, 4), (20, 33, 17), (530, 620, 8)]
PAIRS = ["rows", "ids", "listed", "listed with ids"]


def problem(n, m, d, pairs, seed=0):
    """(x, y, options) of whole numbers: scores are exact, and many are equal. Some rows have no positive."""
    g = torch.Generator().manual_seed(seed + n * m)
    x, y = (torch.randint(-2, 3, (count, d), generator=g).float() for count in (n, m))
    options = {}
    if pairs in ("ids", "listed with ids"):
        groups = max(n // 3, 1)
        options = {"x_ids": torch.randint(0, groups + 1, (n,), generator=g)}
        options["y_ids"] = torch.randint(0, groups, (m,), generator=g)
    if pairs.startswith("listed"):
        count = 2 * n + 1
        rows, cols = (torch.randint(0, size, (count,), generator=g) for size in (n, m))
        options["pairs"] = torch.stack((rows, cols), 1)
    return x, y, options


def loops(x, y, options, exclude_self):
    """{(i, j): (pessimistic, optimistic)} of positives, and of every row's best; one score at a time."""
    s = (x.double() @ y.double().T).tolist()
    n, m = len(x), len(y)
    x_ids, y_ids = options.get("x_ids"), options.get("y_ids")
    same = [[x_ids is not None and bool(x_ids[i] == y_ids[j]) for j in range(m)] for i in range(n)]
    if "pairs" in options:
        listed = {tuple(pair) for pair in options["pairs"].tolist()}
    elif x_ids is not None:
        listed = {(i, j) for i in range(n) for j in range(m) if same[i][j]}
    else:
        listed = {(i, i) for i in range(n)}
    left_out = {(i, j) for i in range(n) for j in range(m) if same[i][j]} | listed
    if exclude_self:
        left_out |= {(i, i) for i in range(min(n, m))}
        listed -= {(i, i) for i in range(n)}
    every = {}
    for i, j in sorted(listed):
        negatives = [s[i][q] for q in range(m) if (i, q) not in left_out]
        before = [q for q in range(m) if (i, q) in listed and (s[i][q] > s[i][j] or (s[i][q] == s[i][j] and q < j))]
        counts = (sum(v >= s[i][j] for v in negatives), sum(v > s[i][j] for v in negatives))
        every[i, j] = tuple(1 + len(before) + count for count in counts)
    best = []
    for i in range(n):
        first = [rank for (row, _), rank in every.items() if row == i]
        best.append(min(first, key=lambda rank: rank[0]) if first else (0, 0))
    return every, best


def transposed(options):
    """The same with x and y exchanged."""
    out = {{"x_ids": "y_ids", "y_ids": "x_ids"}.get(name, name): t for name, t in options.items()}
    return out | ({"pairs": options["pairs"].flip(1)} if "pairs" in options else {})


@pytest.mark.parametrize("exclude_self", [False, True], ids=["", "without self"])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda shape: "x".join(map(str, shape)))
def test_against_loops(shape, pairs, exclude_self):
    x, y, options = problem(*shape, pairs)
    every, best = loops(x, y, options, exclude_self)
    rows = x, y
    if pairs == "rows":  # columns past N have no positive
        flipped = {"pairs": torch.stack((torch.arange(len(x)),) * 2, 1)}
        every_col, best_col = loops(y, x, flipped, exclude_self)
    else:
        every_col, best_col = loops(y, x, transposed(options), exclude_self)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x, y = (t.to(dtype) for t in rows)
        result = gk.ranks(x, y, **options, exclude_self=exclude_self)
        assert list(zip(*(t.tolist() for t in result[:2]), strict=True)) == best
        assert list(zip(*(t.tolist() for t in result[2:]), strict=True)) == best_col
        for segments, right in zip(
            gk.ranks(x, y, **options, exclude_self=exclude_self, every_positive=True), (every, every_col), strict=True
        ):
            anchors = torch.repeat_interleave(torch.arange(len(segments.starts) - 1), segments.starts.diff())
            places = zip(anchors.tolist(), segments.positives.tolist(), strict=True)
            ranks = zip(segments.pessimistic.tolist(), segments.optimistic.tolist(), strict=True)
            assert dict(zip(places, ranks, strict=True)) == right


def as_defined(result, right):
    for ours, defined in zip(result, right, strict=True):
        if isinstance(ours, tuple):
            as_defined(ours, defined)
        else:
            assert torch.equal(ours.cpu(), defined)


@pytest.mark.parametrize("every_positive", [False, True], ids=["best", "every"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_many_tiles(pairs, every_positive, monkeypatch):
    x, y, options = problem(*SHAPES[3], pairs)
    right = gk.reference.ranks(x, y, **options, every_positive=every_positive)
    as_defined(gk.ranks(x, y, **options, every_positive=every_positive), right)
    monkeypatch.setattr(pairing, "MOST_LISTED", 7)  # positives in many lists
    as_defined(gk.ranks(x, y, **options, every_positive=every_positive), right)


@pytest.mark.parametrize("every_positive", [False, True], ids=["best", "every"])
@pytest.mark.parametrize("pairs", ["rows", "ids", "listed with ids"])
def test_wide_rows(pairs, every_positive):
    """y is packed in chunks of a single tile's columns."""
    x, y, options = problem(9, 1300, 8192, pairs)
    right = gk.reference.ranks(x, y, **options, every_positive=every_positive)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        as_defined(gk.ranks(x.to(dtype), y.to(dtype), **options, every_positive=every_positive), right)


@pytest.mark.parametrize("every_positive", [False, True], ids=["best", "every"])
def test_a_score_that_is_no_number_never_helps(every_positive):
    """As a negative's it is ahead of everything, as a positive's behind everything."""
    x = torch.eye(4)
    y = torch.eye(4).repeat(2, 1)
    y[2], y[5, 0] = NAN, INF
    ids = torch.arange(4), torch.arange(8) % 4
    result = gk.ranks(x, y, x_ids=ids[0], y_ids=ids[1], every_positive=every_positive)
    as_defined(result, gk.reference.ranks(x, y, x_ids=ids[0], y_ids=ids[1], every_positive=every_positive))
    if not every_positive:
        # A negative is ahead of rows 0, 1 and 3, s_02 = s_12 = s_32 = NaN. So is y[5] of row 0, s_05 = inf, and of rows
        # 2 and 3, inf * 0. Of row 1 it is a positive, which does not help: the best is s_11 = 1.
        assert result.row_pessimistic.tolist() == [3, 2, 2, 3]
        assert result.col_pessimistic.tolist()[2] == 4


def test_equal_rows_tie_exactly():
    """The bits of a positive's score are those of its equals among negatives, wherever they stand."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 77, generator=g), torch.randn(900, 77, generator=g)
    y[300:600] = y[:300]
    y[600:] = y[:300].flip(0)
    result = gk.ranks(x, y)
    assert torch.equal(result.row_pessimistic - result.row_optimistic, torch.full((300,), 2))


def count_problem(n, m, several, pairs, columns=True, seed=0):
    """A call with levels that many scores equal."""
    g = torch.Generator().manual_seed(seed + n)
    x, y, options = problem(n, m, 5, pairs, seed)

    def levels(anchors):
        sizes = torch.randint(0, 12, (anchors,), generator=g) if several else torch.ones(anchors, dtype=torch.int64)
        each = [torch.randint(-6, 7, (int(size),), generator=g).float().sort().values for size in sizes]
        return torch.cat(each), torch.nn.functional.pad(sizes.cumsum(0), (1, 0)) if several else None

    call = ScoreCountsCall(x, y, *levels(n), *(levels(m) if columns else (None, None)))
    call = call._replace(a_ids=options.get("x_ids"), b_ids=options.get("y_ids"), exclude_self=pairs == "rows")
    if "pairs" in options:
        listed = torch.unique(options["pairs"], dim=0)
        starts = torch.searchsorted(listed[:, 0].contiguous(), torch.arange(n + 1))
        call = call._replace(pair_starts=starts, pair_cols=listed[:, 1].contiguous())
    return call


def counted(call):
    """The counts, a level at a time."""
    s = call.a.double() @ call.b.double().T
    out = torch.zeros(s.shape, dtype=torch.bool)
    if call.a_ids is not None:
        out |= call.a_ids[:, None] == call.b_ids
    if call.exclude_self:
        out |= torch.eye(*s.shape, dtype=torch.bool)
    if call.pair_starts is not None:
        for i in range(len(s)):
            out[i, call.pair_cols[call.pair_starts[i] : call.pair_starts[i + 1]]] = True
    results = []
    for scores, left_out, levels, starts in (
        (s, out, call.row_levels, call.row_starts),
        (s.T, out.T, call.col_levels, call.col_starts),
    ):
        greater, reaching = [], []
        for i in range(len(scores) if levels is not None else 0):
            places = range(i, i + 1) if starts is None else range(int(starts[i]), int(starts[i + 1]))
            counting = scores[i][~left_out[i]]
            greater += [int((counting > levels[place]).sum()) for place in places]
            reaching += [int((counting >= levels[place]).sum()) for place in places]
        results += [greater, reaching]
    return results


@pytest.mark.parametrize("columns", [True, False], ids=["", "rows alone"])
@pytest.mark.parametrize("several", [False, True], ids=["one level", "several"])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("run", ["op", "composite"])
def test_counts_on_the_cpu(run, pairs, several, columns):
    for n, m in ((1, 1), (20, 33), (600, 700)):
        call = count_problem(n, m, several, pairs, columns)
        by = torch.ops.gssf.score_counts if run == "op" else lambda *c: device_ops.composite("score_counts", *c)
        assert [t.tolist() for t in by(*call)] == counted(call)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("pairs", PAIRS)
def test_counts_of_the_composite_in_chunks_of_rows(pairs):
    call = count_problem(45, 33, True, pairs, True)
    assert [t.tolist() for t in device_ops.composite("score_counts", *call)] == counted(call)


@few
@pytest.mark.parametrize("several", [False, True], ids=["one level", "several"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_counts_by_triton(pairs, several):
    for n, m in ((1, 1), (20, 75)):
        call = count_problem(n, m, several, pairs)
        moved = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in call]
        for dtype in DTYPES:
            results = device_ops.score_counts(moved[0].to(dtype), moved[1].to(dtype), *moved[2:])
            assert [t.tolist() for t in results] == counted(call)
    call = call._replace(col_levels=None, col_starts=None)
    moved = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in call]
    assert [t.tolist() for t in device_ops.score_counts(*moved)] == counted(call)


@few
def test_counts_of_what_is_no_number_by_triton():
    a, b = torch.eye(3), torch.eye(3)
    b[1], b[2, 0] = NAN, -INF
    call = ScoreCountsCall(a, b, torch.tensor([-INF, 0.0, INF]), None, torch.tensor([-INF, -INF, 1.0]))
    on_device = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in call]
    results = [t.tolist() for t in device_ops.score_counts(*on_device)]
    assert results == [t.tolist() for t in torch.ops.gssf.score_counts(*call)]
    assert results == [t.tolist() for t in device_ops.composite("score_counts", *call)]


@pytest.mark.parametrize("cols", [[0, 5], [-1, 2], [3, 1]], ids=["past the last", "negative", "descending"])
def test_pairs_that_are_not_listed_as_they_must_be(cols):
    call = ScoreCountsCall(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2))
    call = call._replace(pair_starts=torch.tensor([0, 2, 2]), pair_cols=torch.tensor(cols))
    if backends()["score_counts"]["cpu"] != "cpp":
        pytest.skip("the extension checks them")
    with pytest.raises(ValueError, match="pair_cols"):
        torch.ops.gssf.score_counts(*call)


def test_no_rows_and_no_columns():
    for n, m in ((0, 3), (2, 0), (0, 0)):
        result = gk.ranks(torch.ones(n, 2), torch.ones(m, 2), x_ids=torch.zeros(n).long(), y_ids=torch.zeros(m).long())
        assert [len(t) for t in result] == [n, n, m, m]
        assert not any(t.any() for t in result)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.ones(2, 4)}, ValueError, "y: expected at least the 3 rows of x"),
        ({"y": torch.ones(5, 3)}, ValueError, "y: expected 4 columns"),
        ({"pairs": "rows"}, ValueError, 'pairs: expected None, "ids" or a tensor'),
        ({"pairs": torch.tensor([[0, 5]])}, ValueError, "pairs: expected"),
        ({"pairs": "ids"}, ValueError, "x_ids: expected ids"),
        ({"x_ids": torch.arange(3)}, ValueError, "y_ids: expected ids too"),
        ({"every_positive": 1}, TypeError, "every_positive: expected True or False"),
        ({"exclude_self": 1}, TypeError, "exclude_self: expected True or False"),
        ({"metric": 3}, TypeError, "metric: expected"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        gk.ranks(**{"x": torch.ones(3, 4), "y": torch.ones(5, 4), **change})
