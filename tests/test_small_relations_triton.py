"""Relational distillation of small problems: its Triton kernels against fp64. See interpreted.py for where it runs."""

import pytest
import torch
from interpreted import DEVICE, DTYPES, where_triton_runs

from gssf_kernels import plan, reference
from gssf_kernels.kernels import relations, sums, tiles
from gssf_kernels.statistics import relations as statistics

INF, NAN = float("inf"), float("nan")
WEIGHTS = (2.0, 0.75, 1.5)
PHI = {"abs": "mae", "square": "mse"}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_kind = pytest.mark.parametrize("kind", PHI)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "RELATIONS", dict.fromkeys(tiles.RELATIONS, tiles.Sweep(16, 16, 16, 4, 2)))
    monkeypatch.setattr(tiles, "GRADIENTS", dict.fromkeys(tiles.GRADIENTS, tiles.Gradients(16, 32, 16, 4, 2)))
    monkeypatch.setattr(tiles, "TERMS", 16)


def close(got, expected, dtype, like=None):
    """Within some roundings of dtype of the largest number, or of like."""
    rtol = 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    size = expected.nan_to_num(0, 0, 0).abs().max() if like is None else like
    atol = rtol * float(size) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), expected, rtol=rtol, atol=atol, equal_nan=True)


def given(n, dims, dtype):
    """Whole numbers over 4: their products are exact, so that no rounding turns the sign of a difference."""
    return [(torch.randint(-6, 7, (n, d)) / 4).to(dtype) for d in dims]


def run(sides, lam, tau, kind, learnable=True, need=True, upstream=1.5):
    """(the loss, the gradients of student, λ and τ)"""
    on = [x.to(DEVICE) for x in sides]
    numbers = [torch.tensor(v).to(DEVICE) for v in (lam, tau)] if learnable else [None, None]
    found = relations.relation_loss(*on, *numbers, lam, tau, list(WEIGHTS), kind, need)
    if found is NotImplemented:
        return found, None
    loss, dlam, dtau, slope, dh = found
    grad, none = torch.tensor(upstream).to(DEVICE), dh.new_empty(0)
    dh, _, dlam, dtau = sums.score_total_backward(grad, dlam, dtau, dh, none, on[0], None, slope, None, 1.0, 1.0)
    return loss, (dh, dlam, dtau)


def truth(sides, lam, tau, kind):
    """(leaves, the loss) in fp64 by the definition."""
    student, *teachers = (x.double() for x in sides)
    leaves = [student.requires_grad_(), *(torch.tensor(v).double().requires_grad_() for v in (lam, tau))]
    options = {"lam": leaves[1], "tau": leaves[2], "weights": WEIGHTS, "kind": PHI[kind]}
    return leaves, reference.relational_distillation_loss(leaves[0], *teachers, **options)


def check(sides, lam, tau, kind, learnable=True, upstream=1.5):
    dtype = sides[0].dtype
    leaves, expected = truth(sides, lam, tau, kind)
    expected.backward()
    loss, gradients = run(sides, lam, tau, kind, learnable, upstream=upstream)
    assert loss.dtype == torch.float32
    close(loss, expected.detach(), torch.float32)
    for got, leaf in zip(gradients, leaves, strict=True):
        assert got.shape == leaf.shape
        assert got.dtype == (dtype if leaf.dim() else torch.float32)
        size = float(leaf.grad.abs().max()) if leaf.dim() else upstream * float(expected.detach()) / abs(tau)
        close(got, upstream * leaf.grad, dtype if leaf.dim() else torch.float32, like=size)


SHAPES = [(1, (3, 3, 3)), (2, (1, 2, 3)), (16, (16, 16, 16)), (17, (40, 5, 17)), (33, (8, 24, 9)), (50, (33, 7, 20))]


@every_dtype
@every_kind
@pytest.mark.parametrize(("n", "dims"), SHAPES)
def test_loss_and_gradients(n, dims, kind, dtype):
    check(given(n, dims, dtype), 0.375, 0.25, kind, learnable=n % 2 == 0)


@every_kind
@pytest.mark.parametrize("lam", [-0.5, 0.0, 0.25, 0.75, 1.0, 1.5])
@pytest.mark.parametrize("tau", [-0.5, 0.125, 2.0])
def test_every_sign_of_lam_and_tau(tau, lam, kind):
    check(given(33, (8, 24, 9), torch.float32), lam, tau, kind)


@every_kind
def test_any_numbers(kind):
    """Not whole: a difference of either sign near 0 is a rounding of the loss, and of the gradient."""
    sides = [torch.nn.functional.normalize(torch.randn(40, d), dim=1) for d in (30, 20, 40)]
    check(sides, 0.3, 0.07, kind)


@every_kind
def test_ties_get_no_gradient(kind):
    """e = 0 everywhere, or but for one teacher's row: φ'(0) = 0, forward and back."""
    h = torch.randint(-2, 3, (40, 4)).float()
    loss, (dh, dlam, dtau) = run([h, h.clone(), h.clone()], 0.5, 0.07, kind)
    assert (loss, dlam, dtau) == (0, 0, 0)
    assert not dh.any()
    other = h.clone()
    other[7] += 1
    check([h, other, other], 0.5, 0.25, kind)
    check([h, h, other], 0.0, 0.25, kind)


@every_kind
@pytest.mark.parametrize("special", [INF, -INF, NAN])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_special_values(side, special, kind):
    """They pass both ways as in the op's reference, to the same places."""
    sides = given(40, (8, 8, 8), torch.float32)
    sides[side][17] = torch.where(sides[side][17] > 0, special, 1.0)
    options = (None, None, 0.375, 0.25, list(WEIGHTS), kind, True)
    expected = statistics._forward(*(x.double() for x in sides), *options)
    assert not expected[0].isfinite()
    for got, known in zip(relations.relation_loss(*(x.to(DEVICE) for x in sides), *options), expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), known, equal_nan=True)


@pytest.mark.parametrize("learnable", [True, False])
def test_without_a_student_that_learns(learnable):
    sides = given(33, (8, 24, 9), torch.float32)
    whole, part = (run(sides, 0.375, 0.25, "abs", learnable, need) for need in (True, False))
    assert part[1][0].numel() == 0
    for got, expected in zip((part[0], *part[1][1:]), (whole[0], *whole[1][1:]), strict=True):
        assert torch.equal(got, expected)


def test_any_layout():
    wide = [(torch.randint(-6, 7, (40, 33)) / 4) for _ in range(3)]
    sides = [wide[0][:, 1:20], wide[1].T[:33, :40].T, wide[2][:, ::2]]
    runs = [run(of, 0.3, 0.5, "abs")[1] for of in (sides, [x.clone() for x in sides])]
    for got, expected in zip(*runs, strict=True):
        assert torch.equal(got, expected)


def test_gradients_below_the_smallest_half():
    """A pair's share of the mean is far below what halves hold; their sum is not."""
    sides = given(50, (24, 24, 24), torch.float16)
    check(sides, 0.375, 0.25, "square", upstream=1e-3)


def test_what_is_too_large_or_empty_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 40)
    for n, declined in ((40, False), (41, True), (0, True)):
        assert (run(given(n, (3, 3, 3), torch.float32), 0.5, 0.5, "abs")[0] is NotImplemented) == declined


def test_the_same_inputs_give_the_same_bits():
    sides = [torch.randn(50, d) for d in (30, 20, 40)]
    runs = [(loss, *gradients) for loss, gradients in (run(sides, 0.3, 0.07, "abs") for _ in range(2))]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


where_triton_runs(globals())
