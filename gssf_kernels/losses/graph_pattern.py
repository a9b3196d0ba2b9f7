"""Graph pattern loss: a triplet loss on every edge of a graph of representations.

    L = Σ_{e = (p, q)} w_e Σ_i [m_e + max_{j ≠ i} s_ij − s_ii]₊ + [m_e + max_{j ≠ i} s_ji − s_ii]₊,     s = p qᵀ

A node is one representation of all N instances: K_x of the first modality, K_y of the second. Row i of every node is
the same instance. All edges go through one sweep, and no score is stored.

After GPLDAN (arXiv 2106.13552, ICIP 2020), of which we could read abstract and introduction alone: its idea of all
distances between several representations of an instance, without labels. The formula is ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels.losses.every_negative import every_negative
from gssf_kernels.losses.triplet import NEGATIVES
from gssf_kernels.ops import anchor_terms
from gssf_kernels.ops.edges import hardest_of_edges
from gssf_kernels.ops.mining import PairedInputs, semihard_limit, semihard_or_hardest
from gssf_kernels.ops.pairing import Pairing
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.similarity import StructuredSimilarity, check_metric, metric_of

Metrics = StructuredSimilarity | Sequence[StructuredSimilarity] | nn.ModuleList | None


def graph_pattern_loss(
    xs: Tensor,
    ys: Tensor,
    *,
    margin: float | Tensor = 0.2,
    edges: str | Tensor = "all",
    weights: Tensor | None = None,
    negatives: str = "hardest",
    ids: Tensor | None = None,
    metric: Metrics = None,
    normalize: bool = False,
    reduction: str = "sum",
    return_edges: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Triplet loss on every edge between representations of the same N instances, summed over the edges.

        Σ_{e = (p, q)} w_e Σ_i [m_e + n_i − s_ii]₊ + [m_e + n'_i − s_ii]₊,     s = p qᵀ

    n_i is the hardest negative of row i of node p among the rows of node q, n'_i that of row i of q among those of p.
    Nodes are numbered xs first: node k < K_x is xs[k], node K_x + k is ys[k]. With one node each and edges="cross"
    this is :func:`~gssf_kernels.triplet_loss`: to the bit with "sum" or "mean", without weights and metric.

    Args:
        xs: [K_x, N, D] float.
        ys: [K_y, N, D] of xs's dtype and device.
        margin: m >= 0, a finite number; or a tensor [E] for each edge, constant to autograd.
        edges: "all": every unordered pair of nodes, (0, 1), (0, 2), …; "cross": every pair of an x and a y, those of
            the first x first; or a tensor [E, 2] of integers, (p, q) each, with p ≠ q.
        weights: [E] float, differentiable; None: 1.
        negatives: "hardest", "semihard" or "all", as in :func:`~gssf_kernels.triplet_loss`. "semihard" takes two
            sweeps for all edges, "all" one for each edge.
        ids: [N] integers: instances of equal id are not each other's negatives. None: every other instance is one.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` for all edges, or a sequence of one for each edge. The
            weights are applied to p.
        normalize: compare by cosine; not with a metric, which has its own.
        reduction: "sum", "mean" (the sum over N) or "none": [E, N].
        return_edges: return ``(loss, [E])``: also the loss of each edge, without its weight and detached, for a log;
            sums over the instances, or with "mean" means.

    Returns:
        a scalar, or [E, N]; fp32 (fp64 for fp64). No edge or no instance gives a differentiable 0. NaN and Inf
        propagate. Differentiable once in xs, ys, weights and the metrics.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one N x N x D product for each edge. Extra memory: O((K_x + K_y) N D + E N).

    Source: after GPLDAN, arXiv 2106.13552; the formula is ours.
    """
    _check_nodes(xs, ys)
    _checks.choice(negatives, "negatives", NEGATIVES)
    _checks.reduction(reduction)
    _checks.flag(return_edges, "return_edges")
    _checks.flag(normalize, "normalize")
    kx, ky = xs.shape[0], ys.shape[0]
    edges = _edges(edges, kx, ky, xs.device)
    count, n = edges.shape[0], xs.shape[1]
    margins = _margins(margin, count, xs.device)
    if weights is not None:
        _check_of_edges(weights, "weights", count, xs.device)
    metrics = _metrics(metric, normalize, count, xs, ys)
    xs, ys = _checks.autocast(xs, ys)
    ids = None if ids is None else _checks.labels(ids, "ids", n, xs.device)
    a, b, places = _sides(xs, ys, edges, metrics)
    if weights is None and isinstance(margins, float) and not return_edges and reduction != "none" and count and n:
        return _total(a, b, places, ids, margins, negatives, reduction)
    if negatives == "all":
        of_edges = _every_negative(a, b, places, ids, margins, "none")
        terms = torch.stack(of_edges) if of_edges else (a.sum() + b.sum()).expand(0, n)
    else:
        positive, rows, cols = _statistics(a, b, places, ids, negatives == "semihard")
        positive = positive - (margins if isinstance(margins, float) else margins[:, None].to(positive.dtype))
        terms = anchor_terms(positive.flatten(), rows.flatten(), cols.flatten(), "hinge", [0.0], "none")
        terms = terms.view(count, n)
    weighted = terms if weights is None else weights[:, None].to(terms.dtype) * terms
    loss = weighted if reduction == "none" else weighted.sum()
    loss = loss / max(n, 1) if reduction == "mean" else loss
    if not return_edges:
        return loss
    each = terms.detach().sum(1)
    return loss, each / max(n, 1) if reduction == "mean" else each


def _total(a, b, edges, ids, margin: float, negatives: str, reduction: str) -> Tensor:
    """The loss without weights, summed by the ops of the triplet loss."""
    if negatives == "all":
        return torch.stack(_every_negative(a, b, edges, ids, margin, reduction)).sum()
    positive, rows, cols = (t.flatten() for t in _statistics(a, b, edges, ids, negatives == "semihard"))
    total = anchor_terms(positive, rows, cols, "hinge", [margin], reduction)
    return total * edges.shape[0] if reduction == "mean" and edges.shape[0] != 1 else total


def _check_nodes(xs, ys) -> None:
    for t, name in ((xs, "xs"), (ys, "ys")):
        _checks.floating(t, name, "[K, N, D]")
    _checks.alike(ys, "ys", xs, "xs")
    if xs.shape[1:] != ys.shape[1:]:
        raise ValueError(f"ys: expected the N and D of xs {list(xs.shape)}, got {list(ys.shape)}")


def _check_edges(edges) -> None:
    if isinstance(edges, str):
        _checks.choice(edges, "edges", ("all", "cross"))
    elif isinstance(edges, Tensor):
        _checks.index_pairs(edges, "edges", "E")
    else:
        raise TypeError(f'edges: expected "all", "cross" or a tensor [E, 2] of integers, got {type(edges).__name__}')


def _edges(edges, kx: int, ky: int, device: torch.device) -> Tensor:
    """[E, 2] int64 on the device."""
    nodes = kx + ky
    _check_edges(edges)
    if isinstance(edges, str):
        if edges == "all":
            return torch.triu_indices(nodes, nodes, 1, device=device).T.contiguous()
        sides = torch.arange(kx, device=device), torch.arange(kx, nodes, device=device)
        return torch.cartesian_prod(*sides).view(-1, 2)
    edges = edges.to(torch.int64)
    inside = (edges >= 0) & (edges < nodes) & (edges[:, :1] != edges[:, 1:])
    if _checks.readable(edges):
        if not bool(inside.all()):
            wrong = edges[int((~inside).any(1).nonzero()[0])].tolist()
            raise ValueError(f"edges: expected two different nodes within 0..{nodes - 1}, got {tuple(wrong)}")
    elif edges.device.type == "cuda":
        torch._assert_async(inside.all(), "edges: expected two different nodes, got one that is out of range or twice")
        edges = edges.clamp(0, nodes - 1)
    return edges.to(device).contiguous()


def _check_of_edges(t, name: str, count: int | None = None, device: torch.device | None = None) -> None:
    """t is a floating vector, of ``count`` edges and on the device unless they are None."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected a floating tensor [E], one number for each edge, got {got}")
    if t.dim() != 1 or (count is not None and t.shape[0] != count):
        size = "E" if count is None else count
        raise ValueError(f"{name}: expected shape [{size}], one number for each edge, got {list(t.shape)}")
    if device is not None and t.device != device:
        raise ValueError(f"{name}: expected device {device}, got {t.device}")


def _margins(margin, count: int | None = None, device: torch.device | None = None) -> float | Tensor:
    """margin, checked; count and device as in `_check_of_edges`."""
    if not isinstance(margin, Tensor):
        return _checks.non_negative(margin, "margin")
    _check_of_edges(margin, "margin", count, device)
    if _checks.readable(margin) and not bool(((margin >= 0) & margin.isfinite()).all()):
        raise ValueError(f"margin: expected finite numbers >= 0, got {margin.tolist()}")
    return margin.detach()


def _check_metrics(metric, normalize: bool) -> None:
    if isinstance(metric, str) or not isinstance(metric, (Sequence, nn.ModuleList)):
        check_metric(metric)
    else:
        for each in metric:
            check_metric(each)
            if each is None:
                raise TypeError("metric: expected a StructuredSimilarity for each edge, got None")
    if normalize and metric is not None:
        raise ValueError("normalize: expected False with a metric, which has its own, got True")


def _metrics(
    metric, normalize: bool, count: int, xs: Tensor, ys: Tensor
) -> StructuredSimilarity | list[StructuredSimilarity] | None:
    """metric and normalize, checked: one metric for all edges, or one for each."""
    _check_metrics(metric, normalize)
    if metric is None or isinstance(metric, StructuredSimilarity):
        return metric_of(metric, normalize, "graph_pattern_loss", xs.flatten(0, 1), ys.flatten(0, 1))
    if len(metric) != count:
        raise ValueError(f"metric: expected one, or one for each of {count} edges, got {len(metric)}")
    return list(metric)


def _sides(
    xs: Tensor, ys: Tensor, edges: Tensor, metric: StructuredSimilarity | list[StructuredSimilarity] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(a [L, N, D], b [R, N, D], edges [E, 2] between them): the factors of the scores of every edge."""
    nodes = xs if ys.shape[0] == 0 else ys if xs.shape[0] == 0 else torch.cat((xs, ys))
    if not metric:
        return nodes, nodes, edges
    shape, rows = nodes.shape, nodes.flatten(0, 1)
    if isinstance(metric, StructuredSimilarity):
        a, b = metric.factors(rows, rows)
        return a.view(shape), b.view(shape), edges
    factors = [each.factors(*_ends(nodes, nodes, edges[e])) for e, each in enumerate(metric)]
    places = torch.arange(len(factors), device=edges.device)[:, None].expand(-1, 2).contiguous()
    return torch.stack([a for a, _ in factors]), torch.stack([b for _, b in factors]), places


def _ends(a: Tensor, b: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    """(a[p], b[q]) of an edge (p, q) [2], whose values stay on the device."""
    left, right = (t.index_select(0, end)[0] for t, end in zip((a, b), edge.split(1), strict=True))
    return left, right


def _statistics(a: Tensor, b: Tensor, edges: Tensor, ids: Tensor | None, semihard: bool) -> tuple[Tensor, ...]:
    """(scores of the pairs, negatives of the rows, of the columns) [E, N] each."""
    if not edges.shape[0] or not a.shape[1]:
        none = (a.sum() + b.sum()).expand(edges.shape[0], a.shape[1])
        return none, none, none
    route = "sweep" if semihard else ""
    hardest = hardest_of_edges(a, b, edges, ids, route=route)
    p, rows, cols = hardest.positive_score, hardest.row_score, hardest.col_score
    if semihard:
        limited = hardest_of_edges(a, b, edges, ids, semihard_limit(p), route)
        rows = semihard_or_hardest(limited.row_score, rows)
        cols = semihard_or_hardest(limited.col_score, cols)
    return p, rows, cols


def _every_negative(
    a: Tensor, b: Tensor, edges: Tensor, ids: Tensor | None, margins: float | Tensor, reduction: str
) -> list[Tensor]:
    """The terms of each edge over every negative [N], or their sum or mean: a sweep for each edge."""
    pairing = Pairing("rows", ids, ids)
    terms = []
    for e in range(edges.shape[0]):
        left, right = _ends(a, b, edges[e])
        margin = margins if isinstance(margins, float) else margins[e].to(accumulation_dtype(a.dtype))
        terms.append(every_negative(PairedInputs(left, right, pairing, True, (None, None)), margin, reduction))
    return terms


class GraphPatternLoss(nn.Module):
    """:func:`graph_pattern_loss` as a module.

    Args:
        margin, edges, negatives, normalize, reduction, return_edges: as in :func:`graph_pattern_loss`; tensors become
            buffers.
        weights: [E] float, constant: a buffer. None: 1.
        metric: one for all edges, or a sequence of one for each; their parameters become this module's.

    Raises:
        TypeError, ValueError: the setting that is wrong, what was expected and what came.
    """

    margin: float | Tensor
    edges: str | Tensor
    weights: Tensor | None

    def __init__(
        self,
        margin: float | Tensor = 0.2,
        edges: str | Tensor = "all",
        weights: Tensor | None = None,
        negatives: str = "hardest",
        metric: Metrics = None,
        reduction: str = "sum",
        *,
        normalize: bool = False,
        return_edges: bool = False,
    ):
        super().__init__()
        _checks.choice(negatives, "negatives", NEGATIVES)
        _checks.reduction(reduction)
        _checks.flag(return_edges, "return_edges")
        _checks.flag(normalize, "normalize")
        _check_edges(edges)
        _check_metrics(metric, normalize)
        if weights is not None:
            _check_of_edges(weights, "weights")
        for name, value in (("margin", _margins(margin)), ("edges", edges), ("weights", weights)):
            if isinstance(value, Tensor):
                self.register_buffer(name, value.detach().clone())
            else:
                setattr(self, name, value)
        self.metric = nn.ModuleList(metric) if isinstance(metric, Sequence) else metric
        self.negatives, self.reduction = negatives, reduction
        self.normalize, self.return_edges = normalize, return_edges

    def forward(self, xs: Tensor, ys: Tensor, ids: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of xs [K_x, N, D] and ys [K_y, N, D]; see :func:`graph_pattern_loss`."""
        return graph_pattern_loss(
            xs,
            ys,
            margin=self.margin,
            edges=self.edges,
            weights=self.weights,
            negatives=self.negatives,
            ids=ids,
            metric=self.metric,
            normalize=self.normalize,
            reduction=self.reduction,
            return_edges=self.return_edges,
        )

    def extra_repr(self) -> str:
        margin = "of each edge" if isinstance(self.margin, Tensor) else self.margin
        edges = f"{self.edges.shape[0]} listed" if isinstance(self.edges, Tensor) else repr(self.edges)
        return f"margin={margin}, edges={edges}, negatives={self.negatives!r}, reduction={self.reduction!r}"


__all__ = ["GraphPatternLoss", "graph_pattern_loss"]
