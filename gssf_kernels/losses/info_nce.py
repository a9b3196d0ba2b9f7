"""InfoNCE in both directions, the loss of CLIP, from one sweep.

    L = ½ mean_i [lse_j(t_ij) − Σ_j Y_ij t_ij] + ½ mean_j [lse_i(t_ij) − Σ_i Y'_ij t_ij],     t = κ x yᵀ

Y is the identity; with ids, Y_ij = 1[positive]/(positives of row i). Y' is the same by columns. Since t is linear in y,
Σ_j Y_ij t_ij is κ x_i times the mean of row i's positives, which costs O((N + M) D). With label smoothing ε, the target
is (1 − ε) Y + ε/M.

Source: InfoNCE, arXiv 1807.03748; both directions and the learnable scale, CLIP, arXiv 2103.00020. Soft targets by id
as in arXiv 2412.10761.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels.ops.info_nce import Options, info_nce_of_factors
from gssf_kernels.similarity import StructuredSimilarity, check_metric


def info_nce_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    symmetric: bool = True,
    reduction: str = "mean",
    metric: StructuredSimilarity | None = None,
) -> Tensor:
    """InfoNCE of paired embeddings, without the matrix of logits ``κ x yᵀ``.

    Row i of x pairs with row i of y. Equal ids are positives too; the positives of an anchor have equal targets. Rows
    of y past N are further candidates for the rows of x, but no anchors.

    Args:
        x: [N, D] float.
        y: [M, D] of x's dtype and device, M >= N.
        scale: κ, the inverse temperature: a number > 0 or a scalar tensor on x's device; never synchronises.
        x_ids: [N] integers. If N = M, the ids of one input serve both.
        y_ids: [M] integers.
        label_smoothing: ε in [0, 1), the part of the target that is uniform over all candidates.
        symmetric: the mean of both directions; False: only the rows' direction.
        reduction: "mean" over the N pairs, "sum" or "none" ([N]).
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). N = 0 gives a differentiable 0. NaN and Inf in the inputs
        propagate. Differentiable once, in x, y, scale and the metric's weights.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product forward, three backward. Extra memory: as :func:`~gssf_kernels.logsumexp_scores`; with ids also a
    few N x D matrices.
    """
    epsilon = _checks.fraction(label_smoothing, "label_smoothing")
    _checks.flag(symmetric, "symmetric")
    _checks.reduction(reduction)
    if metric is not None:
        check_metric(metric)
        x, y = metric.factors(x, y)
    x, y = _checks.autocast(x, y)
    _checks.embeddings(x, y, "x", "y")
    x_ids, y_ids = _checks.ids(x_ids, y_ids, x, y, "x_ids", "y_ids")
    kappa = _checks.scale(scale, x)

    return info_nce_of_factors(x, y, kappa, x_ids, y_ids, Options(epsilon, symmetric, reduction))


class InfoNCELoss(nn.Module):
    """:func:`info_nce_loss` as a module with a scale that is learned through its logarithm, as in CLIP.

    Args:
        scale: the initial κ.
        learnable: whether ``log_scale`` is a parameter.
        label_smoothing, symmetric, reduction: as in :func:`info_nce_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this module's).
        device, dtype: of ``log_scale``.

    Attributes:
        log_scale: scalar parameter, or buffer if not learnable.
    """

    log_scale: Tensor

    def __init__(
        self,
        scale: float = 1 / 0.07,
        learnable: bool = True,
        label_smoothing: float = 0.0,
        symmetric: bool = True,
        reduction: str = "mean",
        metric: StructuredSimilarity | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _checks.flag(learnable, "learnable")
        self.label_smoothing = _checks.fraction(label_smoothing, "label_smoothing")
        _checks.flag(symmetric, "symmetric")
        _checks.reduction(reduction)
        check_metric(metric)
        _checks.parameter_dtype(dtype)
        value = torch.tensor(math.log(_checks.positive(scale, "scale")), device=device, dtype=dtype)
        if learnable:
            self.log_scale = nn.Parameter(value)
        else:
            self.register_buffer("log_scale", value)
        self.symmetric, self.reduction, self.metric = symmetric, reduction, metric

    def forward(self, x: Tensor, y: Tensor, x_ids: Tensor | None = None, y_ids: Tensor | None = None) -> Tensor:
        """The loss of x [N, D] and y [M, D], M >= N; see :func:`info_nce_loss`."""
        return info_nce_loss(
            x,
            y,
            scale=cast(Any, _checks.Logarithm(self.log_scale)),
            x_ids=x_ids,
            y_ids=y_ids,
            label_smoothing=self.label_smoothing,
            symmetric=self.symmetric,
            reduction=self.reduction,
            metric=self.metric,
        )

    def extra_repr(self) -> str:
        learnable = isinstance(self.log_scale, nn.Parameter)
        parts = [f"learnable={learnable}", f"label_smoothing={self.label_smoothing}", f"symmetric={self.symmetric}"]
        return ", ".join([*parts, f"reduction={self.reduction!r}"])


__all__ = ["InfoNCELoss", "info_nce_loss"]
