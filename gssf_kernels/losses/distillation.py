"""Relational distillation: a student's relations against a mixture of two frozen teachers', from one sweep.

    R^F = h hᵀ/τ,   R^I = u uᵀ/τ,   R^T = t tᵀ/τ,   E = λ R^T + (1 − λ) R^I
    L = w₀ mean|R^F − E| + w₁ mean|R^I − E| + w₂ mean|R^T − E|

over the N(N−1) pairs i ≠ j; "mse" squares instead. Since R^I − E = λ (R^I − R^T) and R^T − E = (1 − λ)(R^T − R^I), the
last two are multiples of one sum over the teachers alone, which the same sweep gives.

Source: structure-aware distillation, arXiv 2412.10761 (IEEE TIP 33), and its authors' public code.
"""

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels.ops.relations import KINDS, relation_loss

_TEACHERS = ("image_teacher", "text_teacher")


def relational_distillation_loss(
    student: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    *,
    lam: float | Tensor,
    tau: float | Tensor,
    weights: tuple[float, float, float] = (2.0, 1.0, 1.0),
    kind: str = "mae",
) -> Tensor:
    """Distance of the student's relations ``h hᵀ/τ`` from the teachers' mixture, without storing any matrix.

    The vectors are compared as they come: normalise them first. Both teachers are constants: no gradient reaches them.

    Args:
        student: h [N, D] float.
        image_teacher, text_teacher: u, t [N, any] of student's dtype and device.
        lam: λ, the text teacher's share: a number or a scalar tensor on student's device; any value.
        tau: τ, a number > 0 or a scalar tensor on student's device (its value is not looked at).
        weights: w₀, w₁, w₂, finite numbers >= 0.
        kind: "mae" (of derivative 0 where student and mixture agree) or "mse".

    Returns:
        a scalar, fp32 (fp64 for fp64); 0 for N < 2. Differentiable once in student, lam and tau.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: three half products, and one whole for the gradient. Extra memory: three half-sized chunks of scores besides
    the gradient, and on the CPU fp32 copies of the three inputs (of bf16 where there is a unit for it), two of
    student's with a gradient. On a GPU a student of up to 1024 rows has the gradient of each score stored instead.
    """
    _checks.choice(kind, "kind", tuple(KINDS))
    shares = _weights(weights)
    student, image_teacher, text_teacher = _checks.autocast(student, image_teacher, text_teacher)
    for teacher, name in ((image_teacher, _TEACHERS[0]), (text_teacher, _TEACHERS[1])):
        _check_sides(student, teacher, name)
    lam = _checks.scalar_or_number(lam, "lam", student)
    tau = _checks.scalar_or_number(tau, "tau", student, positive=True)
    teachers = (image_teacher.detach(), text_teacher.detach())
    return relation_loss(student, *teachers, lam, tau, shares, KINDS[kind])


def _weights(weights) -> tuple[float, float, float]:
    if not isinstance(weights, (tuple, list)) or len(weights) != 3:
        raise TypeError(f"weights: expected three numbers, got {weights!r}")
    first, second, third = (_checks.non_negative(w, f"weights[{k}]") for k, w in enumerate(weights))
    return first, second, third


def _check_sides(student, teacher, name: str) -> None:
    _checks.floating(student, "student", "[N, D]")
    _checks.floating(teacher, name, "[N, D]")
    _checks.alike(teacher, name, student, "student")
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(f"{name}: expected the {student.shape[0]} rows of student, got {list(teacher.shape)}")
    for x, x_name in ((student, "student"), (teacher, name)):
        if x.shape[1] == 0:
            raise ValueError(f"{x_name}: expected at least one column, got {list(x.shape)}")


class RelationalDistillationLoss(nn.Module):
    """:func:`relational_distillation_loss` as a module that holds λ and τ, both learned as they are.

    Args:
        lam, tau: λ and τ at the start.
        weights, kind: as in :func:`relational_distillation_loss`.
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
        device=None,
        dtype=None,
    ):
        super().__init__()
        _checks.choice(kind, "kind", tuple(KINDS))
        _checks.parameter_dtype(dtype)
        self.weights, self.kind = _weights(weights), kind
        self.lam = nn.Parameter(torch.tensor(_checks.finite(lam, "lam"), device=device, dtype=dtype))
        self.tau = nn.Parameter(torch.tensor(_checks.positive(tau, "tau"), device=device, dtype=dtype))

    def forward(self, student: Tensor, image_teacher: Tensor, text_teacher: Tensor) -> Tensor:
        """The loss of student [N, D] and both teachers [N, any]; see :func:`relational_distillation_loss`."""
        return relational_distillation_loss(
            student, image_teacher, text_teacher, lam=self.lam, tau=self.tau, weights=self.weights, kind=self.kind
        )

    def extra_repr(self) -> str:
        return f"weights={self.weights}, kind={self.kind!r}"


__all__ = ["RelationalDistillationLoss", "relational_distillation_loss"]
