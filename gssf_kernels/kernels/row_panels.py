"""Dense losses of many bf16 scores: what is stored of s is the gradient of one panel of rows, in bf16.

    for each panel R of row blocks:   a sweep leaves its sums and stores dscores [R, M];
                                      da[R] = dscores b,   db += dscoresᵀ a[R]

The two products are the library's, summed in fp32. A chunk that the library multiplies, a pass turns into dscores and a
cast rounds (`gssf_kernels/dense.py`, what all else does) moves 22 bytes of memory a score; this moves 6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gssf_kernels.dense import Right
from gssf_kernels.kernels import tiles
from gssf_kernels.kernels.gradients import empty_dscores
from gssf_kernels.kernels.sweep import Sweep


def gradients_by_row_panels(
    a: torch.Tensor,
    b: torch.Tensor,
    tile: tiles.Sweep,
    needs: list[bool],
    count: int,
    launch: Callable[[Sweep, int, int, torch.Tensor | None, torch.Tensor], None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Σ_j ds_ij b_j [N, D], Σ_i ds_ij a_i [M, D], sums [count] fp64), gradients fp32, empty if not needed.

    launch(sweep, first, blocks, dscores, partial) sweeps row blocks [first, first + blocks), stores their
    dscores [·, M] if it is not None, and leaves partial [count, blocks times sweep.column_blocks] fp32, of every tile.
    """
    sweep, N, M = Sweep(a, b, tile), len(a), len(b)
    BN, step = tile.BN, max(min(sweep.row_blocks, tiles.ROW_PANEL_SCORES // (M * tile.BN)), 1)
    da = a.new_empty(a.shape if needs[0] else 0, dtype=torch.float32)
    db = b.new_empty(b.shape if needs[1] else 0, dtype=torch.float32)
    dscores = empty_dscores(a[: step * BN], M) if any(needs) else None
    right = Right(b, torch.float32) if needs[0] else None
    starts = range(0, sweep.row_blocks, step)
    sums = a.new_empty(len(starts), count, dtype=torch.float64)
    for panel, first in enumerate(starts):
        blocks, rows = min(step, sweep.row_blocks - first), slice(first * BN, min((first + step) * BN, N))
        partial = da.new_empty(count, blocks * sweep.column_blocks)
        launch(sweep, first, blocks, dscores, partial)
        torch.sum(partial, 1, dtype=torch.float64, out=sums[panel])
        if dscores is None:
            continue
        of_rows = dscores[: rows.stop - rows.start]
        if right is not None:
            right.product(of_rows, da[rows])
        if needs[1]:
            Right(a[rows], torch.float32).product(of_rows.mT, db, add=first > 0)
    return da, db, sums.sum(0)
