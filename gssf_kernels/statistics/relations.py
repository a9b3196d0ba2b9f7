"""How far the relations within one set are from a mixture of two others', without storing any.

    e_ij = f_ij − (λ w_ij + (1 − λ) u_ij),     f = h hᵀ,  u = image imageᵀ,  w = text textᵀ
    S = Σ_{i≠j} φ(e_ij),   B = Σ_{i≠j} φ(w_ij − u_ij),     φ: |·| or ·²
    loss = [w₀ S + (w₁ φ(λ) + w₂ φ(1 − λ)) B] φ(1/τ) / pairs

All three are symmetric, so a chunk of rows meets only the columns from its own first row on, and the others' terms
count twice (:func:`gssf_kernels.dense.triangle`): 3 half products, and one whole more for dh = 2 φ'(e) h. φ and φ' come
from one pass over e: they agree about its sign, and at e = 0 both are 0. The diagonal is left out. What λ and τ get
follows from S, B and Σ φ'(e) (w − u). Small problems on a GPU take two launches forward and one back
(``kernels/relations.py``).
"""

import torch
from torch import Tensor

from gssf_kernels._library import Function, define, distinct, last_derivative
from gssf_kernels.dense import triangle
from gssf_kernels.precision import accumulation_dtype

KINDS = {"mae": "abs", "mse": "square"}


def relation_loss(student, image, text, lam, tau, weights: tuple[float, float, float], kind: str) -> Tensor:
    """The loss, a scalar of the accumulation dtype; differentiable once in student [N, D], λ and τ.

    lam, tau: scalar tensors of that dtype, or numbers; weights: w₀, w₁, w₂; kind: "abs" or "square"
    """
    student, image, text = distinct(student, image, text)
    lam, lam_number = (lam, 0.0) if isinstance(lam, Tensor) else (None, lam)
    tau, tau_number = (tau, 1.0) if isinstance(tau, Tensor) else (None, tau)
    lam, tau = distinct(lam, tau)
    need = torch.is_grad_enabled() and student.requires_grad
    return _Relations.apply(student, image, text, lam, tau, lam_number, tau_number, weights, kind, need)[0]


class _Relations(Function):
    @staticmethod
    def forward(student, image, text, lam, tau, lam_number, tau_number, weights, kind, need):
        options = (lam_number, tau_number, list(weights), kind, need)
        return torch.ops.gssf.relation_loss(student, image, text, lam, tau, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *found = output
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*found, inputs[0], *inputs[3:5])

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 10
        dstudent, dlam, dtau = last_derivative(_scaled, grad, *ctx.saved_tensors)
        needs = ctx.needs_input_grad
        ends = (dlam if needs[3] else None, dtau if needs[4] else None)
        return dstudent if needs[0] else None, None, None, *ends, *[None] * 5


def _scaled(grad, dlam, dtau, slope, dstudent, student, lam, tau):
    """What student, λ and τ get of ``grad``; they come along for their dtype and their history."""
    given = (dlam, dtau, dstudent, dstudent.new_empty(0), student, None, slope, None, 1.0, 1.0)
    dstudent, _, dlam, dtau = torch.ops.gssf.score_total_backward(grad, *given)
    return dstudent, dlam, dtau


def _forward(student, image, text, lam, tau, lam_number, tau_number, weights, kind, need):
    """(loss, what λ and τ get of it, and in two factors what student does: a scalar, and Σ_j φ'(e_ij) h_j [N, D])"""
    n, dtype = student.shape[0], accumulation_dtype(student.dtype)
    lam = student.new_full((), lam_number, dtype=dtype) if lam is None else lam
    tau = student.new_full((), tau_number, dtype=dtype) if tau is None else tau
    sums = student.new_empty(3, n, dtype=dtype)

    def visit(scores, first):
        part = slice(first, first + scores[0].shape[0])
        torch.ops.gssf.relation_pass(*scores, lam, kind, need, sums[:, part])

    dh = triangle((student, image, text), visit, need)
    numbers = _formula(sums.sum(1, dtype=torch.float64), lam.double(), tau.double(), weights, kind, max(n * (n - 1), 1))
    return (*(t.to(dtype) for t in numbers), dh if dh is not None else sums.new_empty(0))


def _formula(sums, lam, tau, weights, kind, pairs):
    """(loss, dlam, dtau, slope) in fp64; slope: what each φ'(e_ij) h_j counts for in dh_i."""
    to_student, between, along = sums
    own, to_image, to_text = weights
    (size, rest, share), (at_size, at_rest, at_share) = _phi(torch.stack((lam, 1 - lam, 1 / tau)), kind)
    total = (own * to_student + (to_image * size + to_text * rest) * between) / pairs
    dlam = ((to_image * at_size - to_text * at_rest) * between - own * along) / pairs
    slope = 2 * own * share / pairs  # 2: h_i stands on both sides of a pair
    return share * total, share * dlam, -total * at_share / (tau * tau), slope


def _phi(t, kind):
    """(φ, φ')"""
    if kind == "abs":
        return t.abs(), torch.where(t > 0, 1, torch.where(t < 0, -1, t))
    return t * t, 2 * t


def _fake(student, image, text, lam, tau, lam_number, tau_number, weights, kind, need):
    shapes = ((), (), (), (), student.shape if need else 0)
    return tuple(student.new_empty(shape, dtype=accumulation_dtype(student.dtype)) for shape in shapes)


def _relation_pass(f, u, w, lam, kind, gradient, rows):
    n, m = f.shape
    gap = w - u
    e = (f - u) - lam * gap
    times = torch.where(torch.arange(m, device=f.device) < n, 1, 2).to(f.dtype).repeat(n, 1)
    times.diagonal().zero_()
    (phi, slope), (between, _) = _phi(e, kind), _phi(gap, kind)
    for k, terms in enumerate((phi, between, slope * gap)):
        rows[k] = torch.where(times == 0, 0, times * terms).sum(1)
    if gradient:
        f.copy_(slope)
        f.diagonal().zero_()


define(
    "relation_loss(Tensor student, Tensor image, Tensor text, Tensor? lam, Tensor? tau, float lam_number, "
    "float tau_number, float[] weights, str kind, bool need) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
    through="relation_pass",
    triton="relations.relation_loss",
)
define(
    "relation_pass(Tensor(a!) f, Tensor u, Tensor w, Tensor lam, str kind, bool gradient, Tensor(b!) rows) -> ()",
    reference=_relation_pass,
    fake=lambda *_: None,
    triton="dense.relation_pass",
)
