"""How far the relations within one set are from a mixture of two others', without storing any.

    e_ij = f_ij − (λ w_ij + (1 − λ) u_ij),     f = h hᵀ,  u = image imageᵀ,  w = text textᵀ
    student = Σ_{i≠j} φ(e_ij),   teachers = Σ_{i≠j} φ(w_ij − u_ij),     φ: |·| or ·²

All three are symmetric, so a chunk of rows meets only the columns from its own first row on, and the others' terms
count twice (:func:`gssf_kernels.dense.triangle`): 3 half products, and one whole more for dh = 2 φ'(e) h. φ and φ' come
from one pass over e: they agree about its sign, and at e = 0 both are 0. The diagonal is left out.
"""

import torch
from torch import Tensor

from gssf_kernels._library import Function, accumulation_dtype, define, distinct, last_derivative
from gssf_kernels.dense import triangle

KINDS = {"mae": "abs", "mse": "square"}


def relation_sums(student: Tensor, image: Tensor, text: Tensor, lam: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``(student, teachers)``, fp64 scalars; differentiable once in student [N, D] and lam. kind: "abs" or "square"."""
    student, image, text = distinct(student, image, text)
    need = torch.is_grad_enabled() and student.requires_grad
    total, teachers, *_ = _Relations.apply(student, image, text, lam, kind, need)
    return total, teachers


class _Relations(Function):
    @staticmethod
    def forward(student, image, text, lam, kind, need):
        return torch.ops.gssf.relation_sums(student, image, text, lam, kind, need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, teachers, dlam, dstudent = output
        ctx.mark_non_differentiable(teachers, dlam, dstudent)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dstudent, dlam, inputs[0], inputs[3])

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        needs = ctx.needs_input_grad
        dstudent, dlam = last_derivative(_scaled, grad, *ctx.saved_tensors)
        return dstudent if needs[0] else None, None, None, dlam if needs[3] else None, None, None


def _scaled(grad, dstudent, dlam, student, lam):
    """What student and lam get of ``grad``; they come along for their history."""
    return (grad * dstudent).to(student.dtype), (grad * dlam).to(lam.dtype)


def _forward(student, image, text, lam, kind, need):
    n = student.shape[0]
    sums = student.new_empty(3, n, dtype=accumulation_dtype(student.dtype))

    def visit(scores, first):
        part = slice(first, first + scores[0].shape[0])
        torch.ops.gssf.relation_pass(*scores, lam, kind, need, sums[:, part])

    dh = triangle((student, image, text), visit, need)
    total, teachers, along = sums.sum(1, dtype=torch.float64)
    return total.clone(), teachers.clone(), -along, dh.mul_(2) if dh is not None else sums.new_empty(0)


def _fake(student, image, text, lam, kind, need):
    scalars = (lam.new_empty((), dtype=torch.float64) for _ in range(3))
    return (*scalars, lam.new_empty(student.shape if need else 0))


def _relation_pass(f, u, w, lam, kind, gradient, rows):
    n, m = f.shape
    gap = w - u
    e = (f - u) - lam * gap
    times = torch.where(torch.arange(m, device=f.device) < n, 1, 2).to(f.dtype).repeat(n, 1)
    times.diagonal().zero_()
    phi, slope = (e.abs(), torch.where(e > 0, 1, torch.where(e < 0, -1, e))) if kind == "abs" else (e * e, 2 * e)
    between = gap.abs() if kind == "abs" else gap * gap
    for k, terms in enumerate((phi, between, slope * gap)):
        rows[k] = torch.where(times == 0, 0, times * terms).sum(1)
    if gradient:
        f.copy_(slope)
        f.diagonal().zero_()


define(
    "relation_sums(Tensor student, Tensor image, Tensor text, Tensor lam, str kind, bool need)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
    through="relation_pass",
)
define(
    "relation_pass(Tensor(a!) f, Tensor u, Tensor w, Tensor lam, str kind, bool gradient, Tensor(b!) rows) -> ()",
    reference=_relation_pass,
    fake=lambda *_: None,
    triton="dense.relation_pass",
)
