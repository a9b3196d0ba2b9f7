"""The CPU's products, what they make of the thread count, and the half of a symmetric problem that is left out."""

import pytest
import torch

import gssf_kernels as gk
from gssf_kernels import dense, plan
from gssf_kernels.dense import Right

DTYPES = [torch.float32, torch.float64]
BF16 = torch.bfloat16
native = pytest.mark.skipif(gk.backends()["hardest_negatives"]["cpu"] != "cpp", reason="the library's products")
unit = pytest.mark.skipif(dense.bf16_unit() == "none", reason="no bf16 unit on this processor, or no extension")


SHAPES = [(1, 1, 1), (5, 0, 3), (0, 4, 3), (2, 7, 31), (6, 9, 33), (13, 257, 70), (70, 600, 300), (300, 8, 65)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
def test_products_of_any_shape_and_layout(n, k, m, dtype):
    for left in ("rows", "columns"):
        for right in ("rows", "columns"):
            x, y, start = torch.randn(n, k, dtype=dtype), torch.randn(k, m, dtype=dtype), torch.randn(n, m, dtype=dtype)
            out = torch.full((n + 2, m + 3), 7.0, dtype=dtype)[1 : n + 1, 2 : m + 2]  # rows apart, and a frame
            truth = x.double() @ y.double()
            x = x.mT.contiguous().mT if left == "columns" else x
            y = y.mT.contiguous().mT if right == "columns" else y
            factor, eps = Right(y, dtype), torch.finfo(dtype).eps
            bound = eps * (x.abs().double() @ y.abs().double()) * (k / 16 + 16)
            factor.product(x, out)
            assert ((out - truth).abs() <= bound).all()
            out.copy_(start)
            factor.product(x, out, add=True)
            assert ((out - truth - start).abs() <= bound + eps * start.abs() * (k / 16 + 16)).all()
            frame = out._base
            edges = torch.cat((frame[0], frame[-1], frame[1:-1, :2].flatten(), frame[1:-1, -1]))
            assert (edges == 7).all()


@unit
@pytest.mark.parametrize("left_dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("n", "k", "m"), [*SHAPES, (64, 32, 64), (129, 1056, 96), (33, 1100, 129), (16, 512, 16)])
def test_bf16_products_of_any_shape_and_layout(n, k, m, left_dtype):
    """Those of the numbers rounded to bf16, but for a sum in fp32: of one product, to the bit."""
    for left in ("rows", "columns", "apart", "odd"):
        for right in ("rows", "columns", "apart"):
            x, y, start = torch.randn(n, k).to(left_dtype), torch.randn(k, m).to(BF16), torch.randn(n, m)
            out = torch.full((n + 2, m + 3), 7.0)[1 : n + 1, 2 : m + 2]
            rounded = x.to(BF16).double()
            truth, size = rounded @ y.double(), rounded.abs() @ y.double().abs()
            x, y = laid_out(x, left), laid_out(y, right)
            factor = Right(y, torch.float32)
            assert factor.y.dtype == BF16
            factor.product(x, out)
            assert ((out - truth).abs() <= 1.2e-7 * size * (0 if k == 1 else k / 16 + 16)).all()
            out.copy_(start)
            factor.product(x, out, add=True)
            assert ((out - truth - start).abs() <= 1.2e-7 * (size + start.abs()) * (k / 16 + 16)).all()
            frame = out._base
            assert (torch.cat((frame[0], frame[-1], frame[1:-1, :2].flatten(), frame[1:-1, -1])) == 7).all()


def laid_out(x, how):
    if how == "columns":
        return x.mT.contiguous().mT
    if how == "apart":  # neither rows nor columns adjacent
        return x.repeat_interleave(3, 1)[:, ::3]
    return torch.nn.functional.pad(x, (1, 2))[:, 1:-2] if how == "odd" else x


@unit
@pytest.mark.parametrize("layout", ["rows", "columns", "apart"])
def test_a_left_side_is_rounded_as_pytorch_rounds(layout):
    """Ties to even, infinities, what overflows to them and NaN of any bits; what is subnormal may become 0."""
    bits = torch.arange(-(2**31), 2**31, 65_521, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0x3F808000, 0x3F908000, 0x10000).to(torch.int32)
    special = torch.tensor([0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, 0x7F800001, -1, -0x80000000, -0x800000, 0x3F80FFFF])
    x = torch.cat((bits, ties, ties + 1, ties - 1, special.to(torch.int32))).view(torch.float32)[:, None]
    out, expected = torch.empty(len(x), 1), x.to(BF16).float()
    x = laid_out(torch.nn.functional.pad(x, (7, 24)), layout)  # 32 channels, of which one is not 0
    Right(torch.ones(32, 1, dtype=BF16), torch.float32).product(x, out)
    normal = ~(expected.abs() < torch.finfo(BF16).tiny)
    assert torch.equal(out[normal].nan_to_num(nan=123.0), expected[normal].nan_to_num(nan=123.0))
    assert ((out == expected) | (out == 0))[~normal].all()


@pytest.mark.parametrize("dtype", [*DTYPES, BF16])
def test_parts_of_a_packed_factor(dtype):
    x, y = torch.randn(9, 140).to(dtype), torch.randn(140, 200).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    row = 64 if dtype == BF16 else 11
    part, out = Right(y, wide).part(row=row, column=64), torch.empty(9, 136, dtype=wide)
    part.product(dense.operand(x[:, row:], wide), out)
    torch.testing.assert_close(out, (x[:, row:].double() @ y[row:, 64:].double()).to(wide), rtol=1e-4, atol=1e-4)
    part, out = Right(y, wide).part(row=row, stop=128), torch.empty(9, 200, dtype=wide)
    part.product(dense.operand(x[:, row:128], wide), out)
    torch.testing.assert_close(out, (x[:, row:128].double() @ y[row:128].double()).to(wide), rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16])
def test_a_score_depends_on_its_two_rows_alone(request, dtype):
    """Equal rows score equally wherever they stand, in either order: ties are exact, and go to the lowest index."""
    a = torch.randn(900, 333).to(dtype)
    a[[3, 513, 700, 899]] = a[41].clone()
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    s = torch.empty(900, 900, dtype=accumulate)
    Right(a.mT, accumulate).product(a.to(accumulate), s)
    if dtype == torch.bfloat16 and gk.backends()["hardest_negatives"]["certified"] != "no":
        bits = a.view(torch.uint16).numpy()
        rounded_scores = request.getfixturevalue("internals").certified.rounded_scores
        s = torch.from_numpy(rounded_scores(bits, bits)[0]).view(900, 900)  # the unit's sums
    assert torch.equal(s, s.mT)
    assert torch.equal(s[:, 41], s[:, 899])
    assert torch.equal(s[41], s[700])
    ids = torch.arange(900) // 2
    results = gk.hardest_negatives(a, a.clone(), a_ids=ids, b_ids=ids)
    negatives = s.masked_fill(ids[:, None] == ids, -torch.inf)
    assert torch.equal(results.row_score, negatives.amax(1))
    assert torch.equal(results.row_index, negatives.argmax(1))
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
@pytest.mark.parametrize("dtype", [*DTYPES, BF16])
@pytest.mark.parametrize("name", LOSSES)
def test_the_thread_count_changes_no_bit_of_dense_losses(name, dtype):
    x, y = torch.randn(700, 70).to(dtype), torch.randn(700, 70).to(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        value = LOSSES[name](leaf, y)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for other in results[1:]:
        assert all(torch.equal(t, u) for t, u in zip(other, results[0], strict=True))


@unit
@pytest.mark.parametrize(("n", "k", "m"), [(700, 1100, 333), (64, 64, 64), (257, 40, 1000)])
def test_the_thread_count_changes_no_bit_of_bf16_products(n, k, m):
    x, y, start = torch.randn(n, k), torch.randn(k, m).to(BF16), torch.randn(n, m)
    results = []
    for threads in (1, 2, 3, 7, 40):
        torch.set_num_threads(threads)
        out = start.clone()
        Right(y, torch.float32).product(x, out, add=True)
        results.append(out)
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_bf16_gradients_are_summed_in_fp32_over_chunks(symmetric, monkeypatch):
    """The slopes of hinges are 0 and 1, exact in bf16; what is left is the rounding of fp32 sums."""
    monkeypatch.setitem(plan.CHUNK_SCORES, "cpu", 5000)
    a, b = torch.randn(500, 40).to(BF16), torch.randn(300, 40).to(BF16)
    arguments = (None, None, 1.0, 0.5, None, None, "hinge", "include", False, "sum", 1.0, [True, not symmetric])
    total, _, _, da, db, _ = torch.ops.gssf.score_sums(a, None if symmetric else b, *arguments)
    x, y = a.double(), (a if symmetric else b).double()
    t = x @ y.mT + 0.5
    ds = (t > 0).double()
    assert (total - t.clamp_min(0).sum()).abs() < 1e-5 * total
    for got, truth in [(da, ds @ y * (1 + symmetric)), (db, ds.mT @ x)][: 2 - symmetric]:
        assert got.dtype == torch.float32
        assert (got - truth).norm() < 2e-6 * truth.norm()


@unit
@pytest.mark.parametrize("name", LOSSES)
def test_bf16_losses_on_the_unit_are_those_of_fp32_products(name, monkeypatch):
    """But for ds, which is rounded to bf16 as the result is."""
    x, y = torch.nn.functional.normalize(torch.randn(2, 300, 70), dim=2).to(BF16)

    def run():
        leaf = x.clone().requires_grad_()
        value = LOSSES[name](leaf, y)
        return value.detach(), torch.autograd.grad(value, leaf)[0].float()

    value, grad = run()
    monkeypatch.setattr(dense, "bf16_unit", lambda: "none")
    assert Right(x, torch.float32).y.dtype == torch.float32
    plain_value, plain_grad = run()
    torch.testing.assert_close(value, plain_value, rtol=2e-6, atol=1e-6)
    assert (grad - plain_grad).norm() < 2**-8 * plain_grad.norm()


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
    for module in ("logsumexp_chunks", "sums"):
        monkeypatch.setattr(f"gssf_kernels.ops.{module}.triangle", lambda *a: seen.append(a[0][0].shape[0]) or half(*a))
    monkeypatch.setitem(plan.CHUNK_SCORES, "cpu", 2000)
    ids = torch.randint(0, max(n // 3, 1), (n,)) if with_ids else None
    a = torch.randn(n, 12, dtype=torch.float64)
    k, c = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)

    def run(other):
        x, scale, bias = (t.clone().requires_grad_() for t in (a, k, c))
        value = SYMMETRIC[name](x, other(x), ids, scale, bias)
        grads = torch.autograd.grad(value, (x, scale, bias), allow_unused=True)
        return [value.detach(), *(g for g in grads if g is not None)]

    results = run(lambda x: x)
    assert seen
    seen.clear()
    expected = run(lambda x: x.clone())
    assert not seen
    for g, e in zip(results, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["logsumexp", "sigmoid"])
def test_one_side_twice_in_half_precision(name, dtype):
    a = torch.nn.functional.normalize(torch.randn(150, 40), dim=1).to(dtype).requires_grad_()
    k, c = torch.tensor(9.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    (results,) = torch.autograd.grad(SYMMETRIC[name](a, a, None, k, c), a)
    (expected,) = torch.autograd.grad(SYMMETRIC[name](a, a.clone(), None, k, c), a)
    torch.testing.assert_close(results, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_special_values_on_one_side_twice(special):
    a = torch.randn(90, 5)
    a[[7, 60], 2] = special
    for name in ("logsumexp", "softplus, include"):
        k, c = torch.tensor(1.0), torch.tensor(0.0)
        results, expected = (SYMMETRIC[name](a, b, None, k, c) for b in (a, a.clone()))
        torch.testing.assert_close(results, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 40, 700, 1100])
def test_hardest_negatives_of_one_side_twice(n, dtype):
    """To the bit, ties, NaN and infinities included, whatever tiles were left out."""
    a = torch.randint(-2, 3, (n, 6)).to(dtype)
    if n > 10:
        a[n // 2] = torch.nan
        a[n // 3, 0], a[n - 1, 0] = torch.inf, -torch.inf
    for ids in (None, torch.arange(n) % 7, torch.zeros(n, dtype=torch.int64)):
        results = gk.hardest_negatives(a, a, a_ids=ids, b_ids=ids)
        expected = gk.hardest_negatives(a, a.clone(), a_ids=ids, b_ids=ids)
        for g, e in zip(results, expected, strict=True):
            assert torch.equal(g.nan_to_num(nan=123.0), e.nan_to_num(nan=123.0))
