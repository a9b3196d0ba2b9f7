"""Scores of listed pairs by the Triton kernels, and their gradients, against fp64 truth."""

import device_ops
import pytest
import torch
from interpreted import DEVICE, every_dtype
from triton_checks import INF, NAN, assert_as_good, close, many, two_sides

pytest.importorskip("triton")

from device_ops import pair_scores, pair_scores_backward

pytestmark = many


@every_dtype
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
        device_ops.launch("pair_scores", x, x, index, index)
    with pytest.raises(TypeError, match="float64"):
        device_ops.launch("pair_scores_backward", x[0], index, index, x, x, [True, True])


def test_pairs_of_all_rows():
    a, b = two_sides(40, 50, 24, torch.float32)
    results = pair_scores(a.to(DEVICE), b.to(DEVICE), None, None)
    close(results, (a.double() * b[:40].double()).sum(1), torch.float32, subnormal=True)
