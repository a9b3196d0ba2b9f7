"""One training step's loss, the ways to compute it: what a user would write, and ours.

Each variant takes ``x [N, D]``, ``y [N, D]`` and a StructuredSimilarity, and returns the scalar
hardest-negative triplet loss (margin 0.2, summed, L2-normalised inputs, structured similarity).
"""

import torch
import torch.nn.functional as F

import gssf_kernels as gk

MARGIN = 0.2


def naive(x, y, metric):
    """As in VSE++'s public code: the matrix, both cost matrices, two masks, two maxima."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    groups, width, _ = metric.blocks.shape
    mixed = torch.bmm(x.view(-1, groups, width).transpose(0, 1), metric.blocks).transpose(0, 1).reshape(x.shape)
    scores = (x * metric.diag + mixed) @ y.t()
    diagonal = scores.diag().view(-1, 1)
    cost_y = (MARGIN + scores - diagonal.expand_as(scores)).clamp(min=0)
    cost_x = (MARGIN + scores - diagonal.t().expand_as(scores)).clamp(min=0)
    mask = torch.eye(scores.size(0), dtype=torch.bool, device=scores.device)
    cost_y = cost_y.masked_fill(mask, 0)
    cost_x = cost_x.masked_fill(mask, 0)
    return cost_y.max(1)[0].sum() + cost_x.max(0)[0].sum()


def fused(x, y, metric):
    return gk.triplet_loss(x, y, margin=MARGIN, metric=metric)


def variants() -> dict:
    return {"fused": fused, "naive": naive, "compile": torch.compile(naive)}


def inputs(n: int, d: int, block: int, dtype: torch.dtype, seed: int = 0):
    """Random embeddings needing gradients, and a metric a little off its start."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=g).to(dtype).requires_grad_() for _ in range(2))
    metric = gk.StructuredSimilarity(d, block, dtype=dtype)
    with torch.no_grad():
        metric.diag += 0.1 * torch.randn(d, generator=g)
        metric.blocks += 0.1 * torch.randn(metric.blocks.shape, generator=g)
    return x, y, metric


def leaves(x, y, metric) -> list[torch.Tensor]:
    """What gets gradients."""
    return [x, y, metric.diag, metric.blocks]


def machine() -> dict:
    """What a figure must stand beside."""
    import platform

    from gssf_kernels.__main__ import cpu_description

    return {
        "cpu": cpu_description(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gssf_kernels": gk.__version__,
        "backends": gk.backends(),
    }
