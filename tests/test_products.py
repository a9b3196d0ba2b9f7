"""The CPU's products, what they make of the thread count, and the half of a symmetric problem that is left out."""

import pytest
import torch

import gssf_kernels as gk
from gssf_kernels import dense
from gssf_kernels.dense import Right

DTYPES = [torch.float32, torch.float64]
native = pytest.mark.skipif(gk.backends()["hardest_negatives"]["cpu"] != "cpp", reason="the library's products")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "m"),
    [(1, 1, 1), (5, 0, 3), (0, 4, 3), (2, 7, 31), (6, 9, 33), (13, 257, 70), (70, 600, 300), (300, 8, 65)],
)
def test_products_of_any_shape_and_layout(n, k, m, dtype):
    for left in ("rows", "columns"):
        for right in ("rows", "columns"):
            x, y, start = torch.randn(n, k, dtype=dtype), torch.randn(k, m, dtype=dtype), torch.randn(n, m, dtype=dtype)
            out = torch.full((n + 2, m + 3), 7.0, dtype=dtype)[1 : n + 1, 2 : m + 2]  # rows apart, and a frame
            truth = x.double() @ y.double()
            x = x.mT.contiguous().mT if left == "columns" else x
            y = y.mT.contiguous().mT if right == "columns" else y
            factor, eps = Right(y, dtype), torch.finfo(dtype).eps
            bound = eps * (x.abs().double() @ y.abs().double()) * (k / 8 + 8)
            factor.product(x, out)
            assert ((out - truth).abs() <= bound).all()
            out.copy_(start)
            factor.product(x, out, add=True)
            assert ((out - truth - start).abs() <= bound + eps * start.abs() * (k / 8 + 8)).all()
            frame = out._base
            edges = torch.cat((frame[0], frame[-1], frame[1:-1, :2].flatten(), frame[1:-1, -1]))
            assert (edges == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_packed_factor(dtype):
    x, y = torch.randn(9, 40, dtype=dtype), torch.randn(40, 200, dtype=dtype)
    part, out = Right(y, dtype).after(row=11, column=64), torch.empty(9, 136, dtype=dtype)
    part.product(x[:, 11:], out)
    torch.testing.assert_close(out, x[:, 11:] @ y[11:, 64:], rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16])
def test_a_score_depends_on_its_two_rows_alone(dtype):
    """Equal rows score equally wherever they stand, in either order: ties are exact, and go to the lowest index."""
    a = torch.randn(900, 333).to(dtype)
    a[[3, 513, 700, 899]] = a[41].clone()
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    s = torch.empty(900, 900, dtype=accumulate)
    Right(a.mT, accumulate).product(a.to(accumulate), s)
    if dtype == torch.bfloat16 and gk.backends()["hardest_negatives"]["certified"] != "no":
        s, *_ = torch.ops.gssf.rounded_scores(a, a)  # the unit's own sums
    assert torch.equal(s, s.mT)
    assert torch.equal(s[:, 41], s[:, 899])
    assert torch.equal(s[41], s[700])
    ids = torch.arange(900) // 2
    found = gk.hardest_negatives(a, a.clone(), a_ids=ids, b_ids=ids)
    negatives = s.masked_fill(ids[:, None] == ids, -torch.inf)
    assert torch.equal(found.row_score, negatives.amax(1))
    assert torch.equal(found.row_index, negatives.argmax(1))
    if dtype == torch.bfloat16:
        return
    lone = torch.empty(1, 1, dtype=accumulate)
    for i, j in ((0, 899), (412, 41), (899, 513)):
        Right(a[j : j + 1].mT, accumulate).product(a[i : i + 1].to(accumulate), lone)
        assert lone == s[i, j]


@native
def test_products_err_less_than_a_plain_sum():
    """Their error grows with the number of chains: well below that of one long sum, which is PyTorch's too."""
    a, b = torch.randn(200, 512), torch.randn(200, 512)
    truth, s, plain = a.double() @ b.double().T, torch.empty(200, 200), torch.zeros(200, 200)
    Right(b.mT, torch.float32).product(a, s)
    for k in range(512):
        plain = torch.addcmul(plain, a[:, k, None], b[:, k])
    assert (s - truth).norm() < 0.7 * (plain - truth).norm()


LOSSES = {
    "info_nce": lambda x, y: gk.info_nce_loss(x, y, scale=10.0),
    "sigmoid": lambda x, y: gk.sigmoid_loss(x, y, scale=10.0, bias=-5.0),
    "every negative": lambda x, y: gk.triplet_loss(x, y, negatives="all"),
    "distillation": lambda x, y: gk.relational_distillation_loss(x, y, y.flip(1), lam=0.3, tau=0.1),
}


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_thread_count_changes_no_bit_of_dense_losses(name, dtype):
    x, y = torch.randn(700, 70, dtype=dtype), torch.randn(700, 70, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        value = LOSSES[name](leaf, y)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for other in results[1:]:
        assert all(torch.equal(t, u) for t, u in zip(other, results[0], strict=True))


# b is a: half of the scores are left out


SYMMETRIC = {
    "logsumexp": lambda a, b, ids, k, c: torch.stack(gk.logsumexp_scores(a, b, scale=k)).sin().sum(),
    "rows' logsumexp": lambda a, b, ids, k, c: gk.logsumexp_scores(a, b, scale=k)[0].cos().sum(),
    "info_nce": lambda a, b, ids, k, c: gk.info_nce_loss(a, b, scale=k, x_ids=ids, y_ids=ids, label_smoothing=0.1),
    "sigmoid": lambda a, b, ids, k, c: gk.sigmoid_loss(a, b, scale=k, bias=c, x_ids=ids, y_ids=ids),
    **{
        f"{kind}, {positives}": lambda a, b, ids, k, c, kind=kind, positives=positives: gk.sum_scores(
            a, b, kind, scale=k, bias=c, positives=positives, a_ids=ids, b_ids=ids
        )
        for kind in ("hinge", "softplus", "abs", "square")
        for positives in ("include", "exclude", "negate")
    },
}


@pytest.mark.parametrize("with_ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("n", [1, 2, 31, 33, 100, 257])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_one_side_twice_is_that_of_two_equal_sides(name, n, with_ids, monkeypatch):
    seen = []
    half = dense.triangle
    for module in ("logsumexp", "sums"):
        monkeypatch.setattr(
            f"gssf_kernels.statistics.{module}.triangle", lambda *a: seen.append(a[0][0].shape[0]) or half(*a)
        )
    monkeypatch.setitem(dense.CHUNK_SCORES, "cpu", 2000)
    ids = torch.randint(0, max(n // 3, 1), (n,)) if with_ids else None
    a = torch.randn(n, 12, dtype=torch.float64)
    k, c = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)

    def run(other):
        x, scale, bias = (t.clone().requires_grad_() for t in (a, k, c))
        value = SYMMETRIC[name](x, other(x), ids, scale, bias)
        grads = torch.autograd.grad(value, (x, scale, bias), allow_unused=True)
        return [value.detach(), *(g for g in grads if g is not None)]

    found = run(lambda x: x)
    assert seen
    seen.clear()
    expected = run(lambda x: x.clone())
    assert not seen
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["logsumexp", "sigmoid"])
def test_one_side_twice_in_half_precision(name, dtype):
    a = torch.nn.functional.normalize(torch.randn(150, 40), dim=1).to(dtype).requires_grad_()
    k, c = torch.tensor(9.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    (found,) = torch.autograd.grad(SYMMETRIC[name](a, a, None, k, c), a)
    (expected,) = torch.autograd.grad(SYMMETRIC[name](a, a.clone(), None, k, c), a)
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_special_values_on_one_side_twice(special):
    a = torch.randn(90, 5)
    a[[7, 60], 2] = special
    for name in ("logsumexp", "softplus, include"):
        k, c = torch.tensor(1.0), torch.tensor(0.0)
        found, expected = (SYMMETRIC[name](a, b, None, k, c) for b in (a, a.clone()))
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 40, 700, 1100])
def test_hardest_negatives_of_one_side_twice(n, dtype):
    """To the bit, ties, NaN and infinities included, whatever tiles were left out."""
    a = torch.randint(-2, 3, (n, 6)).to(dtype)
    if n > 10:
        a[n // 2] = torch.nan
        a[n // 3, 0], a[n - 1, 0] = torch.inf, -torch.inf
    for ids in (None, torch.arange(n) % 7, torch.zeros(n, dtype=torch.int64)):
        found = gk.hardest_negatives(a, a, a_ids=ids, b_ids=ids)
        expected = gk.hardest_negatives(a, a.clone(), a_ids=ids, b_ids=ids)
        for g, e in zip(found, expected, strict=True):
            assert torch.equal(g.nan_to_num(nan=123.0), e.nan_to_num(nan=123.0))
