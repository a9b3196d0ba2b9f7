"""Batch-hard: the loss one row at a time in fp64, and the hardest positives in tiles."""

import math
import subprocess
import sys

import pytest
import torch
from cases import LABELS, randn

import gssf_kernels as gk
from gssf_kernels.statistics import hardest_positives, positives

BOTH = pytest.mark.parametrize("implementation", [gk, gk.reference], ids=["ours", "reference"])


def loop_batch_hard(x, labels, margin):
    """Per-row terms, and the gradient of their sum."""
    rows = x.tolist()
    s = [[math.fsum(p * q for p, q in zip(u, v, strict=True)) for v in rows] for u in rows]
    terms, dx = [], torch.zeros_like(x)
    for i, row in enumerate(s):
        same = [j for j in range(len(rows)) if labels[j] == labels[i] and j != i]
        others = [j for j in range(len(rows)) if labels[j] != labels[i]]
        if not same or not others:
            terms.append(0.0)
            continue
        p, n = min(same, key=lambda j: (row[j], j)), max(others, key=lambda j: (row[j], -j))
        terms.append(max(0.0, margin + row[n] - row[p]))
        if margin + row[n] - row[p] >= 0:
            dx[i] += x[n] - x[p]
            dx[n] += x[i]
            dx[p] -= x[i]
    return terms, dx


@BOTH
@pytest.mark.parametrize("labels", sorted(LABELS))
@pytest.mark.parametrize("n", [1, 2, 3, 14, 40])
def test_batch_hard_is_the_formula(n, labels, implementation):
    g = torch.Generator().manual_seed(n)
    x, labels = randn(g, n, 5), LABELS[labels](g, n)
    for margin in (0.0, 0.2, 4.0):
        terms, dx = loop_batch_hard(x, labels.tolist(), margin)
        leaf = x.clone().requires_grad_()
        got = {r: implementation.batch_hard_loss(leaf, labels, margin=margin, reduction=r) for r in ("none", "sum")}
        torch.testing.assert_close(
            got["none"].detach(), torch.tensor(terms, dtype=torch.float64), rtol=1e-12, atol=1e-13
        )
        torch.testing.assert_close(torch.autograd.grad(got["sum"], leaf)[0], dx, rtol=1e-12, atol=1e-13)
        mean = implementation.batch_hard_loss(x, labels, margin=margin)  # over all rows, also those without a term
        assert float(mean) == pytest.approx(math.fsum(terms) / n, rel=1e-12, abs=1e-13)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_go_to_the_lowest_index(dtype, implementation):
    for n, d, seed in ((30, 1, 0), (30, 2, 1), (60, 3, 2)):
        g = torch.Generator().manual_seed(seed)
        x = torch.randint(-2, 3, (n, d), generator=g).to(torch.float64)
        labels = torch.randint(0, 4, (n,), generator=g)
        terms, dx = loop_batch_hard(x, labels.tolist(), 0.5)
        leaf = x.to(dtype).requires_grad_()
        loss = implementation.batch_hard_loss(leaf, labels, margin=0.5, reduction="none")
        assert loss.tolist() == terms
        assert torch.equal(torch.autograd.grad(loss.sum(), leaf)[0].double(), dx)


def plain_positives(x, labels):
    s = x.double() @ x.double().T
    same = (labels[:, None] == labels[None, :]) & ~torch.eye(len(x), dtype=torch.bool)
    least, index = s.to(gk.reference.accumulate(x).dtype).masked_fill(~same, torch.inf).min(1)
    return torch.where(least == torch.inf, -1, index)


@pytest.mark.parametrize(("rows", "cols"), [(128, 1024), (7, 5), (3, 1), (64, 3)])
@pytest.mark.parametrize("labels", sorted(LABELS))
def test_tiles_of_any_size_give_the_same(labels, rows, cols, monkeypatch):
    """Whole numbers, so that ties are everywhere and exact, within tiles and across them."""
    monkeypatch.setattr(positives, "_ROWS", rows)
    monkeypatch.setattr(positives, "_COLS", cols)
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 41):
        x, chosen = torch.randint(-2, 3, (n, 3), generator=g).float(), LABELS[labels](g, n)
        assert torch.equal(hardest_positives(x, chosen), plain_positives(x, chosen))
        if n > 2:
            x[n // 2, 1] = math.nan  # is the hardest positive of all its label; of two, the first
            x[n - 1, 0] = math.nan
            assert torch.equal(hardest_positives(x, chosen), plain_positives(x, chosen))


@pytest.mark.parametrize("labels", sorted(LABELS))
def test_bounds_that_may_not_be_looked_at(labels, monkeypatch):
    """As on a GPU in fp64: all rows meet."""
    monkeypatch.setattr(positives._checks, "readable", lambda t: False)
    g = torch.Generator().manual_seed(0)
    for n in (1, 41, 300):
        x, chosen = torch.randint(-2, 3, (n, 3), generator=g).double(), LABELS[labels](g, n)
        assert torch.equal(hardest_positives(x, chosen), plain_positives(x, chosen))


def test_one_giant_label_and_singletons():
    """A label of 3,000 rows beside 500 of one row each, in mixed order."""
    labels = torch.cat((torch.zeros(3000, dtype=torch.long), torch.arange(1, 501)))[torch.randperm(3500)]
    x = torch.randn(3500, 16)
    found = hardest_positives(x, labels)
    assert torch.equal(found, plain_positives(x, labels))
    assert torch.equal(found < 0, labels > 0)
    leaf = x.clone().requires_grad_()
    gk.batch_hard_loss(leaf, labels, margin=5.0).backward()
    twin = x.double().requires_grad_()
    gk.reference.batch_hard_loss(twin, labels, margin=5.0).backward()
    torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-5, atol=1e-7)


def test_the_thread_count_changes_no_bit():
    x, labels = torch.randn(600, 256), torch.randint(0, 5, (600,))
    results = []
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        loss = gk.batch_hard_loss(leaf, labels, margin=1.0, reduction="none")
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    for other in results[1:]:
        assert all(torch.equal(t, u) for t, u in zip(other, results[0], strict=True))


def test_identical_rows_have_the_lowest_index():
    """Real numbers: the same row twice must score the same wherever it stands in a tile."""
    x = torch.randn(8, 333).repeat(40, 1)
    labels = torch.zeros(320, dtype=torch.long)
    assert torch.equal(hardest_positives(x, labels), plain_positives(x, labels))
    assert int(hardest_positives(x, labels).max()) < 9


def test_nan_propagates_within_its_label():
    x, labels = torch.randn(12, 4), torch.arange(12) // 4
    x[5, 2] = math.nan
    leaf = x.clone().requires_grad_()
    loss = gk.batch_hard_loss(leaf, labels, reduction="none")
    assert loss.isnan().all()  # every other row meets it as a positive or as a negative
    loss.sum().backward()
    assert leaf.grad.isnan().any(1).tolist() == [i != 5 for i in range(12)]  # its own is made of the others


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(
            torch.ops.gssf.hardest_positives.default, (torch.randn(20, 8).to(dtype), torch.arange(20) // 3)
        )


def test_empty_batch():
    x = torch.randn(0, 4, requires_grad=True)
    loss = gk.batch_hard_loss(x, torch.zeros(0, dtype=torch.long))
    assert float(loss.detach()) == 0
    loss.backward()
    assert x.grad.shape == (0, 4)


_PEAK = """
import resource, torch, gssf_kernels as gk
from gssf_kernels.statistics import hardest_positives
torch.set_num_threads(2)
x, labels = torch.randn(8000, 16), torch.zeros(8000, dtype=torch.long)
hardest_positives(x[:1500], labels[:1500])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hardest_positives(x, labels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_giant_label_takes_a_tile_of_memory():
    """8,000² fp32 scores alone would be 244 MiB."""
    out = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert int(out.stdout) / 1024 <= 16
