"""Structured projection: ``p = x W``, ``W = diag(w) + blockdiag(B)``, the learnable half of GSSF.

    W = diag(w) + Pᵀ blockdiag(B_1, …, B_G) P,      p = x̂ W,      x̂ = x / max(‖x‖₂, 1e-12) or x

Since W is shared by all pairs, ``s = x W yᵀ = p yᵀ``: one O(N·D·b) pass here replaces a structured
product per pair. Source: the structural sparse form of GSSF, arXiv 2410.15266 (IEEE TIP 2024): Diag
is the paper's; the block layout, the sum of both and the channel permutation P are ours.

Backward, with g = dL/dp: ``dw = Σ_n x̂∘g``, ``dB_g = x̂_gᵀ g_g``, ``dx̂ = g∘w + g_g B_gᵀ`` and, through the
norm, ``dx = (dx̂ − x̂ ⟨x̂, dx̂⟩) / ‖x‖``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan, reference
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.plan import accumulation_dtype


class ProjectCall(NamedTuple):
    """One side; or with y both sides of a metric: ŷ, and with pairs the scores of rows i of both."""

    x: Tensor
    y: Tensor | None
    diag: Tensor | None
    blocks: Tensor | None
    permutation: Tensor | None
    normalize: bool
    pairs: bool = False


class ProjectBackwardCall(NamedTuple):
    """The gradients of x̂ W and of ŷ, and the lengths of x where the forward gave them. Without y, x is both sides."""

    dp: Tensor | None
    dunit: Tensor | None
    norm: Tensor
    x: Tensor
    y: Tensor | None
    diag: Tensor | None
    blocks: Tensor | None
    permutation: Tensor | None
    normalize: bool
    needs: list[bool]  # for x, y, diag, blocks


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
    p, *_ = _Project.apply(x.reshape(-1, x.shape[-1]), None, diag, blocks, permutation, normalize, ONE_SIDE)
    return p.view(x.shape)


def sides(
    x: Tensor, y: Tensor, diag: Tensor | None, blocks: Tensor | None, permutation: Tensor | None, normalize: bool,
    pairs: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """``(x̂ W, ŷ, positive_score)``, both sides of a metric with checked weights; without ``normalize`` ŷ is y itself.

    positive_score: the scores [N] of rows i of both, detached, or None without ``pairs``.
    """
    if diag is None and blocks is None and not normalize:
        return x, y, None
    unchanged = y
    x, y = distinct(x, None if x is y and normalize else y)
    p, unit, _, positive_score = _Project.apply(x, y, diag, blocks, permutation, normalize, PAIRS if pairs else SIDES)
    return p, unit if normalize else unchanged, positive_score if pairs else None


ONE_SIDE, SIDES, PAIRS = range(3)  # of SIDES and PAIRS x is both where y is None


class _Project(Function):
    @staticmethod
    def forward(x, y, diag, blocks, permutation, normalize, sides):
        y = x if y is None and sides != ONE_SIDE else y
        return torch.ops.gssf.project(x, y, diag, blocks, permutation, normalize, sides == PAIRS)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, diag, blocks, permutation, ctx.normalize, sides = inputs
        _, unit, norm, positive_score = output
        ctx.of_unit = ctx.normalize and sides != ONE_SIDE
        ctx.mark_non_differentiable(norm, positive_score, *(() if ctx.of_unit else (unit,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(norm, x, y, diag, blocks, permutation)

    @staticmethod
    def backward(ctx, dp, dunit, *_):
        norm, x, y, *weights = ctx.saved_tensors
        of_p, of_unit = dp is not None, dunit is not None and ctx.of_unit
        used = (of_p or (of_unit and y is None), of_unit, of_p, of_p)
        needs = [need and part for need, part in zip(ctx.needs_input_grad[:4], used, strict=True)]
        op = torch.ops.gssf.project_backward
        grads = last_derivative(op, dp, dunit if of_unit else None, norm, x, y, *weights, ctx.normalize, needs)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


def _kept_lengths(call) -> int:
    """How many lengths of rows are kept for the backward: C++ computes them again, and one side alone needs none."""
    kept = call.normalize and call.y is not None and _checks.device_type(call.x) != "cpu"
    return call.x.shape[0] if kept else 0


def _project(call):
    x, y, diag, blocks, permutation, normalize, pairs = call
    dtype = accumulation_dtype(x.dtype)
    p = reference.project(x, diag, blocks, permutation=permutation, normalize=normalize).clone()
    both = normalize and y is not None
    unit = reference.project(y, normalize=True).clone() if both else x.new_empty(0)
    norm, positive_score = x.new_empty(_kept_lengths(call), dtype=dtype), x.new_empty(0, dtype=dtype)
    if norm.numel():
        torch.linalg.vector_norm(x, dim=1, dtype=dtype, out=norm).clamp_min_(reference.EPS)
    if pairs:
        i = torch.arange(x.shape[0], device=x.device)
        positive_score = torch.ops.gssf.pair_scores(p, unit if normalize else y, i, i)
    return p, unit, norm, positive_score


def _project_backward(call):
    dp, dunit, _, x, y, diag, blocks, permutation, normalize, needs = call
    dx, dy, ddiag, dblocks = (x.new_empty(0) for _ in range(4))
    if dp is not None and (needs[0] or needs[2] or needs[3]):
        weights = (diag, blocks, permutation, normalize)
        dx, ddiag, dblocks = _side_backward(dp, x, weights, (needs[0], needs[2], needs[3]))
    if dunit is not None and normalize and needs[0 if y is None else 1]:
        other = x if y is None else y
        of_unit, *_ = _side_backward(dunit, other, (None, None, None, True), (True, False, False))
        if y is not None:
            dy = of_unit
        else:
            dx = of_unit if dp is None else dx + of_unit
    return dx, dy, ddiag, dblocks


def _side_backward(grad, x, weights, needs):
    """(dx, ddiag, dblocks) of one side, by the formulas above and not by autograd, which is out of reach where a
    dispatch mode calls the op."""
    diag, blocks, permutation, normalize = weights
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


def pairs_project_backward(grad, rows, cols, call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, ddiag, dblocks) of the scores x̂ W ŷᵀ at (rows [E], cols [E]) with gradients grad [E], in plain PyTorch.

    call: has x, y, diag, blocks, permutation, normalize and needs, for x, y, diag, blocks
    """
    x, y, needs = call.x, call.y, call.needs
    weights = (call.diag, call.blocks, call.permutation, call.normalize)
    dx, dy, ddiag, dblocks = (x.new_empty(0) for _ in range(4))
    if needs[0] or needs[2] or needs[3]:
        dx, ddiag, dblocks = _pairs_side_backward((grad, rows, cols), x, y, weights, (needs[0], needs[2], needs[3]))
    if needs[1]:  # y's rows go through W where x's go through its transpose
        transposed = (call.diag, None if call.blocks is None else call.blocks.mT, *weights[2:])
        dy, *_ = _pairs_side_backward((grad, cols, rows), y, x, transposed, (True, False, False))
    return dx, dy, ddiag, dblocks


def _pairs_side_backward(edges, x, y, weights, needs):
    """`_side_backward` of the gradient Σ_{e: rows_e = i} g_e ŷ[cols_e] of row i, in the dtype of sums."""
    diag, blocks, permutation, normalize = weights
    dtype = accumulation_dtype(x.dtype)
    grad, rows, cols = edges
    other = reference.project(y.to(dtype), normalize=normalize)
    gathered = reference.weighted_sums(grad, rows, cols, other, x.shape[0])
    wide_x, wide_diag, wide_blocks = (None if t is None else t.to(dtype) for t in (x, diag, blocks))
    grads = _side_backward(gathered, wide_x, (wide_diag, wide_blocks, permutation, normalize), needs)
    return tuple(g.to((x if t is None else t).dtype) for g, t in zip(grads, (x, diag, blocks), strict=True))


def _fake_project(call):
    x, y, dtype = call.x, call.y, accumulation_dtype(call.x.dtype)
    p = torch.empty_like(x, memory_format=torch.contiguous_format)
    both = call.normalize and y is not None
    unit = torch.empty_like(y, memory_format=torch.contiguous_format) if both else x.new_empty(0)
    sizes = _kept_lengths(call), x.shape[0] if call.pairs else 0
    return p, unit, *(x.new_empty(size, dtype=dtype) for size in sizes)


def _fake_project_backward(call):
    of_p, of_unit = call.dp is not None, call.dunit is not None and call.normalize
    used = (of_p or (of_unit and call.y is None), of_unit and call.y is not None, of_p, of_p)
    tensors = (call.x, call.y, call.diag, call.blocks)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if t is not None and part and need
        else call.x.new_empty(0)
        for t, part, need in zip(tensors, used, call.needs, strict=True)
    )


# x̂ W [N, D]; with y and normalize ŷ [M, D], and off the CPU what the rows of x are divided by [N]; with pairs the
# scores of rows i [N]; what is not made is empty
register(
    "project",
    ProjectCall,
    "(Tensor, Tensor, Tensor, Tensor)",
    composite=_project,
    fake=_fake_project,
    launcher="project.project",
    plans=plan.project,
)
register(
    "project_backward",
    ProjectBackwardCall,
    "(Tensor, Tensor, Tensor, Tensor)",
    composite=_project_backward,
    fake=_fake_project_backward,
    launcher="project.project_backward",
    plans=plan.project_backward,
)
