"""What tests of gradients by slabs of rows share."""

import pytest
import torch
from interpreted import DEVICE
from triton_checks import SLAB_DTYPE

from gssf_kernels.ops.score_functions import pointwise

SHAPES = [(16, 32, 16), (17, 33, 17), (70, 70, 40), (97, 50, 24), (50, 97, 8)]
SLABS = [1, 16 * 97, 1 << 20]  # scores of one: a row block, one or two, all
slabbed = pytest.mark.parametrize("scores", SLABS, ids=["a row block", "some", "one slab"])


def sides(n, m, d):
    return [torch.randn(k, d).to(SLAB_DTYPE).to(DEVICE) for k in (n, m)]


def close(found, expected):
    """fp32 within some roundings of the largest number; gradients of bf16 within those of bf16."""
    eps = torch.finfo(found.dtype).eps if found.dtype != torch.float64 else 2**-23
    rough = torch.bfloat16 == SLAB_DTYPE and found.dim() > 1
    rtol = 4 * max(eps, 2**-8) if rough else 16 * eps
    atol = rtol * float(expected.nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(found.cpu().double(), expected.cpu(), rtol=rtol, atol=atol, equal_nan=True)


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
