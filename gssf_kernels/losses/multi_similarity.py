"""Multi-similarity loss: a soft minimum over positives and a soft maximum over negatives, optionally with mining.

    L_i = (1/α) log(1 + Σ_p e^{−α (s_ip − λ)}) + (1/β) log(1 + Σ_n e^{β (s_in − λ)})

p runs over the positives of anchor i, n over its negatives. With mining (ε), only those positives count that score less
than the hardest negative + ε, and only those negatives that score greater than the hardest positive − ε.

Source: Wang et al., CVPR 2019 (α = 2, β = 50, λ = 0.5, ε = 0.1 in pytorch-metric-learning, where mining is separate).
"""

import torch
from torch import Tensor, nn

from gssf_kernels import _checks, reference
from gssf_kernels.diagnostics import diagnose_labels
from gssf_kernels.ops.labels import labelled_factors, log_sums
from gssf_kernels.ops.mined_log_sums import mined_log_sums
from gssf_kernels.reference import Diagnostics
from gssf_kernels.similarity import StructuredSimilarity, check_metric, metric_of


def multi_similarity_loss(
    x: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = None,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    metric: StructuredSimilarity | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Multi-similarity loss of labelled embeddings, without the matrix of scores.

    Anchors, y, labels, ``metric``, results and errors are as in :func:`~gssf_kernels.circle_loss`.

    Args:
        x: [N, D] float.
        labels: [N] integers; rows of equal label are positives.
        alpha, beta: α, β > 0, sharpness at positives and at negatives.
        base: λ, the score at which the exponents change sign.
        epsilon: ε >= 0, in units of the score, turns mining on. A positive counts if it scores less than the anchor's
            largest negative + ε, a negative if it scores greater than its least positive − ε. Without positives no
            negative counts, and without negatives no positive. None: all count.
        y: [M, D] of x's dtype and device, any M, with y_labels; or None.
        y_labels: [M] integers.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by; without y best a symmetric one.
        normalize: compare by cosine: divide the rows by their L2 norms first, in the same pass as a metric would.
        reduction: "mean" over all N anchors, "sum" or "none" ([N]).
        diagnostics: return ``(loss, Diagnostics)``; see :mod:`gssf_kernels.diagnostics`.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). N = 0 gives a differentiable 0. NaN and Inf in the inputs
        propagate. Differentiable once, in x, y and the metric's weights; the choice of mining is constant to autograd.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product forward, three backward; half of each without y, unless W is not symmetric. With mining two
    products forward, but one on the CPU if labels have few rows each and the metric, if any, is not symmetric. Extra
    memory: as :func:`~gssf_kernels.logsumexp_scores`.
    """
    alpha, beta = _checks.positive(alpha, "alpha"), _checks.positive(beta, "beta")
    constants = [alpha, beta, _checks.finite(base, "base")]
    epsilon = None if epsilon is None else _checks.non_negative(epsilon, "epsilon")
    _checks.flag(diagnostics, "diagnostics")
    _checks.reduction(reduction)
    metric = metric_of(metric, normalize, "multi_similarity_loss", x, y)
    factors = labelled_factors(x, labels, y, y_labels, metric)
    if epsilon is None:
        positive_lse, negative_lse = log_sums(factors, "multi_similarity", constants)
    else:
        positive_lse, negative_lse = mined_log_sums(factors, constants, epsilon)
    zero = positive_lse.new_zeros(())
    terms = torch.logaddexp(positive_lse, zero) / alpha + torch.logaddexp(negative_lse, zero) / beta
    loss = reference.reduce(terms, reduction)
    return (loss, diagnose_labels(x, y, factors)) if diagnostics else loss


class MultiSimilarityLoss(nn.Module):
    """:func:`multi_similarity_loss` as a module.

    Args:
        alpha, beta, base, epsilon, reduction: as in :func:`multi_similarity_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this module's).
        normalize, diagnostics: as in the function.

    Raises:
        TypeError, ValueError: the setting that is wrong, what was expected and what came.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        epsilon: float | None = None,
        metric: StructuredSimilarity | None = None,
        reduction: str = "mean",
        *,
        normalize: bool = False,
        diagnostics: bool = False,
    ):
        super().__init__()
        self.alpha, self.beta = _checks.positive(alpha, "alpha"), _checks.positive(beta, "beta")
        self.base = _checks.finite(base, "base")
        self.epsilon = None if epsilon is None else _checks.non_negative(epsilon, "epsilon")
        check_metric(metric)
        _checks.flag(normalize, "normalize")
        _checks.flag(diagnostics, "diagnostics")
        self.normalize, self.diagnostics = normalize, diagnostics
        _checks.reduction(reduction)
        self.metric, self.reduction = metric, reduction

    def forward(
        self, x: Tensor, labels: Tensor, y: Tensor | None = None, y_labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of x [N, D] with labels [N], and y [M, D] with y_labels [M]; see :func:`multi_similarity_loss`."""
        return multi_similarity_loss(
            x,
            labels,
            alpha=self.alpha,
            beta=self.beta,
            base=self.base,
            epsilon=self.epsilon,
            y=y,
            y_labels=y_labels,
            metric=self.metric,
            normalize=self.normalize,
            diagnostics=self.diagnostics,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        settings = f"alpha={self.alpha}, beta={self.beta}, base={self.base}, epsilon={self.epsilon}"
        return f"{settings}, reduction={self.reduction!r}"


__all__ = ["MultiSimilarityLoss", "multi_similarity_loss"]
