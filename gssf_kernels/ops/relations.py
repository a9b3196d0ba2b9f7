"""How far the relations within one set are from a mixture of those of two other sets, without storing a matrix.

    e_ij = f_ij − (λ w_ij + (1 − λ) u_ij),     f = h hᵀ,  u = image imageᵀ,  w = text textᵀ
    S = Σ_{i≠j} φ(e_ij),   B = Σ_{i≠j} φ(w_ij − u_ij),     φ: |·| or ·²
    loss = [w₀ S + (w₁ φ(λ) + w₂ φ(1 − λ)) B] φ(1/τ) / pairs

Source: structure-aware distillation, arXiv 2412.10761; :mod:`gssf_kernels.losses.distillation`.

f, u and w are symmetric. Only the upper triangle is computed, and its terms count twice
(:func:`gssf_kernels.dense.triangle`): three half products, and one whole product for dh = 2 φ'(e) h. The diagonal is
left out. One pass over e computes φ and φ', so that both see the same sign of e; at e = 0 both are 0. The gradients
with respect to λ and τ follow from S, B and Σ φ'(e) (w − u).

On a GPU (``triton/relations.py``), the forward of a small problem is two launches and its backward one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import plan
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.dense import triangle
from gssf_kernels.ops.score_functions import pointwise
from gssf_kernels.plan import accumulation_dtype

KINDS = {"mae": "abs", "mse": "square"}


def relation_loss(
    student, image, text, lam, tau, weights: tuple[float, float, float], kind: str
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar of the accumulation dtype, differentiable once in student [N, D], λ and τ; and S and B.

    S and B [2] are divided by the number of pairs, and have no gradient.

    lam, tau: scalar tensors of that dtype, or numbers.
    weights: w₀, w₁, w₂.
    kind: φ, "abs" or "square".
    """
    student, image, text = distinct(student, image, text)
    lam, lam_number = (lam, 0.0) if isinstance(lam, Tensor) else (None, lam)
    tau, tau_number = (tau, 1.0) if isinstance(tau, Tensor) else (None, tau)
    lam, tau = distinct(lam, tau)
    need = torch.is_grad_enabled() and student.requires_grad
    call = Call(student, image, text, lam, tau, lam_number, tau_number, list(weights), kind, need)
    loss, *_, means = _Relations.apply(*call)
    return loss, means


class Call(NamedTuple):
    """The loss, and its gradients with respect to λ, τ and student."""

    student: Tensor  # [N, D]
    image: Tensor  # [N, any]
    text: Tensor  # [N, any]
    lam: Tensor | None  # λ, a scalar; None: λ is lam_number
    tau: Tensor | None  # τ, a scalar; None: τ is tau_number
    lam_number: float
    tau_number: float
    weights: list[float]
    kind: str
    need: bool  # whether the forward computes the gradient with respect to student


class PassCall(NamedTuple):
    """Sums over the rows of a chunk, e = (s − image) − λ (text − image); with ``gradient`` s becomes φ'(e)."""

    s: Tensor  # [R, M], scores of the student; column 0 is the first row of the chunk: written
    image: Tensor  # [R, M], scores of the image teacher
    text: Tensor  # [R, M], scores of the text teacher
    lam: Tensor  # λ, a scalar
    kind: str
    gradient: bool
    rows: Tensor  # [3, R]: sums of φ(e), φ(text − image), φ'(e) (text − image); columns past R count twice: written


class _Relations(Function):
    call = Call

    @staticmethod
    def forward(*arguments):
        return torch.ops.gssf.relation_loss(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:-1], inputs[0], *inputs[3:5])

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * len(Call._fields)
        dstudent, dlam, dtau = last_derivative(_scaled, grad_out, *ctx.saved_tensors)
        needs = ctx.needs_input_grad
        scalars = (dlam if needs[3] else None, dtau if needs[4] else None)
        return dstudent if needs[0] else None, None, None, *scalars, *[None] * 5


def _scaled(grad_out, dlam, dtau, slope, dstudent, student, lam, tau):
    """grad_out times the gradients with respect to student, λ and τ that the forward computed.

    lam and tau are arguments only so that a second derivative with respect to them raises.
    """
    gradients = (grad_out, dlam, dtau, dstudent, dstudent.new_empty(0))
    options = ("square", "include", False, "sum", 1.0, [False, False])
    inputs = (student, None, slope, None, 1.0, 0.0, None, None)
    dstudent, _, dlam, dtau, _ = torch.ops.gssf.score_sums_backward(*gradients, *inputs, *options)
    return dstudent, dlam, dtau


def _by_chunks(call: Call) -> tuple[Tensor, ...]:
    """(loss, dλ, dτ, slope, Σ_j φ'(e_ij) h_j [N, D], S and B over pairs); dh is slope times the sums."""
    student, n, dtype = call.student, call.student.shape[0], accumulation_dtype(call.student.dtype)
    lam = student.new_full((), call.lam_number, dtype=dtype) if call.lam is None else call.lam
    tau = student.new_full((), call.tau_number, dtype=dtype) if call.tau is None else call.tau
    rows = student.new_empty(3, n, dtype=dtype)

    def visit(scores, first):
        part = slice(first, first + scores[0].shape[0])
        torch.ops.gssf.relation_pass(*PassCall._make((*scores, lam, call.kind, call.need, rows[:, part])))

    dh = triangle((student, call.image, call.text), visit, call.need)
    totals = rows.sum(1, dtype=torch.float64)
    pairs = max(n * (n - 1), 1)
    scalars = _formula(totals, lam.double(), tau.double(), call.weights, call.kind, pairs)
    means = (totals[:2] / pairs).to(dtype)
    return (*(t.to(dtype) for t in scalars), dh if dh is not None else rows.new_empty(0), means)


def _formula(totals, lam, tau, weights, kind, pairs):
    """(loss, dλ, dτ, slope) in fp64; slope: the factor of each φ'(e_ij) h_j in dh_i.

    totals: S, B and Σ φ'(e) (w − u).
    """
    student_sum, teacher_sum, gap_sum = totals
    w0, w1, w2 = weights
    phi, dphi = pointwise(torch.stack((lam, 1 - lam, 1 / tau)), kind)
    total = (w0 * student_sum + (w1 * phi[0] + w2 * phi[1]) * teacher_sum) / pairs
    dlam = ((w1 * dphi[0] - w2 * dphi[1]) * teacher_sum - w0 * gap_sum) / pairs
    slope = 2 * w0 * phi[2] / pairs  # 2: both factors of h hᵀ are h
    return phi[2] * total, phi[2] * dlam, -total * dphi[2] / (tau * tau), slope


def _fake(call: Call) -> tuple[Tensor, ...]:
    shapes = ((), (), (), (), call.student.shape if call.need else 0, 2)
    return tuple(call.student.new_empty(shape, dtype=accumulation_dtype(call.student.dtype)) for shape in shapes)


def _pass(call: PassCall) -> None:
    n, m = call.s.shape
    gap = call.text - call.image
    e = (call.s - call.image) - call.lam * gap
    times = torch.where(torch.arange(m, device=e.device) < n, 1, 2).to(e.dtype).repeat(n, 1)
    times.diagonal().zero_()
    (phi, slope), (between, _) = pointwise(e, call.kind), pointwise(gap, call.kind)
    for k, terms in enumerate((phi, between, slope * gap)):
        call.rows[k] = torch.where(times == 0, 0, times * terms).sum(1)
    if call.gradient:
        call.s.copy_(slope)
        call.s.diagonal().zero_()


register(
    "relation_loss",
    Call,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_by_chunks,
    fake=_fake,
    launcher="relations.relation_loss",
    plans=plan.relation_loss,
    through="relation_pass",
)
register(
    "relation_pass",
    PassCall,
    "()",
    composite=_pass,
    fake=lambda call: None,
    launcher="relations.relation_pass",
    plans=plan.chunk_pass,
    mutates=("s", "rows"),
)
