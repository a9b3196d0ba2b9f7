"""The launchers' calls for search and ranks; see :mod:`bench.calls`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.case import PRODUCTS, Case
from gssf_kernels._library import OPS
from gssf_kernels.ops.score_counts import ScoreCountsCall
from gssf_kernels.ops.top_scores import TopScoresCall


def _top(dtype: torch.dtype, n: int, m: int, d: int, k: int, everything: bool) -> TopScoresCall:
    call = TopScoresCall(torch.zeros(n, d, dtype=dtype), torch.zeros(m, d, dtype=dtype), k)
    if not everything:
        return call
    ids = (torch.zeros(count, dtype=torch.int64) for count in (n, m))
    return call._replace(a_ids=next(ids), b_ids=next(ids), exclude_self=True, row_limit=torch.zeros(n), columns=True)


def _counts(dtype: torch.dtype, n: int, m: int, d: int, everything: bool) -> ScoreCountsCall:
    call = ScoreCountsCall(torch.zeros(n, d, dtype=dtype), torch.zeros(m, d, dtype=dtype), torch.zeros(n))
    if not everything:
        return call._replace(col_levels=torch.zeros(m))
    ids = (torch.zeros(count, dtype=torch.int64) for count in (n, m))
    starts = torch.arange(n + 1)
    return call._replace(
        row_starts=starts, col_levels=torch.zeros(m), col_starts=torch.arange(m + 1), a_ids=next(ids), b_ids=next(ids),
        exclude_self=True, pair_starts=starts, pair_cols=torch.zeros(n, dtype=torch.int64),
    )  # fmt: skip


def _cases() -> Iterator[Case]:
    top, counts = OPS["top_scores"].on_cuda, OPS["score_counts"].on_cuda
    for product, (dtype, _) in PRODUCTS.items():
        for k in (10, 100, 300):
            for everything, shape in ((False, (1040, 4096, 256)), (True, (1041, 4097, 200))):
                name = f"top_scores of {k}{' with all that leaves out, ragged' if everything else ''}"
                make = partial(_top, dtype, *shape, k, everything)
                yield Case(name, top, make, ("top_scores_kernel",), product)
        for name, shape, everything in (
            ("score_counts", (1040, 1040, 1024), False),
            ("score_counts ragged", (1041, 1041, 200), False),
            ("score_counts of several levels with all that leaves out", (1041, 1041, 200), True),
        ):
            yield Case(name, counts, partial(_counts, dtype, *shape, everything), ("sweep_kernel",), product)
    one = torch.float32
    yield Case("top_scores of one", top, partial(_top, one, 1, 1, 1, 1, True), ("top_scores_kernel",))
    yield Case("score_counts of one", counts, partial(_counts, one, 1, 1, 1, True), ("sweep_kernel",))


RETRIEVAL_CASES = [*_cases()]
