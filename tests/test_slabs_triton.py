"""Dense losses of many scores by slabs of rows: their Triton kernels against fp64."""

import pytest
import torch
from interpreted import DEVICE, where_triton_runs

from gssf_kernels import plan
from gssf_kernels.kernels import logsumexp, slabs, sums, tiles
from gssf_kernels.statistics.sums import pointwise

DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16  # the interpreter has no bf16, the table only that
INF, NAN = float("inf"), float("nan")
SHAPES = [(16, 32, 16), (17, 33, 17), (70, 70, 40), (97, 50, 24), (50, 97, 8)]
SLABS = [1, 16 * 97, 1 << 20]  # scores of one: a row block, one or two, all

slabbed = pytest.mark.parametrize("scores", SLABS, ids=["a row block", "some", "one slab"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tiles.Sweep(16, 32, 16, 4, 2))
    monkeypatch.setattr(tiles, "MERGE_PARTS", 2)
    monkeypatch.setattr(tiles, "MERGE_LANES", 32)
    monkeypatch.setattr(plan, "SMALL", 64)
    monkeypatch.setattr(plan, "ROW_PANEL_DTYPES", frozenset({DTYPE}))


def given(n, m, d):
    return [torch.randn(k, d).to(DTYPE).to(DEVICE) for k in (n, m)]


def close(found, expected):
    """fp32 within some roundings of the largest number; gradients of bf16 within those of bf16."""
    eps = torch.finfo(found.dtype).eps if found.dtype != torch.float64 else 2**-23
    rough = torch.bfloat16 == DTYPE and found.dim() > 1
    rtol = 4 * max(eps, 2**-8) if rough else 16 * eps
    atol = rtol * float(expected.nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(found.cpu().double(), expected.cpu(), rtol=rtol, atol=atol, equal_nan=True)


def leaves_of(*tensors):
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


@slabbed
@pytest.mark.parametrize("learnable", [True, False], ids=["learned", "a number"])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_log_sums(monkeypatch, n, m, d, learnable, scores):
    monkeypatch.setattr(tiles, "SLAB_SCORES", scores)
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", scores)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", 2)
    a, b = given(n, m, d)
    scale = torch.tensor(0.7, device=DEVICE)
    number = (scale, 1.0) if learnable else (None, 0.7)
    x, y, kappa = leaves_of(a, b, torch.tensor(0.7))
    t = kappa * (x @ y.T)
    expected = t.logsumexp(1), t.logsumexp(0), t.diagonal()

    row_max, row_log, col_max, col_log, pair, kept = logsumexp.logsumexp_scores(a, b, *number)
    assert kept.numel() == 0
    close(row_max, t.detach().amax(1))
    close(col_max, t.detach().amax(0))
    for found, right in zip((row_max + row_log, col_max + col_log, pair), expected, strict=True):
        close(found, right.detach())

    above = [torch.randn(len(line), dtype=torch.float64) for line in expected]
    right = torch.autograd.grad(expected, (x, y, kappa), above)
    lines = row_max, row_log, col_max, col_log
    grads = [g.float().to(DEVICE) for g in above]
    found = logsumexp.logsumexp_scores_backward(*grads, a, b, *number, *lines, [True, True, learnable])
    for ours, truth in zip(found[: 2 + learnable], right, strict=False):
        close(ours, truth)
    assert [g.dtype for g in found[:2]] == [DTYPE] * 2
    assert learnable or found[2].numel() == 0


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=["a", "b", "κ alone"])
def test_log_sums_gradients_of_some(monkeypatch, needs):
    monkeypatch.setattr(tiles, "SLAB_SCORES", 1)
    a, b = given(50, 40, 16)
    scale = torch.tensor(1.5, device=DEVICE)
    *lines, _, _ = logsumexp.logsumexp_scores(a, b, scale, 1.0)
    drow = torch.randn(50, device=DEVICE)
    whole = logsumexp.logsumexp_scores_backward(drow, None, None, a, b, scale, 1.0, *lines, [True] * 3)
    some = logsumexp.logsumexp_scores_backward(drow, None, None, a, b, scale, 1.0, *lines, [*needs, True])
    for found, expected, need in zip(some, whole, (*needs, True), strict=True):
        assert torch.equal(found, expected) if need else found.numel() == 0


def test_log_sums_of_nothing_to_sum_and_nan(monkeypatch):
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", 1)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", 1)
    a, b = (t.abs() for t in given(40, 50, 8))
    a[3], a[20, 0], b[7] = -INF, NAN, INF  # t of row 3 and column 7: -inf
    expected = a.double().cpu() @ b.double().cpu().T
    row_max, row_log, col_max, col_log, *_ = logsumexp.logsumexp_scores(a, b, None, 1.0)
    close(row_max + row_log, expected.logsumexp(1))
    close(col_max + col_log, expected.logsumexp(0))
    a[20, 0] = 1
    b[7] = -INF
    a[3] = 1
    row_max, row_log, col_max, col_log, *_ = logsumexp.logsumexp_scores(a, b, None, 1.0)
    assert float(col_max[7] + col_log[7]) == -INF
    close(row_max + row_log, (a.double().cpu() @ b.double().cpu().T).logsumexp(1))


@slabbed
@pytest.mark.parametrize("ids", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize(("kind", "positives"), [("softplus", "negate"), ("hinge", "exclude"), ("square", "include")])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES[1:4])
def test_sums(monkeypatch, n, m, d, kind, positives, ids, scores):
    monkeypatch.setattr(tiles, "SLAB_SCORES", scores)
    a, b = given(n, m, d)
    labels = [torch.randint(0, 9, (k,), device=DEVICE) for k in (n, m)] if ids else [None, None]
    scale, bias = torch.tensor(0.9, device=DEVICE), torch.tensor(-0.4, device=DEVICE)
    x, y, kappa, beta = leaves_of(a, b, torch.tensor(0.9), torch.tensor(-0.4))
    same = torch.eye(n, m, dtype=torch.bool)
    if ids:
        same |= labels[0].cpu()[:, None] == labels[1].cpu()
    t = kappa * (x @ y.T) + beta
    f, _ = pointwise(torch.where(same, -t, t) if positives == "negate" else t, kind)
    expected = 0.25 * (torch.where(same, 0, f) if positives == "exclude" else f).sum()
    right = torch.autograd.grad(expected, (kappa, beta, x, y))

    found = sums.score_total(a, b, scale, bias, 1.0, 0.0, *labels, kind, positives, False, 0.25, [True, True])
    total, dscale, dbias, da, db = found
    for ours, truth in zip((total, dscale, dbias), (expected.detach(), *right[:2]), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=2e-5, atol=2e-5 * n * m / 100)
    for ours, truth in zip(
        (da, db), right[2:], strict=True
    ):  # κ, the share and what comes from above are still to come
        close(0.25 * 0.9 * ours, truth)

    alone = sums.score_total(a, b, scale, bias, 1.0, 0.0, *labels, kind, positives, False, 0.25, [False, False])
    assert [g.numel() for g in alone[3:]] == [0, 0]
    if scores == SLABS[0]:
        return
    for ours, whole in zip(alone[:3], found[:3], strict=True):
        torch.testing.assert_close(ours, whole)
    log = sums.score_total(a, b, scale.log(), bias, None, 0.0, *labels, kind, positives, False, 0.25, [False, False])
    torch.testing.assert_close(log[0], total)


def test_what_is_declined(monkeypatch):
    a, b = given(20, 30, 8)
    assert slabs.takes(a, b)
    assert not slabs.takes(a, None)
    assert not slabs.takes(a[:2], b[:32])
    assert not slabs.takes(a.to(torch.float16), b.to(torch.float16))
    assert logsumexp.logsumexp_scores(a, None, None, 1.0) is NotImplemented
    relative = (None, None, 1.0, 0.0, None, None, "hinge", "exclude", True, 1.0, [True, True])
    assert sums.score_total(a, b, *relative) is NotImplemented
    monkeypatch.undo()
    assert {torch.bfloat16} == plan.ROW_PANEL_DTYPES
    assert slabs.takes(torch.empty(1025, 1, dtype=torch.bfloat16), torch.empty(1024, 1, dtype=torch.bfloat16))
    assert not slabs.takes(torch.empty(1024, 1, dtype=torch.bfloat16), torch.empty(1024, 1, dtype=torch.bfloat16))


where_triton_runs(globals())
