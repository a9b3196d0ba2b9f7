"""The Triton kernels of listed pairs, of the gradient of hardest negatives and of losses' terms, against fp64 truth."""

import pytest
import torch
from interpreted import DEVICE, DTYPES, where_triton_runs
from triton_checks import INF, NAN, assert_as_good, small_tiles  # noqa: F401

from gssf_kernels import plan
from gssf_kernels.kernels import tiles
from gssf_kernels.kernels.pairs import hardest_negatives_backward, pair_scores, pair_scores_backward
from gssf_kernels.kernels.terms import (
    contrast_terms,
    contrast_terms_backward,
    hinge_terms,
    hinge_terms_backward,
)

# pair_scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 3, 100, 257])
def test_pair_scores(D, dtype):
    N, M, E = 13, 21, 70
    a, b = torch.randn(N, D).to(dtype), torch.randn(D, M).to(dtype).T
    rows, cols = torch.randint(-1, N, (E,)), torch.randint(-1, M, (E,))
    rows[::7] = 3  # a hub of more edges than one step takes
    grad = torch.randn(E)[torch.arange(E)]

    def scores(a, b):
        s = (a[rows.clamp(0)] * b[cols.clamp(0)]).sum(1)
        return torch.where((rows >= 0) & (cols >= 0), s, -INF)

    on = [x.to(DEVICE) for x in (a, b, rows, cols)]
    wide_a, wide_b = a.double().requires_grad_(), b.double().requires_grad_()
    truth = scores(wide_a, wide_b)
    ours = pair_scores(*on)
    assert ours.dtype == torch.float32
    assert_as_good(ours, scores(a.float(), b.float()), truth.detach())

    truth.backward(grad.double())
    plain_a, plain_b = a.clone().requires_grad_(), b.clone().requires_grad_()
    scores(plain_a, plain_b).backward(grad.to(dtype))
    da, db = pair_scores_backward(grad.to(DEVICE), on[2], on[3], on[0], on[1], [True, True])
    assert da.dtype == db.dtype == dtype
    assert_as_good(da, plain_a.grad, wide_a.grad)
    assert_as_good(db, plain_b.grad, wide_b.grad)


def test_pair_scores_backward_of_a_hub_and_of_absent_edges():
    a, b = torch.ones(3, 130), torch.arange(40.0)[:, None].expand(40, 130)
    rows = torch.cat([torch.full((40,), 1), torch.tensor([-1, 0])])
    cols = torch.cat([torch.arange(40), torch.tensor([2, -1])])
    grad = torch.ones(42)
    grad[40:] = NAN  # the gradient of an edge that is none must not count
    da, db = (x.cpu() for x in pair_scores_backward(*(x.to(DEVICE) for x in (grad, rows, cols, a, b)), [True, True]))
    assert torch.equal(da, torch.tensor([0.0, 780.0, 0.0])[:, None].expand(3, 130))
    assert torch.equal(db, torch.ones(40, 130))


def test_pair_scores_backward_of_a_zero_gradient_adds_nothing_even_to_infinite_rows():
    a, b, index = torch.ones(2, 5), torch.full((2, 5), INF), torch.arange(2)
    da, db = (
        x.cpu()
        for x in pair_scores_backward(*(x.to(DEVICE) for x in (torch.zeros(2), index, index, a, b)), [True, True])
    )
    assert not da.any()
    assert not db.any()


def test_pair_scores_backward_takes_an_expanded_gradient_and_no_edges():
    a, b = torch.randint(-3, 4, (5, 6)).float(), torch.randint(-3, 4, (7, 6)).float()
    index = torch.arange(5)
    grad = torch.tensor(2.0).expand(5)
    da, db = (x.cpu() for x in pair_scores_backward(*(x.to(DEVICE) for x in (grad, index, index, a, b)), [True, True]))
    assert torch.equal(da, 2 * b[:5])
    assert torch.equal(db, torch.cat([2 * a, torch.zeros(2, 6)]))
    none = index[:0].to(DEVICE)
    da, db = pair_scores_backward(grad[:0].to(DEVICE), none, none, a.to(DEVICE), b.to(DEVICE), [True, True])
    assert da.shape == (5, 6)
    assert db.shape == (7, 6)
    assert not da.any()
    assert not db.any()
    assert pair_scores(a.to(DEVICE), b.to(DEVICE), none, none).shape == (0,)


def test_pair_scores_backward_gives_only_what_is_needed():
    a, b, index = torch.randn(4, 8).to(DEVICE), torch.randn(4, 8).to(DEVICE), torch.arange(4).to(DEVICE)
    grad = torch.ones(4).to(DEVICE)
    both = pair_scores_backward(grad, index, index, a, b, [True, True])
    for side in range(2):
        one = pair_scores_backward(grad, index, index, a, b, [side == 0, side == 1])
        assert torch.equal(one[side], both[side])
        assert one[1 - side].numel() == 0


def test_fp64_is_refused():
    x, index = torch.randn(4, 4, dtype=torch.float64), torch.arange(4)
    with pytest.raises(TypeError, match="float64"):
        pair_scores(x, x, index, index)
    with pytest.raises(TypeError, match="float64"):
        pair_scores_backward(x[0], index, index, x, x, [True, True])


# the gradient of hardest negatives, and the triplet formula


@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 1), (1, 40, 3), (33, 50, 130), (70, 70, 17)])
def test_hardest_backward_scanning_is_the_sum_of_its_pairs(N, M, D, dtype, needs, monkeypatch):
    a, b = torch.randn(N, D).to(dtype), torch.randn(D, M).to(dtype).T
    rows, cols = torch.randint(-1, M, (N,)), torch.randint(-1, N, (M,))
    cols[::2] = N // 2  # a hub of more edges than one step takes
    dpair, drow, dcol = torch.randn(N), torch.randn(N), torch.randn(M)
    dpair[::3] = dcol[1::5] = 0
    on = [t.to(DEVICE) for t in (dpair, drow, dcol, rows, cols, a, b)]
    scanned = hardest_negatives_backward(*on, needs)
    monkeypatch.setattr(plan, "SCAN_ROWS", 0)
    summed = hardest_negatives_backward(*on, needs)
    i, j = torch.arange(N), torch.arange(M)
    edges = torch.cat((i, i, cols)), torch.cat((i, rows, j))
    weight = torch.cat((dpair, drow, dcol)).double()
    real = (edges[0] >= 0) & (edges[1] >= 0)
    g = torch.zeros(N, M, dtype=torch.float64)
    g.index_put_((edges[0][real], edges[1][real]), weight[real], accumulate=True)
    for k, exact in enumerate((g @ b.double(), g.T @ a.double())):
        for found in (scanned[k], summed[k]):
            if needs[k]:
                assert found.dtype == dtype
                floor = 8 * torch.finfo(dtype).eps * float(exact.abs().max())
                assert float((found.cpu().double() - exact).abs().max()) <= floor
            else:
                assert found.numel() == 0


def test_hardest_backward_lets_through_no_nan_of_absent_edges_or_zero_gradients():
    a, b = torch.ones(4, 3), torch.full((5, 3), INF)
    rows, cols = torch.full((4,), -1), torch.full((5,), -1)
    lines = torch.zeros(4), torch.full((4,), NAN), torch.full((5,), NAN)
    da, db = hardest_negatives_backward(*(t.to(DEVICE) for t in (*lines, rows, cols, a, b)), [True, True])
    assert not da.any()
    assert not db.any()
    da, db = hardest_negatives_backward(*(t.to(DEVICE) for t in (*lines, rows, cols, a[:0], b)), [True, True])
    assert da.shape == (0, 3)
    assert not db.any()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 9), (32, 32), (70, 100)])
def test_hinge_terms(N, M, reduction, monkeypatch):
    monkeypatch.setattr(tiles, "TERMS", 16)
    positive, row, col = torch.randn(N), torch.randn(N), torch.randn(M)
    row[0], col[M // 2] = -INF, -INF
    row[N // 2] = positive[N // 2] - 0.25  # exactly on the hinge, for a margin that is exact too
    for special in (None, NAN, INF):
        if special is not None:
            row[N - 1] = special
        exact = [t.double().requires_grad_() for t in (positive, row, col)]
        terms = sum(torch.where(0.25 + n - exact[0] < 0, 0, 0.25 + n - exact[0]) for n in (exact[1], exact[2][:N]))
        truth = terms if reduction == "none" else terms.sum() / (N if reduction == "mean" else 1)
        grad = torch.randn(truth.shape)
        truth.backward(grad.double())
        on = [t.to(DEVICE) for t in (positive, row, col)]
        found = hinge_terms(*on, 0.25, reduction)
        torch.testing.assert_close(found.cpu().double(), truth.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
        for got, leaf in zip(hinge_terms_backward(grad.to(DEVICE), *on, 0.25, reduction), exact, strict=True):
            torch.testing.assert_close(got.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-6)


def test_hinge_terms_take_expanded_gradients_and_an_empty_batch():
    lines = [t.to(DEVICE) for t in (torch.zeros(9), torch.zeros(9), torch.zeros(12))]
    grad = torch.tensor(2.0).expand(9).to(DEVICE)
    dpositive, drow, dcol = hinge_terms_backward(grad, *lines, 0.25, "none")
    assert (dpositive.tolist(), drow.tolist(), dcol.tolist()) == ([-4.0] * 9, [2.0] * 9, [2.0] * 9 + [0.0] * 3)
    none = [t[:0] for t in lines[:2]]
    assert hinge_terms(*none, lines[2], 0.25, "mean").tolist() == 0
    assert hinge_terms(*none, lines[2], 0.25, "none").shape == (0,)
    one = torch.ones(()).to(DEVICE)
    assert hinge_terms_backward(one, *none, lines[2], 0.25, "mean")[2].tolist() == [0.0] * 12


@pytest.mark.parametrize("sides", ["both", "both of one target", "rows"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 9), (70, 100)])
def test_contrast_terms(N, M, reduction, sides, monkeypatch):
    monkeypatch.setattr(tiles, "TERMS", 16)
    lines = [torch.randn(n) for n in (N, N, N, M, M, N)]
    both, shared = sides != "rows", sides == "both of one target"
    lines = [*lines[:5], None] if shared else lines if both else [*lines[:3], None, None, None]
    exact = [t if t is None else t.double().requires_grad_() for t in lines]
    terms = (exact[0] - exact[2]) + exact[1]
    if both:
        terms = (terms + (exact[3][:N] - exact[2 if shared else 5]) + exact[4][:N]) / 2
    truth = terms if reduction == "none" else terms.sum() / (N if reduction == "mean" else 1)
    grad = torch.randn(truth.shape)
    truth.backward(grad.double())
    on = [t if t is None else t.to(DEVICE) for t in lines]
    found = contrast_terms(*on, reduction)
    torch.testing.assert_close(found.cpu().double(), truth.detach(), rtol=1e-5, atol=1e-5)
    drow, dtarget, dcol = contrast_terms_backward(grad.to(DEVICE), on[1], on[4], shared, reduction)
    wanted = (exact[1], exact[2], exact[4]) if both else (exact[1], exact[2])
    for got, leaf in zip((drow, dtarget, dcol), wanted, strict=both):
        torch.testing.assert_close(got.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-6)
    assert dcol.shape == (M if both else 0,)


where_triton_runs(globals())
