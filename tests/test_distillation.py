"""Relational distillation: against loops over pairs, over chunks and at extremes."""

import pytest
import torch
import torch.nn.functional as F
from dense_cases import X, assert_same, normal, value_and_gradients

import gssf_kernels as gk


def unit_rows(n, d):
    return F.normalize(normal(n, d), dim=1)


@pytest.mark.parametrize("kind", ["mae", "mse"])
@pytest.mark.parametrize("n", [2, 3, 40])
def test_distillation_number_by_number(chunked, n, kind):
    h, u, t = unit_rows(n, 6), unit_rows(n, 5), unit_rows(n, 9)
    lam, tau = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)

    def ours(h, lam, tau):
        return gk.relational_distillation_loss(h, u, t, lam=lam, tau=tau, kind=kind)

    def plain(h, lam, tau):
        total = 0.0
        for i in range(n):
            for j in range(n):
                if i == j:
                    continue
                student, image, text = ((x[i] * x[j]).sum() / tau for x in (h, u, t))
                mixture = lam * text + (1 - lam) * image
                for weight, relation in zip((2.0, 1.0, 1.0), (student, image, text), strict=True):
                    gap = relation - mixture
                    total = total + weight * (gap.abs() if kind == "mae" else gap * gap)
        return total / (n * (n - 1))

    assert_same(value_and_gradients(ours, (h, lam, tau)), value_and_gradients(plain, (h, lam, tau)), 1e-10, 1e-12)


@pytest.mark.parametrize("kind", ["mae", "mse"])
def test_a_student_equal_to_the_mixture_gets_no_gradient(kind):
    h = torch.randint(-2, 3, (90, 4)).float()  # exact scores: every difference is 0
    student = h.clone().requires_grad_()
    gk.relational_distillation_loss(student, h, h, lam=0.5, tau=0.07, kind=kind).backward()
    assert not student.grad.any()


@pytest.mark.parametrize("n", [0, 1])
def test_distillation_of_no_pair_is_zero(n):
    h = torch.randn(n, 4, requires_grad=True)
    loss = gk.relational_distillation_loss(h, torch.randn(n, 3), torch.randn(n, 5), lam=0.5, tau=0.1)
    assert loss == 0
    loss.backward()
    assert not h.grad.any()


def test_distillation_module_learns_lam_and_tau():
    criterion = gk.RelationalDistillationLoss(kind="mse")
    assert (criterion.lam.item(), criterion.tau.item()) == (0.5, pytest.approx(0.07))
    assert "kind='mse'" in repr(criterion)
    sides = [F.normalize(torch.randn(30, 8), dim=1) for _ in range(3)]
    loss = criterion(*sides)
    torch.testing.assert_close(loss, gk.relational_distillation_loss(*sides, lam=0.5, tau=0.07, kind="mse"))
    loss.backward()
    torch.testing.assert_close(criterion.tau.grad, -2 * loss.detach() / 0.07)  # the loss goes as 1/tau²
    assert criterion.lam.grad.isfinite()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"image_teacher": torch.randn(5, 8)}, ValueError, r"image_teacher: expected the 4 rows.*\[5, 8\]"),
        ({"text_teacher": torch.randn(3, 8)}, ValueError, r"text_teacher: expected the 4 rows.*\[3, 8\]"),
        ({"text_teacher": torch.randn(4, 8).double()}, TypeError, r"text_teacher: .*torch.float64"),
        ({"student": torch.randn(4)}, ValueError, r"student: .*got \[4\]"),
        ({"lam": torch.ones(2)}, ValueError, r"lam: .*one element, got \[2\]"),
        ({"lam": "half"}, TypeError, r"lam: .*got str"),
        ({"tau": 0.0}, ValueError, r"tau: .*> 0, got 0.0"),
        ({"weights": (1.0, 2.0)}, TypeError, r"weights: expected three numbers"),
        ({"weights": (1.0, -2.0, 0.0)}, ValueError, r"weights\[1\]: .*got -2.0"),
        ({"kind": "huber"}, ValueError, r"kind: .*'mae', 'mse', got 'huber'"),
    ],
)
def test_bad_distillation(change, kind, message):
    given = {"student": X, "image_teacher": X, "text_teacher": X, "lam": 0.5, "tau": 0.1, **change}
    with pytest.raises(kind, match=f"^{message}"):
        gk.relational_distillation_loss(**given)
