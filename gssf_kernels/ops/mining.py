"""Hardest negatives for pairs of any kind, one direction or both, with or without limits; and the terms of their pairs.

The general form of :mod:`gssf_kernels.ops.hardest`: pairs as :mod:`gssf_kernels.ops.pairing` has them, negatives as
:mod:`gssf_kernels.ops.negatives`.

    Σ_{(i, j) ∈ P} f(s_ij, n_i) + f(s_ij, n'_j)      f: the term of one direction, "hinge" or "goal <triplet> <pair>"
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import Function, distinct, last_derivative
from gssf_kernels.ops.pairing import Levels, ListedPairs, Pairing, few_as_list, levels_of, one_level, pairing_of
from gssf_kernels.ops.pairs import scores_of_pairs
from gssf_kernels.ops.segment_terms import lowest_of_pairs, segment_terms
from gssf_kernels.ops.segments import gather, segment_sums, segments_of
from gssf_kernels.ops.terms import anchor_terms
from gssf_kernels.reference import RelativeTerms
from gssf_kernels.similarity import StructuredSimilarity, paired_factors


class PairedInputs(NamedTuple):
    """What a loss compares, checked."""

    a: Tensor  # [N, D], the factors of the scores
    b: Tensor  # [M, D]
    pairing: Pairing
    columns: bool  # columns are anchors too
    # The largest score of a row's negatives [N], of a column's [M]; or several, [K, N] and [K, M].
    limits: tuple[Tensor | None, Tensor | None]
    positive_score: Tensor | None = None  # [N] of pairs (i, i), detached, if the metric's projection made it


def paired_inputs(
    x: Tensor,
    y: Tensor,
    pairs: str | Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    *,
    metric: StructuredSimilarity | None,
    symmetric: bool = True,
    false_negative_margin: float | None = None,
    same_id: str = "positive",
    scores: bool = False,
    mined: bool = False,
) -> PairedInputs:
    """The user's arguments of a two-sided loss, checked, but for symmetric and metric, which are checked already.

    same_id: with "ignore" equal ids are no positives. scores: whether positive_score is wanted, where the metric's
    projection can make it. mined: whether limits are for the hardest negatives by any route, so that they are rounded
    as those are.
    """
    margin = _checks.optional_non_negative(false_negative_margin, "false_negative_margin")
    x, y = _checks.autocast(x, y)
    pairing = pairing_of(pairs, x_ids, y_ids, x, y, ("x", "y", "x_ids", "y_ids"))
    if same_id == "ignore" and pairing.kind == "ids":
        raise ValueError('same_id: expected "positive" with pairs="ids", got "ignore"')
    a, b, positive_score = x, y, None
    if metric is not None:
        a, b, positive_score = paired_factors(metric, x, y, scores and pairing.kind == "rows")
        a, b = _checks.autocast(a, b)
    positives = pairing._replace(x_ids=None, y_ids=None) if same_id == "ignore" else pairing
    exact = mined and pairing.kind != "listed"  # mining of listed pairs is never certified
    return PairedInputs(a, b, pairing, symmetric, limits_of(a, b, positives, margin, symmetric, exact), positive_score)


def check_reduction(reduction: str, pairs, symmetric: bool) -> None:
    """Raise ValueError unless the loss can be reduced so: by id, the terms of both directions are no vector."""
    _checks.reduction(reduction)
    if reduction == "none" and isinstance(pairs, str) and pairs == "ids" and symmetric:
        raise ValueError('reduction: expected "sum" or "mean" with pairs="ids" and symmetric=True, got "none"')


class Mined(NamedTuple):
    """The hardest negatives of rows and columns, and the scores of the pairs. With K limits [K, N] and [K, M]."""

    positive_score: Tensor  # [N] of pairs (i, i), [P] of listed pairs in sorted order, or [0] by ids
    row_score: Tensor  # [N]
    row_index: Tensor
    col_score: Tensor  # [M], or [0] if columns are no anchors
    col_index: Tensor
    row_relative: Tensor | None = None  # GOAL's r⁻
    col_relative: Tensor | None = None


def mine(inputs: PairedInputs, relative: RelativeTerms | None = None, route: str = "") -> Mined:
    """One sweep. Differentiable once in a and b, through the scores."""
    a, b, pairing, columns, limits, _ = inputs
    negatives = pairing.negatives(columns, *limits)
    listed = pairing.listed
    edges = (None, None) if listed is None else (listed.rows, listed.cols)
    extra: tuple = (route,)
    if relative is not None:
        lowest = lowest_positive(a, b, pairing)
        beta = None if relative.kind == "linear" else relative.beta
        extra = lowest - relative.negative_threshold, beta
    a, b = distinct(a, b)
    ids = distinct(pairing.x_ids, pairing.y_ids)
    results = _Mine.apply(a, b, *ids, *edges, pairing.kind == "rows", negatives, extra)
    return Mined(*results)


def lowest_positive(a: Tensor, b: Tensor, pairing: Pairing) -> Tensor:
    """The lowest score of all pairs, a scalar; +inf if there is none. No gradient."""
    with torch.no_grad():
        if pairing.kind == "ids":
            assert pairing.x_ids is not None
            assert pairing.y_ids is not None
            scores, _ = lowest_of_pairs(a, b, pairing.x_ids, pairing.y_ids)
        else:
            scores = pair_scores_of(a, b, pairing.listed)
        return torch.cat((scores, scores.new_full((1,), torch.inf))).min()


def pair_scores_of(a: Tensor, b: Tensor, listed: ListedPairs | None, exact: bool = False) -> Tensor:
    """The scores of the pairs (i, i) [N], or of listed pairs [P] with +inf for one listed again. No gradient."""
    if listed is None:
        i = torch.arange(a.shape[0], device=a.device)
        return torch.ops.gssf.pair_scores(a.detach(), b.detach(), i, i, exact)
    scores = torch.ops.gssf.pair_scores(a.detach(), b.detach(), listed.rows, listed.cols, exact)
    return torch.where(listed.counted, scores, torch.inf)


def lowest_positives(a: Tensor, b: Tensor, pairing: Pairing, exact: bool) -> tuple[Tensor, Tensor]:
    """The lowest score of each row's positives [N], and of each column's [M]; +inf for none. No gradient.

    Positives are the pairs and, with pairs (i, i), the scores of equal id. exact: as in `scores_of_pairs`.
    """
    n, m = a.shape[0], b.shape[0]
    if pairing.kind != "rows":
        return _lowest_of_listed(a, b, pairing, exact)
    scores = pair_scores_of(a, b, None, exact)
    padding = scores.new_full((m - n,), torch.inf)
    rows, cols = scores, torch.cat((scores, padding))
    if pairing.x_ids is not None and pairing.y_ids is not None:
        by_id = _lowest_of_listed(a, b, pairing._replace(kind="ids"), exact)
        rows, cols = (torch.minimum(*both) for both in zip((rows, cols), by_id, strict=True))
    return rows, cols


def _lowest_of_listed(a: Tensor, b: Tensor, pairing: Pairing, exact: bool) -> tuple[Tensor, Tensor]:
    """`lowest_positives` of pairs that are listed, or by id."""
    listed = few_as_list(pairing)
    if listed is None:
        assert pairing.x_ids is not None
        assert pairing.y_ids is not None
        return lowest_of_pairs(a, b, pairing.x_ids, pairing.y_ids)
    scores = pair_scores_of(a, b, listed, exact)
    rows, cols = (scores.new_full((t.shape[0],), torch.inf) for t in (a, b))
    index = listed.rows.clamp_min(0), listed.cols.clamp_min(0)
    rows, cols = (t.scatter_reduce(0, i, scores, "amin") for t, i in zip((rows, cols), index, strict=True))
    return rows, cols


class _Mine(Function):
    @staticmethod
    def forward(a, b, x_ids, y_ids, pair_rows, pair_cols, paired, negatives, extra):
        if len(extra) == 1:
            return torch.ops.gssf.hardest_negatives(a, b, x_ids, y_ids, *extra, *negatives)[:5]
        return torch.ops.gssf.relative_negatives(a, b, x_ids, y_ids, *extra, *negatives)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, _, _, pair_rows, pair_cols, ctx.paired, _, _ = inputs
        _, _, row_index, _, col_index, *relative = output
        ctx.mark_non_differentiable(row_index, col_index, *relative)
        ctx.save_for_backward(a, b, pair_rows, pair_cols, row_index, col_index)

    @staticmethod
    def backward(ctx, dpositive, drow, _drow_index, dcol, *_):
        a, b, *indices = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        grads = last_derivative(_gradients, ctx.paired, needs, dpositive, drow, dcol, a, b, *indices)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 7)


def _gradients(paired, needs, dpositive, drow, dcol, a, b, pair_rows, pair_cols, row_index, col_index):
    i, j = (torch.arange(index.shape[-1], device=a.device) for index in (row_index, col_index))
    if paired:
        pair_rows = pair_cols = i
    elif pair_rows is None:
        pair_rows = pair_cols = i[:0]
    i, j = (anchor.expand_as(index).flatten() for anchor, index in ((i, row_index), (j, col_index)))
    rows = torch.cat((pair_rows, i, col_index.flatten()))
    cols = torch.cat((pair_cols, row_index.flatten(), j))
    dscores = torch.cat((dpositive, drow.flatten(), dcol.flatten()))
    return torch.ops.gssf.pair_scores_backward(dscores, rows, cols, a, b, needs)


def pair_directions(mined: Mined, listed: ListedPairs, columns: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each listed pair, in sorted order: its score, and the hardest negatives of its row and of its column [P].

    A pair listed again has score 0 and no negative.
    """
    positive_score = torch.where(listed.counted, mined.positive_score, 0)
    col = gather(mined.col_score, listed.cols) if columns else None
    return positive_score, gather(mined.row_score, listed.rows), col


def listed_pairs(inputs: PairedInputs, mined: Mined) -> tuple[ListedPairs | None, Mined]:
    """The pairs as a list, with their scores in `mined`, if they are listed, or if they are few by id; else None."""
    listed = few_as_list(inputs.pairing)
    if listed is not None and inputs.pairing.kind == "ids":
        scores = scores_of_pairs(inputs.a, inputs.b, listed.rows, listed.cols, exact=True)
        mined = mined._replace(positive_score=scores)
    return listed, mined


def pair_terms(inputs: PairedInputs, mined: Mined, formula: str, constants: list[float], reduction: str) -> Tensor:
    """The terms of all pairs, or their sum or mean. Differentiable once in a, b and the scores of `mined`.

    "none": [N] of pairs (i, i), [P] of listed pairs in the user's order, and [N] by ids, the sum over each row's pairs,
    for which columns are no anchors.
    """
    a, b, pairing, columns, *_ = inputs
    if pairing.kind == "rows":
        col_score = mined.col_score if columns else None
        return anchor_terms(mined.positive_score, mined.row_score, col_score, formula, constants, reduction)
    listed, mined = listed_pairs(inputs, mined)
    if listed is not None:
        positive_score, row, col = pair_directions(mined, listed, columns)
        terms = anchor_terms(positive_score, row, col, formula, constants, "none")
        return reduce_listed(terms, listed, reduction, a.shape[0] if pairing.kind == "ids" else None)
    assert pairing.x_ids is not None
    assert pairing.y_ids is not None
    scores = mined.row_score, mined.col_score if columns else None
    each = reduction == "none"
    total = segment_terms(a, b, pairing.x_ids, pairing.y_ids, *scores, formula, constants, each)
    return total / pair_count(pairing.x_ids, pairing.y_ids).clamp_min(1) if reduction == "mean" else total


def reduce_listed(terms: Tensor, listed: ListedPairs, reduction: str, rows: int | None = None) -> Tensor:
    """terms [P] of listed pairs, which are 0 for a pair listed again, in the user's order; or their sum or mean.

    rows: for "none" the sums over the pairs of each of so many rows instead.
    """
    if reduction == "none" and rows is not None:
        return segment_sums(terms[:, None], listed.rows, torch.arange(rows, device=terms.device), rows)[:, 0]
    if reduction == "none":
        return torch.zeros_like(terms).index_copy(0, listed.order, terms)
    total = terms.sum()
    return total / listed.total.clamp_min(1) if reduction == "mean" else total


def pair_count(x_ids: Tensor, y_ids: Tensor) -> Tensor:
    """How many pairs of equal id there are, a scalar."""
    return segments_of(x_ids, y_ids).row_counts().sum() if x_ids.shape[0] else x_ids.sum()


def limits_of(
    a: Tensor, b: Tensor, pairing: Pairing, margin: float | None, columns: bool, exact: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The limits of ``false_negative_margin``: the lowest positive score of each anchor plus the margin."""
    if margin is None:
        return None, None
    rows, cols = lowest_positives(a, b, pairing, exact)
    return rows + margin, cols + margin if columns else None


def semihard(inputs: PairedInputs) -> tuple[Tensor, Tensor, Tensor | None, Mined]:
    """For each pair its score, the semi-hard negatives of its row and of its column [P], and the hardest negatives.

    The semi-hard negative of a pair is the hardest one that scores less than the pair, or the hardest if there is none.
    The pairing is of kind "rows" or "listed". A sweep for the hardest, and one that compares each score with those of
    its anchor's pairs, up to `plan.LIMITS` of them.
    """
    a, b, pairing, columns, limits, _ = inputs
    hardest = mine(inputs, route="sweep")  # as the sweeps with limits, so that scores are rounded alike
    listed, counts = pairing.listed, (a.shape[0], b.shape[0])[: 1 + columns]
    if listed is None:
        p, row, col = hardest.positive_score, hardest.row_score, hardest.col_score[: a.shape[0]] if columns else None
        levels = [one_level(a.shape[0], count, a.device) for count in counts]
    else:
        p, row, col = pair_directions(hardest, listed, columns)
        levels = [levels_of(*anchors) for anchors in zip((listed.rows, listed.cols), counts, strict=False)]
    most = max(t.most for t in levels)
    bounds = [_semihard_limits(p, t._replace(most=most), limit) for t, limit in zip(levels, limits, strict=False)]
    scores: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, most, plan.LIMITS):
        part = slice(first, first + plan.LIMITS) if most > 1 else 0
        limits_of_part = bounds[0][part], bounds[1][part] if columns else None
        mined = mine(inputs._replace(limits=limits_of_part), route="sweep")
        scores[0].append(mined.row_score.flatten())
        scores[1].append(mined.col_score.flatten())
    if most:
        row = semihard_or_hardest(gather(torch.cat(scores[0]), levels[0].places()), row)
        col = None if col is None else semihard_or_hardest(gather(torch.cat(scores[1]), levels[1].places()), col)
    return p, row, col, hardest


def semihard_limit(p: Tensor) -> Tensor:
    """The largest number less than each pair's score p: the limit of its semi-hard negatives. No gradient."""
    return torch.nextafter(p.detach(), p.new_full((), -torch.inf))


def semihard_or_hardest(semihard_score: Tensor, hardest_score: Tensor) -> Tensor:
    """The semi-hard negative's score, or the hardest's where there is no semi-hard one (-inf)."""
    return torch.where(semihard_score == -torch.inf, hardest_score, semihard_score)


def _semihard_limits(p: Tensor, levels: Levels, limit: Tensor | None) -> Tensor:
    """The limits of the semi-hard negatives of each anchor's pairs [most, anchors]; +inf where there is no pair.

    p [P]: the pairs' scores. limit [anchors]: the limit of the anchor's negatives.
    """
    pairs = levels.pairs()
    bounds = torch.where(pairs < 0, torch.inf, gather(semihard_limit(p), pairs))
    return bounds if limit is None else torch.minimum(bounds, limit)
