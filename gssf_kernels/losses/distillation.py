"""Relational distillation: the relations of a student against a mixture of those of two frozen teachers.

    R^F = h hᵀ/τ,   R^I = u uᵀ/τ,   R^T = t tᵀ/τ,   E = λ R^T + (1 − λ) R^I
    L = w₀ mean|R^F − E| + w₁ mean|R^I − E| + w₂ mean|R^T − E|

The means are over the N(N−1) pairs i ≠ j; "mse" squares instead of |·|. Since R^I − E = λ (R^I − R^T) and R^T − E =
(1 − λ)(R^T − R^I), the last two means are multiples of one sum over the teachers. The same sweep computes it.

Source: structure-aware distillation, arXiv 2412.10761 (IEEE TIP 33), and its authors' public code. With a metric the
student's relations are ``R^F = h W hᵀ/τ``, as GSSF (arXiv 2410.15266) names it. They are not symmetric, and R^F − E is
one product of concatenated rows: ``[h W, −λ t, −(1 − λ) u] [h, t, u]ᵀ/τ``.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gssf_kernels import _checks, reference
from gssf_kernels.ops.relations import KINDS, relation_loss
from gssf_kernels.ops.sums import Term, score_sums
from gssf_kernels.similarity import StructuredSimilarity, check_metric

_TEACHERS = ("image_teacher", "text_teacher")


class DistillationTerms(NamedTuple):
    """The distances of all relations from the mixture E: detached 0-d tensors, without weights."""

    student: Tensor  # mean|R^F − E|
    image_teacher: Tensor  # mean|R^I − E|
    text_teacher: Tensor  # mean|R^T − E|


def relational_distillation_loss(
    student: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    *,
    lam: float | Tensor,
    tau: float | Tensor,
    weights: tuple[float, float, float] = (2.0, 1.0, 1.0),
    kind: str = "mae",
    metric: StructuredSimilarity | None = None,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, DistillationTerms]:
    """Distance of the student's relations ``h hᵀ/τ`` from the teachers' mixture, without storing any matrix.

    Vectors are compared without normalising them. The teachers are constants to autograd.

    Args:
        student: h [N, D] float.
        image_teacher, text_teacher: u, t [N, any] of student's dtype and device.
        lam: λ, the text teacher's share: a number or a scalar tensor on student's device, of any value.
        tau: τ, a number > 0 or a scalar tensor on student's device; never synchronises.
        weights: w₀, w₁, w₂, finite numbers >= 0.
        kind: "mae" (with derivative 0 where student and mixture are equal) or "mse".
        metric: a :class:`~gssf_kernels.StructuredSimilarity` for the student's relations, ``R^F = ĥ W ĥᵀ/τ`` (the
            teachers' stay plain products). None: ``h hᵀ/τ``.
        return_terms: return ``(loss, DistillationTerms)``, the three means without their weights.

    Returns:
        a scalar, fp32 (fp64 for fp64); 0 for N < 2. Differentiable once in student, lam, tau and the metric's weights.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: three half products, and a whole one for the gradient. Extra memory: three half-sized chunks of scores besides
    the gradient. On the CPU also fp32 copies of the three inputs (bf16 on a CPU with a unit for it), two of student
    with a gradient. On a GPU, up to 1024 rows, dscores are stored instead of chunks.

    With a metric the products are whole ones, of the channels of all three inputs, which are stored twice; in fp32 for
    16-bit inputs.
    """
    _checks.choice(kind, "kind", tuple(KINDS))
    _checks.flag(return_terms, "return_terms")
    check_metric(metric)
    shares = _weights(weights)
    student, image_teacher, text_teacher = _checks.autocast(student, image_teacher, text_teacher)
    for teacher, name in ((image_teacher, _TEACHERS[0]), (text_teacher, _TEACHERS[1])):
        _check_teacher(student, teacher, name)
    lam = _checks.scalar_or_number(lam, "lam", student)
    tau = _checks.scalar_or_number(tau, "tau", student, positive=True)
    teachers = (image_teacher.detach(), text_teacher.detach())
    if metric is None:
        loss, means = relation_loss(student, *teachers, lam, tau, shares, KINDS[kind])
    else:
        loss, means = _by_metric(metric.factors(student, student), *teachers, lam, tau, shares, KINDS[kind])
    return (loss, _terms(means, lam, tau, kind)) if return_terms else loss


def _by_metric(
    factors: tuple[Tensor, Tensor], image: Tensor, text: Tensor, lam, tau, weights, kind: str
) -> tuple[Tensor, Tensor]:
    """As `relation_loss`, for the student's relations a bᵀ; factors: (a, b)."""
    a, b, image, text = (reference.accumulate(t) for t in (*factors, image, text))
    n, term = a.shape[0], Term(kind, "exclude", 1.0, 0.0)
    pairs = max(n * (n - 1), 1)
    with torch.no_grad():
        between = score_sums(torch.cat((text, -image), 1), torch.cat((text, image), 1), term, None, None, "sum") / pairs
    gaps = torch.cat((a, -lam * text, (lam - 1) * image), 1), torch.cat((b, text, image), 1)
    student = score_sums(*gaps, term, None, None, "sum") / pairs
    first, second, third = weights

    def phi(t):
        return abs(t) if kind == "abs" else t * t

    loss = (first * student + (second * phi(lam) + third * phi(1 - lam)) * between) * phi(1 / tau)
    return loss, torch.stack((student.detach(), between))


def _terms(means: Tensor, lam: Tensor | float, tau: Tensor | float, kind: str) -> DistillationTerms:
    """means: those of φ(e) and of φ(text − image) over pairs [2]."""

    def phi(t):
        t = t.detach() if isinstance(t, Tensor) else t
        return abs(t) if kind == "mae" else t * t

    student, between = (phi(1 / tau) * means).unbind()
    return DistillationTerms(student, phi(lam) * between, phi(1 - lam) * between)


def _weights(weights) -> tuple[float, float, float]:
    if not isinstance(weights, (tuple, list)) or len(weights) != 3:
        raise TypeError(f"weights: expected three numbers, got {weights!r}")
    first, second, third = (_checks.non_negative(w, f"weights[{k}]") for k, w in enumerate(weights))
    return first, second, third


def _check_teacher(student, teacher, name: str) -> None:
    _checks.floating(student, "student", "[N, D]")
    _checks.floating(teacher, name, "[N, D]")
    _checks.alike(teacher, name, student, "student")
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(f"{name}: expected the {student.shape[0]} rows of student, got {list(teacher.shape)}")
    for x, x_name in ((student, "student"), (teacher, name)):
        if x.shape[1] == 0:
            raise ValueError(f"{x_name}: expected at least one column, got {list(x.shape)}")


class RelationalDistillationLoss(nn.Module):
    """:func:`relational_distillation_loss` as a module with λ and τ as parameters.

    Args:
        lam, tau: the initial λ and τ.
        weights, kind, return_terms: as in :func:`relational_distillation_loss`.
        metric: as in the function; its parameters become this module's.
        device, dtype: of ``lam`` and ``tau``.

    Attributes:
        lam, tau: scalar parameters.
    """

    def __init__(
        self,
        lam: float = 0.5,
        tau: float = 0.07,
        weights: tuple[float, float, float] = (2.0, 1.0, 1.0),
        kind: str = "mae",
        *,
        metric: StructuredSimilarity | None = None,
        return_terms: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _checks.choice(kind, "kind", tuple(KINDS))
        _checks.parameter_dtype(dtype)
        _checks.flag(return_terms, "return_terms")
        check_metric(metric)
        self.metric = metric
        self.weights, self.kind, self.return_terms = _weights(weights), kind, return_terms
        self.lam = nn.Parameter(torch.tensor(_checks.finite(lam, "lam"), device=device, dtype=dtype))
        self.tau = nn.Parameter(torch.tensor(_checks.positive(tau, "tau"), device=device, dtype=dtype))

    def forward(
        self, student: Tensor, image_teacher: Tensor, text_teacher: Tensor
    ) -> Tensor | tuple[Tensor, DistillationTerms]:
        """The loss of student [N, D] and both teachers [N, any]; see :func:`relational_distillation_loss`."""
        return relational_distillation_loss(
            student,
            image_teacher,
            text_teacher,
            lam=self.lam,
            tau=self.tau,
            weights=self.weights,
            kind=self.kind,
            metric=self.metric,
            return_terms=self.return_terms,
        )

    def extra_repr(self) -> str:
        return f"weights={self.weights}, kind={self.kind!r}"


__all__ = ["DistillationTerms", "RelationalDistillationLoss", "relational_distillation_loss"]
