"""The structured projection ``p = x W`` of GSSF's learnable similarity ``s = x W yᵀ = p yᵀ``.

    W = diag(w) + Pᵀ blockdiag(B_1, …, B_G) P,      p = x̂ W,      x̂ = x / max(‖x‖₂, 1e-12) or x
    dw = Σ_n x̂ ∘ g,   dB_g = x̂_gᵀ g_g,   dx̂ = g ∘ w + g_g B_gᵀ,   dx = (dx̂ − x̂ ⟨x̂, dx̂⟩) / ‖x‖,      g = dL/dp

All pairs share W, so one projection of O(N·D·b) replaces a structured product for each pair.

Source: the structural sparse form of GSSF, arXiv 2410.15266 (IEEE TIP 2024). The diagonal is the paper's. The layout of
the blocks, the sum of both and the permutation P of channels are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan, reference
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.plan import accumulation_dtype


class ProjectCall(NamedTuple):
    """x̂ W; with y also ŷ, and with pairs also positive_score."""

    x: Tensor  # [N, D]
    y: Tensor | None  # [M, D]
    diag: Tensor | None  # [D]
    blocks: Tensor | None  # [G, b, b]
    permutation: Tensor | None  # [D] int64
    normalize: bool
    pairs: bool = False  # compute s_ii [N]; requires y and M >= N


class ProjectBackwardCall(NamedTuple):
    """The gradients with respect to x, y, diag and blocks."""

    dp: Tensor | None  # [N, D], dL/d(x̂ W)
    dunit: Tensor | None  # [M, D], dL/dŷ
    norm: Tensor  # [N], the norms of the rows of x, or empty: computed again
    x: Tensor  # [N, D]
    y: Tensor | None  # [M, D]; None: y is x
    diag: Tensor | None
    blocks: Tensor | None
    permutation: Tensor | None
    normalize: bool
    needs: list[bool]  # whether x, y, diag and blocks need a gradient


def project(
    x: Tensor,
    diag: Tensor | None = None,
    blocks: Tensor | None = None,
    *,
    permutation: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """``p = x̂ (diag(w) + blockdiag(B))``, the weighted factor of the structured similarity.

    The block term of channel ``g·b + c``, in the order of the blocks, is ``Σ_k x̂[g·b + k] · blocks[g, k, c]``. The
    diagonal term is ``x̂ ∘ diag``. p is the sum of the terms whose weights are passed, or x̂ without any.

    Args:
        x: [..., D] float, embeddings. All leading dimensions share the weights.
        diag: [D] of x's dtype, or fp32 with fp16 or bf16 rows: the weight w of each channel.
        blocks: [G, b, b] of such a dtype with G·b = D, one matrix for each block of b channels.
        permutation: [D] int64, the channels in the order of the blocks; contains each channel once. None: the
            identity. Its values are checked only on the CPU, because reading them on a GPU would synchronise.
        normalize: first divide each row by its L2 norm, as ``torch.nn.functional.normalize`` does.

    Returns:
        [..., D] in x's dtype, summed in fp32 (fp64 for fp64). Inside ``torch.autocast`` x takes the region's
        dtype. Differentiable once in x, diag and blocks; deterministic. Without weights and ``normalize``, x itself.

    Raises:
        TypeError: an argument is not a floating tensor, or differs from x in dtype.
        ValueError: a shape or device does not fit x, D is not G·b, or permutation does not contain each channel once.

    Source: GSSF, arXiv 2410.15266; the docstring of this file says what is ours.
    """
    (x,) = _checks.autocast(x)
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
    p, *_ = _Project.apply(x.reshape(-1, x.shape[-1]), None, diag, blocks, permutation, normalize, ONLY_X)
    return p.view(x.shape)


def project_both(
    x: Tensor, y: Tensor, diag: Tensor | None, blocks: Tensor | None, permutation: Tensor | None, normalize: bool,
    pairs: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """``(x̂ W, ŷ, positive_score)``, both factors of a metric with checked weights. Without ``normalize`` ŷ is y itself.

    positive_score: s_ii [N], detached; None without ``pairs``.
    """
    if diag is None and blocks is None and not normalize:
        return x, y, None
    unchanged = y
    x, y = distinct(x, None if x is y and normalize else y)
    p, unit, _, positive_score = _Project.apply(x, y, diag, blocks, permutation, normalize, PAIRS if pairs else BOTH)
    return p, unit if normalize else unchanged, positive_score if pairs else None


# What `_Project` computes: x̂ W; x̂ W and ŷ; both and positive_score. With BOTH and PAIRS, y=None means y is x.
ONLY_X, BOTH, PAIRS = range(3)


class _Project(Function):
    @staticmethod
    def forward(x, y, diag, blocks, permutation, normalize, results):
        y = x if y is None and results != ONLY_X else y
        return torch.ops.gssf.project(x, y, diag, blocks, permutation, normalize, results == PAIRS)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, diag, blocks, permutation, ctx.normalize, results = inputs
        _, unit, norm, positive_score = output
        ctx.has_unit = ctx.normalize and results != ONLY_X
        ctx.mark_non_differentiable(norm, positive_score, *(() if ctx.has_unit else (unit,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(norm, x, y, diag, blocks, permutation)

    @staticmethod
    def backward(ctx, dp, dunit, *_):
        norm, x, y, *weights = ctx.saved_tensors
        has_dp, has_dunit = dp is not None, dunit is not None and ctx.has_unit
        used = (has_dp or (has_dunit and y is None), has_dunit, has_dp, has_dp)
        needs = [need and part for need, part in zip(ctx.needs_input_grad[:4], used, strict=True)]
        op = torch.ops.gssf.project_backward
        grads = last_derivative(op, dp, dunit if has_dunit else None, norm, x, y, *weights, ctx.normalize, needs)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


def _kept_norms(call) -> int:
    """How many norms of rows of x are kept for the backward: none for C++, which computes them again, nor without y."""
    kept = call.normalize and call.y is not None and _checks.device_type(call.x) != "cpu"
    return call.x.shape[0] if kept else 0


def _project(call):
    x, y, diag, blocks, permutation, normalize, pairs = call
    dtype = accumulation_dtype(x.dtype)
    p = reference.project(x, diag, blocks, permutation=permutation, normalize=normalize).clone()
    unit = reference.project(y, normalize=True).clone() if normalize and y is not None else x.new_empty(0)
    norm, positive_score = x.new_empty(_kept_norms(call), dtype=dtype), x.new_empty(0, dtype=dtype)
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
        dx, ddiag, dblocks = _factor_backward(dp, x, weights, (needs[0], needs[2], needs[3]))
    if dunit is not None and normalize and needs[0 if y is None else 1]:
        dnormalized, *_ = _factor_backward(dunit, x if y is None else y, (None, None, None, True), (True, False, False))
        if y is not None:
            dy = dnormalized
        else:
            dx = dnormalized if dp is None else dx + dnormalized
    return dx, dy, ddiag, dblocks


def _factor_backward(dp, x, weights, needs):
    """(dx, ddiag, dblocks) of one factor ``p = x̂ W``, by the formulas in the docstring of this file.

    Autograd cannot be used: it is not available where a dispatch mode calls the op.
    """
    diag, blocks, permutation, normalize = weights
    unit, g, norm = reference.accumulate(x), reference.accumulate(dp), None
    dunit = g if diag is None and blocks is None else torch.zeros_like(g)
    if normalize:
        norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        unit = unit / norm.clamp_min(reference.EPS)
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
        if norm is not None:
            inner = torch.where(norm < reference.EPS, 0, (unit * dunit).sum(1, keepdim=True))
            dunit = (dunit - unit * inner) / norm.clamp_min(reference.EPS)
        dx = dunit.to(x.dtype).contiguous()
        dx = dx.clone() if dx is dp else dx
    return dx, ddiag, dblocks


def pairs_project_backward(dscores, rows, cols, call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, ddiag, dblocks) from the gradients dscores [E] of the scores x̂ W ŷᵀ at (rows [E], cols [E]).

    call: has x, y, diag, blocks, permutation, normalize and needs (of x, y, diag, blocks).
    """
    x, y, needs = call.x, call.y, call.needs
    weights = (call.diag, call.blocks, call.permutation, call.normalize)
    dx, dy, ddiag, dblocks = (x.new_empty(0) for _ in range(4))
    if needs[0] or needs[2] or needs[3]:
        edges = (dscores, rows, cols)
        dx, ddiag, dblocks = _pairs_factor_backward(edges, x, y, weights, (needs[0], needs[2], needs[3]))
    if needs[1]:  # s = x̂ (ŷ Wᵀ)ᵀ: for y, the transposed weights
        transposed = (call.diag, None if call.blocks is None else call.blocks.mT, *weights[2:])
        dy, *_ = _pairs_factor_backward((dscores, cols, rows), y, x, transposed, (True, False, False))
    return dx, dy, ddiag, dblocks


def _pairs_factor_backward(edges, x, y, weights, needs):
    """`_factor_backward` in the dtype of sums, where dp_i = Σ_{e: rows_e = i} dscores_e ŷ[cols_e]."""
    diag, blocks, permutation, normalize = weights
    dtype = accumulation_dtype(x.dtype)
    dscores, rows, cols = edges
    unit = reference.project(y.to(dtype), normalize=normalize)
    dp = reference.weighted_sums(dscores, rows, cols, unit, x.shape[0])
    inputs = (x, diag, blocks)
    x, diag, blocks = (None if t is None else t.to(dtype) for t in inputs)
    grads = _factor_backward(dp, x, (diag, blocks, permutation, normalize), needs)
    return tuple(g.to((inputs[0] if t is None else t).dtype) for g, t in zip(grads, inputs, strict=True))


def _fake_project(call):
    x, y, dtype = call.x, call.y, accumulation_dtype(call.x.dtype)
    p = torch.empty_like(x, memory_format=torch.contiguous_format)
    unit = x.new_empty(0)
    if call.normalize and y is not None:
        unit = torch.empty_like(y, memory_format=torch.contiguous_format)
    sizes = _kept_norms(call), x.shape[0] if call.pairs else 0
    return p, unit, *(x.new_empty(size, dtype=dtype) for size in sizes)


def _fake_project_backward(call):
    has_dp, has_dunit = call.dp is not None, call.dunit is not None and call.normalize
    used = (has_dp or (has_dunit and call.y is None), has_dunit and call.y is not None, has_dp, has_dp)
    tensors = (call.x, call.y, call.diag, call.blocks)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if t is not None and part and need
        else call.x.new_empty(0)
        for t, part, need in zip(tensors, used, call.needs, strict=True)
    )


# Results: x̂ W [N, D]; with y and normalize ŷ [M, D], and except on the CPU what the rows of x are divided by [N]; with
# pairs positive_score [N]. Results that are not computed are empty.
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
