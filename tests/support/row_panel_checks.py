"""What tests of gradients by row panels share."""

import pytest
import torch
from interpreted import DEVICE
from triton_checks import ROW_PANEL_DTYPE

from gssf_kernels.ops.score_functions import pointwise

SHAPES = [(16, 32, 16), (17, 33, 17), (70, 70, 40), (97, 50, 24), (50, 97, 8)]
PANEL_SCORES = [1, 16 * 97, 1 << 20]  # scores of a panel: a row block, one or two, all
every_panel_size = pytest.mark.parametrize("scores", PANEL_SCORES, ids=["a row block", "several panels", "one panel"])


def sides(n, m, d):
    return [torch.randn(k, d).to(ROW_PANEL_DTYPE).to(DEVICE) for k in (n, m)]


def close(result, expected):
    """fp32 within some roundings of the largest number; gradients of bf16 within those of bf16."""
    eps = torch.finfo(result.dtype).eps if result.dtype != torch.float64 else 2**-23
    rough = torch.bfloat16 == ROW_PANEL_DTYPE and result.dim() > 1
    rtol = 4 * max(eps, 2**-8) if rough else 16 * eps
    atol = rtol * float(expected.nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(result.cpu().double(), expected.cpu(), rtol=rtol, atol=atol, equal_nan=True)


def true_sums(leaves, labels, kind, positives, share):
    """(share of the sum over all scores, its gradients) of leaves: a, b, κ, β in fp64."""
    x, y, kappa, beta = leaves
    same = torch.eye(len(x), len(y), dtype=torch.bool)
    if labels[0] is not None:
        same |= labels[0].cpu()[:, None] == labels[1].cpu()
    t = kappa * (x @ y.T) + beta
    f, _ = pointwise(torch.where(same, -t, t) if positives == "negate" else t, kind)
    total = share * (torch.where(same, 0, f) if positives == "exclude" else f).sum()
    return total.detach(), torch.autograd.grad(total, leaves)
