"""Structured projection: ``p = x W``, ``W = diag(w) + blockdiag(B)``, the learnable half of GSSF.

    W = diag(w) + Pᵀ blockdiag(B_1, …, B_G) P,      p = x̂ W,      x̂ = x / max(‖x‖₂, 1e-12) or x

Since W is shared by all pairs, ``s = x W yᵀ = p yᵀ``: one O(N·D·b) pass here replaces a structured
product per pair. Source: the structural sparse form of GSSF, arXiv 2410.15266 (IEEE TIP 2024): Diag
is the paper's; the block layout, the sum of both and the channel permutation P are ours.

Backward, with g = dL/dp: ``dw = Σ_n x̂∘g``, ``dB_g = x̂_gᵀ g_g``, ``dx̂ = g∘w + g_g B_gᵀ`` and, through the
norm, ``dx = (dx̂ − x̂ ⟨x̂, dx̂⟩) / ‖x‖``.
"""

import torch
from torch import Tensor

from gssf_kernels import _checks, reference
from gssf_kernels._library import Function, accumulation_dtype, define, last_derivative


def project(
    x: Tensor,
    diag: Tensor | None = None,
    blocks: Tensor | None = None,
    *,
    permutation: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """``p = x̂ (diag(w) + blockdiag(B))``: one side of the structured similarity.

    Channel ``g·b + c`` of the grouped order becomes ``Σ_k x̂[g·b + k] · blocks[g, k, c]``, to which
    ``x̂ ∘ diag`` is added. Without ``diag`` only the block term is left, without ``blocks`` only the
    diagonal one, without both ``p = x̂``.

    Args:
        x: [..., D] float, embeddings. Any leading dimensions; they share the weights.
        diag: [D] of x's dtype, the weight w of each channel.
        blocks: [G, b, b] of x's dtype with G·b = D, one matrix for each group of b channels.
        permutation: [D] int64, the channel standing at each place of the grouped order (identity when
            absent); holds each channel once. Its values are checked on the CPU only, since reading
            them on a GPU would wait for it.
        normalize: divide each row by its L2 norm first, as ``torch.nn.functional.normalize`` does.

    Returns:
        [..., D] in x's dtype; sums are taken in fp32 (fp64 for fp64). Inside ``torch.autocast`` all
        inputs take the region's dtype. Differentiable once in x, diag and blocks, deterministically. Without
        weights and ``normalize`` there is nothing to do, and x itself comes back.

    Raises:
        TypeError: an argument is not a floating tensor, or differs from x in dtype.
        ValueError: a shape or device does not fit x, D is not G·b, or permutation is not one.

    Source: GSSF, arXiv 2410.15266; see this file's head for what is ours.
    """
    x, diag, blocks = _checks.autocast(x, diag, blocks)
    if not isinstance(x, Tensor) or x.dim() == 0:
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise (ValueError if isinstance(x, Tensor) else TypeError)(f"x: expected a tensor [..., D], got {got}")
    _checks.floating(x, "x", ",".join("[...]" for _ in range(x.dim())))
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one channel, got shape {list(x.shape)}")
    _checks.metric_weights(x, diag, blocks, permutation)
    _checks.flag(normalize, "normalize")
    if diag is None and blocks is None and not normalize:
        return x
    p = _Project.apply(x.reshape(-1, x.shape[-1]), diag, blocks, permutation, normalize)
    return p.view(x.shape)


class _Project(Function):
    @staticmethod
    def forward(x, diag, blocks, permutation, normalize):
        return torch.ops.gssf.project(x, diag, blocks, permutation, normalize)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, diag, blocks, permutation, ctx.normalize = inputs
        ctx.save_for_backward(x, diag, blocks, permutation)

    @staticmethod
    def backward(ctx, grad):
        x, diag, blocks, permutation = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        op = torch.ops.gssf.project_backward
        grads = last_derivative(op, grad, x, diag, blocks, permutation, ctx.normalize, needs)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


def _reference(x, diag, blocks, permutation, normalize):
    return reference.project(x, diag, blocks, permutation=permutation, normalize=normalize).clone()


def _reference_sides(x, y, diag, blocks, permutation):
    op = torch.ops.gssf.project
    return op(x, diag, blocks, permutation, True), op(y, None, None, None, True)


def _reference_backward(grad, x, diag, blocks, permutation, normalize, needs):
    inputs = (x, diag, blocks)
    given = [t is not None and need for t, need in zip(inputs, needs, strict=True)]
    x, diag, blocks = (t if t is None else t.detach().requires_grad_(g) for t, g in zip(inputs, given, strict=True))
    with torch.enable_grad():
        p = reference.project(x, diag, blocks, permutation=permutation, normalize=normalize)
    wanted = [t for t, g in zip((x, diag, blocks), given, strict=True) if g]
    grads = iter(torch.autograd.grad(p, wanted, grad) if wanted else ())
    return tuple(next(grads).clone() if g else grad.new_empty(0) for g in given)


def _reference_pairs_backward(grad, rows, cols, x, y, diag, blocks, permutation, normalize, needs):
    dtype = accumulation_dtype(x.dtype)
    other = reference.project(y.to(dtype), normalize=normalize)
    upstream = reference.weighted_sums(grad, rows, cols, other, x.shape[0])
    wide_x, wide_diag, wide_blocks = (None if t is None else t.to(dtype) for t in (x, diag, blocks))
    found = _reference_backward(upstream, wide_x, wide_diag, wide_blocks, permutation, normalize, needs)
    return tuple(g if t is None else g.to(t.dtype) for g, t in zip(found, (x, diag, blocks), strict=True))


def _fake(x, diag, blocks, permutation, normalize):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_sides(x, y, diag, blocks, permutation):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, y))


def _fake_pairs_backward(grad, rows, cols, x, y, diag, blocks, permutation, normalize, needs):
    return _fake_backward(x, x, diag, blocks, permutation, normalize, needs)


def _fake_backward(grad, x, diag, blocks, permutation, normalize, needs):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and need else x.new_empty(0)
        for t, need in zip((x, diag, blocks), needs, strict=True)
    )


define(
    "project(Tensor x, Tensor? diag, Tensor? blocks, Tensor? permutation, bool normalize) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton="project.project",
)
# Both sides of a metric that normalises: x̂ W and ŷ.
define(
    "project_sides(Tensor x, Tensor y, Tensor? diag, Tensor? blocks, Tensor? permutation) -> (Tensor, Tensor)",
    reference=_reference_sides,
    fake=_fake_sides,
    through="project",
    triton="project.project_sides",
)
define(
    "project_backward(Tensor grad, Tensor x, Tensor? diag, Tensor? blocks, Tensor? permutation, bool normalize, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton="project.project_backward",
)
# The backward of a projection whose rows meet only in listed pairs: dp_i = Σ_{e: rows_e = i} g_e ŷ[cols_e] is gathered
# on its way through: row by row in C++, which stores no [N, D] but the result.
define(
    "pairs_project_backward(Tensor grad, Tensor rows, Tensor cols, Tensor x, Tensor y, Tensor? diag, Tensor? blocks, "
    "Tensor? permutation, bool normalize, bool[] needs) -> (Tensor, Tensor, Tensor)",
    reference=_reference_pairs_backward,
    fake=_fake_pairs_backward,
    triton="project.pairs_project_backward",
)
