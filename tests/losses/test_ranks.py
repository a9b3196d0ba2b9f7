"""A loss split over ranks is that of the whole batch: each rank compares its rows with all, in one direction at a time.

Ranks are played one after the other. Their gradients are averaged, as DistributedDataParallel does.
"""

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk

RANKS, EACH, D = 3, 14, 8
ROWS = RANKS * EACH


def problem():
    g = torch.Generator().manual_seed(11)
    x, y = (F.normalize(torch.randn(ROWS, D, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    return x, y, torch.randint(0, 30, (ROWS,), generator=g)


def rank_rows_first(rank):
    """The rank's rows, and all rows with those first."""
    rank_rows = torch.arange(rank * EACH, (rank + 1) * EACH)
    return rank_rows, torch.cat((rank_rows, torch.arange(rank * EACH), torch.arange((rank + 1) * EACH, ROWS)))


def whole(loss, x, y, ids):
    """Written out on the matrix."""
    same = (ids[:, None] == ids) | torch.eye(ROWS, dtype=torch.bool)
    s = x @ y.mT
    if loss == "info_nce_loss":
        target = same.double() / same.sum(1, keepdim=True)
        t = 14 * s
        return -0.5 * ((target * t.log_softmax(1)).sum(1) + (target.mT * t.log_softmax(0)).sum(0)).mean()
    if loss == "sigmoid_loss":
        t = 10 * s - 5
        return F.softplus(torch.where(same, -t, t)).sum() / ROWS
    negatives, positive = s.masked_fill(same, -torch.inf), s.diagonal()
    return sum((0.2 + negatives.amax(dim) - positive).clamp_min(0) for dim in (0, 1)).mean()


def of_rank(loss, x, y, ids, rank):
    rank_rows, all_rows = rank_rows_first(rank)
    options = {"x_ids": ids[rank_rows], "y_ids": ids[all_rows], "reduction": "mean"}
    if loss == "sigmoid_loss":  # every score belongs to one rank
        return gk.sigmoid_loss(x[rank_rows], y[all_rows], scale=10.0, bias=-5.0, **options)
    options["symmetric"] = False
    if loss == "info_nce_loss":
        options["scale"] = 14.0
    rows, columns = (getattr(gk, loss)(u[rank_rows], v[all_rows], **options) for u, v in ((x, y), (y, x)))
    return (rows + columns) / 2 if loss == "info_nce_loss" else rows + columns


@pytest.mark.parametrize("loss", ["info_nce_loss", "sigmoid_loss", "triplet_loss"])
def test_the_mean_over_ranks_is_the_whole(loss):
    x, y, ids = problem()
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    expected = whole(loss, *leaves, ids)
    gradients = torch.autograd.grad(expected, leaves)
    of_ranks = x.clone().requires_grad_(), y.clone().requires_grad_()
    total = sum(of_rank(loss, *of_ranks, ids, rank) for rank in range(RANKS)) / RANKS
    torch.testing.assert_close(total, expected)
    for got, gradient in zip(torch.autograd.grad(total, of_ranks), gradients, strict=True):
        torch.testing.assert_close(got, gradient)
