"""Does the fused loss agree with its definition, on the batch at hand, in value and in gradient?

Both take a maximum and a hinge. Where two negatives score the same up to rounding, or a hinge is at 0 up to
rounding, either side may rightly choose differently; those anchors are found, their scores compared, and the
few gradient rows they touch left out. Everything else has to agree to fp32 rounding.
"""

import torch
from losses import MARGIN
from torch import Tensor

import gssf_kernels as gk

ROUNDING = 2e-5  # of scores and gradients of order 1, summed in fp32 over some hundred channels or edges


class Disagreement(RuntimeError):
    """The fused loss and its definition differ by more than rounding."""


def agree(a: Tensor, b: Tensor, pictures: Tensor) -> tuple[float, float]:
    """Compare gk.triplet_loss with gk.reference.triplet_loss on a [B, D] (pictures), b [N, D] (captions).

    pictures: [N] int64, the row of a that each caption describes; also the ids.

    Returns:
        largest error of the value (relative) and of the gradients (relative to their largest entry).

    Raises:
        Disagreement: more than ROUNDING apart.
    """
    values, gradients, picks = [], [], []
    for kernels in (gk, gk.reference):
        # Gradients are taken at the B pictures: the N rows repeat them, and repeated rows tie exactly.
        leaves = [a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()]
        rows = leaves[0][pictures]  # [N, D]
        loss = kernels.triplet_loss(rows, leaves[1], margin=MARGIN, x_ids=pictures, y_ids=pictures)
        gradients.append(torch.autograd.grad(loss, leaves))
        values.append(float(loss.detach()))
        with torch.no_grad():
            picks.append(kernels.hardest_negatives(rows, leaves[1], a_ids=pictures, b_ids=pictures))
    fused, plain = picks
    errors = [
        ("row maxima", (fused.row_score - plain.row_score).abs().max()),
        ("column maxima", (fused.col_score - plain.col_score).abs().max()),
        ("loss", abs(values[0] - values[1]) / max(abs(values[1]), 1.0)),
    ]

    positive = (a[pictures] * b).sum(1)
    unsure_row = (fused.row_index != plain.row_index) | ((MARGIN + plain.row_score - positive).abs() < ROUNDING)
    unsure_col = (pictures[fused.col_index] != pictures[plain.col_index]) | (
        (MARGIN + plain.col_score - positive).abs() < ROUNDING
    )
    settled_a, settled_b = torch.ones(len(a), dtype=torch.bool), torch.ones(len(b), dtype=torch.bool)
    settled_a[pictures[unsure_row | unsure_col]] = False
    settled_b[unsure_row | unsure_col] = False
    for pick in picks:
        settled_b[pick.row_index[unsure_row]] = False
        settled_a[pictures[pick.col_index[unsure_col]]] = False
    for name, settled, ours, theirs in zip(("da", "db"), (settled_a, settled_b), *gradients, strict=True):
        if settled.float().mean() < 0.5:
            raise Disagreement(f"{name}: {int((~settled).sum())} of {len(settled)} rows hang on ties; cannot compare")
        errors.append((name, (ours - theirs)[settled].abs().max() / theirs.abs().max().clamp(min=1e-30)))
    for name, error in errors:
        if not error <= ROUNDING:
            raise Disagreement(f"fused triplet loss, {name}: off by {float(error):.2e}, allowed {ROUNDING:.0e}")
    return float(errors[2][1]), max(float(error) for _, error in errors[3:])
