"""What goes forward and back in three launches, its Triton kernels against fp64: see interpreted.py for where it runs.

Compiled they are in test_lowering.py, and counted in test_launches.py.
"""

import pytest
import torch

pytest.importorskip("triton")

from interpreted import DEVICE, DTYPES, where_triton_runs

from gssf_kernels import plan, reference
from gssf_kernels.kernels import batch_hard, goal, hardest, project, sweep, tiles

INF, NAN = float("inf"), float("nan")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
REDUCTIONS = pytest.mark.parametrize("reduction", ["sum", "mean", "none"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tiles.Sweep(16, 32, 16, 4, 2))
    monkeypatch.setattr(tiles, "MERGE_PARTS", 2)
    monkeypatch.setattr(tiles, "MERGE_LANES", 32)
    monkeypatch.setattr(tiles, "TERM_LANES", 16)
    monkeypatch.setattr(tiles, "TERMS", 16)
    monkeypatch.setattr(tiles, "PROJECT", dict.fromkeys(tiles.PROJECT, tiles.Project(16, 16, 4, 2)))


def close(got, expected, dtype):
    """Within some roundings of dtype of the largest number."""
    rtol = 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    atol = rtol * float(expected.nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def on_device(*tensors):
    return [t if t is None else t.to(DEVICE) for t in tensors]


# both sides of a metric


@every_dtype
@pytest.mark.parametrize("weights", ["diag blocks", "diag", "blocks", ""])
@pytest.mark.parametrize(("n", "m", "d", "b"), [(1, 1, 4, 2), (19, 23, 50, 25), (9, 40, 24, 8), (33, 33, 48, 3)])
def test_both_sides(n, m, d, b, weights, dtype):
    x, y = torch.randn(n, d).to(dtype), torch.randn(d, m).to(dtype).T
    x[0] = 0
    diag = torch.randn(d).to(dtype) if "diag" in weights else None
    blocks = torch.randn(d // b, b, b).to(dtype) if "blocks" in weights else None
    permutation = torch.randperm(d) if b > 2 and blocks is not None else None
    found = project.project_sides(*on_device(x, y, diag, blocks, permutation))
    wide = [t if t is None else t.double() for t in (x, y, diag, blocks)]
    p = reference.project(wide[0], *wide[2:], permutation=permutation, normalize=True)
    *found, norm, pair = found
    for got, expected in zip(found, (p, reference.project(wide[1], normalize=True)), strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        close(got, expected, dtype)
    assert norm.dtype == torch.float32
    close(norm, wide[0].norm(dim=1).clamp_min(1e-12), torch.float32)
    assert pair.shape == (0,)


@every_dtype
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n", "m", "d", "b"), [(1, 1, 4, 2), (19, 23, 50, 25), (33, 40, 50, 5), (33, 33, 48, 3)])
def test_both_sides_with_their_pairs(n, m, d, b, normalize, dtype, monkeypatch):
    if n == m == 33:
        monkeypatch.setattr(plan, "SMALL", 33 * 33 - 1)  # and in a launch of their own
    x, y, diag, blocks = (torch.randn(*shape).to(dtype) for shape in ((n, d), (m, d), (d,), (d // b, b, b)))
    permutation = torch.randperm(d) if b > 2 else None
    on = on_device(x, y, diag, blocks, permutation)
    p, unit, norm, pair = project.project_sides(*on, normalize, True)
    exact = reference.project(x.double(), diag.double(), blocks.double(), permutation=permutation, normalize=normalize)
    close(p, exact, dtype)
    if normalize:
        close(unit, reference.project(y.double(), normalize=True), dtype)
    else:
        assert unit.numel() == norm.numel() == 0
    assert pair.dtype == torch.float32
    factors = p.cpu().double(), (unit.cpu() if normalize else y)[:n].double()  # as they are stored
    close(pair, (factors[0] * factors[1]).sum(1), torch.float32)


def check_sides_backward(n, m, d, b, normalize, dtype, twice=False, needs=(True,) * 4, without=()):
    x, y, diag, blocks = (torch.randn(*shape).to(dtype) for shape in ((n, d), (m, d), (d,), (d // b, b, b)))
    if dtype == torch.float32:
        x[n // 2] = 0  # its gradient is beyond halves
    permutation = torch.randperm(d) if b > 2 else None
    dp, dunit = torch.randn(n, d).to(dtype), torch.randn(n if twice else m, d).to(dtype)
    leaves = [t.double().requires_grad_() for t in (x, y, diag, blocks)]
    other = leaves[0] if twice else leaves[1]
    p = reference.project(leaves[0], *leaves[2:], permutation=permutation, normalize=normalize)
    total = 0.0 if "dp" in without else (p * dp.double()).sum()
    if normalize and "dunit" not in without:
        total = total + (reference.project(other, normalize=True) * dunit.double()).sum()
    expected = torch.autograd.grad(total, leaves, allow_unused=True)
    on = on_device(x, x if twice else y, diag, blocks, permutation)
    norm = project.project_sides(*on, normalize)[2]
    given = [None if name in without else t for name, t in (("dp", dp), ("dunit", dunit))]
    on[1] = None if twice else on[1]
    found = project.project_sides_backward(*on_device(*given), norm, *on, normalize, [*needs])
    for got, known, need in zip(found, expected, needs, strict=True):
        if need and known is not None:
            assert got.dtype == dtype
            close(got, known, dtype)
        else:
            assert got.numel() == 0


@every_dtype
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n", "m", "d", "b"), [(1, 1, 4, 2), (19, 40, 50, 25), (33, 33, 48, 3)])
def test_gradients_of_both_sides(n, m, d, b, normalize, dtype):
    check_sides_backward(n, m, d, b, normalize, dtype)


@every_dtype
@pytest.mark.parametrize(("n", "d", "b"), [(1, 4, 2), (40, 50, 25)])
def test_gradients_of_one_side_given_twice(n, d, b, dtype):
    check_sides_backward(n, n, d, b, True, dtype, twice=True, needs=(True, False, True, True))


def test_gradients_of_sides_that_are_not_wanted_or_not_used():
    for needs in ((True, False, False, False), (False, True, False, False), (False, False, False, True)):
        check_sides_backward(9, 14, 24, 8, True, torch.float32, needs=needs)
    for without in ("dp", "dunit"):
        check_sides_backward(9, 14, 24, 8, True, torch.float32, without=(without,))


def test_sides_of_many_rows_are_declined(monkeypatch):
    monkeypatch.setattr(plan, "SCAN_ROWS", 20)
    x, y = on_device(torch.randn(21, 8), torch.randn(22, 8))
    options = None, None, None, True, [True, True, False, False]
    assert project.project_sides_backward(x, y, x[:, 0], x, y, *options) is NotImplemented
    assert project.project_sides_backward(x[:20], y, x[:20, 0], x[:20], y, *options) is not NotImplemented
    assert project.project_sides_backward(x[:20], None, x[:20, 0], x[:20], None, *options) is NotImplemented


def test_one_side_of_nothing():
    p, unit, *_ = project.project_sides(*on_device(torch.empty(0, 8), torch.ones(2, 8)), None, None, None)
    assert p.shape == (0, 8)
    close(unit, torch.full((2, 8), 8**-0.5), torch.float32)


# hinge terms of hardest negatives


def mined(n, m, d, dtype, ids=False):
    a, b = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    return a, b, *((torch.arange(n) % 5 - 2**40, torch.arange(m) % 3 - 2**40) if ids else (None, None))


def check_hinge(a, b, a_ids, b_ids, margin, reduction):
    loss, *found = hardest.hardest_hinge(*on_device(a, b, a_ids, b_ids), margin, reduction)
    for got, expected in zip(found, hardest.hardest_negatives(*on_device(a, b, a_ids, b_ids)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    x, y = a.double(), b.double()
    pair, exact = reference.pair_scores(x, y), reference.hardest_negatives(x, y, a_ids=a_ids, b_ids=b_ids)
    sides = exact.row_score, exact.col_score[: len(a)]
    terms = sum(reference.hinge(margin + negative - pair) for negative in sides)
    assert loss.dtype == torch.float32
    assert loss.shape == (a.shape[:1] if reduction == "none" else ())
    sizes = (reference.reduce(reference.hinge(margin + t.abs() + pair.abs()), reduction) for t in sides)
    expected, size = reference.reduce(terms, reduction), max(float(t.nan_to_num(0, 0, 0).max()) for t in sizes)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=4e-6, atol=4e-6 * size, equal_nan=True)


@every_dtype
@REDUCTIONS
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 3), (1, 40, 5), (16, 32, 16), (33, 50, 24), (50, 50, 20)])
def test_hinge_terms_of_a_sweep(n, m, d, reduction, dtype):
    check_hinge(*mined(n, m, d, dtype, ids=n > 40), 0.25, reduction)


@REDUCTIONS
@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_hinge_terms_of_special_values(special, reduction):
    a, b, *ids = mined(33, 50, 8, torch.float32)
    a[17, 0], b[:, 0] = special, b[:, 0].abs()
    check_hinge(a, b, *ids, 0.25, reduction)


@REDUCTIONS
def test_hinge_terms_without_negatives_are_0(reduction):
    a, b, *_ = mined(20, 20, 8, torch.float32)
    same = torch.zeros(20, dtype=torch.int64)
    loss, _, row_score, row_index, *_ = hardest.hardest_hinge(*on_device(a, b, same, same), 0.25, reduction)
    assert not loss.any()
    assert set(row_index.tolist()) == {-1}
    assert set(row_score.tolist()) == {-INF}


# GOAL without relative terms

MODES = [(triplet, pair) for triplet in ("con", "nca", "cir") for pair in ("con", "lin", "sig")]
NUMBERS = (3.0, 2.0, 10.0, 0.4)  # τ, α, β, λ


def goal_truth(lines, triplet, pair, reduction, grad):
    """(loss, gradients) of the definition on a matrix whose statistics are these, in fp64."""
    p, row, col = (t.double() for t in lines)
    n = len(p)
    options = dict(zip(("tau", "alpha", "beta", "lam"), NUMBERS, strict=True))
    mode = reference.goal._mode(triplet, pair, **options, positive_threshold=0.1, negative_threshold=0.1)
    terms, gradients = torch.zeros(n, dtype=torch.float64), []
    for negative in (row, col[:n]):
        anchor, found = reference.AnchorStatistics(p, negative), negative != -INF
        terms += torch.where(found, mode["value"](anchor), 0)
        gradients.append([torch.where(found, w, 0) for w in mode["weights"](anchor)])
    g = grad.double() / (n if reduction == "mean" else 1)
    (row_pull, row_push), (col_pull, col_push) = gradients
    drawn = -g * (row_pull + col_pull), g * row_push, torch.cat((g * col_push, torch.zeros(len(col) - n)))
    return reference.reduce(terms, reduction), drawn


def goal_lines(n, m):
    p, row, col = torch.randn(n), torch.randn(n), torch.randn(m)
    row[::7] = col[1::5] = -INF
    return p, row, col


@REDUCTIONS
@pytest.mark.parametrize(("triplet", "pair"), MODES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (16, 40), (50, 50)])
def test_goal(n, m, triplet, pair, reduction):
    check_goal(goal_lines(n, m), triplet, pair, reduction)


def check_goal(lines, triplet, pair, reduction):
    grad = torch.randn(len(lines[0])) if reduction == "none" else torch.tensor(0.75)
    loss, gradients = goal_truth(lines, triplet, pair, reduction, grad)
    on, options = on_device(*lines), (triplet, pair, *NUMBERS, reduction)
    got = goal.goal_terms(*on, *options)
    assert got.shape == loss.shape
    size = torch.cat(lines).nan_to_num(0, 0, 0).square().sum() if reduction == "sum" else 1.0
    torch.testing.assert_close(got.cpu().double(), loss, rtol=4e-6, atol=4e-6 * float(size), equal_nan=True)
    for got, expected, line in zip(
        goal.goal_terms_backward(grad.to(DEVICE), *on, *options), gradients, lines, strict=True
    ):
        assert got.shape == line.shape
        torch.testing.assert_close(got.cpu().double(), expected, rtol=2e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(("triplet", "pair"), MODES)
def test_goal_of_special_values(triplet, pair):
    for special in (NAN, 40.0, -40.0):
        for line in range(3):
            lines = goal_lines(20, 23)
            lines[line][3] = special
            check_goal(lines, triplet, pair, "none")


def test_goal_takes_expanded_gradients_and_an_empty_batch():
    lines, options = goal_lines(20, 23), ("nca", "con", *NUMBERS)
    on = on_device(*lines)
    got = goal.goal_terms_backward(torch.tensor(0.5).expand(20).to(DEVICE), *on, *options, "none")
    for one, expected in zip(got, goal_truth(lines, "nca", "con", "none", torch.full((20,), 0.5))[1], strict=True):
        torch.testing.assert_close(one.cpu().double(), expected, rtol=2e-5, atol=1e-7)
    nothing = [on[0][:0], on[1][:0], on[2]]
    assert goal.goal_terms(*nothing, *options, "mean").tolist() == 0
    assert goal.goal_terms(*nothing, *options, "none").shape == (0,)
    assert not goal.goal_terms_backward(on[0][0], *nothing, *options, "mean")[2].any()


def check_hardest_goal(a, b, a_ids, b_ids, triplet, pair, reduction):
    options = (triplet, pair, *NUMBERS, reduction)
    on = on_device(a, b, a_ids, b_ids)
    loss, *found = goal.hardest_goal(*on, *options)
    known = hardest.hardest_negatives(*on)
    for got, expected in zip(found, known, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    expected = goal.goal_terms(known[0], known[1], known[3], *options)
    assert loss.dtype == torch.float32
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6, equal_nan=True)
    lines = [t.cpu() for t in (known[0], known[1], known[3])]
    exact, _ = goal_truth(lines, triplet, pair, reduction, torch.ones(len(a) if reduction == "none" else ()))
    size = float(torch.cat(lines).nan_to_num(0, 0, 0).square().sum())
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=4e-6, atol=4e-6 * size, equal_nan=True)


@REDUCTIONS
@pytest.mark.parametrize(("triplet", "pair"), MODES)
def test_goal_terms_of_a_sweep(triplet, pair, reduction):
    for n, m, d, dtype in ((1, 40, 5, torch.float32), (33, 50, 24, torch.float32), (50, 50, 20, torch.float16)):
        check_hardest_goal(*mined(n, m, d, dtype, ids=n > 40), triplet, pair, reduction)


@REDUCTIONS
def test_goal_terms_of_a_sweep_of_special_values(reduction):
    for special in (INF, -INF, NAN):
        a, b, *ids = mined(33, 50, 8, torch.float32)
        a[17, 0], b[:, 0] = special, b[:, 0].abs()
        check_hardest_goal(a, b, *ids, "nca", "sig", reduction)
    a, b, *_ = mined(20, 20, 8, torch.float32)
    same = torch.zeros(20, dtype=torch.int64)
    assert not goal.hardest_goal(*on_device(a, b, same, same), "nca", "sig", *NUMBERS, reduction)[0].any()


# batch-hard


def labelled(n, d, dtype, groups):
    return torch.randn(n, d).to(dtype), torch.randint(0, groups, (n,)) - 2**40


def check_batch_hard(x, labels, margin, reduction):
    n = len(x)
    leaf = x.double().requires_grad_()
    expected = reference.batch_hard_loss(leaf, labels, margin=margin, reduction=reduction)
    grad = torch.rand(n) + 0.5 if reduction == "none" else torch.tensor(0.75)
    expected.backward(grad.double())
    on = on_device(x, labels)
    loss, *found = batch_hard.batch_hard(*on, margin, reduction)
    assert loss.dtype == torch.float32
    assert loss.shape == expected.shape
    size = float((leaf.detach() @ leaf.detach().T).nan_to_num(0, 0, 0).abs().max()) * (n if reduction == "sum" else 1)
    torch.testing.assert_close(
        loss.cpu().double(), expected.detach(), rtol=4e-6, atol=4e-6 * (size + margin), equal_nan=True
    )
    dx = batch_hard.batch_hard_backward(grad.to(DEVICE), *found, on[0], margin, reduction)
    assert dx.dtype == x.dtype
    if bool(x.isfinite().all()):
        close(dx, leaf.grad, x.dtype)


@every_dtype
@REDUCTIONS
@pytest.mark.parametrize(
    ("n", "d", "groups"), [(1, 3, 1), (2, 3, 1), (16, 16, 4), (33, 24, 2), (50, 20, 9), (50, 40, 60)]
)
def test_batch_hard(n, d, groups, reduction, dtype):
    check_batch_hard(*labelled(n, d, dtype, groups), 0.25, reduction)


@pytest.mark.parametrize("special", [INF, NAN])
def test_batch_hard_of_special_values(special):
    x, labels = labelled(40, 8, torch.float32, 5)
    x[17, 0], x[:, 0] = special, x[:, 0].abs()
    loss, *_ = batch_hard.batch_hard(*on_device(x, labels), 0.25, "none")
    expected = reference.batch_hard_loss(x.double(), labels, margin=0.25, reduction="none")
    close(loss, expected, torch.float32)


def test_ties_of_batch_hard_go_to_the_lowest_index():
    x = torch.randint(-2, 3, (60, 2)).float()
    labels = torch.randint(0, 4, (60,))
    s, same = x @ x.T, labels[:, None] == labels
    _, _, _, positive_place, negative_place = batch_hard.batch_hard(*on_device(x, labels), 0.25, "sum")
    positives = s.masked_fill(~same | torch.eye(60, dtype=torch.bool), INF)
    assert torch.equal(positive_place.cpu(), positives.argmin(1))
    assert torch.equal(negative_place.cpu(), s.masked_fill(same, -INF).argmax(1))


def test_batch_hard_without_partners():
    x, same = torch.randn(20, 8), torch.zeros(20, dtype=torch.int64)
    for labels in (same, torch.arange(20)):
        loss, *found = batch_hard.batch_hard(*on_device(x, labels), 0.25, "sum")
        assert not loss.any()
        assert set(found[2 if labels is not same else 3].tolist()) == {-1}
        grad = torch.tensor(1.0).to(DEVICE)
        assert not batch_hard.batch_hard_backward(grad, *found, x.to(DEVICE), 0.25, "sum").any()


def test_a_zero_gradient_of_batch_hard_adds_nothing_even_from_nan_rows():
    x, labels = torch.randn(20, 8), torch.arange(20) // 4
    _, *found = batch_hard.batch_hard(*on_device(x, labels), 0.25, "none")
    dead = torch.full((20, 8), NAN).to(DEVICE)
    assert not batch_hard.batch_hard_backward(torch.zeros(20).to(DEVICE), *found, dead, 0.25, "none").any()


def test_batch_hard_is_never_tf32(monkeypatch):
    monkeypatch.setattr(tiles, "fp32_products", lambda device: "tf32")
    check_batch_hard(*labelled(33, 40, torch.float32, 3), 0.25, "sum")
    x = torch.zeros(8, 8)
    assert sweep.Sweep(x, x, tiles.Sweep(16, 32, 16, 4, 2), exact=True).precision == "ieee"


def test_what_is_large_or_empty_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 50)
    for n, m, declined in ((40, 50, False), (40, 51, True), (0, 5, True)):
        found = hardest.hardest_hinge(*on_device(*mined(n, m, 8, torch.float32)), 0.25, "sum")
        assert (found is NotImplemented) == declined
        found = goal.hardest_goal(*on_device(*mined(n, m, 8, torch.float32)), "con", "con", *NUMBERS, "sum")
        assert (found is NotImplemented) == declined
    for n, declined in ((44, False), (45, True)):
        found = batch_hard.batch_hard(*on_device(*labelled(n, 8, torch.float32, 5)), 0.25, "sum")
        assert (found is NotImplemented) == declined
    monkeypatch.setattr(plan, "CERTIFIED", 40 * 50)
    assert hardest.hardest_hinge(*on_device(*mined(40, 50, 8, torch.float32)), 0.25, "sum") is NotImplemented


def test_fp64_is_refused():
    x = torch.randn(4, 4, dtype=torch.float64)
    for call in (
        lambda: project.project_sides(x, x, None, None, None),
        lambda: hardest.hardest_hinge(x, x, None, None, 0.25, "sum"),
        lambda: batch_hard.batch_hard(x, torch.arange(4), 0.25, "sum"),
        lambda: goal.goal_terms(x[0], x[0], x[0], "con", "con", *NUMBERS, "sum"),
    ):
        with pytest.raises(TypeError, match="float64"):
            call()


where_triton_runs(globals())
