"""Relational distillation (arXiv 2412.10761): a student's relations against a mixture of two frozen teachers', with
learnable λ and τ, on unit-length inputs of one width. ``x`` is the student, ``y`` the image teacher, ``z`` the text
teacher."""

import torch
import torch.nn.functional as F

import gssf_kernels as gk
from bench.ops.contrastive import parameter
from bench.problem import Op, Problem, Work, compiled, normal, product_flop
from bench.whole import Rows, sweep

LAMBDA, TAU = 0.5, 0.07
WEIGHTS = (2.0, 1.0, 1.0)
SHARES = (0.7, 0.5, 0.5)  # of the image teacher, the text teacher and noise in the student


def naive(problem: Problem):
    """The formula as written: three products, the mixture, three masked means of absolute differences."""
    lam, tau = problem.lam.to(problem.x.dtype), problem.tau.to(problem.x.dtype)
    student, image, text = (h @ h.t() / tau for h in (problem.x, problem.y, problem.z))
    mixture = lam * text + (1 - lam) * image
    count = len(student)
    itself = torch.eye(count, dtype=torch.bool, device=student.device)
    wide = parameter(student.dtype)  # fp16 does not hold the sum over all pairs

    def distance(relations):
        return (relations - mixture).abs().masked_fill(itself, 0).sum(dtype=wide) / (count * (count - 1))

    return WEIGHTS[0] * distance(student) + WEIGHTS[1] * distance(image) + WEIGHTS[2] * distance(text)


def ours():
    loss = getattr(gk, "relational_distillation_loss", None)
    return loss and (
        lambda problem: loss(problem.x, problem.y, problem.z, lam=problem.lam, tau=problem.tau, weights=WEIGHTS)
    )


def whole(exact: Problem, dtype: torch.dtype):
    """With e = f - λw - (1 - λ)u of relations f, u and w: u and w are off the mixture by shares of their own gap."""
    student, image, text, lam, tau = (t.detach() for t in (exact.x, exact.y, exact.z, exact.lam, exact.tau))
    pairs = len(student) * (len(student) - 1)

    def slope(s, rows):
        f, u, w = (t / tau for t in (s, image[rows] @ image.mT, text[rows] @ text.mT))
        teacher_term = w - u
        e = f - lam * w - (1 - lam) * u
        for t in (e, teacher_term):
            t.diagonal(rows.start).fill_(0)
        sign = e.sign()
        return sign, [e.abs().sum(), teacher_term.abs().sum(), (sign * teacher_term).sum()]

    seen = sweep(student, student, slope)
    student_term, teacher_term, signed = (total / pairs for total in seen.sums)
    loss = WEIGHTS[0] * student_term + (WEIGHTS[1] * lam.abs() + WEIGHTS[2] * (1 - lam).abs()) * teacher_term
    dlam = (WEIGHTS[1] * lam.sign() - WEIGHTS[2] * (1 - lam).sign()) * teacher_term - WEIGHTS[0] * signed
    of_student = WEIGHTS[0] / (tau * pairs) * (seen.da + seen.db)
    return [loss, Rows(of_student, seen.directions), dlam, -loss / tau]


def inputs(shape, dtype, device, seed):
    """A student on its way: part of each teacher, more of the image teacher, and noise.

    Were it unrelated to them, the gradient of λ would be a sum of N² signs that cancel, and its relative error noise.
    """
    image, text, noise = normal(shape, torch.float32, device, seed, 3, unit=True)
    student = F.normalize(SHARES[0] * image + SHARES[1] * text + SHARES[2] * noise, dim=1)
    lam, tau = (torch.tensor(v, device=device, dtype=parameter(dtype), requires_grad=True) for v in (LAMBDA, TAU))
    return Problem(student.to(dtype).requires_grad_(), image.to(dtype), z=text.to(dtype), lam=lam, tau=tau)


def work(shape, itemsize):
    """Three symmetric products forward, of which half is enough; one whole product backward, ``dh = 2 φ'(e) h``, whose
    φ'(e) is symmetric too. Plain PyTorch takes three whole ones, and two for the two factors of ``h hᵀ``.

    Bytes: the three inputs once; h again and its gradient.
    """
    g, side = product_flop(shape), float(shape.n * shape.d * itemsize)
    return Work(1.5 * g, g, 3 * side, 2 * side)


OP = Op(
    "distillation",
    "relational distillation from two teachers, learnable mixture and temperature",
    inputs,
    naive,
    {"ours": ours, "naive": lambda: naive, "compile": compiled(naive)},
    work,
    whole,
)
