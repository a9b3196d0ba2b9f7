"""What tests of the Triton kernels share: small tiles, inputs, and comparisons with fp64 truth.

Small tiles make small problems meet every edge.
"""

from functools import partial

import device_ops
import pytest
import torch
from interpreted import DEVICE, INTERPRETED
from kernel_modules import certified, tiles
from relative_loops import plain as plain_relative
from relative_loops import truth as true_relative

from gssf_kernels import plan

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

every_reduction = pytest.mark.parametrize("reduction", ["sum", "mean", "none"])


# Small tiles. A test takes a set of them by its marker: `@few`, or `pytestmark = many`.

few = pytest.mark.triton("few")  # few scores, that go forward and back in few launches
many = pytest.mark.triton("many")  # no problem is small, slabs are two row blocks, merges of few parts
row_panels = pytest.mark.triton("row panels")  # dscores stored a panel at a time, in the one dtype for them here
exact = pytest.mark.triton("exact")  # certified mining, rows, columns and partials a few at a time
own_tiles = pytest.mark.triton  # those that the test itself says

ROW_PANEL_DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16  # the interpreter has no bf16


def small_tiles(which):
    """{name in `tiles` or `plan`: what it is in such tests}"""
    sweep, project = tiles.Sweep(16, 32, 16, 4, 2), tiles.Project(16, 16, 4, 2)
    settings = {"sweep_tile": lambda *_: sweep}
    if which == "exact":
        rescore = {"one": tiles.Rescore(32, 2, 1, 1, 4), "all": tiles.Rescore(16, 2, 16, 1, 4)}
        settings |= {"MIN_SLAB_BLOCKS": 2, "SLAB_ENTRIES": 0, "ROUND": tiles.Pass(16, 32, 4), "RESCORE": rescore}
        return settings
    settings |= {"MERGE_PARTIALS": 4 if which == "many" else 2, "MERGE_LANES": 32}
    if which == "row panels":
        return settings | {"SMALL": 64, "ROW_PANEL_DTYPES": frozenset({ROW_PANEL_DTYPE})}
    settings["PROJECT"] = dict.fromkeys(tiles.PROJECT, project)
    if which == "many":
        settings |= {"MIN_SLAB_BLOCKS": 2, "SLAB_ENTRIES": 0, "SMALL": 0}
        return settings | {"POSITIVES": dict.fromkeys(tiles.POSITIVES, sweep)}
    settings |= {"TERM_LANES": 16, "TERMS": 16, "SCAN_EDGES": 8, "EDGE_CHANNELS": 32}
    settings |= {"GRADIENTS": dict.fromkeys(tiles.GRADIENTS, tiles.Gradients(16, 32, 16, 4, 2))}
    settings |= {"RELATIONS": dict.fromkeys(tiles.RELATIONS, tiles.Sweep(16, 16, 16, 4, 2))}
    settings |= {"FRAGMENTS": dict.fromkeys(tiles.FRAGMENTS, sweep)}
    gradients = tiles.FragmentGradients(16, 16, 16, 16, 4, 2)
    settings |= {"FRAGMENT_GRADIENTS": dict.fromkeys(tiles.FRAGMENT_GRADIENTS, gradients)}
    settings["TOP_KEYS"] = 256  # those of a few rows at a time
    settings["TOP"] = {
        (kind, length): tiles.Top(16, 32, 16, length, 4, 2) for kind, _ in tiles.TOP for length in (4, 16)
    }
    return settings | {"CLOSE": tiles.Pass(8, 16, 4), "PASS": tiles.Pass(16, 32, 4)}


def use_small_tiles(which, monkeypatch):
    for name, value in small_tiles(which).items():
        monkeypatch.setattr(plan if hasattr(plan, name) else tiles, name, value)
    if which == "exact":
        monkeypatch.setattr(certified, "MULTIPLE", 32)
        if INTERPRETED:  # whose bf16 is wrong
            monkeypatch.setattr(certified, "ROUNDED", torch.float32)


# Inputs


def on_device(*tensors):
    return [t if t is None else t.to(DEVICE) for t in tensors]


def two_sides(n, m, d, dtype, twice=False):
    """a [N, D] and b [M, D], or None for one side twice."""
    a = torch.randn(n, d, dtype=torch.float64).to(dtype)
    return a, None if twice else torch.randn(m, d, dtype=torch.float64).to(dtype)


def sides_with_ids(n, m, d, dtype, ids=False):
    """a [N, D], b [M, D] and the ids of their rows, or None twice."""
    a, b = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    return a, b, *((torch.arange(n) % 5 - 2**40, torch.arange(m) % 3 - 2**40) if ids else (None, None))


def fp64_leaves(*tensors):
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


# Comparisons


def close(got, expected, dtype, *, rtol=4e-6, size=None, subnormal=False):
    """Within some roundings of dtype of the largest number, or of size; rtol: of fp32.

    subnormal: and within the smallest number of dtype.
    """
    rtol = rtol if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    atol = rtol * float(expected.nan_to_num(0, 0, 0).abs().max() if size is None else size)
    if subnormal:
        atol += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def assert_same_bits(results, expected):
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


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
    return [x.cpu() for x in device_ops.hardest_negatives(*on)]


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
        has_negative = lowest >= 0
        assert not no[has_negative].gather(1, index[has_negative, None]).any()
        if exact:
            assert torch.equal(index, lowest)
        else:
            assert_as_good(
                s[has_negative].gather(1, index[has_negative, None])[:, 0].to(ours.dtype),
                best(p)[0][has_negative],
                score[has_negative],
            )


def check_relative(a, b, threshold, beta, a_ids=None, b_ids=None, exact=False):
    """Compare with loops in fp64; exact: distances of whole numbers, which leave but one rounding."""
    level = torch.tensor(threshold, device=DEVICE)
    on = [x.to(DEVICE) if x is not None else None for x in (a, b, a_ids, b_ids)]
    *results, rows, cols = (x.cpu() for x in device_ops.relative_negatives(*on, level, beta))
    for ours, known in zip(results, run_hardest(a, b, a_ids, b_ids), strict=True):
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


def log_sum_truth(a, b, scale):
    """(leaves, t, row and column log-sums, pairs) in fp64."""
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in (a, b, scale)]
    x, y = leaves[0], leaves[0] if b is None else leaves[1]
    t = leaves[2] * (x @ y.T)
    t.retain_grad()
    return leaves, t, t.logsumexp(1), t.logsumexp(0), t.diagonal()


def both_passes(name, arguments, written):
    """What the op leaves in the written arguments: its kernel in fp32, its composite in fp64."""
    results = []
    for run, dtype, device in (
        (getattr(device_ops, name), torch.float32, DEVICE),
        (partial(device_ops.composite, name), torch.float64, "cpu"),
    ):
        copies = [
            t.to(device, dtype if t.is_floating_point() else None, copy=True) if isinstance(t, torch.Tensor) else t
            for t in arguments
        ]
        run(*copies)
        results.append([copies[k].cpu().double() for k in written])
    return zip(*results, strict=True)
