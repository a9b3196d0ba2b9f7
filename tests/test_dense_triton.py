"""The passes' Triton kernels against their definition in fp64."""

import pytest
import torch
from interpreted import DEVICE, where_triton_runs

from gssf_kernels.kernels import dense, tiles
from gssf_kernels.statistics import logsumexp, relations, sums

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "PASS", tiles.Pass(16, 32, 4))


def both(kernel, definition, arguments, written):
    """What kernel in fp32 and definition in fp64 leave in the written arguments."""
    results = []
    for run, dtype, device in ((kernel, torch.float32, DEVICE), (definition, torch.float64, "cpu")):
        own = [
            t.to(device, dtype if t.is_floating_point() else None, copy=True) if isinstance(t, torch.Tensor) else t
            for t in arguments
        ]
        run(*own)
        results.append([own[k].cpu().double() for k in written])
    return zip(*results, strict=True)


def close(got, expected, rtol=2e-6):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * float(expected.nan_to_num(0, 0, 0).abs().max()),
                               equal_nan=True)  # fmt: skip


SHAPES = [(1, 1), (16, 32), (17, 33), (40, 70), (5, 200), (50, 7)]


@pytest.mark.parametrize("special", [None, INF, -INF, NAN])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_logsumexp_pass(n, m, special):
    s, scale = 5 * torch.randn(n, m), torch.tensor(1.7)
    if special is not None:
        s[n // 2] = special
        s[:, m // 3] = special
        s[0, 0] = special
    before = (torch.randn(m), torch.rand(m) + 1)
    arguments = (s, scale, torch.empty(n), torch.empty(n), *before)
    found = list(both(dense.logsumexp_pass, logsumexp._logsumexp_pass, arguments, (2, 3, 4, 5)))
    for (top, exact_top), (total, exact_total) in (found[:2], found[2:]):
        close(top + total.log(), exact_top + exact_total.log())


@pytest.mark.parametrize("directions", ["both", "rows", "columns"])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_softmax_pass(n, m, directions):
    s, scale = 3 * torch.randn(n, m), torch.tensor(0.8)
    t = s * scale
    row = (t.amax(1), (t - t.amax(1, keepdim=True)).exp().sum(1).log(), torch.randn(n))
    col = (t.amax(0), (t - t.amax(0)).exp().sum(0).log(), torch.randn(m))
    arguments = [s, scale, *row, *col, torch.empty(n)]
    if directions != "both":
        arguments[7 if directions == "rows" else 4] = None
    for got, expected in both(dense.softmax_pass, logsumexp._softmax_pass, arguments, (0, 8)):
        close(got, expected, 1e-5)


@pytest.mark.parametrize("positives", ["include", "exclude", "negate"])
@pytest.mark.parametrize("kind", ["hinge", "softplus", "abs", "square"])
@pytest.mark.parametrize("columns", ["none", "some", "all"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (17, 33), (40, 70), (50, 7)])
def test_score_sums_pass(n, m, columns, kind, positives):
    s, scale = 2 * torch.randn(n, m), torch.tensor(0.8)
    k = {"none": 0, "some": (m + 1) // 2, "all": m}[columns]
    weighted, with_ids = kind != "abs", kind != "softplus"
    arguments = [
        s, scale, torch.randn(n), torch.randn(n) if weighted else None,
        torch.randn(k) if k else None, torch.randn(k) if k and weighted else None,
        torch.arange(n) % 5 - 2**40 if with_ids else None, torch.arange(m) % 3 - 2**40 if with_ids else None,
        3, kind, positives, columns != "some", torch.empty(3, n), torch.randn(2, k),
    ]  # fmt: skip
    for got, expected in both(dense.score_sums_pass, sums._score_sums_pass, arguments, (0, 12, 13)):
        if expected.numel():
            close(got, expected, 1e-5)


def test_special_values_pass_through_the_sums():
    s = torch.tensor([[0.0, NAN, INF, -INF, 1e30, -1e30]]).repeat(3, 1)
    for kind in ("hinge", "softplus", "abs", "square"):
        arguments = [s, torch.ones(()), *[None] * 6, 0, kind, "include", True, torch.empty(3, 3), torch.empty(2, 0)]
        slopes, _ = both(dense.score_sums_pass, sums._score_sums_pass, arguments, (0, 12))
        assert torch.equal(slopes[0].float().nan_to_num(9), slopes[1].float().nan_to_num(9))


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("kind", ["abs", "square"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 40), (17, 33), (40, 70), (32, 32)])
def test_relation_pass(n, m, kind, gradient):
    f, u, w = torch.randn(3, n, m)
    f[0, -1] = u[0, -1] = w[0, -1]  # e is 0 there, exactly
    arguments = [f, u, w, torch.tensor(0.25), kind, gradient, torch.empty(3, n)]
    for got, expected in both(dense.relation_pass, relations._relation_pass, arguments, (0, 6)):
        close(got, expected, 1e-5)


where_triton_runs(globals())
