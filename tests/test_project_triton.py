"""The structured projection's Triton kernels, against the definition's autograd in fp64."""

import pytest
import torch
import torch.nn.functional as F
from interpreted import DEVICE, DTYPES, where_triton_runs
from triton_checks import NAN, assert_as_good, small_tiles  # noqa: F401

from gssf_kernels.kernels.project import pairs_project_backward, project, project_backward


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
    p = project(*on, normalize)
    needs = [True, diag is not None, blocks is not None]
    gradients = project_backward(grad.to(DEVICE), *on, normalize, needs)
    assert p.dtype == gradients[0].dtype == x.dtype
    for ours, plain, truth in zip([p, *gradients], differentiate(x.dtype), differentiate(torch.float64), strict=True):
        if truth is None:
            assert ours.numel() == 0
        else:
            assert_as_good(ours, plain, truth)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "D", "b"),
    [(1, 1, 1), (20, 3, 3), (5, 17, 1), (19, 48, 3), (40, 64, 16), (33, 64, 64), (18, 100, 25), (7, 96, 8)],
)
def test_project(N, D, b, dtype, normalize):
    check_project(
        torch.randn(N, D).to(dtype), torch.randn(D).to(dtype), torch.randn(D // b, b, b).to(dtype),
        torch.randperm(D), normalize,
    )  # fmt: skip


@pytest.mark.parametrize("terms", ["diag", "blocks", "both", "neither"])
@pytest.mark.parametrize("normalize", [False, True])
def test_project_terms(terms, normalize):
    diag = torch.randn(24) if terms in ("diag", "both") else None
    blocks = torch.randn(6, 4, 4) if terms in ("blocks", "both") else None
    check_project(torch.randn(9, 24), diag, blocks, None, normalize)


def test_project_sums_many_rows_in_splits():
    check_project(torch.randn(300, 20), torch.randn(20), torch.randn(10, 2, 2), None, True)


def test_project_takes_any_layout():
    wide = torch.randn(40, 70)
    check_project(
        wide.T[:30, ::2][:, :18], torch.randn(36)[::2], torch.randn(6, 3, 3).transpose(1, 2),
        torch.randperm(18).repeat_interleave(2)[::2], True,
    )  # fmt: skip


def test_project_of_mixed_dtypes():
    x, diag, blocks = torch.randn(20, 32).half(), torch.randn(32), torch.randn(4, 8, 8)
    p = project(*(t.to(DEVICE) for t in (x, diag, blocks)), None, True)
    truth = plain_project(x.double(), diag.double(), blocks.double(), None, True)
    plain = plain_project(x, diag.half(), blocks.half(), None, True)
    assert_as_good(p, plain, truth)
    grad = torch.randn(20, 32).half()
    _, ddiag, dblocks = project_backward(
        *(t.to(DEVICE) for t in (grad, x, diag, blocks)), None, True, [False, True, True]
    )
    assert ddiag.dtype == dblocks.dtype == torch.float32
    unit = F.normalize(x.double(), dim=1)
    assert_as_good(ddiag, (F.normalize(x, dim=1) * grad).sum(0), (unit * grad.double()).sum(0))


def test_project_of_zero_and_nan_rows():
    x = torch.randn(6, 8)
    x[2] = 0.0
    x[4, 3] = NAN
    diag, blocks = torch.randn(8), torch.randn(2, 4, 4)
    p = project(*(t.to(DEVICE) for t in (x, diag, blocks)), None, True).cpu()
    assert torch.equal(p[2], torch.zeros(8))
    assert p[4].isnan().all()
    assert p[[0, 1, 3, 5]].isfinite().all()
    finite = x.clone()
    finite[4] = 1.0
    check_project(finite, diag, blocks, None, True)


def test_project_backward_gives_only_what_is_needed():
    x, grad = torch.randn(9, 8).to(DEVICE), torch.randn(9, 8).to(DEVICE)
    diag, blocks = torch.randn(8).to(DEVICE), torch.randn(2, 4, 4).to(DEVICE)
    everything = project_backward(grad, x, diag, blocks, None, True, [True] * 3)
    for one in range(3):
        some = project_backward(grad, x, diag, blocks, None, True, [k == one for k in range(3)])
        assert [t.numel() for t in some] == [everything[k].numel() * (k == one) for k in range(3)]
        assert torch.equal(some[one], everything[one])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
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
    found = pairs_project_backward(*on, normalize, [True] * 3)
    for ours, plain, truth in zip(found, differentiate(dtype), differentiate(torch.float64), strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, plain, truth)


def test_pairs_project_backward_of_a_zero_gradient_adds_nothing_even_from_nan_rows():
    x, y, index = torch.randn(3, 8), torch.full((3, 8), NAN), torch.arange(3)
    on = [t.to(DEVICE) for t in (torch.zeros(3), index, index, x, y, torch.randn(8))]
    dx, ddiag, _ = pairs_project_backward(*on, None, None, True, [True, True, False])
    assert not dx.any()
    assert not ddiag.any()


def test_fp64_is_refused():
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        project(x, None, None, None, True)
    with pytest.raises(TypeError, match="float64"):
        project_backward(x, x, None, None, None, True, [True] * 3)


where_triton_runs(globals())
