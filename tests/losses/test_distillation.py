"""Relational distillation: against loops over pairs, over chunks, at extremes, its Triton kernels and launches."""

import device_ops
import pytest
import torch
import torch.nn.functional as F
from dense_cases import X, assert_same, normal, value_and_gradients
from interpreted import DEVICE, every_dtype
from launch_counts import DEVICE as NO_DEVICE
from launch_counts import check_count, counted, every_small_batch, launches
from triton_checks import INF, NAN, both_passes, close, few

import gssf_kernels as gk
from gssf_kernels import plan, reference


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
    inputs = {"student": X, "image_teacher": X, "text_teacher": X, "lam": 0.5, "tau": 0.1, **change}
    with pytest.raises(kind, match=f"^{message}"):
        gk.relational_distillation_loss(**inputs)


# Small problems by Triton

WEIGHTS = (2.0, 0.75, 1.5)
PHI = {"abs": "mae", "square": "mse"}
every_kind = pytest.mark.parametrize("kind", PHI)


def quarters(n, dims, dtype):
    """Whole numbers over 4: their products are exact, so that no rounding turns the sign of a difference."""
    return [(torch.randint(-6, 7, (n, d)) / 4).to(dtype) for d in dims]


def run(sides, lam, tau, kind, learnable=True, need=True, upstream=1.5):
    """(the loss, the gradients of student, λ and τ)"""
    on = [x.to(DEVICE) for x in sides]
    numbers = [torch.tensor(v).to(DEVICE) for v in (lam, tau)] if learnable else [None, None]
    results = device_ops.relation_loss(*on, *numbers, lam, tau, list(WEIGHTS), kind, need)
    loss, dlam, dtau, slope, dh, means = results
    student, image, text = (x.double() @ x.double().mT for x in sides)
    apart = ~torch.eye(len(student), dtype=torch.bool)
    for got, e in zip(means, (student - torch.lerp(image, text, lam), text - image), strict=True):
        distance = e.abs() if kind == "abs" else e * e
        expected = distance[apart].mean() if len(student) > 1 else distance.sum() * 0
        torch.testing.assert_close(
            got.cpu().double(), expected, rtol=1e-2 if sides[0].dtype == torch.float16 else 1e-5, atol=1e-5
        )
    grad, none = torch.tensor(upstream).to(DEVICE), dh.new_empty(0)
    dh, _, dlam, dtau = device_ops.total_backward(grad, dlam, dtau, dh, none, on[0], None, slope, None, 1.0, 1.0)
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
    close(loss, expected.detach(), torch.float32, subnormal=True)
    for got, leaf in zip(gradients, leaves, strict=True):
        assert got.shape == leaf.shape
        assert got.dtype == (dtype if leaf.dim() else torch.float32)
        size = float(leaf.grad.abs().max()) if leaf.dim() else upstream * float(expected.detach()) / abs(tau)
        close(got, upstream * leaf.grad, dtype if leaf.dim() else torch.float32, size=size, subnormal=True)


KERNEL_SHAPES = [
    (1, (3, 3, 3)),
    (2, (1, 2, 3)),
    (16, (16, 16, 16)),
    (17, (40, 5, 17)),
    (33, (8, 24, 9)),
    (50, (33, 7, 20)),
]


@few
@every_dtype
@every_kind
@pytest.mark.parametrize(("n", "dims"), KERNEL_SHAPES)
def test_kernels(n, dims, kind, dtype):
    check(quarters(n, dims, dtype), 0.375, 0.25, kind, learnable=n % 2 == 0)


@few
@every_kind
@pytest.mark.parametrize("lam", [-0.5, 0.0, 0.25, 0.75, 1.0, 1.5])
@pytest.mark.parametrize("tau", [-0.5, 0.125, 2.0])
def test_every_sign_of_lam_and_tau(tau, lam, kind):
    check(quarters(33, (8, 24, 9), torch.float32), lam, tau, kind)


@few
@every_kind
def test_any_numbers(kind):
    """Not whole: a difference of either sign near 0 is a rounding of the loss, and of the gradient."""
    sides = [torch.nn.functional.normalize(torch.randn(40, d), dim=1) for d in (30, 20, 40)]
    check(sides, 0.3, 0.07, kind)


@few
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


@few
@every_kind
@pytest.mark.parametrize("special", [INF, -INF, NAN])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_special_values(side, special, kind):
    """They pass both ways as in the op's reference, to the same places."""
    sides = quarters(40, (8, 8, 8), torch.float32)
    sides[side][17] = torch.where(sides[side][17] > 0, special, 1.0)
    options = (None, None, 0.375, 0.25, list(WEIGHTS), kind, True)
    expected = device_ops.composite("relation_loss", *(x.double() for x in sides), *options)
    assert not expected[0].isfinite()
    for got, known in zip(device_ops.relation_loss(*(x.to(DEVICE) for x in sides), *options), expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), known, equal_nan=True)


@few
@pytest.mark.parametrize("learnable", [True, False])
def test_without_a_student_that_learns(learnable):
    sides = quarters(33, (8, 24, 9), torch.float32)
    whole, part = (run(sides, 0.375, 0.25, "abs", learnable, need) for need in (True, False))
    assert part[1][0].numel() == 0
    for got, expected in zip((part[0], *part[1][1:]), (whole[0], *whole[1][1:]), strict=True):
        assert torch.equal(got, expected)


@few
def test_any_layout():
    wide = [(torch.randint(-6, 7, (40, 33)) / 4) for _ in range(3)]
    sides = [wide[0][:, 1:20], wide[1].T[:33, :40].T, wide[2][:, ::2]]
    runs = [run(of, 0.3, 0.5, "abs")[1] for of in (sides, [x.clone() for x in sides])]
    for got, expected in zip(*runs, strict=True):
        assert torch.equal(got, expected)


@few
def test_gradients_below_the_smallest_half():
    """A pair's share of the mean is far below what halves hold; their sum is not."""
    sides = quarters(50, (24, 24, 24), torch.float16)
    check(sides, 0.375, 0.25, "square", upstream=1e-3)


@few
def test_what_is_too_large_or_empty_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 40)
    for n, declined in ((40, False), (41, True), (0, True)):
        options = (None, None, 0.5, 0.5, list(WEIGHTS), "abs", True)
        sides = quarters(n, (3, 3, 3), torch.float32)
        assert (device_ops.route("relation_loss", *sides, *options) == "chunks") == declined


@few
def test_the_same_inputs_give_the_same_bits():
    sides = [torch.randn(50, d) for d in (30, 20, 40)]
    runs = [(loss, *gradients) for loss, gradients in (run(sides, 0.3, 0.07, "abs") for _ in range(2))]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


# The pass over a chunk of scores, by Triton


@few
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("kind", ["abs", "square"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 40), (17, 33), (40, 70), (32, 32)])
def test_relation_pass(n, m, kind, gradient):
    f, u, w = torch.randn(3, n, m)
    f[0, -1] = u[0, -1] = w[0, -1]  # e is 0 there, exactly
    arguments = [f, u, w, torch.tensor(0.25), kind, gradient, torch.empty(3, n)]
    for got, expected in both_passes("relation_pass", arguments, (0, 6)):
        close(got, expected, torch.float32, rtol=1e-5)


# How many kernels a step launches: (forward, backward); t is λ


def distilled(kind="mae", learned=True):
    def loss(x, y, t):
        lam, tau = (t, torch.empty((), device=NO_DEVICE, requires_grad=True)) if learned else (0.5, 0.07)
        return gk.relational_distillation_loss(x, y, y[:, :256], lam=lam, tau=tau, kind=kind)

    return loss


@every_small_batch({"mae": (distilled(), (2, 1)), "mse": (distilled("mse", learned=False), (2, 1))})
def test_launches(loss, expected, n, dtype):
    check_count(loss, expected, n, dtype)


@counted
def test_what_distillation_launches():
    forward, backward = launches(distilled(), 128)
    assert forward == ["relation_tile_kernel", "relation_loss_kernel"]
    assert backward == ["scaled_kernel"]


@pytest.mark.parametrize("kind", ["mae", "mse"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("terms", ["both", "diag", "blocks"])
def test_relations_by_a_metric(kind, normalize, terms):
    """Against the formula, entry by entry: the relations of the student are not symmetric."""
    generator = torch.Generator().manual_seed(6)
    h, u, t = (torch.randn(9, d, generator=generator, dtype=torch.float64) for d in (8, 5, 6))
    block_size = None if terms == "diag" else 4
    metric = gk.StructuredSimilarity(8, block_size, terms != "blocks", normalize, dtype=torch.float64)
    with torch.no_grad():
        for weight in metric.parameters():
            weight += 0.4 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    lam, tau = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.7))
    h.requires_grad_()
    wrt = (h, lam, tau, *metric.parameters())

    x = torch.nn.functional.normalize(h, dim=1) if normalize else h
    w = torch.zeros(8, 8, dtype=torch.float64)
    w = w if metric.diag is None else w + torch.diag(metric.diag)
    w = w if metric.blocks is None else w + torch.block_diag(*metric.blocks)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(9):
        for j in range(9):
            if i != j:
                image, text = u[i] @ u[j] / tau, t[i] @ t[j] / tau
                mixture = lam * text + (1 - lam) * image
                for share, relation in zip((2, 1, 1), (x[i] @ w @ x[j] / tau, image, text), strict=True):
                    total = total + share * ((relation - mixture).abs() if kind == "mae" else (relation - mixture) ** 2)
    right = total / 72
    module = gk.RelationalDistillationLoss(0.3, 0.7, kind=kind, metric=metric, return_terms=True, dtype=torch.float64)
    losses = (
        gk.relational_distillation_loss(h, u, t, lam=lam, tau=tau, kind=kind, metric=metric),
        gk.reference.relational_distillation_loss(h, u, t, lam=lam, tau=tau, kind=kind, metric=metric),
    )
    for loss in losses:
        torch.testing.assert_close(loss, right)
        grads = (torch.autograd.grad(value, wrt, retain_graph=True) for value in (loss, right))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected)
    loss, each = module(h, u, t)
    torch.testing.assert_close(loss.detach(), right.detach())
    torch.testing.assert_close(2 * each.student + each.image_teacher + each.text_teacher, right.detach())


def test_gradcheck_by_a_metric():
    generator = torch.Generator().manual_seed(7)
    h, u, t = (torch.randn(5, d, generator=generator, dtype=torch.float64) for d in (4, 3, 2))
    metric = gk.StructuredSimilarity(4, 2, dtype=torch.float64)

    def value(h, diag, blocks, lam, tau):
        weights = {"metric.diag": diag, "metric.blocks": blocks, "lam": lam, "tau": tau}
        loss = gk.RelationalDistillationLoss(kind="mse", metric=metric, dtype=torch.float64)
        return torch.func.functional_call(loss, weights, (h, u, t))

    inputs = (h, metric.diag.detach(), metric.blocks.detach() + 0.1, *torch.tensor([0.4, 0.8]).double())
    assert torch.autograd.gradcheck(value, [x.clone().requires_grad_() for x in inputs])


def test_fewer_than_two_rows_by_a_metric_are_a_differentiable_zero():
    metric = gk.StructuredSimilarity(4, 2)
    for n in (0, 1):
        h, teacher = torch.randn(n, 4, requires_grad=True), torch.randn(n, 3)
        loss = gk.relational_distillation_loss(h, teacher, teacher, lam=0.5, tau=1.0, metric=metric)
        assert loss == 0
        loss.backward()
        assert not h.grad.any()
    with pytest.raises(TypeError, match=r"^metric: .*got str"):
        gk.relational_distillation_loss(h, teacher, teacher, lam=0.5, tau=1.0, metric="cosine")
