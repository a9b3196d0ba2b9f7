"""How far the relations within one set are from a mixture of two others', without storing any.

    e_ij = f_ij − (λ w_ij + (1 − λ) u_ij),     f = h hᵀ,  u = image imageᵀ,  w = text textᵀ
    student = Σ_{i≠j} φ(e_ij),   teachers = Σ_{i≠j} φ(w_ij − u_ij),     φ: |·| or ·²

All three are symmetric, so a chunk of rows meets only the columns from its own first row on, and the others' terms
count twice: 3 half products, and with φ'(e) symmetric too, dh = 2 φ'(e) h costs one whole product more. φ and φ' come
from one pass over e: they agree about its sign, and at e = 0 both are 0. The diagonal is left out.
"""

import torch
from torch import Tensor

from gssf_kernels._library import accumulation_dtype, define, distinct, last_derivative
from gssf_kernels.dense import Right, chunk_rows, operand

KINDS = {"mae": "abs", "mse": "square"}


def relation_sums(student: Tensor, image: Tensor, text: Tensor, lam: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``(student, teachers)``, fp64 scalars; differentiable once in student [N, D] and lam. kind: "abs" or "square"."""
    student, image, text = distinct(student, image, text)
    need = torch.is_grad_enabled() and student.requires_grad
    total, teachers, *_ = _Relations.apply(student, image, text, lam, kind, need)
    return total, teachers


class _Relations(torch.autograd.Function):
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
    dtype, n = accumulation_dtype(student.dtype), student.shape[0]
    lefts = [operand(x, dtype) for x in (student, image, text)]
    rights = [Right(x.mT, dtype) for x in lefts]
    h, channels = lefts[0], Right(lefts[0], dtype) if need else None
    limit = max(chunk_rows(h, h) * n // 2, 1)  # scores of one of the three chunks there are
    buffers = student.new_empty(3, min(max(limit, Right.PANEL * n), n * n), dtype=dtype)
    sums = student.new_empty(3, n, dtype=dtype)
    dh = student.new_zeros(student.shape if need else 0, dtype=dtype)
    first = 0
    while first < n:
        width = n - first
        count = min(max(limit // width // Right.PANEL, 1) * Right.PANEL, width)
        part = slice(first, first + count)
        f, u, w = (buffer[: count * width].view(count, width) for buffer in buffers)
        for s, left, right in zip((f, u, w), lefts, rights, strict=True):
            right.after(column=first).product(left[part], s)
        torch.ops.gssf.relation_pass(f, u, w, lam, kind, need, sums[:, part])
        if channels is not None:
            ds = f.to(h.dtype)
            channels.after(row=first).product(ds, dh[part], add=True)
            Right(h[part], dtype).product(ds[:, count:].mT, dh[part.stop :], add=True)
        first += count
    total, teachers, along = sums.sum(1, dtype=torch.float64)
    return total.clone(), teachers.clone(), -along, dh.mul_(2)


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
