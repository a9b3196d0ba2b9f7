"""Dense losses of many bf16 scores: what is stored of s is the gradient of one slab of rows, in bf16.

    for each slab R of row blocks:   a sweep leaves its sums and stores ds [R, M];   da[R] = ds b,   db += dsᵀ a[R]

The two products are the library's, summed in fp32. A chunk that the library multiplies, a pass turns into ds and a cast
rounds (`gssf_kernels/dense.py`, what all else does) moves 22 bytes of memory a score; this moves 6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gssf_kernels import plan
from gssf_kernels.dense import Right
from gssf_kernels.kernels import tiles
from gssf_kernels.kernels.gradients import room
from gssf_kernels.kernels.sweep import Sweep
from gssf_kernels.plan import Scores


def takes(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    """Whether scores of a [N, D] and b [M, D] are swept; of one side twice (None) chunks make half of them."""
    return b is not None and a.dtype in plan.ROW_PANEL_DTYPES and len(a) * len(b) > plan.SMALL


def gradients_by_slabs(
    a: torch.Tensor,
    b: torch.Tensor,
    needs: list[bool],
    count: int,
    launch: Callable[[Sweep, int, int, torch.Tensor | None, torch.Tensor], None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Σ_j ds_ij b_j [N, D], Σ_i ds_ij a_i [M, D], the parts' sums [count] fp64), gradients fp32, empty if not needed.

    launch(sweep, first, blocks, ds, parts) sweeps row blocks [first, first + blocks), stores their ds [·, M] if it is
    not None, and leaves parts [count, blocks times sweep.column_blocks] fp32, of every tile.
    """
    sweep, N, M = Sweep(a, b, Scores(a, b).tile("slabs")), len(a), len(b)
    BN, step = sweep.tile.BN, max(min(sweep.row_blocks, tiles.SLAB_SCORES // (M * sweep.tile.BN)), 1)
    da = a.new_empty(a.shape if needs[0] else 0, dtype=torch.float32)
    db = b.new_empty(b.shape if needs[1] else 0, dtype=torch.float32)
    ds = room(a[: step * BN], M) if any(needs) else None
    channels = Right(b, torch.float32) if needs[0] else None
    starts = range(0, sweep.row_blocks, step)
    sums = a.new_empty(len(starts), count, dtype=torch.float64)
    for slab, first in enumerate(starts):
        blocks, rows = min(step, sweep.row_blocks - first), slice(first * BN, min((first + step) * BN, N))
        parts = da.new_empty(count, blocks * sweep.column_blocks)
        launch(sweep, first, blocks, ds, parts)
        torch.sum(parts, 1, dtype=torch.float64, out=sums[slab])
        if ds is None:
            continue
        part = ds[: rows.stop - rows.start]
        if channels is not None:
            channels.product(part, da[rows])
        if needs[1]:
            Right(a[rows], torch.float32).product(part.mT, db, add=first > 0)
    return da, db, sums.sum(0)
