"""The definition of the graph pattern loss: a triplet loss for each edge, on its stored matrix.

Formula and source: :mod:`gssf_kernels.losses.graph_pattern`.
"""

import itertools

import torch
from torch import Tensor

from gssf_kernels.reference.triplet import triplet_loss


def graph_pattern_loss(
    xs: Tensor,
    ys: Tensor,
    *,
    margin: float | Tensor = 0.2,
    edges: str | Tensor = "all",
    weights: Tensor | None = None,
    negatives: str = "hardest",
    ids: Tensor | None = None,
    metric=None,
    normalize: bool = False,
    reduction: str = "sum",
    return_edges: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Triplet losses summed over edges; see :func:`gssf_kernels.graph_pattern_loss`."""
    nodes, kx, n = [*xs, *ys], len(xs), xs.shape[1]
    if isinstance(edges, Tensor):
        ends = [tuple(edge) for edge in edges.tolist()]
    elif edges == "all":
        ends = list(itertools.combinations(range(len(nodes)), 2))
    else:
        ends = list(itertools.product(range(kx), range(kx, len(nodes))))
    margins = margin.tolist() if isinstance(margin, Tensor) else [margin] * len(ends)
    metrics = [metric] * len(ends) if metric is None or isinstance(metric, torch.nn.Module) else metric
    if isinstance(metric, torch.nn.ModuleList):
        metrics = list(metric)
    terms = [
        triplet_loss(
            nodes[p],
            nodes[q],
            margin=m,
            negatives=negatives,
            x_ids=ids,
            y_ids=ids,
            reduction="none",
            metric=of_edge,
            normalize=normalize,
        )
        for (p, q), m, of_edge in zip(ends, margins, metrics, strict=True)
    ]
    stacked = torch.stack(terms) if terms else (xs.sum() + ys.sum()).expand(0, n)
    weighted = stacked if weights is None else weights[:, None] * stacked
    loss = weighted if reduction == "none" else weighted.sum()
    loss = loss / max(n, 1) if reduction == "mean" else loss
    each = stacked.detach().sum(1)
    return (loss, each / max(n, 1) if reduction == "mean" else each) if return_edges else loss
