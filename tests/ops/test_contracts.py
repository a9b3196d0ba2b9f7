"""What design promises beyond values: ties, NaN, determinism, memory, inputs left alone, empty batches."""

import math
import resource
import warnings

import pytest
import torch
from cases import CASES, DTYPES

import gssf_kernels as gk


def _whole_numbers(n, m, d, dtype=torch.float32, low=-2, high=3):
    """Small whole numbers: every order of summation gives the same exact score, so ties are exact."""
    return torch.randint(low, high, (n, d)).to(dtype), torch.randint(low, high, (m, d)).to(dtype)


def _exact(a, b, a_ids=None, b_ids=None):
    return gk.reference.hardest_negatives(a.double(), b.double(), a_ids=a_ids, b_ids=b_ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("n", "m"), [(2, 2), (15, 16), (130, 200), (600, 1100)])
def test_ties_go_to_the_lowest_index(n, m, dtype):
    for d in (1, 2, 5):  # so few distinct scores that nearly every maximum is tied
        a, b = _whole_numbers(n, m, d, dtype)
        ids = torch.randint(0, n, (n,)), torch.randint(0, n, (m,))
        for a_ids, b_ids in ((None, None), ids):
            results, truth = gk.hardest_negatives(a, b, a_ids=a_ids, b_ids=b_ids), _exact(a, b, a_ids, b_ids)
            assert torch.equal(results.row_index, truth.row_index)
            assert torch.equal(results.col_index, truth.col_index)
            assert torch.equal(results.row_score.double(), truth.row_score)
            assert torch.equal(results.col_score.double(), truth.col_score)


def test_all_scores_equal():
    results = gk.hardest_negatives(torch.ones(700, 3), torch.ones(900, 3))
    assert results.row_index.tolist() == [1] + [0] * 699
    assert results.col_index.tolist() == [1] + [0] * 899


@pytest.mark.parametrize("place", [0, 7, 15, 16, 511, 512, 640])
def test_nan_wins_and_the_first_one_stays(place):
    n = 700
    a, b = _whole_numbers(n, n, 4)
    b[place] = math.nan
    b[min(place + 30, n - 1)] = math.nan
    results, truth = gk.hardest_negatives(a, b), gk.reference.hardest_negatives(a, b)
    assert results.row_score.isnan().all()
    for got, expected in zip(results, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert gk.triplet_loss(a, b).isnan()
    leaf = a.clone().requires_grad_()
    gk.triplet_loss(leaf, b).backward()
    assert leaf.grad.isnan().any(dim=1).all()  # every row's hardest negative is NaN, and its gradient says so
    a[place] = math.nan
    for got, expected in zip(gk.hardest_negatives(a, b), gk.reference.hardest_negatives(a, b), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_infinities():
    a, b = torch.ones(5, 2), torch.ones(6, 2)
    b[3] = math.inf
    results = gk.hardest_negatives(a, b)
    assert results.row_index.tolist() == [3, 3, 3, 0, 3]
    assert results.row_score.tolist() == [math.inf, math.inf, math.inf, 2.0, math.inf]
    assert gk.triplet_loss(a, b).isinf() or gk.triplet_loss(a, b).isnan()
    b[:] = -math.inf  # nothing scores above -inf: no hardest negative
    results = gk.hardest_negatives(a, b)
    assert results.row_index.tolist() == [-1] * 5
    assert results.row_score.tolist() == [-math.inf] * 5


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15, 3e18])
def test_extreme_magnitudes(scale):
    a, b = torch.randn(60, 32) * scale, torch.randn(70, 32) / scale
    results, truth = gk.hardest_negatives(a, b), _exact(a, b)
    torch.testing.assert_close(results.row_score.double(), truth.row_score, rtol=1e-5, atol=0)
    torch.testing.assert_close(results.col_score.double(), truth.col_score, rtol=1e-5, atol=0)
    x = torch.randn(9, 32) * scale
    torch.testing.assert_close(gk.project(x, normalize=True), torch.nn.functional.normalize(x, dim=1))


def test_rows_without_a_valid_negative_contribute_nothing():
    x, y = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    same = torch.zeros(6, dtype=torch.long)
    loss = gk.triplet_loss(x, y, x_ids=same)
    assert float(loss) == 0
    loss.backward()
    assert not x.grad.any()
    assert not y.grad.any()
    # one pair of another id: it meets all others, they meet only it
    ids = torch.tensor([0, 0, 0, 0, 0, 1])
    results = gk.hardest_negatives(x, y, a_ids=ids)
    assert results.row_index.tolist()[:5] == [5] * 5
    one = gk.triplet_loss(x[:1], y[:1])
    assert float(one) == 0
    one.backward()


def test_pair_ii_is_positive_even_with_unequal_ids():
    a = torch.eye(4)
    results = gk.hardest_negatives(a, a, a_ids=torch.arange(4), b_ids=torch.arange(4) + 10)
    assert results.row_score.tolist() == [0.0] * 4
    assert results.row_index.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("which", ["hardest", "all", "semihard"])
def test_empty_batch_is_a_differentiable_zero(m, reduction, which):
    x, y = torch.randn(0, 8, requires_grad=True), torch.randn(m, 8, requires_grad=True)
    loss = gk.triplet_loss(x, y, negatives=which, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert float(loss.sum()) == 0
    loss.sum().backward()
    assert x.grad.shape == (0, 8)
    assert not y.grad.any()
    results = gk.hardest_negatives(x, y)
    assert results.row_score.shape == (0,)
    assert results.col_index.tolist() == [-1] * m
    assert gk.project(x, torch.ones(8), normalize=True).shape == (0, 8)


def test_both_sides_the_same_tensor():
    x = torch.nn.functional.normalize(torch.randn(150, 24, dtype=torch.float64)).requires_grad_()
    labels = torch.arange(150) // 4
    gk.triplet_loss(x, x, x_ids=labels).backward()
    ours = x.grad.clone()
    x.grad = None
    gk.reference.triplet_loss(x, x, x_ids=labels).backward()
    torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_inputs_are_never_written(case):
    tensors, options = case.inputs(torch.float32)
    watched = [*tensors.values(), *(t for t in options.values() if isinstance(t, torch.Tensor))]
    before = [(t.clone(), t._version) for t in watched]
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    sum(torch.where(t.isfinite(), t, 0).sum() for t in case.ours(leaves, options)).backward()
    for t, (value, version) in zip(watched, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version


def _step(threads=None):
    """Loss and every gradient of one training step, whole problem seeded."""
    if threads is not None:
        torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(700, 64, generator=g), torch.randn(900, 64, generator=g)
    metric = gk.StructuredSimilarity(64, 16)
    with torch.no_grad():
        metric.blocks.normal_(generator=g)
    leaves = [x.requires_grad_(), y.requires_grad_(), metric.diag, metric.blocks]
    loss = gk.TripletLoss(metric=metric)(x, y, torch.arange(700) // 5, torch.arange(900) // 5)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_fifty_repeats_give_the_same_bits():
    first = _step()
    for _ in range(50):
        assert all(torch.equal(t, u) for t, u in zip(_step(), first, strict=True))


def test_the_thread_count_changes_no_bit():
    first = _step(1)
    for threads in (2, 3, 7):
        assert all(torch.equal(t, u) for t, u in zip(_step(threads), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(5, 1024), (64, 1024), (100, 777), (128, 1024), (300, 333)])
def test_the_thread_count_changes_no_bit_of_small_sweeps(n, d, dtype):
    """One tile or a few: the library must not spread a product over threads by itself."""
    a, b = torch.randn(n, d, dtype=dtype), torch.randn(n + 20, d, dtype=dtype)
    torch.set_num_threads(1)
    first = gk.hardest_negatives(a, b)
    for threads in (2, 4, 7):
        torch.set_num_threads(threads)
        assert all(torch.equal(t, u) for t, u in zip(gk.hardest_negatives(a, b), first, strict=True))


def test_gradient_scales_with_grad_output():
    x, y = torch.randn(20, 8, dtype=torch.float64, requires_grad=True), torch.randn(20, 8, dtype=torch.float64)
    (one,) = torch.autograd.grad(gk.triplet_loss(x, y), x)
    (scaled,) = torch.autograd.grad(-2.5 * gk.triplet_loss(x, y), x)
    torch.testing.assert_close(scaled, -2.5 * one)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_products_follow_pytorchs_precision(precision):
    """As good as PyTorch's product at each setting, and exactly as fast and rough where "medium" is rougher."""
    a, b = torch.randn(300, 256), torch.randn(400, 256)
    truth = gk.reference.hardest_negatives(a.double(), b.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours, plain = gk.hardest_negatives(a, b), gk.reference.hardest_negatives(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    for got, twin, exact in ((ours[k], plain[k], truth[k]) for k in (0, 2)):
        allowed = 2 * float((twin - exact).norm()) + 1e-6
        assert float((got - exact).norm()) <= allowed
        if float((twin - exact).norm()) > 1e-3:  # a machine where the setting matters: it reaches our tiles too
            assert float((got - exact).norm()) > 1e-4


@pytest.fixture
def no_warnings():
    """PyTorch says many a warning once a process alone: here each time, and each is an error."""
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(False)


def test_sliced_ids_give_the_same_and_no_warning(no_warnings):
    x, y, wide = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8), torch.arange(60) // 9
    sliced = {"x_ids": wide[:40:2], "y_ids": wide[::2]}
    assert not any(t.is_contiguous() for t in sliced.values())
    for loss in (
        gk.triplet_loss,
        lambda x, y, **ids: gk.triplet_loss(x, y, negatives="all", **ids),
        lambda x, y, **ids: gk.goal_loss(x, y, pair="sig_ms", **ids),
        lambda x, y, **ids: gk.info_nce_loss(x, y, scale=2.0, label_smoothing=0.1, **ids),
        lambda x, y, **ids: gk.sigmoid_loss(x, y, scale=2.0, bias=0.0, **ids),
        lambda x, y, **ids: gk.batch_hard_loss(x, ids["x_ids"]),
    ):
        results = []
        for ids in (sliced, {name: t.contiguous() for name, t in sliced.items()}):
            value = loss(x, y, **ids)
            results.append((value, *torch.autograd.grad(value, x)))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


def test_zero_gradient_edges_add_nothing_even_to_infinite_rows():
    a, b = torch.ones(2, 3), torch.full((2, 3), math.inf)
    edges = torch.tensor([0, 1])
    da, db = torch.ops.gssf.pair_scores_backward(torch.tensor([0.0, 0.0]), edges, edges, a, b, [True, True])
    assert not da.any()
    assert not db.any()


def test_a_metric_gives_what_its_factors_give():
    """Two routes to one thing: keyword or module, or the factors taken first."""
    x, y = torch.randn(90, 32, dtype=torch.float64), torch.randn(120, 32, dtype=torch.float64)
    metric = gk.StructuredSimilarity(32, 8, dtype=torch.float64)
    with torch.no_grad():
        metric.blocks.normal_()
    for which in ("hardest", "all", "semihard"):
        leaves = x.requires_grad_(), y.requires_grad_(), metric.diag, metric.blocks
        results = []
        for loss in (
            gk.triplet_loss(x, y, metric=metric, negatives=which),
            gk.TripletLoss(metric=metric, negatives=which)(x, y),
            gk.triplet_loss(*metric.factors(x, y), negatives=which),
        ):
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for other in results[1:]:
            for got, expected in zip(other, results[0], strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_a_frozen_side_costs_nothing_in_the_backward():
    a, b = torch.randn(3, 8), torch.randn(5, 8)
    edges, grad = torch.tensor([0, 2]), torch.tensor([1.0, 2.0])
    both = torch.ops.gssf.pair_scores_backward(grad, edges, edges, a, b, [True, True])
    for side in range(2):
        one = torch.ops.gssf.pair_scores_backward(grad, edges, edges, a, b, [side == 0, side == 1])
        assert torch.equal(one[side], both[side])
        assert one[1 - side].numel() == 0


def test_the_metric_keeps_its_own_permutation():
    order = torch.arange(7, -1, -1)
    first, second = (gk.StructuredSimilarity(8, 4, permutation=order) for _ in range(2))
    first.load_state_dict(gk.StructuredSimilarity(8, 4, permutation=torch.arange(8)).state_dict())
    assert torch.equal(order, torch.arange(7, -1, -1))
    assert torch.equal(second.permutation, order)
    assert torch.equal(first.permutation, torch.arange(8))


def test_meta_and_fake_tensors_pass_without_their_values():
    with torch.device("meta"):
        metric = gk.StructuredSimilarity(8, 4, permutation=torch.arange(8))
        assert metric.project(torch.randn(3, 8)).shape == (3, 8)
        assert gk.triplet_loss(torch.randn(3, 8), torch.randn(5, 8), metric=metric).shape == ()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, order = torch.randn(3, 8), torch.arange(8)
        assert gk.project(x, torch.randn(8), torch.randn(2, 4, 4), permutation=order).shape == (3, 8)
        assert gk.pair_scores(x, torch.randn(5, 8), torch.arange(3)).shape == (3,)


@pytest.mark.parametrize("pair", ["sig", "sig_ms"])
def test_the_thread_count_changes_no_bit_of_goal(pair):
    if pair == "sig_ms" and gk.backends()["relative_negatives"]["cpu"] != "cpp":
        pytest.skip("the reference multiplies as the library does")
    g = torch.Generator().manual_seed(5)
    x, y = (torch.nn.functional.normalize(torch.randn(n, 64, generator=g), dim=1) for n in (700, 900))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = gk.goal_loss(*leaves, pair=pair, x_ids=torch.arange(700) // 5, y_ids=torch.arange(900) // 5)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for other in results[1:]:
        assert all(torch.equal(t, u) for t, u in zip(other, results[0], strict=True))


_PEAK = """
import resource, sys, torch, gssf_kernels as gk
torch.set_num_threads(2)
n = int(sys.argv[1])
loss = {"triplet": gk.triplet_loss, "goal": lambda x, y: gk.goal_loss(x, y, pair="sig_ms")}[sys.argv[2]]
x, y = torch.randn(n, 64, requires_grad=True), torch.randn(n, 64, requires_grad=True)
loss(x[:64], y[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(x, y).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(gk.backends()["hardest_negatives"]["cpu"] != "cpp", reason="the reference stores the matrix")
@pytest.mark.parametrize("loss", ["triplet", "goal"])
def test_memory_is_linear_not_quadratic(loss, run_fresh):
    """Extra memory of forward + backward: at most 16 (N + M) D bytes and 16 MiB (tiles, code, threads).

    16 is 2 gradients and as much again for allocator slack, at 4 bytes. One N x M matrix of 16,384² fp32
    scores alone would be 1024 MiB.
    """
    for n in (4096, 16384):
        done = run_fresh(_PEAK, n, loss)
        assert done.returncode == 0, done.stderr
        peak_mib = int(done.stdout) / 1024
        assert peak_mib > 0
        assert peak_mib <= 16 * 2 * n * 64 / 2**20 + 16, f"N = {n}: {peak_mib:.0f} MiB"


def test_resource_reports_kib():
    """The memory test above reads ru_maxrss as KiB, which holds on Linux."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 10_000
