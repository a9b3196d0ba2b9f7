"""Losses designed by their gradient: weights on the positive and on the hardest negative of every anchor.

    dL/dp_i = −w⁺_i,   dL/dn_i = +w⁻_i      over rows, and the same over columns;  w are constants to autograd

s = x yᵀ, p_i = s_ii, and n_i is the score of the anchor's hardest negative. So dx = G y and dy = Gᵀ x, with a sparse
G = dL/ds of at most three entries for each pair. There need not be a loss whose derivative this is.

Source: GOAL, arXiv 2210.13188; the general form with functions as arguments is ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gssf_kernels import _checks, reference
from gssf_kernels._library import Function
from gssf_kernels.diagnostics import diagnose, diagnose_pairs
from gssf_kernels.ops import paired_hardest_negatives, paired_relative_negatives, relative_positives
from gssf_kernels.ops.mining import (
    Mined,
    PairedInputs,
    check_reduction,
    mine,
    pair_directions,
    paired_inputs,
    reduce_listed,
)
from gssf_kernels.ops.pairing import as_list
from gssf_kernels.ops.segments import gather
from gssf_kernels.reference import AnchorStatistics, Diagnostics, RelativeTerms
from gssf_kernels.similarity import StructuredSimilarity, metric_of

KINDS = ("exponential", "linear")
_NAMES = ("x", "y", "x_ids", "y_ids")


def gradient_space_loss(
    x: Tensor,
    y: Tensor,
    weights: Callable[[AnchorStatistics], tuple[Tensor, Tensor]],
    *,
    value: Callable[[AnchorStatistics], Tensor] | None = None,
    relative: RelativeTerms | None = None,
    pairs: str | Tensor | None = None,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    symmetric: bool = True,
    false_negative_margin: float | None = None,
    reduction: str = "sum",
    normalize: bool = False,
    metric: StructuredSimilarity | None = None,
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """A loss with gradients ``dL/dp = −positive_weight`` and ``dL/dn = +negative_weight``, independent of its value.

    ``pairs``, ids, extra rows of y, ``symmetric``, ``false_negative_margin`` and ``metric`` are as in
    :func:`~gssf_kernels.triplet_loss`; with ``pairs`` an anchor is a pair, and pairs of equal id are listed. The N x M
    matrix is not stored. An anchor without a negative has value 0 and no gradient.

        loss = gk.gradient_space_loss(x, y, lambda anchor: (1 - anchor.positive, anchor.negative.relu()))

    Args:
        x: [N, D] float, anchors.
        y: [M, D] of x's dtype and device, M >= N.
        weights: a function, called once for the rows and once for the columns. Its argument is
            :class:`~gssf_kernels.AnchorStatistics`: detached [N] tensors ``positive``, ``negative`` (-inf where there
            is none) and, with ``relative``, ``relative_positive`` and ``relative_negative``. It returns
            (positive_weight, negative_weight), floating [N] each, which are constants to autograd.
        value: a function of the same argument that returns the terms [N] of the reported loss. None: the terms are
            ``n − p``, which falls as training succeeds, but is not the objective.
        relative: :class:`~gssf_kernels.RelativeTerms`, to compute the relative terms too: r⁺ by sorting in fp64, r⁻ in
            the same sweep. None: they are not computed.
        x_ids: [N] integers. If N = M, the ids of one input serve both.
        y_ids: [M] integers.
        reduction: "sum", "mean" (the sum over N) or "none" ([N]: row term i + column term i).
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by.
        normalize: compare by cosine: divide the rows by their L2 norms first, in the same pass as a metric would.
        diagnostics: return ``(loss, Diagnostics)`` with margin 0; see :mod:`gssf_kernels.diagnostics`.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64), as are all statistics. NaN and Inf propagate.
        Differentiable once.

    Raises:
        TypeError: an argument, or a result of ``weights`` or ``value``, has the wrong type or dtype.
        ValueError: a shape, device, ``reduction`` or field of ``relative`` is wrong.

    Source: GOAL, arXiv 2210.13188.
    """
    _checks.function(weights, "weights")
    if value is not None:
        _checks.function(value, "value")
    _check_relative(relative)
    metric = metric_of(metric, normalize, "gradient_space_loss", x, y)
    _checks.flag(diagnostics, "diagnostics")
    _checks.flag(symmetric, "symmetric")
    check_reduction(reduction, pairs, symmetric)
    if pairs is not None or not symmetric or false_negative_margin is not None:
        inputs = paired_inputs(
            x,
            y,
            pairs,
            x_ids,
            y_ids,
            metric=metric,
            symmetric=symmetric,
            false_negative_margin=false_negative_margin,
            mined=relative is None,
        )
        loss, mined = designed(inputs, weights, value, relative, reduction)
        return (loss, diagnose_pairs(x, y, 0.0, inputs, mined)) if diagnostics else loss
    r_negative: tuple[Tensor | None, Tensor | None] = (None, None)  # r⁻ of the rows, of the columns
    if relative is None:
        positive_score, hardest = paired_hardest_negatives(x, y, x_ids, y_ids, names=_NAMES, metric=metric)
    else:
        positive_score, hardest, r_negative = paired_relative_negatives(
            x, y, x_ids, y_ids, relative, names=_NAMES, metric=metric
        )
    count = positive_score.shape[0]
    rows = _terms(positive_score, hardest.row_score, r_negative[0], weights, value, relative)
    cols = _terms(positive_score, hardest.col_score[:count], r_negative[1], weights, value, relative)
    loss = reference.reduce(rows + cols, reduction)
    return (loss, diagnose(x, y, 0.0, positive_score, hardest)) if diagnostics else loss


def designed(inputs: PairedInputs, weights, value, relative, reduction: str) -> tuple[Tensor, Mined]:
    """(loss, hardest negatives) for pairs of any kind, which are listed: O(P) memory by ids too."""
    by_ids, rows = inputs.pairing.kind == "ids", inputs.a.shape[0]
    inputs = inputs._replace(pairing=as_list(inputs.pairing))
    mined = mine(inputs, relative)
    listed, functions = inputs.pairing.listed, (weights, value, relative)
    if listed is None:
        terms = _terms(mined.positive_score, mined.row_score, mined.row_relative, *functions)
        if inputs.columns:
            terms = terms + _terms(mined.positive_score, mined.col_score[:rows], mined.col_relative, *functions)
        return reference.reduce(terms, reduction), mined
    positive_score, row, col = pair_directions(mined, listed, inputs.columns)
    terms = positive_score * 0
    for n, relative_negative, anchor in (
        (row, mined.row_relative, listed.rows),
        (col, mined.col_relative, listed.cols),
    ):
        if n is not None:
            r = None if relative_negative is None else gather(relative_negative, anchor)
            terms = terms + _terms(positive_score, n, r, *functions, listed.counted)
    return reduce_listed(terms, listed, reduction, rows if by_ids else None), mined


def _terms(positive_score, negative, r_negative, weights, value, relative, counted=None) -> Tensor:
    """The terms [N] of one direction, which carry the designed gradient; counted: which anchors there are."""
    p, n = positive_score.detach(), negative.detach()
    anchor = AnchorStatistics(p, n)
    if relative is not None:
        anchor = AnchorStatistics(p, n, relative_positives(p, n, relative, counted), r_negative[: p.shape[0]])
    result = weights(anchor)
    if not isinstance(result, tuple | list) or len(result) != 2:
        got = f"{len(result)} of them" if isinstance(result, tuple | list) else type(result).__name__
        raise TypeError(f"weights: expected it to give two tensors (positive_weight, negative_weight), got {got}")
    positive_weight, negative_weight = (_checks.anchors(w, "weights", p) for w in result)
    term = n - p if value is None else _checks.anchors(value(anchor), "value", p)
    valid = n != -torch.inf  # what the functions return for an anchor without a negative is not used
    tensors = (term, positive_weight, negative_weight)
    term, positive_weight, negative_weight = (torch.where(valid, t, 0) for t in tensors)
    return _Designed.apply(term, positive_score, negative, positive_weight, negative_weight)


class _Designed(Function):
    """Returns ``value``. Its gradients are −w⁺ grad_out with respect to p, and w⁻ grad_out with respect to n."""

    @staticmethod
    def forward(value, positive, negative, positive_weight, negative_weight):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx, grad_out):
        positive_weight, negative_weight = ctx.saved_tensors
        return None, -grad_out * positive_weight, grad_out * negative_weight, None, None


def _check_relative(relative) -> None:
    if relative is None:
        return
    if not isinstance(relative, RelativeTerms):
        raise TypeError(f"relative: expected RelativeTerms or None, got {type(relative).__name__}")
    _checks.choice(relative.kind, "relative.kind", KINDS)
    for name in ("alpha", "beta"):
        _checks.positive(getattr(relative, name), f"relative.{name}")
    for name in ("positive_threshold", "negative_threshold"):
        _checks.non_negative(getattr(relative, name), f"relative.{name}")


__all__ = ["gradient_space_loss"]
