"""Does the loss agree with its definition, on the batch at hand, in value and in gradient?

Both sides may rightly differ in a derivative where a hinge or a magnitude is at 0 up to rounding, and in a choice where
two negatives score the same up to rounding. Those places are found, and the few gradient rows they touch left out.
Everything else has to agree to fp32 rounding.
"""

import torch
from losses import MARGIN, Criterion
from torch import Tensor

import gssf_kernels as gk

ROUNDING = 2e-5  # of scores and gradients of order 1, summed in fp32 over some hundred channels or edges
KINK = 1e-6  # of a score, a sum over channels alone: closer to 0 than this, its sign is unsure


class Disagreement(RuntimeError):
    """A loss and its definition differ by more than rounding."""


def agree(criterion: Criterion, kind: str, a: Tensor, b: Tensor, owner: Tensor, picked: Tensor) -> tuple[float, float]:
    """Compare gk with gk.reference on pictures a [B, D] and captions b [N, D], in the loss of choice `kind`.

    owner: [N] int64, the row of a that each caption describes; also the ids. picked: [B], see Criterion. Semi-hard
    negatives have no kernel, and GOAL's own gradient is held to loops in the package's tests: for them it is the
    hardest-negative triplet loss that is compared, whose statistics GOAL shares.

    Returns:
        largest error of the value (relative) and of the gradients (relative to their largest entry).

    Raises:
        Disagreement: more than ROUNDING apart.
    """
    if kind in ("hardest", "semihard", "goal"):
        kind, unsure = "hardest", unsure_maxima(a, b, owner)
    elif kind == "all":
        unsure = unsure_hinges(a, b, owner)
    elif kind == "distill":
        unsure = unsure_signs(criterion.gaps(a, b, picked), owner)
    else:
        unsure = [torch.zeros(len(side), dtype=torch.bool) for side in (a, b)]
    values, gradients = [], []
    scalars = list(criterion.parameters())
    for kernels in (gk, gk.reference):
        leaves = [a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()]
        loss = criterion.value(kernels, kind, *leaves, owner, picked)
        gradients.append(torch.autograd.grad(loss, leaves + scalars))
        values.append(float(loss.detach()))
    errors = [("loss", abs(values[0] - values[1]) / max(abs(values[1]), 1 / len(b)))]  # means over N terms
    for name, left_out, ours, theirs in zip(("da", "db"), unsure, *(side[:2] for side in gradients), strict=True):
        if left_out.float().mean() > 0.5:
            raise Disagreement(f"{name}: {int(left_out.sum())} of {len(left_out)} rows hang on ties; cannot compare")
        errors.append((name, (ours - theirs)[~left_out].abs().max() / theirs.abs().max().clamp(min=1e-30)))
    names = [name for name, _ in criterion.named_parameters()]
    for name, ours, theirs in zip(names, *(side[2:] for side in gradients), strict=True):
        # The terms of a scalar's gradient are of order 1, and cancel where it has found its place.
        errors.append((f"gradient of {name}", (ours - theirs).abs() / theirs.abs().clamp(min=1)))
    for name, error in errors:
        if not error <= ROUNDING:
            raise Disagreement(f"{kind}, {name}: off by {float(error):.2e}, allowed {ROUNDING:.0e}")
    return float(errors[0][1]), max(float(error) for _, error in errors[1:])


def unsure_maxima(a: Tensor, b: Tensor, owner: Tensor) -> list[Tensor]:
    """Rows of a and b whose gradient hangs on a tie or a hinge at 0; the maxima themselves must agree.

    Raises:
        Disagreement: they do not.
    """
    ids = {"a_ids": torch.arange(len(a)), "b_ids": owner}
    with torch.no_grad():
        fused, plain = picks = [k.hardest_negatives(a, b, pairs="ids", **ids) for k in (gk, gk.reference)]
    for name in ("row_score", "col_score"):
        error = float((getattr(fused, name) - getattr(plain, name)).abs().max())
        if not error <= ROUNDING:
            raise Disagreement(f"hardest negatives, {name}: off by {error:.2e}, allowed {ROUNDING:.0e}")
    positive = (a[owner] * b).sum(1)  # of the N pairs
    row = (fused.row_index != plain.row_index)[owner] | ((MARGIN + plain.row_score[owner] - positive).abs() < ROUNDING)
    col = (fused.col_index != plain.col_index) | ((MARGIN + plain.col_score - positive).abs() < ROUNDING)
    of_a, of_b = torch.zeros(len(a), dtype=torch.bool), row | col
    of_a[owner[of_b]] = True
    for pick in picks:
        of_b[pick.row_index[owner[row]]] = True
        of_a[pick.col_index[col]] = True
    return [of_a, of_b]


def unsure_hinges(a: Tensor, b: Tensor, owner: Tensor) -> list[Tensor]:
    """Rows of a and b that meet in a hinge at 0, over all negatives."""
    with torch.no_grad():
        s = a[owner] @ b.T
        other = owner[:, None] != owner[None, :]
        row, col = (((MARGIN + s - p).abs() < KINK) & other for p in (s.diagonal()[:, None], s.diagonal()[None, :]))
    # A hinge at (i, j) is one of s_ij and of the diagonal at its anchor: i of the rows, j of the columns.
    of_b = row.any(1) | row.any(0) | col.any(0)
    of_a = torch.zeros(len(a), dtype=torch.bool)
    of_a[owner[row.any(1) | col.any(1) | col.any(0)]] = True
    return [of_a, of_b]


def unsure_signs(gaps: Tensor, owner: Tensor) -> list[Tensor]:
    """Pictures [B] and captions [N] of the relations [B, B] at 0."""
    close = (gaps.abs() < KINK).fill_diagonal_(False)
    of_a = close.any(1) | close.any(0)
    return [of_a, of_a[owner]]
