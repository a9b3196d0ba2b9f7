"""csrc/cuda on whole numbers, whose answers are exact: python -m bench.light.hopper [--dry].

The last of all, and in a process of its own: a barrier that nobody arrives at would hang the card's queue.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import gssf_kernels as gk
from bench.light import worker
from gssf_kernels import plan
from gssf_kernels.triton import hopper

# N, M, D: ragged; one tile; several tiles with several stages; the large tile (D >= 512); many tiles a processor.
SHAPES = [(129, 257, 40), (128, 256, 64), (700, 1100, 320), (1040, 1300, 1024), (4224, 4352, 256), (4224, 4352, 1024)]


def whole(n: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randint(-3, 4, (n, d), generator=torch.Generator().manual_seed(seed)).to(dtype)


def scores(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double().T


def hardest(a: Tensor, b: Tensor, ids: tuple) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, what the card gives, the true answer) of each result."""
    results = hopper.hardest_negatives(a, b, *ids)
    truth = gk.reference.hardest_negatives(a.double(), b.double(), a_ids=ids[0], b_ids=ids[1])
    names = ("pair_score", "row_score", "row_index", "col_score", "col_index")
    yield from zip(names, results, (scores(a, b).diagonal(), *truth), strict=True)


def log_sums(a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Largest ones are exact; a logarithm of a sum is rounded, here to twelve bits of it."""
    row_max, row_log, col_max, col_log, pair = hopper.logsumexp_scores(a, b, None, 0.125)
    t = 0.125 * scores(a, b)
    yield "row_max", row_max, t.amax(1)
    yield "col_max", col_max, t.amax(0)
    yield "pair", pair, t.diagonal()[: len(pair)]
    for name, log, dim in (("row_log", row_log, 1), ("col_log", col_log, 0)):
        right = t.logsumexp(dim) - t.amax(dim)
        off = (log.double() - right).abs() > 2.0**-12 * right.clamp_min(1)
        yield name, torch.where(off, log.double(), right), right


def check(name: str, results: Iterator[tuple[str, Tensor, Tensor]]) -> None:
    """Tell the finding of one call."""
    wrong = {}
    for result, value, right in results:
        bad = (value.double() != right.double()).nonzero().flatten()
        if len(bad):
            first = int(bad[0])
            pair = {"value": float(value[first]), "truth": float(right[first])}
            wrong[result] = {"wrong": len(bad), "first": first, **pair}
    worker.tell("finding", kind="hopper", name=name, right=not wrong, **({"results": wrong} if wrong else {}))


def main() -> int:
    dry = "--dry" in sys.argv
    if not plan.hopper_built():
        worker.tell("finding", kind="hopper", name="csrc/cuda", right=None, why="the extension was built without it")
        return 0
    if dry:
        worker.tell(
            "finding",
            kind="hopper",
            name="csrc/cuda",
            right=None,
            why="it needs a card",
        )
        return 0
    for n, m, d in SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            a, b = whole(n, d, dtype, 0).cuda(), whole(m, d, dtype, 1).cuda()
            ids = tuple(torch.arange(k, device="cuda") // 3 for k in (n, m))
            words = f"{str(dtype).removeprefix('torch.')} {n}x{m}x{d}"
            check(f"hardest_negatives {words}", hardest(a, b, (None, None)))
            check(f"hardest_negatives {words} ids", hardest(a, b, ids))
            check(f"logsumexp_scores {words}", log_sums(a, b))
    return 0


if __name__ == "__main__":
    sys.exit(main())
