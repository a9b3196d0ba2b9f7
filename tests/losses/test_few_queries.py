"""Few queries against many candidates without a gradient, in the rows' direction: a queue of negatives."""

import pytest
import torch
import torch.nn.functional as F
from triton_checks import fp64_leaves

import gssf_kernels as gk
from gssf_kernels._library import EXTENSION_ERROR
from gssf_kernels.dense import OnceRight, Right

compiled = pytest.mark.skipif(EXTENSION_ERROR is not None, reason="PyTorch's products")

N, M, D = 40, 900, 24
SCALARS = {"info_nce_loss": {"scale": 9.0, "symmetric": False}, "sigmoid_loss": {"scale": 9.0, "bias": -5.0}}


def problem(dtype=torch.float32, n=N, m=M):
    g = torch.Generator().manual_seed(n + m)
    x, y = (F.normalize(torch.randn(rows, D, generator=g), dim=1).to(dtype) for rows in (n, m))
    ids, other_ids = torch.arange(n) % 5, torch.arange(m) % 5
    bias = torch.randn(m, generator=g).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return x, y, ids, other_ids, bias


def options(x_ids, y_ids, bias):
    ids = {"x_ids": x_ids, "y_ids": y_ids}
    return {
        "plain": {},
        "smoothed": {"label_smoothing": 0.1},
        "ids": ids,
        "ids, smoothed": {**ids, "label_smoothing": 0.2},
        "same ids ignored": {**ids, "same_id": "ignore"},
        "pairs by id": {**ids, "pairs": "ids"},
        "biased": {"y_bias": bias},
        "margin": {"false_negative_margin": 0.1},
        "margin, ids": {**ids, "false_negative_margin": 0.1},
        "margin, pairs by id": {**ids, "pairs": "ids", "false_negative_margin": 0.1},
        "margin, same ids ignored": {**ids, "same_id": "ignore", "false_negative_margin": 0.1},
        "margin, biased": {"y_bias": bias, "false_negative_margin": 0.1},
        "each row": {"reduction": "none"},
    }


CASES = list(options(None, None, None))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.usefixtures("chunked")
def test_info_nce_against_the_definition(case, dtype):
    x, y, x_ids, y_ids, bias = problem(dtype)
    named, exact_named = (options(x_ids, y_ids, b)[case] for b in (bias, bias.double()))
    x.requires_grad_()
    scale = torch.tensor(9.0, requires_grad=True, dtype=bias.dtype)
    loss = gk.info_nce_loss(x, y, scale=scale, symmetric=False, **named)
    weights = torch.rand(loss.shape, dtype=loss.dtype, generator=torch.Generator().manual_seed(0))
    (loss * weights).sum().backward()

    exact_x, exact_y, exact_scale = fp64_leaves(x.detach(), y, scale.detach())
    truth = gk.reference.info_nce_loss(exact_x, exact_y, scale=exact_scale, symmetric=False, **exact_named)
    (truth * weights.double()).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, exact in ((loss, truth), (x.grad, exact_x.grad), (scale.grad, exact_scale.grad)):
        largest = float(exact.detach().abs().max())
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("case", CASES)
def test_the_same_with_a_gradient_of_the_candidates(case):
    """Then the backward computes the scores again."""
    x, y, *rest = problem(torch.float64)
    gradients = []
    for needs in (False, True):
        leaf, other = x.clone().requires_grad_(), y.clone().requires_grad_(needs)
        scale = torch.tensor(9.0, requires_grad=True, dtype=torch.float64)
        loss = gk.info_nce_loss(leaf, other, scale=scale, symmetric=False, **options(*rest)[case])
        gradients.append(torch.autograd.grad(loss.sum(), (leaf, scale)))
        assert other.grad is None
    torch.testing.assert_close(*gradients)


def test_the_scale_alone_has_a_gradient():
    x, y, *_ = problem(torch.float64)
    scale = torch.tensor(9.0, requires_grad=True, dtype=torch.float64)
    gk.info_nce_loss(x, y, scale=scale, symmetric=False).backward()
    truth = scale.detach().clone().requires_grad_()
    F.cross_entropy(truth * x @ y.mT, torch.arange(N)).backward()
    torch.testing.assert_close(scale.grad, truth.grad)


def test_no_queries_and_infinite_rows():
    x, y, *_ = problem()
    empty = x[:0].clone().requires_grad_()
    loss = gk.info_nce_loss(empty, y, scale=9.0, symmetric=False)
    loss.backward()
    assert float(loss) == 0
    assert empty.grad.shape == (0, D)
    x[3] = torch.nan
    x.requires_grad_()
    terms = gk.info_nce_loss(x, y, scale=9.0, symmetric=False, reduction="none")
    assert terms.isnan().tolist() == [row == 3 for row in range(N)]
    (gradient,) = torch.autograd.grad(terms[4], x)
    assert gradient[:3].eq(0).all()
    assert gradient[4].isfinite().all()


@compiled
@pytest.mark.parametrize("shape", [(600, 40), (40, 600), (64, 64), (1, 900), (900, 1), (129, 200), (0, 5), (5, 0)])
@pytest.mark.parametrize("order", ["row by row", "column by column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_products_of_one_use_have_the_same_bits(shape, order, dtype):
    g = torch.Generator().manual_seed(0)
    y, x = torch.randn(*shape, generator=g, dtype=dtype), torch.randn(9, shape[0], generator=g, dtype=dtype)
    y = y if order == "row by row" else y.mT.contiguous().mT
    whole, once = torch.empty(9, shape[1], dtype=dtype), torch.empty(9, shape[1], dtype=dtype)
    Right(y, dtype).product(x, whole)
    OnceRight(y, dtype).product(x, once)
    assert torch.equal(whole, once)
    for strided in (x.mT.contiguous().mT, x.repeat(1, 2)[:, : shape[0]]):
        OnceRight(y, dtype).product(strided, once)
        assert torch.equal(whole, once)
    torch.testing.assert_close(whole.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("loss", ["info_nce_loss", "sigmoid_loss"])
def test_transposed_candidates(loss):
    """A queue that is stored as [D, M]."""
    x, y, *_ = problem()
    stored = y.mT.contiguous()
    results = []
    for candidates in (y, stored.mT):
        leaf = x.clone().requires_grad_()
        value = getattr(gk, loss)(leaf, candidates, **SCALARS[loss])
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@compiled
@pytest.mark.parametrize("loss", ["info_nce_loss", "sigmoid_loss"])
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
def test_nothing_of_the_size_of_the_candidates_is_made(loss, ids):
    """The scores of 64 queries are a quarter of the candidates; half of the candidates would show."""
    x, y = torch.randn(64, 256, requires_grad=True), torch.empty(65536, 256)
    named = dict(SCALARS[loss])
    if ids:
        named |= {"x_ids": torch.arange(64), "y_ids": torch.arange(65536)}
    explanation = gk.explain(getattr(gk, loss), x, y, **named)
    scores, candidates = 16, 64
    assert explanation.forward.extra_mib < scores + candidates / 4
    assert explanation.backward.extra_mib < candidates / 4
