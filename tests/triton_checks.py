"""What tests of the Triton kernels share: small tiles, and comparisons with fp64 truth.

Small tiles make small problems meet every edge.
"""

import pytest
import torch
from interpreted import DEVICE
from test_relative import plain as plain_relative
from test_relative import truth as true_relative

from gssf_kernels import plan
from gssf_kernels.kernels import tiles
from gssf_kernels.kernels.hardest import hardest_negatives
from gssf_kernels.kernels.relative import relative_negatives

INF, NAN = float("inf"), float("nan")
IDS = {
    "distinct": lambda n: torch.arange(n),
    "equal": lambda n: torch.zeros(n, dtype=torch.int64),
    "groups": lambda n: torch.arange(n) // 5,
    "shuffled": lambda n: torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(n)),
    "negative": lambda n: torch.arange(n) // 3 - 2**40,
    "low bits alike": lambda n: (torch.arange(n) % 7) * 2**32 + 5,
    "extreme": lambda n: torch.where(torch.arange(n) % 2 == 0, 2**63 - 1, -(2**63)),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, slabs of two row blocks, merges of few parts."""
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tiles.Sweep(16, 32, 16, 4, 2))
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", 2)
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", 0)
    monkeypatch.setattr(plan, "SMALL", 0)
    monkeypatch.setattr(tiles, "MERGE_PARTS", 4)
    monkeypatch.setattr(tiles, "MERGE_LANES", 32)
    monkeypatch.setattr(tiles, "POSITIVES", {key: tiles.Sweep(16, 32, 16, 4, 2) for key in tiles.POSITIVES})
    monkeypatch.setattr(tiles, "PROJECT", {key: tiles.Project(16, 16, 4, 2) for key in tiles.PROJECT})


def assert_as_good(ours, plain, truth):
    """Our error is at most twice that of plain PyTorch in the same dtype, plus four roundings."""
    assert ours.shape == truth.shape
    ours, plain, truth = ours.cpu(), plain.cpu(), truth.cpu()
    assert torch.equal(ours.isnan(), truth.isnan())
    finite = truth.isfinite()
    infinite = truth.isinf()
    assert torch.equal(ours[infinite].double(), truth[infinite])
    if finite.any():
        error = (ours.double() - truth)[finite].abs().max()
        floor = 4 * torch.finfo(ours.dtype).eps * truth[finite].abs().max()
        assert error <= 2 * (plain.double() - truth)[finite].abs().max() + floor


def best(s):
    """(score, index) of the best entry of each row of s: NaN above all, lowest index, -1 where all is -inf."""
    nan = s.isnan()
    score = torch.where(nan.any(1), NAN, s.nan_to_num(-INF, INF, -INF).amax(1))
    hit = torch.where(nan.any(1)[:, None], nan, s == score[:, None])
    return score, torch.where(score == -INF, -1, hit.int().argmax(1))


def positives(N, M, a_ids, b_ids):
    """[N, M] bool: pairs that are no negatives."""
    mask = torch.eye(N, M, dtype=torch.bool)
    return mask if a_ids is None else mask | (a_ids[:, None] == b_ids[None, :])


def run_hardest(a, b, a_ids=None, b_ids=None):
    on = [x.to(DEVICE) if x is not None and not x.is_cuda else x for x in (a, b, a_ids, b_ids)]
    return [x.cpu() for x in hardest_negatives(*on)]


def check_hardest(a, b, a_ids=None, b_ids=None, exact=False):
    """Compare with fp64; exact: every index too, for data whose scores are exact in fp32."""
    pair, row_score, row_index, col_score, col_index = run_hardest(a, b, a_ids, b_ids)
    assert row_index.dtype == col_index.dtype == torch.int64
    a, b = a.cpu(), b.cpu()
    truth = a.double() @ b.double().T
    plain = a.float() @ b.float().T
    assert_as_good(pair, plain.diagonal(), truth.diagonal())
    masked = positives(len(a), len(b), a_ids, b_ids)
    for ours, index, s, p, no in [
        (row_score, row_index, truth, plain, masked),
        (col_score, col_index, truth.T, plain.T, masked.T),
    ]:
        s, p = s.masked_fill(no, -INF), p.masked_fill(no, -INF)
        score, lowest = best(s)
        assert_as_good(ours, best(p)[0], score)
        assert torch.equal(index == -1, lowest == -1)
        some = lowest >= 0
        assert not no[some].gather(1, index[some, None]).any()
        if exact:
            assert torch.equal(index, lowest)
        else:
            assert_as_good(s[some].gather(1, index[some, None])[:, 0].to(ours.dtype), best(p)[0][some], score[some])


def check_relative(a, b, threshold, beta, a_ids=None, b_ids=None, exact=False):
    """Compare with loops in fp64; exact: distances of whole numbers, which leave but one rounding."""
    level = torch.tensor(threshold, device=DEVICE)
    on = [x.to(DEVICE) if x is not None else None for x in (a, b, a_ids, b_ids)]
    *found, rows, cols = (x.cpu() for x in relative_negatives(*on, level, beta))
    for ours, known in zip(found, run_hardest(a, b, a_ids, b_ids), strict=True):
        torch.testing.assert_close(ours, known, rtol=0, atol=0, equal_nan=True)
    arguments = (a, b, threshold, beta, a_ids, b_ids)
    expected = true_relative(*arguments)
    for ours, twin, name in zip(
        (rows, cols), plain_relative(*arguments), ("row_relative", "col_relative"), strict=True
    ):
        if exact:
            assert torch.equal(ours, expected[name].float())
        else:
            assert_as_good(ours, twin, expected[name])
    return rows, cols
