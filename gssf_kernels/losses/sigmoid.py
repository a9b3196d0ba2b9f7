"""The pairwise sigmoid loss of SigLIP, from one sweep.

    L = −(1/N) Σ_ij log σ(z_ij (κ s_ij + β)),     s = x yᵀ,   z_ij = +1 for positives, −1 for all others

Source: SigLIP, arXiv 2303.15343 (κ starts at 10 and β at −10; κ is learned through its logarithm).
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels.ops.sums import Term, score_sums
from gssf_kernels.similarity import StructuredSimilarity, check_metric


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    reduction: str = "mean",
    metric: StructuredSimilarity | None = None,
) -> Tensor:
    """Pairwise sigmoid loss of paired embeddings, without the matrix of logits ``κ x yᵀ + β``.

    Row i of x pairs with row i of y. Equal ids are positives too. Rows of y past N are extra negatives.

    Args:
        x: [N, D] float.
        y: [M, D] of x's dtype and device, M >= N.
        scale, bias: κ and β, numbers (κ > 0) or scalar tensors on x's device; never synchronises.
        x_ids: [N] integers. If N = M, the ids of one input serve both.
        y_ids: [M] integers.
        reduction: "mean" (the sum over N), "sum" or "none" ([N]: the terms of row i).
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). N = 0 gives a differentiable 0. NaN and Inf in the inputs
        propagate. Differentiable once, in x, y, scale, bias and the metric's weights.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product, and two further ones for the gradient. Extra memory: as :func:`~gssf_kernels.sum_scores`.
    """
    _checks.reduction(reduction)
    if metric is not None:
        check_metric(metric)
        x, y = metric.factors(x, y)
    x, y = _checks.autocast(x, y)
    _checks.embeddings(x, y, "x", "y")
    x_ids, y_ids = _checks.ids(x_ids, y_ids, x, y, "x_ids", "y_ids")
    kappa = _checks.scale(scale, x)
    bias = _checks.scalar_or_number(bias, "bias", x)
    # −log σ(z t) is softplus(t) for negatives and softplus(−t) for positives.
    return score_sums(x, y, Term("softplus", "negate", kappa, bias), x_ids, y_ids, reduction)


class SigmoidLoss(nn.Module):
    """:func:`sigmoid_loss` as a module with a bias, and a scale that is learned through its logarithm.

    Args:
        scale, bias: the initial κ and β.
        learnable: whether ``log_scale`` and ``bias`` are parameters.
        reduction: as in :func:`sigmoid_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this module's).
        device, dtype: of ``log_scale`` and ``bias``.

    Attributes:
        log_scale, bias: scalar parameters, or buffers if not learnable.
    """

    log_scale: Tensor
    bias: Tensor

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        learnable: bool = True,
        reduction: str = "mean",
        metric: StructuredSimilarity | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _checks.flag(learnable, "learnable")
        _checks.reduction(reduction)
        check_metric(metric)
        _checks.parameter_dtype(dtype)
        log_scale = math.log(_checks.positive(scale, "scale"))
        for name, value in (("log_scale", log_scale), ("bias", _checks.finite(bias, "bias"))):
            tensor = torch.tensor(value, device=device, dtype=dtype)
            if learnable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.reduction, self.metric = reduction, metric

    def forward(self, x: Tensor, y: Tensor, x_ids: Tensor | None = None, y_ids: Tensor | None = None) -> Tensor:
        """The loss of x [N, D] and y [M, D], M >= N; see :func:`sigmoid_loss`."""
        return sigmoid_loss(
            x,
            y,
            scale=cast(Any, _checks.Logarithm(self.log_scale)),
            bias=self.bias,
            x_ids=x_ids,
            y_ids=y_ids,
            reduction=self.reduction,
            metric=self.metric,
        )

    def extra_repr(self) -> str:
        return f"learnable={isinstance(self.bias, nn.Parameter)}, reduction={self.reduction!r}"


__all__ = ["SigmoidLoss", "sigmoid_loss"]
