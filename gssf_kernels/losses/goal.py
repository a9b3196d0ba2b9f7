"""GOAL: fifteen losses designed in gradient space, a triplet weight T times a pair weight P.

    dL/dp_i = −T_i P⁺_i,   dL/dn_i = +T_i P⁻_i        over rows, and the same over columns;  T, P are constants

    T:  con  1        nca  σ(−τ(p − n))        cir  σ(−τ(p(2 − p) − n² − ½))

             P⁺                            P⁻
    con      1                             1
    lin      1 − p                         n
    sig      σ(−α(p − λ))                  σ(β(n − λ))
    lin_ms   (1 − r⁺)(1 − p)               (1 + r⁻) n
    sig_ms   1 / (e^{α(p − λ)} + r⁺)       1 / (e^{−β(n − λ)} + r⁻)

p_i = s_ii, and n_i is the score of the hardest negative. r⁺ and r⁻ are as in :class:`~gssf_kernels.RelativeTerms`, of
the kind "linear" for lin_ms. There is no margin and no hinge. Five combinations are the derivative of a loss (sp:
softplus):

    con·con  n − p                              con·lin  ½[(1 − p)² + n²]
    con·sig  sp(−α(p − λ))/α + sp(β(n − λ))/β      nca·con  sp(−τ(p − n))/τ
    cir·lin  sp(τ[(1 − p)² + n² − ½]) / (2τ)

Source: GOAL, arXiv 2210.13188, and its authors' public code (microsoft/VSE_Gradient). The backward there ignores
grad_out, which is wrong with loss scaling, loss weights and accumulation; here it is multiplied in. The losses of the
five combinations, ids, extra rows of y and metrics are ours.
"""

import torch
from torch import Tensor, nn

from gssf_kernels import _checks, reference
from gssf_kernels.diagnostics import diagnose, diagnose_pairs
from gssf_kernels.losses.gradient_space import designed
from gssf_kernels.ops import anchor_terms, hardest_terms, paired_hardest_negatives
from gssf_kernels.ops.goal import PAIR, RELATIVE, TRIPLET, Constants, anchor_weights
from gssf_kernels.ops.mining import check_reduction, mine, pair_terms, paired_inputs
from gssf_kernels.reference import Diagnostics, RelativeTerms
from gssf_kernels.similarity import StructuredSimilarity, check_metric, metric_of

_NAMES = ("x", "y", "x_ids", "y_ids")


def goal_loss(
    x: Tensor,
    y: Tensor,
    *,
    triplet: str = "nca",
    pair: str = "con",
    tau: float = 1.0,
    alpha: float = 2.0,
    beta: float = 10.0,
    lam: float = 0.5,
    positive_threshold: float = 0.1,
    negative_threshold: float = 0.1,
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
    """GOAL: the gradient is ``Σ −T P⁺ dp + T P⁻ dn`` over rows and columns, T and P as in the docstring of this file.

    For con·con, con·lin, con·sig, nca·con and cir·lin the value is the loss with this derivative. For the other ten
    there is no such loss, and the value is ``Σ (n − p)``. That falls as training succeeds, but it is not the objective:
    its finite differences are not the gradient.

    ``pairs``, ids, extra rows of y, ``symmetric``, ``false_negative_margin``, ``reduction`` and ``metric`` are as in
    :func:`~gssf_kernels.triplet_loss`; lin_ms and sig_ms list the pairs of equal id, for which a GPU synchronises. The
    N x M matrix is not stored, except on a GPU by lin_ms and sig_ms of at most 2²⁰ scores: 4 MiB while the forward
    runs. An anchor without a negative has value 0 and no gradient.

    Args:
        x: [N, D] float, anchors. Rows should be L2-normalised, here or by the metric: thresholds, λ and the form of
            the weights are meant for cosines. P⁻ of sig_ms grows to e^{β(n − λ)}, 148 at n = 1, and is infinite in
            fp32 if β(n − λ) > 88.
        y: [M, D] of x's dtype and device, M >= N without ``pairs``.
        triplet: T, one of "con", "nca", "cir".
        pair: P, one of "con", "lin", "sig", "lin_ms", "sig_ms".
        tau: τ > 0, sharpness of nca and cir.
        alpha, beta: α, β > 0, sharpness of sig and sig_ms at positives and at negatives.
        lam: λ, the score at which the exponents of sig and sig_ms are 0.
        positive_threshold: >= 0; p_k counts in r⁺_i if it is at most n_i plus this.
        negative_threshold: >= 0; s_ij counts in r⁻_i if it is at least the lowest p_k minus this.
        x_ids: [N] integers. If N = M, the ids of one input serve both.
        y_ids: [M] integers.
        reduction: "sum" as in the authors' code, "mean" (the sum over N) or "none" ([N]: row term i + column term i).
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by.
        normalize: compare by cosine: divide the rows by their L2 norms first, in the same pass as a metric would.
        diagnostics: return ``(loss, Diagnostics)`` with margin 0; see :mod:`gssf_kernels.diagnostics`.

    Returns:
        a scalar, or [N] for "none"; statistics, weights and value in fp32 (fp64 for fp64). N = 0 gives a
        differentiable 0. NaN propagates. Differentiable once.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, mode or number is out of range.

    Source: GOAL, arXiv 2210.13188.
    """
    constants, relative = _mode(triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold)
    metric = metric_of(metric, normalize, "goal_loss", x, y)
    _checks.flag(diagnostics, "diagnostics")
    _checks.flag(symmetric, "symmetric")
    check_reduction(reduction, pairs, symmetric)
    formula, settings = f"goal {triplet} {pair}", [*constants]
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
        if relative is None:
            mined = mine(inputs)
            loss = pair_terms(inputs, mined, formula, settings, reduction)
        else:

            def weights(anchor):
                return anchor_weights(anchor, triplet, pair, constants)

            loss, mined = designed(inputs, weights, None, relative, reduction)
        return (loss, diagnose_pairs(x, y, 0.0, inputs, mined)) if diagnostics else loss
    if relative is None and metric is None:
        positive_score, hardest = paired_hardest_negatives(x, y, x_ids, y_ids, names=_NAMES)
        statistics = positive_score, hardest.row_score, hardest.col_score
        terms = anchor_terms(*statistics, formula, settings, reduction)
    else:
        if relative is not None:
            settings += [relative.positive_threshold, relative.negative_threshold]
        terms, positive_score, hardest = hardest_terms(
            x, y, x_ids, y_ids, formula, settings, reduction, names=_NAMES, metric=metric
        )
    return (terms, diagnose(x, y, 0.0, positive_score, hardest)) if diagnostics else terms


def goal_weights(
    scores: Tensor,
    *,
    triplet: str = "nca",
    pair: str = "con",
    tau: float = 1.0,
    alpha: float = 2.0,
    beta: float = 10.0,
    lam: float = 0.5,
    positive_threshold: float = 0.1,
    negative_threshold: float = 0.1,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
) -> Tensor:
    """``G = dL/ds`` of GOAL for scores that are not a product of embeddings, for example of cross-attention.

        scores = model(images, captions)                             # [N, M], any way
        scores.backward(gk.goal_weights(scores).to_dense())
        (scores * gk.goal_weights(scores).to_dense()).sum().backward()       # the same

    Args:
        scores: [N, M] float, M >= N. Pairs are on the diagonal; columns past N are extra negatives.
        triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold: as in :func:`goal_loss`.
        x_ids: [N] integers, of the rows. If N = M, the ids of one input serve both.
        y_ids: [M] integers, of the columns.

    Returns:
        a coalesced sparse COO tensor [N, M] of the scores' dtype with at most 3 N entries, without gradient:
        ``G_ii = −T_i P⁺_i − T'_i P'⁺_i``, and ``+T_i P⁻_i``, ``+T'_j P'⁻_j`` at the hardest negatives of row i and
        column j < N. Anchors without a negative have no entries.

    Computed in plain PyTorch, weights in fp32 (fp64 for fp64). The number of entries depends on values: on a GPU this
    function synchronises and cannot be captured in a CUDA graph.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, mode or number is out of range.

    Source: GOAL, arXiv 2210.13188.
    """
    constants, relative = _mode(triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold)
    _checks.score_matrix(scores, "scores")
    x_ids, y_ids = _checks.ids(x_ids, y_ids, scores, scores.mT, "x_ids", "y_ids")
    s = reference.accumulate(scores.detach())
    masked = s.masked_fill(reference.positives(s, s.mT, x_ids, y_ids), -torch.inf)
    count = s.shape[0]
    i = torch.arange(count, device=s.device)
    indices, entries = [], []
    for anchor_scores, transposed in ((masked, False), (masked[:, :count].mT, True)):
        anchor, negative_index = reference.anchor_statistics(s.diagonal(), anchor_scores, relative)
        positive_weight, negative_weight = anchor_weights(anchor, triplet, pair, constants)
        valid = negative_index >= 0
        negatives = torch.stack((i, negative_index))[:, valid]
        indices += [torch.stack((i, i))[:, valid], negatives.flip(0) if transposed else negatives]
        entries += [-positive_weight[valid], negative_weight[valid]]
    g = torch.sparse_coo_tensor(torch.cat(indices, 1), torch.cat(entries), s.shape, check_invariants=False)
    return g.coalesce().to(scores.dtype)


def _mode(triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold):
    """(constants, relative terms), after checking every argument."""
    _checks.choice(triplet, "triplet", tuple(TRIPLET))
    _checks.choice(pair, "pair", tuple(PAIR))
    constants = Constants(
        _checks.positive(tau, "tau"),
        _checks.positive(alpha, "alpha"),
        _checks.positive(beta, "beta"),
        _checks.finite(lam, "lam"),
    )
    thresholds = (
        _checks.non_negative(positive_threshold, "positive_threshold"),
        _checks.non_negative(negative_threshold, "negative_threshold"),
    )
    kind = RELATIVE.get(pair)
    return constants, None if kind is None else RelativeTerms(kind, constants.alpha, constants.beta, *thresholds)


class GoalLoss(nn.Module):
    """:func:`goal_loss` as a module; with ``metric``, on its structured similarity.

    Args:
        triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold, symmetric,
            false_negative_margin, reduction, diagnostics: as in :func:`goal_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this
            module's). None: the scores are x yᵀ.
        normalize: as in the function.

    Raises:
        TypeError, ValueError: the setting that is wrong, what was expected and what came.
    """

    def __init__(
        self,
        triplet: str = "nca",
        pair: str = "con",
        *,
        tau: float = 1.0,
        alpha: float = 2.0,
        beta: float = 10.0,
        lam: float = 0.5,
        positive_threshold: float = 0.1,
        negative_threshold: float = 0.1,
        reduction: str = "sum",
        metric: StructuredSimilarity | None = None,
        symmetric: bool = True,
        false_negative_margin: float | None = None,
        diagnostics: bool = False,
        normalize: bool = False,
    ):
        super().__init__()
        _mode(triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold)
        _checks.reduction(reduction)
        check_metric(metric)
        _checks.flag(normalize, "normalize")
        self.normalize = normalize
        _checks.flag(diagnostics, "diagnostics")
        _checks.flag(symmetric, "symmetric")
        self.symmetric = symmetric
        self.false_negative_margin = _checks.optional_non_negative(false_negative_margin, "false_negative_margin")
        self.triplet, self.pair, self.reduction = triplet, pair, reduction
        self.tau, self.alpha, self.beta, self.lam = tau, alpha, beta, lam
        self.positive_threshold, self.negative_threshold = positive_threshold, negative_threshold
        self.metric, self.diagnostics = metric, diagnostics

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_ids: Tensor | None = None,
        y_ids: Tensor | None = None,
        pairs: str | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of x [N, D] and y [M, D]; see :func:`goal_loss`."""
        return goal_loss(
            x,
            y,
            triplet=self.triplet,
            pair=self.pair,
            tau=self.tau,
            alpha=self.alpha,
            beta=self.beta,
            lam=self.lam,
            positive_threshold=self.positive_threshold,
            negative_threshold=self.negative_threshold,
            pairs=pairs,
            x_ids=x_ids,
            y_ids=y_ids,
            symmetric=self.symmetric,
            false_negative_margin=self.false_negative_margin,
            reduction=self.reduction,
            metric=self.metric,
            normalize=self.normalize,
            diagnostics=self.diagnostics,
        )

    def extra_repr(self) -> str:
        return (
            f"triplet={self.triplet!r}, pair={self.pair!r}, tau={self.tau}, alpha={self.alpha}, beta={self.beta}, "
            f"lam={self.lam}, reduction={self.reduction!r}"
        )


__all__ = ["GoalLoss", "goal_loss", "goal_weights"]
