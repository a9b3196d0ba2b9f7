"""The structured projection's Triton kernels, against the definition's autograd in fp64."""

import device_ops
import pytest
import torch
import torch.nn.functional as F
from interpreted import DEVICE, every_dtype
from triton_checks import NAN, assert_as_good, close, few, many, on_device, two_sides

from gssf_kernels import plan, reference

pytest.importorskip("triton")


def plain_project(x, diag, blocks, permutation, normalize):
    """The definition, in the dtype of x."""
    x = F.normalize(x, dim=1) if normalize else x
    if diag is None and blocks is None:
        return x
    p = x * diag if diag is not None else torch.zeros_like(x)
    if blocks is None:
        return p
    at = permutation if permutation is not None else torch.arange(x.shape[1])
    q = x[:, at].reshape(len(x), *blocks.shape[:2])
    return p.index_add(1, at, torch.einsum("ngk,gkc->ngc", q, blocks).reshape(x.shape))


def check_project(x, diag, blocks, permutation, normalize):
    """Compare p and all gradients with fp64 autograd."""
    grad = torch.randn(x.shape).to(x.dtype)

    def differentiate(dtype):
        leaves = [t.to(dtype).clone().requires_grad_() if t is not None else None for t in (x, diag, blocks)]
        p = plain_project(*leaves, permutation, normalize)
        p.backward(grad.to(dtype))
        return [p.detach()] + [t.grad if t is not None else None for t in leaves]

    on = [t.to(DEVICE) if t is not None else None for t in (x, diag, blocks, permutation)]
    p = device_ops.project(on[0], None, *on[1:], normalize)[0]
    needs = [True, diag is not None, blocks is not None]
    gradients = device_ops.project_backward_of_x(grad.to(DEVICE), *on, normalize, needs)
    assert p.dtype == gradients[0].dtype == x.dtype
    for ours, plain, truth in zip([p, *gradients], differentiate(x.dtype), differentiate(torch.float64), strict=True):
        if truth is None:
            assert ours.numel() == 0
        else:
            assert_as_good(ours, plain, truth)


@many
@pytest.mark.parametrize("normalize", [False, True])
@every_dtype
@pytest.mark.parametrize(
    ("N", "D", "b"),
    [(1, 1, 1), (20, 3, 3), (5, 17, 1), (19, 48, 3), (40, 64, 16), (33, 64, 64), (18, 100, 25), (7, 96, 8)],
)
def test_project(N, D, b, dtype, normalize):
    check_project(
        torch.randn(N, D).to(dtype), torch.randn(D).to(dtype), torch.randn(D // b, b, b).to(dtype),
        torch.randperm(D), normalize,
    )  # fmt: skip


@many
@pytest.mark.parametrize("terms", ["diag", "blocks", "both", "neither"])
@pytest.mark.parametrize("normalize", [False, True])
def test_project_terms(terms, normalize):
    diag = torch.randn(24) if terms in ("diag", "both") else None
    blocks = torch.randn(6, 4, 4) if terms in ("blocks", "both") else None
    check_project(torch.randn(9, 24), diag, blocks, None, normalize)


@many
def test_project_sums_many_rows_in_splits():
    check_project(torch.randn(300, 20), torch.randn(20), torch.randn(10, 2, 2), None, True)


@many
def test_project_takes_any_layout():
    wide = torch.randn(40, 70)
    check_project(
        wide.T[:30, ::2][:, :18], torch.randn(36)[::2], torch.randn(6, 3, 3).transpose(1, 2),
        torch.randperm(18).repeat_interleave(2)[::2], True,
    )  # fmt: skip


@many
def test_project_of_mixed_dtypes():
    x, diag, blocks = torch.randn(20, 32).half(), torch.randn(32), torch.randn(4, 8, 8)
    on_x, *weights = (t.to(DEVICE) for t in (x, diag, blocks))
    p = device_ops.project(on_x, None, *weights, None, True)[0]
    truth = plain_project(x.double(), diag.double(), blocks.double(), None, True)
    plain = plain_project(x, diag.half(), blocks.half(), None, True)
    assert_as_good(p, plain, truth)
    grad = torch.randn(20, 32).half()
    _, ddiag, dblocks = device_ops.project_backward_of_x(
        *(t.to(DEVICE) for t in (grad, x, diag, blocks)), None, True, [False, True, True]
    )
    assert ddiag.dtype == dblocks.dtype == torch.float32
    unit = F.normalize(x.double(), dim=1)
    assert_as_good(ddiag, (F.normalize(x, dim=1) * grad).sum(0), (unit * grad.double()).sum(0))


@many
def test_project_of_zero_and_nan_rows():
    x = torch.randn(6, 8)
    x[2] = 0.0
    x[4, 3] = NAN
    diag, blocks = torch.randn(8), torch.randn(2, 4, 4)
    on_x, *weights = (t.to(DEVICE) for t in (x, diag, blocks))
    p = device_ops.project(on_x, None, *weights, None, True)[0].cpu()
    assert torch.equal(p[2], torch.zeros(8))
    assert p[4].isnan().all()
    assert p[[0, 1, 3, 5]].isfinite().all()
    finite = x.clone()
    finite[4] = 1.0
    check_project(finite, diag, blocks, None, True)


@many
def test_project_backward_gives_only_what_is_needed():
    x, grad = torch.randn(9, 8).to(DEVICE), torch.randn(9, 8).to(DEVICE)
    diag, blocks = torch.randn(8).to(DEVICE), torch.randn(2, 4, 4).to(DEVICE)
    everything = device_ops.project_backward_of_x(grad, x, diag, blocks, None, True, [True] * 3)
    for one in range(3):
        gradients = device_ops.project_backward_of_x(grad, x, diag, blocks, None, True, [k == one for k in range(3)])
        assert [t.numel() for t in gradients] == [everything[k].numel() * (k == one) for k in range(3)]
        assert torch.equal(gradients[one], everything[one])


@many
@pytest.mark.parametrize("normalize", [False, True])
@every_dtype
@pytest.mark.parametrize("permuted", [False, True])
def test_pairs_project_backward(permuted, dtype, normalize):
    """The gradient of Σ_e g_e ⟨p of x, ŷ⟩ over listed pairs, by autograd in fp64."""
    D, N, M, E = 24, 19, 30, 70
    x, y = torch.randn(N, D).to(dtype), torch.randn(M, D).to(dtype)
    diag, blocks = torch.randn(D).to(dtype), torch.randn(3, 8, 8).to(dtype)
    permutation = torch.randperm(D) if permuted else None
    grad, rows, cols = torch.randn(E), torch.randint(-1, N, (E,)), torch.randint(-1, M, (E,))
    rows[:25] = 4  # a hub
    grad[::6] = 0

    def differentiate(dtype):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, diag, blocks)]
        p = plain_project(*leaves, permutation, normalize)
        other = F.normalize(y.to(dtype), dim=1) if normalize else y.to(dtype)
        real = (rows >= 0) & (cols >= 0)
        (grad[real].to(dtype) * (p[rows[real]] * other[cols[real]]).sum(1)).sum().backward()
        return [t.grad for t in leaves]

    on = [t.to(DEVICE) if t is not None else None for t in (grad, rows, cols, x, y, diag, blocks, permutation)]
    results = device_ops.project_backward_of_pairs(*on, normalize, [True] * 3)
    for ours, plain, truth in zip(results, differentiate(dtype), differentiate(torch.float64), strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, plain, truth)


@many
def test_pairs_project_backward_of_a_zero_gradient_adds_nothing_even_from_nan_rows():
    x, y, index = torch.randn(3, 8), torch.full((3, 8), NAN), torch.arange(3)
    on = [t.to(DEVICE) for t in (torch.zeros(3), index, index, x, y, torch.randn(8))]
    dx, ddiag, _ = device_ops.project_backward_of_pairs(*on, None, None, True, [True, True, False])
    assert not dx.any()
    assert not ddiag.any()


# Both sides of a metric


@few
@every_dtype
@pytest.mark.parametrize("weights", ["diag blocks", "diag", "blocks", ""])
@pytest.mark.parametrize(("n", "m", "d", "b"), [(1, 1, 4, 2), (19, 23, 50, 25), (9, 40, 24, 8), (33, 33, 48, 3)])
def test_both_sides(n, m, d, b, weights, dtype):
    x, y = torch.randn(n, d).to(dtype), torch.randn(d, m).to(dtype).T
    x[0] = 0
    diag = torch.randn(d).to(dtype) if "diag" in weights else None
    blocks = torch.randn(d // b, b, b).to(dtype) if "blocks" in weights else None
    permutation = torch.randperm(d) if b > 2 and blocks is not None else None
    results = device_ops.project(*on_device(x, y, diag, blocks, permutation), True)
    wide = [t if t is None else t.double() for t in (x, y, diag, blocks)]
    p = reference.project(wide[0], *wide[2:], permutation=permutation, normalize=True)
    *results, norm, pair = results
    for got, expected in zip(results, (p, reference.project(wide[1], normalize=True)), strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        close(got, expected, dtype)
    assert norm.dtype == torch.float32
    close(norm, wide[0].norm(dim=1).clamp_min(1e-12), torch.float32)
    assert pair.shape == (0,)


@few
@every_dtype
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n", "m", "d", "b"), [(1, 1, 4, 2), (19, 23, 50, 25), (33, 40, 50, 5), (33, 33, 48, 3)])
def test_both_sides_with_their_pairs(n, m, d, b, normalize, dtype, monkeypatch):
    if n == m == 33:
        monkeypatch.setattr(plan, "SMALL", 33 * 33 - 1)  # and in a launch of their own
    x, y, diag, blocks = (torch.randn(*shape).to(dtype) for shape in ((n, d), (m, d), (d,), (d // b, b, b)))
    permutation = torch.randperm(d) if b > 2 else None
    on = on_device(x, y, diag, blocks, permutation)
    p, unit, norm, pair = device_ops.project(*on, normalize, True)
    exact = reference.project(x.double(), diag.double(), blocks.double(), permutation=permutation, normalize=normalize)
    close(p, exact, dtype)
    if normalize:
        close(unit, reference.project(y.double(), normalize=True), dtype)
    else:
        assert unit.numel() == norm.numel() == 0
    assert pair.dtype == torch.float32
    factors = p.cpu().double(), (unit.cpu() if normalize else y)[:n].double()  # as they are stored
    close(pair, (factors[0] * factors[1]).sum(1), torch.float32)


def check_sides_backward(n, m, d, b, normalize, dtype, twice=False, needs=(True,) * 4, without=()):
    x, y, diag, blocks = (torch.randn(*shape).to(dtype) for shape in ((n, d), (m, d), (d,), (d // b, b, b)))
    if dtype == torch.float32:
        x[n // 2] = 0  # its gradient is beyond halves
    permutation = torch.randperm(d) if b > 2 else None
    dp, dunit = torch.randn(n, d).to(dtype), torch.randn(n if twice else m, d).to(dtype)
    leaves = [t.double().requires_grad_() for t in (x, y, diag, blocks)]
    other = leaves[0] if twice else leaves[1]
    p = reference.project(leaves[0], *leaves[2:], permutation=permutation, normalize=normalize)
    total = 0.0 if "dp" in without else (p * dp.double()).sum()
    if normalize and "dunit" not in without:
        total = total + (reference.project(other, normalize=True) * dunit.double()).sum()
    expected = torch.autograd.grad(total, leaves, allow_unused=True)
    on = on_device(x, x if twice else y, diag, blocks, permutation)
    norm = device_ops.project(*on, normalize)[2]
    inputs = [None if name in without else t for name, t in (("dp", dp), ("dunit", dunit))]
    on[1] = None if twice else on[1]
    results = device_ops.project_backward(*on_device(*inputs), norm, *on, normalize, [*needs])
    for got, known, need in zip(results, expected, needs, strict=True):
        if need and known is not None:
            assert got.dtype == dtype
            close(got, known, dtype)
        else:
            assert got.numel() == 0


@few
@every_dtype
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n", "m", "d", "b"), [(1, 1, 4, 2), (19, 40, 50, 25), (33, 33, 48, 3)])
def test_gradients_of_both_sides(n, m, d, b, normalize, dtype):
    check_sides_backward(n, m, d, b, normalize, dtype)


@few
@every_dtype
@pytest.mark.parametrize(("n", "d", "b"), [(1, 4, 2), (40, 50, 25)])
def test_gradients_of_one_side_given_twice(n, d, b, dtype):
    check_sides_backward(n, n, d, b, True, dtype, twice=True, needs=(True, False, True, True))


@few
def test_gradients_of_sides_that_are_not_wanted_or_not_used():
    for needs in ((True, False, False, False), (False, True, False, False), (False, False, False, True)):
        check_sides_backward(9, 14, 24, 8, True, torch.float32, needs=needs)
    for without in ("dp", "dunit"):
        check_sides_backward(9, 14, 24, 8, True, torch.float32, without=(without,))


@few
def test_sides_of_many_rows_are_declined(monkeypatch):
    monkeypatch.setattr(plan, "SCAN_ROWS", 20)
    x, y = on_device(torch.randn(21, 8), torch.randn(22, 8))
    options = None, None, None, True, [True, True, False, False]
    assert device_ops.route("project_backward", x, y, x[:, 0], x, y, *options) == "triton"
    assert device_ops.route("project_backward", x[:20], y, x[:20, 0], x[:20], y, *options) == "small"
    assert device_ops.route("project_backward", x[:20], None, x[:20, 0], x[:20], None, *options) == "triton"


@few
def test_one_side_of_nothing():
    p, unit, *_ = device_ops.project(*on_device(torch.empty(0, 8), torch.ones(2, 8)), None, None, None, True)
    assert p.shape == (0, 8)
    close(unit, torch.full((2, 8), 8**-0.5), torch.float32)


# The gradient of hardest negatives by a metric


@few
@every_dtype
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "d", "b", "needs"),
    [
        (1, 1, 4, 2, (True, True, True, True)),
        (19, 23, 50, 25, (True, True, True, True)),
        (9, 14, 24, 8, (True, False, False, False)),
        (9, 14, 24, 8, (False, True, False, False)),
        (9, 14, 24, 8, (False, False, True, True)),
    ],
)
def test_gradient_of_hardest_negatives_by_a_metric(n, m, d, b, needs, normalize, dtype):
    """Of Σ_e g_e ⟨p of x, ŷ⟩ over the pairs and the hardest, by autograd in fp64."""
    x, y = two_sides(n, m, d, dtype)
    diag, blocks = (torch.randn(*shape).to(dtype) for shape in ((d,), (d // b, b, b)))
    permutation = torch.randperm(d) if d > 4 else None
    rows, cols = torch.randint(-1, m, (n,)), torch.randint(-1, n, (m,))
    cols[::2] = n // 2  # a hub of more edges than one step takes
    dpositive, drow, dcol = torch.randn(n), torch.randn(n), torch.randn(m)
    dpositive[1::3] = dcol[1::5] = 0
    leaves = [t.double().requires_grad_() for t in (x, y, diag, blocks)]
    p = reference.project(leaves[0], *leaves[2:], permutation=permutation, normalize=normalize)
    s = p @ reference.project(leaves[1], normalize=normalize).T
    i, j = torch.arange(n), torch.arange(m)
    weight = torch.cat((dpositive, drow, dcol)).double()
    edges = torch.cat((i, i, cols)), torch.cat((i, rows, j))
    real = (edges[0] >= 0) & (edges[1] >= 0)
    (weight[real] * s[edges[0][real], edges[1][real]]).sum().backward()
    on = [
        t if t is None else t.to(DEVICE) for t in (dpositive, drow, dcol, rows, cols, x, y, diag, blocks, permutation)
    ]
    results = device_ops.hardest_negatives_backward(*on, normalize, [*needs])
    for got, leaf, need in zip(results, leaves, needs, strict=True):
        if need:
            assert got.dtype == dtype
            close(got, leaf.grad, dtype, subnormal=True)
        else:
            assert got.numel() == 0


@few
def test_by_a_metric_a_zero_gradient_adds_nothing_even_from_nan_rows():
    x, y, index = torch.randn(3, 8), torch.full((3, 8), NAN), torch.arange(3)
    zero, diag = torch.zeros(3), torch.randn(8)
    on = [t.to(DEVICE) for t in (zero, zero, zero, index, index, x, y, diag)]
    dx, _, ddiag, _ = device_ops.hardest_negatives_backward(*on, None, None, True, [True, False, True, False])
    assert not dx.any()
    assert not ddiag.any()


@few
def test_many_rows_of_a_metric_are_declined(monkeypatch):
    monkeypatch.setattr(plan, "SCAN_ROWS", 20)
    x, index, line = torch.randn(21, 8).to(DEVICE), torch.arange(21).to(DEVICE), torch.zeros(21).to(DEVICE)
    inputs = (line, line, line, index, index, x, x, None, None, None, True, [True] * 4)
    assert device_ops.route("hardest_negatives_backward", *inputs) == "triton"


@many
def test_fp64_is_refused():
    x = torch.randn(4, 4, dtype=torch.float64)
    for call in (
        lambda: device_ops.launch("project", x, None, None, None, None, True),
        lambda: device_ops.launch("project_backward", x, None, x[0], x, None, None, None, None, True, [True] * 4),
        lambda: device_ops.launch("project", x, x, None, None, None, True),
    ):
        with pytest.raises(TypeError, match="float64"):
            call()
