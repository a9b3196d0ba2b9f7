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
from gssf_kernels._library import Function, define, distinct, last_derivative
from gssf_kernels.precision import accumulation_dtype


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


def sides(
    x: Tensor, y: Tensor, diag: Tensor | None, blocks: Tensor | None, permutation: Tensor | None, normalize: bool,
    pairs: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """``(x̂ W, ŷ, pair)``, both sides of a metric, whose weights are checked; without ``normalize`` ŷ is y itself.

    pair: the scores [N] of rows i of both, detached, or None without ``pairs``.
    """
    if diag is None and blocks is None and not normalize:
        return x, y, None
    other = y
    x, y = distinct(x, None if x is y and normalize else y)
    p, unit, _, pair = _Sides.apply(x, y, diag, blocks, permutation, normalize, pairs)
    return p, unit if normalize else other, pair if pairs else None


class _Sides(Function):
    @staticmethod
    def forward(x, y, diag, blocks, permutation, normalize, pairs):
        y = x if y is None else y
        return torch.ops.gssf.project_sides(x, y, diag, blocks, permutation, normalize, pairs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, diag, blocks, permutation, ctx.normalize, _ = inputs
        _, unit, norm, pair = output
        ctx.mark_non_differentiable(norm, pair, *(() if ctx.normalize else (unit,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(norm, x, y, diag, blocks, permutation)

    @staticmethod
    def backward(ctx, dp, dunit, *_):
        of_x, of_y = dp is not None, dunit is not None and ctx.normalize
        given = (of_x or (of_y and ctx.saved_tensors[2] is None), of_y, of_x, of_x)
        needs = [need and some for need, some in zip(ctx.needs_input_grad[:4], given, strict=True)]
        op = torch.ops.gssf.project_sides_backward
        found = last_derivative(op, dp, dunit, *ctx.saved_tensors, ctx.normalize, needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None)


def _lengths(x: Tensor, normalize: bool) -> int:
    """Of how many rows the lengths are kept for the backward: C++ makes them again."""
    return x.shape[0] if normalize and x.device.type != "cpu" else 0


def _reference_sides(x, y, diag, blocks, permutation, normalize=True, pairs=False):
    op, dtype = torch.ops.gssf.project, accumulation_dtype(x.dtype)
    p = op(x, diag, blocks, permutation, normalize)
    unit = op(y, None, None, None, True) if normalize else y.new_empty(0)
    norm, pair = x.new_empty(_lengths(x, normalize), dtype=dtype), x.new_empty(0, dtype=dtype)
    if norm.numel():
        torch.linalg.vector_norm(x, dim=1, dtype=dtype, out=norm).clamp_min_(reference.EPS)
    if pairs:
        i = torch.arange(x.shape[0], device=x.device)
        pair = torch.ops.gssf.pair_scores(p, unit if normalize else y, i, i)
    return p, unit, norm, pair


def _reference_sides_backward(dp, dunit, norm, x, y, diag, blocks, permutation, normalize, needs):
    op = torch.ops.gssf.project_backward
    dx, dy, ddiag, dblocks = (x.new_empty(0) for _ in range(4))
    if dp is not None and (needs[0] or needs[2] or needs[3]):
        dx, ddiag, dblocks = op(dp, x, diag, blocks, permutation, normalize, [needs[0], needs[2], needs[3]])
    if dunit is not None and normalize and (needs[0] if y is None else needs[1]):
        of_unit, *_ = op(dunit, x if y is None else y, None, None, None, True, [True, False, False])
        if y is not None:
            dy = of_unit
        else:
            dx = of_unit if dp is None else dx + of_unit
    return dx, dy, ddiag, dblocks


def _reference_backward(grad, x, diag, blocks, permutation, normalize, needs):
    """By the formulas above and not by autograd, which is out of reach where a dispatch mode calls the op."""
    wide, g, length = reference.accumulate(x), reference.accumulate(grad), None
    unit, dunit = wide, g if diag is None and blocks is None else torch.zeros_like(g)
    if normalize:
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        unit = wide / length.clamp_min(reference.EPS)
    dx, ddiag, dblocks = (x.new_empty(0) for _ in range(3))
    if diag is not None:
        dunit = dunit + g * reference.accumulate(diag)
        ddiag = (unit * g).sum(0).to(diag.dtype) if needs[1] else ddiag
    if blocks is not None:
        unit_groups, g_groups = (
            (t if permutation is None else t[:, permutation]).unflatten(1, blocks.shape[:2]) for t in (unit, g)
        )  # [N, G, b]
        mixed = torch.einsum("ngc,gkc->ngk", g_groups, reference.accumulate(blocks)).flatten(1)
        dunit = dunit + (mixed if permutation is None else mixed[:, torch.argsort(permutation)])
        dblocks = torch.einsum("ngk,ngc->gkc", unit_groups, g_groups).to(blocks.dtype) if needs[2] else dblocks
    if needs[0]:
        if length is not None:
            inner = torch.where(length < reference.EPS, 0, (unit * dunit).sum(1, keepdim=True))
            dunit = (dunit - unit * inner) / length.clamp_min(reference.EPS)
        dx = dunit.to(x.dtype).contiguous()
        dx = dx.clone() if dx is grad else dx
    return dx, ddiag, dblocks


def _reference_pairs_backward(grad, rows, cols, x, y, diag, blocks, permutation, normalize, needs):
    dtype = accumulation_dtype(x.dtype)
    other = reference.project(y.to(dtype), normalize=normalize)
    upstream = reference.weighted_sums(grad, rows, cols, other, x.shape[0])
    wide_x, wide_diag, wide_blocks = (None if t is None else t.to(dtype) for t in (x, diag, blocks))
    found = _reference_backward(upstream, wide_x, wide_diag, wide_blocks, permutation, normalize, needs)
    return tuple(g.to((x if t is None else t).dtype) for g, t in zip(found, (x, diag, blocks), strict=True))


def _fake(x, diag, blocks, permutation, normalize):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_sides(x, y, diag, blocks, permutation, normalize=True, pairs=False):
    p = torch.empty_like(x, memory_format=torch.contiguous_format)
    unit = torch.empty_like(y, memory_format=torch.contiguous_format) if normalize else y.new_empty(0)
    sizes = _lengths(x, normalize), x.shape[0] if pairs else 0
    return p, unit, *(x.new_empty(size, dtype=accumulation_dtype(x.dtype)) for size in sizes)


def _fake_sides_backward(dp, dunit, norm, x, y, diag, blocks, permutation, normalize, needs):
    of_x, of_y = dp is not None, dunit is not None and normalize
    some_x = of_x or (of_y and y is None)
    wanted = (some_x and needs[0], of_y and needs[1], of_x and needs[2], of_x and needs[3])
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and some else x.new_empty(0)
        for t, some in zip((x, y, diag, blocks), wanted, strict=True)
    )


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
# Both sides of a metric: x̂ W and ŷ, which without normalize is y and not given back; what the backward divides by,
# where it is kept; and the pairs' scores, where they are wanted.
define(
    "project_sides(Tensor x, Tensor y, Tensor? diag, Tensor? blocks, Tensor? permutation, bool normalize=True, "
    "bool pairs=False) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_sides,
    fake=_fake_sides,
    through="project",
    triton="project.project_sides",
)
define(
    "project_sides_backward(Tensor? dp, Tensor? dunit, Tensor norm, Tensor x, Tensor? y, Tensor? diag, Tensor? blocks, "
    "Tensor? permutation, bool normalize, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_sides_backward,
    fake=_fake_sides_backward,
    through="project_backward",
    triton="project.project_sides_backward",
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
