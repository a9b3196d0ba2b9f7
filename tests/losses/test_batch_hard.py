"""Batch-hard: the loss one row at a time in fp64, the hardest positives in tiles, its Triton kernels and launches."""

import math

import device_ops
import pytest
import torch
from cases import LABELS, randn
from interpreted import DEVICE, every_dtype
from kernel_modules import sweep, tiles
from launch_counts import check_count, every_small_batch, ids_of
from triton_checks import INF, NAN, assert_as_good, best, close, every_reduction, few, many, on_device

import gssf_kernels as gk
from gssf_kernels import _checks, plan, reference
from gssf_kernels.ops import hardest_positives, positives

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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", sorted(LABELS))
def test_a_metric_compares_by_its_factors(labels, reduction):
    """Against loops over single scores of s = x̂ W x̂ᵀ, in which a row never meets itself."""
    metric = gk.StructuredSimilarity(8, block_size=4, dtype=torch.float64)
    with torch.no_grad():
        metric.diag.normal_()
        metric.blocks.normal_()
    x = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    chosen = LABELS[labels](torch.Generator().manual_seed(0), 23)
    module = gk.BatchHardLoss(margin=0.3, reduction=reduction, metric=metric)
    got = module(x, chosen)
    unit = torch.nn.functional.normalize(x, dim=1)
    s = reference.project(x, metric.diag, metric.blocks, permutation=metric.permutation, normalize=True) @ unit.T
    terms = []
    for i in range(23):
        positives = [s[i, j] for j in range(23) if chosen[j] == chosen[i] and j != i]
        negatives = [s[i, j] for j in range(23) if chosen[j] != chosen[i]]
        both = positives and negatives
        terms.append((0.3 + max(negatives) - min(positives)).clamp_min(0) if both else s.new_zeros(()))
    expected = reference.reduce(torch.stack(terms), reduction)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        got, gk.reference.batch_hard_loss(x, chosen, margin=0.3, reduction=reduction, metric=metric)
    )
    if expected.requires_grad:
        leaves = (x, metric.diag, metric.blocks)
        ours, right = (torch.autograd.grad(t.sum(), leaves) for t in (got, expected))
        for g, e in zip(ours, right, strict=True):
            torch.testing.assert_close(g, e)


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
    monkeypatch.setattr(_checks, "readable", lambda t: False)
    g = torch.Generator().manual_seed(0)
    for n in (1, 41, 300):
        x, chosen = torch.randint(-2, 3, (n, 3), generator=g).double(), LABELS[labels](g, n)
        assert torch.equal(hardest_positives(x, chosen), plain_positives(x, chosen))


def test_one_giant_label_and_singletons():
    """A label of 3,000 rows beside 500 of one row each, in mixed order."""
    labels = torch.cat((torch.zeros(3000, dtype=torch.long), torch.arange(1, 501)))[torch.randperm(3500)]
    x = torch.randn(3500, 16)
    results = hardest_positives(x, labels)
    assert torch.equal(results, plain_positives(x, labels))
    assert torch.equal(results < 0, labels > 0)
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
from gssf_kernels.ops import hardest_positives
torch.set_num_threads(2)
x, labels = torch.randn(8000, 16), torch.zeros(8000, dtype=torch.long)
hardest_positives(x[:1500], labels[:1500])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hardest_positives(x, labels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_giant_label_takes_a_tile_of_memory(run_fresh):
    """8,000² fp32 scores alone would be 244 MiB."""
    done = run_fresh(_PEAK)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) / 1024 <= 16


# By Triton


def labelled(n, d, dtype, groups):
    return torch.randn(n, d).to(dtype), torch.randint(0, groups, (n,)) - 2**40


def check_batch_hard(x, labels, margin, reduction):
    n = len(x)
    leaf = x.double().requires_grad_()
    expected = reference.batch_hard_loss(leaf, labels, margin=margin, reduction=reduction)
    grad = torch.rand(n) + 0.5 if reduction == "none" else torch.tensor(0.75)
    expected.backward(grad.double())
    on = on_device(x, labels)
    loss, *results = device_ops.batch_hard(*on, margin, reduction)
    assert loss.dtype == torch.float32
    assert loss.shape == expected.shape
    size = float((leaf.detach() @ leaf.detach().T).nan_to_num(0, 0, 0).abs().max()) * (n if reduction == "sum" else 1)
    torch.testing.assert_close(
        loss.cpu().double(), expected.detach(), rtol=4e-6, atol=4e-6 * (size + margin), equal_nan=True
    )
    dx = device_ops.batch_hard_backward(grad.to(DEVICE), *results, on[0], margin, reduction)
    assert dx.dtype == x.dtype
    if bool(x.isfinite().all()):
        close(dx, leaf.grad, x.dtype)


@few
@every_dtype
@every_reduction
@pytest.mark.parametrize(
    ("n", "d", "groups"), [(1, 3, 1), (2, 3, 1), (16, 16, 4), (33, 24, 2), (50, 20, 9), (50, 40, 60)]
)
def test_batch_hard(n, d, groups, reduction, dtype):
    check_batch_hard(*labelled(n, d, dtype, groups), 0.25, reduction)


@few
@pytest.mark.parametrize("special", [INF, NAN])
def test_batch_hard_of_special_values(special):
    x, labels = labelled(40, 8, torch.float32, 5)
    x[17, 0], x[:, 0] = special, x[:, 0].abs()
    loss, *_ = device_ops.batch_hard(*on_device(x, labels), 0.25, "none")
    expected = reference.batch_hard_loss(x.double(), labels, margin=0.25, reduction="none")
    close(loss, expected, torch.float32)


@few
def test_ties_of_batch_hard_go_to_the_lowest_index():
    x = torch.randint(-2, 3, (60, 2)).float()
    labels = torch.randint(0, 4, (60,))
    s, same = x @ x.T, labels[:, None] == labels
    _, _, _, positive_place, negative_place = device_ops.batch_hard(*on_device(x, labels), 0.25, "sum")
    positives = s.masked_fill(~same | torch.eye(60, dtype=torch.bool), INF)
    assert torch.equal(positive_place.cpu(), positives.argmin(1))
    assert torch.equal(negative_place.cpu(), s.masked_fill(same, -INF).argmax(1))


@few
def test_batch_hard_without_partners():
    x, same = torch.randn(20, 8), torch.zeros(20, dtype=torch.int64)
    for labels in (same, torch.arange(20)):
        loss, *results = device_ops.batch_hard(*on_device(x, labels), 0.25, "sum")
        assert not loss.any()
        assert set(results[2 if labels is not same else 3].tolist()) == {-1}
        grad = torch.tensor(1.0).to(DEVICE)
        assert not device_ops.batch_hard_backward(grad, *results, x.to(DEVICE), 0.25, "sum").any()


@few
def test_a_zero_gradient_of_batch_hard_adds_nothing_even_from_nan_rows():
    x, labels = torch.randn(20, 8), torch.arange(20) // 4
    _, *results = device_ops.batch_hard(*on_device(x, labels), 0.25, "none")
    dead = torch.full((20, 8), NAN).to(DEVICE)
    assert not device_ops.batch_hard_backward(torch.zeros(20).to(DEVICE), *results, dead, 0.25, "none").any()


@few
def test_batch_hard_is_never_tf32(monkeypatch):
    monkeypatch.setattr(plan, "fp32_products", lambda device: "tf32")
    check_batch_hard(*labelled(33, 40, torch.float32, 3), 0.25, "sum")
    x = torch.zeros(8, 8)
    assert sweep.Sweep(x, x, tiles.Sweep(16, 32, 16, 4, 2), exact=True).precision == "ieee"


@few
def test_what_is_large_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 50)
    for n, declined in ((44, False), (45, True)):
        inputs = on_device(*labelled(n, 8, torch.float32, 5))
        assert device_ops.route("batch_hard", *inputs, 0.25, "sum") == ("composite" if declined else "small")


@few
def test_fp64_is_refused():
    x, labels = torch.randn(4, 4, dtype=torch.float64), torch.arange(4)
    with pytest.raises(TypeError, match="float64"):
        device_ops.launch("batch_hard", x, labels, 0.25, "sum")
    with pytest.raises(TypeError, match="float64"):
        device_ops.launch("hardest_positives", x, labels)


# Its hardest positives, of any number of rows


def check_positives(x, labels, exact=True):
    """Compare with fp64; exact: every index too, for data whose scores are exact in fp32."""
    results = device_ops.hardest_positives(x.to(DEVICE), labels.to(DEVICE)).cpu()
    assert results.dtype == torch.int64
    s = x.double() @ x.double().T
    no = (labels[:, None] != labels[None, :]) | torch.eye(len(x), dtype=torch.bool)
    score, lowest = best((-s).masked_fill(no, -INF))
    if exact:
        assert torch.equal(results, lowest)
    assert torch.equal(results == -1, lowest == -1)
    has_positive = lowest >= 0
    assert not no[has_positive].gather(1, results[has_positive, None]).any()
    chosen = -s[has_positive].gather(1, results[has_positive, None])[:, 0]
    assert_as_good(
        chosen.float(), (-(x.float() @ x.float().T)).masked_fill(no, -INF).amax(1)[has_positive], score[has_positive]
    )


KERNEL_LABELS = {
    "fours": lambda n: torch.arange(n) // 4,
    "shuffled": lambda n: torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(n)) - 3,
    "one": lambda n: torch.zeros(n, dtype=torch.int64),
    "unique": lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(n)),
    "giant beside singles": lambda n: torch.where(torch.arange(n) % 3 == 0, torch.arange(n), -(2**60)),
}


@many
@pytest.mark.parametrize("kind", KERNEL_LABELS)
@every_dtype
@pytest.mark.parametrize(("N", "D"), [(1, 1), (2, 3), (16, 16), (33, 17), (90, 40)])
def test_positives(N, D, dtype, kind):
    check_positives(torch.randint(-2, 3, (N, D)).to(dtype), KERNEL_LABELS[kind](N))  # ties everywhere, and exact
    check_positives(torch.randn(N, D).to(dtype), KERNEL_LABELS[kind](N), exact=False)


@many
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_positives_keep_nan_and_inf(value):
    x, labels = torch.randint(1, 4, (50, 5)).float(), torch.arange(50) % 3
    x[7, 1] = x[34, 0] = x[35, 2] = value
    check_positives(x, labels)
    x[:, 0] = value
    check_positives(x, labels)


@many
def test_positives_take_any_layout_and_an_empty_batch():
    wide = torch.randint(-9, 9, (60, 70)).float()
    check_positives(wide[::2, 1:18], (torch.arange(90) // 6)[:60:2])
    check_positives(wide.T[:45, :34:2], torch.arange(45) % 4)
    assert device_ops.hardest_positives(
        torch.randn(0, 8).to(DEVICE), torch.zeros(0, dtype=torch.int64).to(DEVICE)
    ).shape == (0,)


# How many kernels a step launches: (forward, backward)

STEPS = {
    "batch-hard": (lambda x, y, t: gk.batch_hard_loss(x, ids_of(x)), (2, 1)),
    "batch-hard none": (lambda x, y, t: gk.batch_hard_loss(x, ids_of(x), reduction="none"), (2, 1)),
}


@every_small_batch(STEPS)
def test_launches(loss, expected, n, dtype):
    check_count(loss, expected, n, dtype)
