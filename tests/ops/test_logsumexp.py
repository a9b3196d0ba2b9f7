"""logsumexp_scores: formulas written otherwise, chunks, extremes, and its Triton kernels against fp64."""

import device_ops
import pytest
import row_panel_checks
import torch
from dense_cases import INF, NAN, assert_same, normal, value_and_gradients
from interpreted import DEVICE, every_dtype
from kernel_modules import tiles
from triton_checks import ROW_PANEL_DTYPE, both_passes, close, few, fp64_leaves, log_sum_truth, row_panels, two_sides

import gssf_kernels as gk
from gssf_kernels import plan
from gssf_kernels.ops.masks import UNPAIRED


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (40, 33), (70, 1100), (130, 64)])
def test_logsumexp_over_any_chunks(chunked, n, m):
    a, b, scale = normal(n, 9), normal(m, 9), torch.tensor(1.7, dtype=torch.float64)

    def ours(a, b, scale):
        rows, cols = gk.logsumexp_scores(a, b, scale=scale)
        return (rows.sin().sum() + (cols * cols).sum()).tanh()

    def plain(a, b, scale):
        t = torch.einsum("id,jd->ij", a, b) * scale
        return (torch.logsumexp(t, 1).sin().sum() + torch.logsumexp(t, 0).square().sum()).tanh()

    assert_same(value_and_gradients(ours, (a, b, scale)), value_and_gradients(plain, (a, b, scale)), 1e-9, 1e-11)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand(chunked, size):
    a, b = torch.randn(50, 8), torch.randn(90, 8)
    a[:, 0], b[:, 0] = 1, size  # beside ordinary differences
    b[7, 0], a[3, 0] = -size, 5
    got = value_and_gradients(lambda a, b: torch.cat(gk.logsumexp_scores(a, b)).sum(), (a, b))
    t64 = (a.double(), b.double())
    truth = value_and_gradients(lambda a, b: torch.cat(gk.reference.logsumexp_scores(a, b)).sum(), t64)
    plain = value_and_gradients(lambda a, b: torch.cat(gk.reference.logsumexp_scores(a, b)).sum(), (a, b))
    for g, p, t in zip(got, plain, truth, strict=True):
        assert g.isfinite().all()
        assert (g.double() - t).norm() <= 2 * (p.double() - t).norm() + 1.2e-7 * t.norm()


@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_infinities_and_nan_are_those_of_torch(chunked, special):
    """Alone and in whole rows and columns; then by way of the inputs, where 0 · ∞ spreads NaN."""
    t = torch.randn(80, 600)
    t[torch.tensor([0, 17, 79]), 5] = special
    t[20:40, 9] = special
    t[33] = special
    t[:, 30] = special
    t[:, 550] = special
    for got, expected in zip(run_logsumexp_pass(t), (t.logsumexp(1), t.logsumexp(0)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    a, b = torch.randn(80, 3), torch.randn(40, 3)
    a[0, 0] = special
    for got, expected in zip(gk.logsumexp_scores(a, b), gk.reference.logsumexp_scores(a, b), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


SCALED = ("scaled", [], None, None, None, None, 0, False)  # t = κ s, all alike


def run_logsumexp_pass(t, rows=plan.MIN_CHUNK_ROWS):
    """Log-sums of t by its rows chunk by chunk, on whatever backend t's device has."""
    n, m = t.shape
    row_max, row_sum, col_max, col_sum = (t.new_full((size,), fill) for size in (n, m) for fill in (-INF, 0))
    for k in range(0, n, rows):
        part = slice(k, k + rows)
        torch.ops.gssf.logsumexp_pass(t[part], t.new_ones(()), *SCALED, row_max[part], row_sum[part], col_max, col_sum)
    return row_max + row_sum.log(), col_max + col_sum.log()


def test_nothing_to_sum():
    rows, cols = gk.logsumexp_scores(torch.randn(0, 3), torch.randn(4, 3))
    assert rows.shape == (0,)
    assert cols.tolist() == [-INF] * 4
    a = torch.randn(3, 2, requires_grad=True)
    rows, cols = gk.logsumexp_scores(a, torch.randn(0, 2))
    assert rows.tolist() == [-INF] * 3
    rows.sum().backward()
    assert not a.grad.any()


# Small problems, by Triton

SHAPES = [(1, 1, 1), (1, 40, 3), (40, 1, 8), (16, 32, 16), (17, 33, 17), (50, 97, 24), (70, 70, 40)]


def forward(a, b, scale, learnable=True):
    on = [t if t is None else t.to(DEVICE) for t in (a, b, scale if learnable else None)]
    constant = 1.0 if learnable else float(scale)
    return (*on, constant), device_ops.logsumexp_scores(*on, constant)


@few
@every_dtype
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_log_sums(n, m, d, learnable, dtype):
    a, b = two_sides(n, m, d, dtype)
    scale = torch.tensor(0.75)
    _, (row_max, row_log, col_max, col_log, logit_of_pairs, _) = forward(a, b, scale, learnable)
    *_, rows, cols, positive_logit = log_sum_truth(a, b, scale)
    for got, expected in ((row_max + row_log, rows), (col_max + col_log, cols), (logit_of_pairs, positive_logit)):
        assert got.dtype == torch.float32
        assert got.shape == expected.shape
        close(got, expected.detach(), torch.float32, subnormal=True)


@few
@pytest.mark.parametrize("special", [INF, -INF, NAN])
@pytest.mark.parametrize("place", ["row", "both"])
def test_log_sums_of_special_values(place, special):
    a, b = two_sides(40, 70, 8, torch.float32)
    a[17, 0] = special
    if place == "both":
        b[3, 0] = b[33, 0] = special
    a[:, 1], b[:, 1] = 0, 0
    a[20, 1] = b[50, 1] = INF  # 0 times it is NaN
    scale = torch.tensor(0.75)
    _, (row_max, row_log, col_max, col_log, *_) = forward(a, b, scale)
    *_, rows, cols, _ = log_sum_truth(a, b, scale)
    for got, expected in ((row_max + row_log, rows), (col_max + col_log, cols)):
        assert torch.equal(got.isnan().cpu(), expected.isnan())
        close(got, expected.detach(), torch.float32, subnormal=True)


@few
@every_dtype
@pytest.mark.parametrize("lines", ["row", "col", "pair", "row pair", "row col pair"])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_gradients_of_log_sums(n, m, d, lines, dtype):
    check_gradients(n, m, d, lines, dtype, learnable=(n + m) % 2 == 0)


@few
@every_dtype
@pytest.mark.parametrize("n", [1, 16, 33, 50])
def test_gradients_of_log_sums_of_one_side_twice(n, dtype):
    check_gradients(n, n, 24, "row col pair", dtype, twice=True)
    check_gradients(n, n, 24, "row", dtype, twice=True)


@few
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_what_is_not_wanted_is_empty(needs):
    check_gradients(33, 50, 24, "row col pair", torch.float32, needs=needs)


@few
@every_dtype
def test_gradients_below_the_smallest_half(dtype):
    """A mean over many leaves each score little: nothing of it may be lost."""
    check_gradients(33, 50, 24, "row col pair", dtype, needs=(True, False, True), size=1e-6)


def check_gradients(n, m, d, statistics, dtype, twice=False, learnable=True, needs=(True,) * 3, size=1.0):
    a, b = two_sides(n, m, d, dtype, twice)
    if size != 1:  # gradients that halves hold, of scores' gradients that they do not
        a, b = a / 512, b * 512
    scale = torch.tensor(0.75)
    inputs, results = forward(a, b, scale, learnable)
    leaves, t, *outputs = log_sum_truth(a, b, scale)
    names = ("row", "col", "pair")
    grads = [
        size * torch.randn(len(t)) if name in statistics.split() else None
        for name, t in zip(names, outputs, strict=True)
    ]
    sum((t * g.double()).sum() for t, g in zip(outputs, grads, strict=True) if g is not None).backward()
    on = [t if t is None else t.to(DEVICE) for t in grads]
    got = device_ops.logsumexp_scores_backward(*on, *inputs, *results[:4], [*needs])
    for gradient, leaf, need in zip(got, leaves, needs, strict=True):
        if not need or leaf is None:
            assert gradient.numel() == 0
        else:
            assert gradient.shape == leaf.shape
            parts = t.grad * t.detach() / scale if leaf is leaves[2] else None  # which may cancel
            size = None if parts is None else parts.abs().sum()
            close(gradient, leaf.grad, dtype, size=size, subnormal=True)


@few
def test_a_line_of_nothing_gets_no_gradient():
    """All of a row at -inf: its log-sum is -inf, and nothing flows."""
    a, b = torch.full((3, 1), 1.0), torch.full((4, 1), -INF)
    inputs, results = forward(a, b, torch.tensor(1.0))
    assert results[0].tolist() == [-INF] * 3
    assert results[1].tolist() == [-INF] * 3
    drow = torch.ones(3).to(DEVICE)
    _, db, _ = device_ops.logsumexp_scores_backward(drow, None, None, *inputs, *results[:4], [False, True, False])
    assert db.tolist() == [[0.0]] * 4


@few
def test_what_is_too_large_or_empty_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 50)
    for n, m, declined in ((40, 50, False), (40, 51, True), (0, 5, True), (5, 0, True)):
        a, b = two_sides(n, m, 8, torch.float32)
        assert (device_ops.route("logsumexp_scores", a, b, None, 1.0) == "chunks") == declined


@few
def test_the_same_inputs_give_the_same_bits():
    a, b = two_sides(50, 97, 24, torch.float32)
    runs = []
    for _ in range(2):
        inputs, results = forward(a, b, torch.tensor(0.75))
        grads = (results[1], results[3], results[4])
        runs.append((*results, *device_ops.logsumexp_scores_backward(*grads, *inputs, *results[:4], [True] * 3)))
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


# Many scores by row panels, by Triton


@row_panels
@row_panel_checks.every_panel_size
@pytest.mark.parametrize("learnable", [True, False], ids=["learned", "a number"])
@pytest.mark.parametrize(("n", "m", "d"), row_panel_checks.SHAPES)
def test_log_sums_and_gradients_by_row_panels(monkeypatch, n, m, d, learnable, scores):
    monkeypatch.setattr(tiles, "ROW_PANEL_SCORES", scores)
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", scores)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", 2)
    a, b = row_panel_checks.sides(n, m, d)
    scale = torch.tensor(0.7, device=DEVICE)
    number = (scale, 1.0) if learnable else (None, 0.7)
    x, y, kappa = fp64_leaves(a, b, torch.tensor(0.7))
    t = kappa * (x @ y.T)
    expected = t.logsumexp(1), t.logsumexp(0), t.diagonal()

    row_max, row_log, col_max, col_log, positive_logit, kept = device_ops.logsumexp_scores(a, b, *number)
    assert kept.numel() == 0
    row_panel_checks.close(row_max, t.detach().amax(1))
    row_panel_checks.close(col_max, t.detach().amax(0))
    for results, right in zip((row_max + row_log, col_max + col_log, positive_logit), expected, strict=True):
        row_panel_checks.close(results, right.detach())

    grad_out = [torch.randn(len(line), dtype=torch.float64) for line in expected]
    right = torch.autograd.grad(expected, (x, y, kappa), grad_out)
    statistics = row_max, row_log, col_max, col_log
    grads = [g.float().to(DEVICE) for g in grad_out]
    results = device_ops.logsumexp_scores_backward(*grads, a, b, *number, *statistics, [True, True, learnable])
    for ours, truth in zip(results[: 2 + learnable], right, strict=False):
        row_panel_checks.close(ours, truth)
    assert [g.dtype for g in results[:2]] == [ROW_PANEL_DTYPE] * 2
    assert learnable or results[2].numel() == 0


@row_panels
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=["a", "b", "κ alone"])
def test_only_the_gradients_that_are_needed_by_row_panels(monkeypatch, needs):
    monkeypatch.setattr(tiles, "ROW_PANEL_SCORES", 1)
    a, b = row_panel_checks.sides(50, 40, 16)
    scale = torch.tensor(1.5, device=DEVICE)
    *statistics, _, _ = device_ops.logsumexp_scores(a, b, scale, 1.0)
    drow = torch.randn(50, device=DEVICE)
    whole = device_ops.logsumexp_scores_backward(drow, None, None, a, b, scale, 1.0, *statistics, [True] * 3)
    gradients = device_ops.logsumexp_scores_backward(drow, None, None, a, b, scale, 1.0, *statistics, [*needs, True])
    for results, expected, need in zip(gradients, whole, (*needs, True), strict=True):
        assert torch.equal(results, expected) if need else results.numel() == 0


@row_panels
def test_log_sums_of_infinite_rows_and_nan_by_row_panels(monkeypatch):
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", 1)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", 1)
    a, b = (t.abs() for t in row_panel_checks.sides(40, 50, 8))
    a[3], a[20, 0], b[7] = -INF, NAN, INF  # t of row 3 and column 7: -inf
    expected = a.double().cpu() @ b.double().cpu().T
    row_max, row_log, col_max, col_log, *_ = device_ops.logsumexp_scores(a, b, None, 1.0)
    row_panel_checks.close(row_max + row_log, expected.logsumexp(1))
    row_panel_checks.close(col_max + col_log, expected.logsumexp(0))
    a[20, 0] = 1
    b[7] = -INF
    a[3] = 1
    row_max, row_log, col_max, col_log, *_ = device_ops.logsumexp_scores(a, b, None, 1.0)
    assert float(col_max[7] + col_log[7]) == -INF
    row_panel_checks.close(row_max + row_log, (a.double().cpu() @ b.double().cpu().T).logsumexp(1))


# Rows alone, by Triton


@pytest.mark.parametrize("route", [pytest.param("small", marks=few), pytest.param("row panels", marks=row_panels)])
def test_without_statistics_of_columns(monkeypatch, route):
    """Rows' statistics have the same bits as beside those of columns, and gradients as without one of a column."""
    monkeypatch.setattr(tiles, "ROW_PANEL_SCORES", 1)
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", 1)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", 1)
    a, b = row_panel_checks.sides(50, 40, 16)
    scale = torch.tensor(1.5, device=DEVICE)
    rows_alone = ("scaled", [], None, None, None, False, None, False)
    assert device_ops.route("logsumexp_scores", a, b, scale, 1.0, "", *rows_alone) == route
    *both, positive_logit, _ = device_ops.logsumexp_scores(a, b, scale, 1.0)
    *alone, the_same_logit, _ = device_ops.logsumexp_scores(a, b, scale, 1.0, "", *rows_alone)
    assert torch.equal(positive_logit, the_same_logit)
    assert all(torch.equal(*t) for t in zip(both[:2], alone[:2], strict=True))
    assert [t.numel() for t in alone[2:]] == [0, 0]
    drow, dpositive = torch.randn(50, device=DEVICE), torch.randn(40, device=DEVICE)
    sides = drow, None, dpositive, a, b, scale, 1.0
    expected = device_ops.logsumexp_scores_backward(*sides, *both, [True] * 3)
    results = device_ops.logsumexp_scores_backward(*sides, *alone, [True] * 3, None, "", *rows_alone)
    assert all(torch.equal(*t) for t in zip(results, expected, strict=True))


@few
def test_small_problems_keep_no_means():
    a, b = row_panel_checks.sides(50, 40, 16)
    rows_alone = ("scaled", [], None, None, None, False, None, False)
    *_, kept = device_ops.logsumexp_scores(a, b, None, 1.5, "means", *rows_alone)
    assert kept.shape == (0, 16)
    *_, kept, _ = device_ops.info_nce(b, a, None, 1.5, None, None, 0.0, False, "mean", "means")
    assert kept.shape == (0, 16)


@row_panels
def test_more_scores_keep_means(monkeypatch):
    monkeypatch.setitem(plan.KEPT_MEANS, "cuda", 50 * 40 - 1)
    a, b = row_panel_checks.sides(50, 40, 16)
    rows_alone = ("scaled", [], None, None, None, False, None, False)
    assert device_ops.route("logsumexp_scores", a, b, None, 1.5, "means", *rows_alone) == "chunks"
    *_, means = device_ops.logsumexp_scores(a, b, None, 1.5, "means", *rows_alone)
    x, y = a.double().cpu(), b.double().cpu()
    row_panel_checks.close(means, (1.5 * x @ y.mT).softmax(1) @ y)


# The passes over a chunk of scores, by Triton

PASS_SHAPES = [(1, 1), (16, 32), (17, 33), (40, 70), (5, 200), (50, 7)]


def limited(n, m, first, ids, rows=True, cols=True):
    """The arguments by which negatives above limits are left out."""
    g = torch.Generator().manual_seed(n + m)
    labels = [torch.arange(size) % 5 if ids else None for size in (n, m)]
    limits = [torch.randn(size, generator=g) if used else None for size, used in ((n, rows), (m, cols))]
    return ("limited", [], *labels, *limits, first, False)


@few
@pytest.mark.parametrize(("first", "ids"), [(0, False), (-3, True), (UNPAIRED, True)], ids=["pairs", "ids", "unpaired"])
@pytest.mark.parametrize(("n", "m"), PASS_SHAPES)
def test_passes_with_limits(n, m, first, ids):
    s, scale = torch.randn(n, m), torch.tensor(1.7)
    s[n // 2, m // 2] = NAN
    before = (torch.randn(m), torch.rand(m) + 1)
    for sides in ({}, {"cols": False}, {"rows": False}):
        arguments = (s, scale, *limited(n, m, first, ids, **sides), torch.empty(n), torch.empty(n), *before)
        results = list(both_passes("logsumexp_pass", arguments, (10, 11, 12, 13)))
        for (top, exact_top), (total, exact_total) in (results[:2], results[2:]):
            close(top + total.log(), exact_top + exact_total.log(), torch.float32, rtol=2e-6)
        row, col = ((torch.rand(size) + 3, torch.rand(size), torch.randn(size)) for size in (n, m))
        arguments = (s, scale, *limited(n, m, first, ids, **sides), *row, *col, torch.empty(n))
        for got, expected in both_passes("softmax_pass", arguments, (0, 16)):
            close(got, expected, torch.float32, rtol=1e-5)


@few
@pytest.mark.parametrize("special", [None, INF, -INF, NAN])
@pytest.mark.parametrize(("n", "m"), PASS_SHAPES)
def test_logsumexp_pass(n, m, special):
    s, scale = 5 * torch.randn(n, m), torch.tensor(1.7)
    if special is not None:
        s[n // 2] = special
        s[:, m // 3] = special
        s[0, 0] = special
    before = (torch.randn(m), torch.rand(m) + 1)
    arguments = (s, scale, *SCALED, torch.empty(n), torch.empty(n), *before)
    results = list(both_passes("logsumexp_pass", arguments, (10, 11, 12, 13)))
    for (top, exact_top), (total, exact_total) in (results[:2], results[2:]):
        close(top + total.log(), exact_top + exact_total.log(), torch.float32, rtol=2e-6)


@few
@pytest.mark.parametrize("directions", ["both", "rows", "columns"])
@pytest.mark.parametrize(("n", "m"), PASS_SHAPES)
def test_softmax_pass(n, m, directions):
    s, scale = 3 * torch.randn(n, m), torch.tensor(0.8)
    t = s * scale
    row = (t.amax(1), (t - t.amax(1, keepdim=True)).exp().sum(1).log(), torch.randn(n))
    col = (t.amax(0), (t - t.amax(0)).exp().sum(0).log(), torch.randn(m))
    arguments = [s, scale, *SCALED, *row, *col, torch.empty(n)]
    if directions != "both":
        arguments[15 if directions == "rows" else 12] = None
    for got, expected in both_passes("softmax_pass", arguments, (0, 16)):
        close(got, expected, torch.float32, rtol=1e-5)
