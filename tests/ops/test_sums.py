"""Sums of functions of every score: against loops over numbers, and the Triton kernels against fp64."""

import math

import device_ops
import pytest
import row_panel_checks
import torch
from dense_cases import INF, NAN, X, Y, normal
from interpreted import DEVICE, every_dtype
from kernel_modules import tiles
from launch_counts import check_count, every_small_batch
from triton_checks import both_passes, close, few, fp64_leaves, row_panels, two_sides

import gssf_kernels as gk
from gssf_kernels import plan
from gssf_kernels.ops.score_functions import pointwise

FUNCTIONS = {
    "hinge": lambda t: max(t, 0.0),
    "softplus": lambda t: max(t, 0.0) + math.log1p(math.exp(-abs(t))),
    "abs": abs,
    "square": lambda t: t * t,
}


@pytest.mark.parametrize("positives", ["include", "exclude", "negate"])
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 5), (35, 20), (20, 35)])
def test_sums_number_by_number(chunked, kind, positives, n, m):
    a, b = normal(n, 4), normal(m, 4)
    a_ids, b_ids = torch.arange(n) % 5, torch.arange(m) % 7
    rows = []
    for i in range(n):
        row = 0.0
        for j in range(m):
            t = 1.3 * float(a[i] @ b[j]) - 0.4
            positive = positives != "include" and (i == j or int(a_ids[i]) == int(b_ids[j]))
            if not (positive and positives == "exclude"):
                row += FUNCTIONS[kind](-t if positive else t)
        rows.append(row)
    options = {"scale": 1.3, "bias": -0.4, "positives": positives, "a_ids": a_ids, "b_ids": b_ids}
    torch.testing.assert_close(gk.sum_scores(a, b, kind, reduction="none", **options).tolist(), rows)
    torch.testing.assert_close(float(gk.sum_scores(a, b, kind, **options)), sum(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_exact_at_every_size(dtype):
    """From far below to far above zero, the derivative too; a sum of one term each."""
    t = torch.cat([torch.linspace(-100, 100, 1001, dtype=dtype), torch.logspace(-30, 4, 600, dtype=dtype)])
    t = torch.cat([t, -t, torch.zeros(1, dtype=dtype)]).requires_grad_()
    ours = gk.sum_scores(t[:, None], torch.ones(1, 1, dtype=dtype), "softplus", reduction="none")
    (slope,) = torch.autograd.grad(ours.sum(), t)
    exact, normal_range = t.detach().double(), 80 if dtype == torch.float32 else 700
    expected = torch.where(exact > 0, exact, 0) + torch.log1p(torch.exp(-exact.abs()))
    seen = exact > -normal_range
    for got, truth in ((ours, expected), (slope, torch.sigmoid(exact))):
        error = ((got.detach().double() - truth) / truth)[seen].abs().max()
        assert error <= 4 * torch.finfo(dtype).eps


def test_abs_has_no_slope_at_zero():
    a = torch.zeros(5, 3, requires_grad=True)
    gk.sum_scores(a, torch.ones(4, 3), "abs").backward()
    assert not a.grad.any()
    (value,) = torch.autograd.grad(gk.sum_scores(a, torch.ones(4, 3), "abs", bias=-1e-30), a)
    assert value.tolist() == [[-4.0] * 3] * 5


@pytest.mark.parametrize("kind", ["hinge", "softplus", "abs", "square"])
def test_nan_and_infinity_reach_the_sums(kind):
    a, b = torch.ones(40, 2), torch.ones(50, 2)
    b[7] = NAN
    assert gk.sum_scores(a, b, kind).isnan()
    b[7] = INF
    assert gk.sum_scores(a, b, kind) == INF
    b[7] = -INF
    expected = gk.reference.sum_scores(a, b, kind)
    torch.testing.assert_close(gk.sum_scores(a, b, kind), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "relu"}, "kind: .*'hinge', 'softplus', 'abs', 'square', got 'relu'"),
        ({"positives": "drop"}, "positives: .*'include', 'exclude', 'negate', got 'drop'"),
        ({"reduction": "mean"}, "reduction: .*'sum', 'none', got 'mean'"),
        ({"scale": -2}, "scale: .*> 0, got -2"),
        ({"bias": INF}, "bias: .*got inf"),
        ({"a_ids": torch.arange(4)}, "b_ids: .*4 and 6 rows"),
    ],
)
def test_bad_options_of_sums(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        gk.sum_scores(X, Y, **{"kind": "abs", **options})


# Small problems, by Triton

SHAPES = [(1, 1, 1), (1, 40, 3), (40, 1, 8), (16, 32, 16), (17, 33, 17), (50, 97, 24), (70, 70, 40)]
PAIRED = [shape for shape in SHAPES if shape[0] <= shape[1]]


class Sum:
    """A call of `score_sums` and its truth in fp64."""

    def __init__(self, n, m, d, dtype, kind, positives, ids=False, relative=False, learnable=True, twice=False):
        self.a, self.b = two_sides(n, m, d, dtype, twice)
        self.kind, self.positives, self.relative, self.learnable = kind, positives, relative, learnable
        self.scale, self.bias = torch.tensor(1.0 if relative else 0.75), torch.tensor(0.3)
        self.ids = (torch.arange(n) % 5 - 2**40, torch.arange(m) % 3 - 2**40) if ids else (None, None)
        self.ids = (self.ids[0], None) if twice else self.ids

    def term(self, t, same, dim=1):
        f, _ = pointwise(torch.where(same, -t, t) if self.positives == "negate" else t, self.kind)
        return torch.where(same, 0, f).sum(dim) if self.positives == "exclude" else f.sum(dim)

    def truth(self):
        """(leaves, t, the rows' terms, which add up to the total)"""
        leaves = [t if t is None else t.double().requires_grad_() for t in (self.a, self.b, self.scale, self.bias)]
        a, b, scale, bias = leaves
        b = a if b is None else b
        n = len(a)
        s = a @ b.T
        same = torch.eye(*s.shape, dtype=torch.bool)
        if self.ids[0] is not None:
            other = self.ids[0] if self.ids[1] is None else self.ids[1]
            same = same | (self.ids[0][:, None] == other)
        t = scale * s + bias
        t.retain_grad()
        if not self.relative:
            return leaves, t, self.term(t, same)
        positive_score = s.diagonal()
        return (
            leaves,
            t,
            self.term(t - positive_score[:, None], same) + self.term(t[:, :n] - positive_score, same[:, :n], 0),
        )

    def run(self, share=1.0, needs=(True, True), upstream=1.0):
        """(what is found, the gradients)"""
        on = [t if t is None else t.to(DEVICE) for t in (self.a, self.b)]
        numbers, constants, *inputs = self.arguments()
        needs = [needs[0], needs[1] and self.b is not None]
        results = device_ops.total(*on, *numbers, *constants, *inputs, share=share, needs=needs)
        grad = torch.tensor(upstream).to(DEVICE)
        return results, device_ops.total_backward(grad, *results[1:], *on, *numbers, constants[0], share)

    def arguments(self):
        """(tensors of κ and β, numbers for them, ids, kind, positives, relative)"""
        scale = self.scale.log() if self.learnable == "log" else self.scale
        numbers = [t.to(DEVICE) if self.learnable else None for t in (scale, self.bias)]
        constants = (
            (None if self.learnable == "log" else 1.0, 0.0) if self.learnable else (float(self.scale), float(self.bias))
        )
        ids = [t if t is None else t.to(DEVICE) for t in self.ids]
        return numbers, constants, *ids, self.kind, self.positives, self.relative

    def check_rows(self, needs=(True, True), known=False, expanded=False):
        """Rows' sums and its gradient; known: with the pairs' scores given, and so in `score_sums`."""
        dtype = self.a.dtype
        leaves, t, terms = self.truth()
        grad = torch.full((), 0.75).expand(len(terms)) if expanded else torch.randn(len(terms))
        (terms * grad.double()).sum().backward()
        if self.learnable == "log":
            leaves[2].grad *= self.scale
        on = [x if x is None else x.to(DEVICE) for x in (self.a, self.b)]
        numbers, constants, *arguments = self.arguments()
        inputs, needs = (*on, *numbers, *constants, *arguments), [needs[0], needs[1] and self.b is not None]
        known_score = device_ops.pair_scores(*on, None, None) if known else None
        results, positive_score = device_ops.rows(*inputs, positive_score=known_score)
        assert results.dtype == torch.float32
        close(results, terms.detach(), torch.float32, subnormal=True)
        assert positive_score.shape == ((len(terms),) if self.relative and not known else (0,))
        known_score = known_score if known else positive_score if self.relative else None
        gradients = device_ops.rows_backward(grad.to(DEVICE), *inputs, positive_score=known_score, needs=needs)
        slopes = t.grad.abs() * (self.a.double() @ (self.a if self.b is None else self.b).double().T).abs()
        sizes = (None, None, slopes.sum(), t.grad.abs().sum())
        for gradient, leaf, need, size in zip(gradients, leaves, (*needs, True, True), sizes, strict=True):
            if not need:
                assert gradient.numel() == 0
            elif leaf.dim() or not self.relative:
                close(gradient, leaf.grad, dtype, size=size, subnormal=True)
                assert gradient.dtype == (dtype if leaf.dim() else torch.float32)
        if known:
            value, *_ = device_ops.total(*inputs, share=0.25, needs=needs, positive_score=known_score)
            close(value, 0.25 * terms.sum().detach(), torch.float32, subnormal=True)

    def check(self, share=0.25, upstream=2.0, needs=(True, True)):
        dtype = self.a.dtype
        leaves, t, total = self.truth()
        total = total.sum()
        total.backward()
        if self.learnable == "log":
            leaves[2].grad *= self.scale
        (value, *_), gradients = self.run(share, needs, upstream)
        close(value, share * total.detach(), torch.float32, subnormal=True)
        slopes = t.grad.abs() * (self.a.double() @ (self.a if self.b is None else self.b).double().T).abs()
        sizes = (None, None, slopes.sum(), t.grad.abs().sum())
        wanted = (needs[0], needs[1] and self.b is not None, not self.relative, not self.relative)
        for gradient, leaf, need, size in zip(gradients, leaves, wanted, sizes, strict=True):
            if leaf is None or (leaf.dim() > 0 and not need):
                assert gradient.numel() == 0
            elif need:
                factor = share * upstream
                size = size if size is None else factor * size
                close(gradient, factor * leaf.grad, dtype, size=size, subnormal=True)
                assert gradient.dtype == (dtype if leaf.dim() else torch.float32)


@few
@every_dtype
@pytest.mark.parametrize("positives", ["include", "exclude", "negate"])
@pytest.mark.parametrize("kind", ["hinge", "softplus", "abs", "square"])
def test_totals_of_every_kind(kind, positives, dtype):
    Sum(33, 50, 24, dtype, kind, positives).check()
    Sum(20, 17, 9, dtype, kind, positives, ids=True, learnable=False).check()


@few
@every_dtype
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_totals(n, m, d, dtype):
    Sum(n, m, d, dtype, "softplus", "negate", ids=n > 20).check()


@few
@every_dtype
@pytest.mark.parametrize("n", [1, 16, 33, 50])
def test_totals_of_one_side_twice(n, dtype):
    Sum(n, n, 24, dtype, "softplus", "negate", ids=n > 20, twice=True).check()


@few
@every_dtype
@pytest.mark.parametrize(("n", "m", "d"), PAIRED)
def test_totals_relative_to_the_pairs(n, m, d, dtype):
    for ids in (False, True):
        Sum(n, m, d, dtype, "hinge", "exclude", ids, relative=True, learnable=False).check()


@few
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("relative", [True, False])
def test_what_is_not_wanted_of_a_total_is_empty(relative, needs):
    Sum(33, 50, 24, torch.float32, "hinge", "exclude", relative=relative, learnable=False).check(needs=needs)


@few
@every_dtype
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_rows(n, m, d, dtype):
    Sum(n, m, d, dtype, "softplus", "negate", ids=n > 20, learnable=n % 2 == 0).check_rows(expanded=n == 16)
    Sum(n, m, d, dtype, "square", "exclude", ids=n < 20).check_rows()


@few
@every_dtype
def test_sums_of_a_logarithm(dtype):
    call = Sum(33, 50, 24, dtype, "softplus", "negate", learnable="log")
    call.check()
    call.check_rows()


@few
@every_dtype
@pytest.mark.parametrize("n", [1, 16, 50])
def test_rows_of_one_side_twice(n, dtype):
    Sum(n, n, 24, dtype, "softplus", "negate", ids=n > 20, twice=True).check_rows()


@few
@every_dtype
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), PAIRED)
def test_rows_relative_to_the_pairs(n, m, d, known, dtype):
    for ids in (False, True):
        Sum(n, m, d, dtype, "hinge", "exclude", ids, relative=True, learnable=False).check_rows(known=known)


@few
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("relative", [True, False])
def test_what_is_not_wanted_of_rows_is_empty(relative, needs):
    Sum(33, 50, 24, torch.float32, "hinge", "exclude", relative=relative, learnable=False).check_rows(needs)


@few
@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_rows_of_special_values(special):
    for relative in (False, True):
        call = Sum(40, 70, 8, torch.float32, "hinge", "exclude", relative=relative, learnable=False)
        call.a[17, 0], call.b[:, 0] = special, call.b[:, 0].abs()
        numbers, constants, *inputs = call.arguments()
        results, _ = device_ops.rows(call.a.to(DEVICE), call.b.to(DEVICE), *numbers, *constants, *inputs)
        expected = call.truth()[2].detach()
        torch.testing.assert_close(results.cpu().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@few
@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_totals_of_special_values(special):
    for relative in (False, True):
        call = Sum(40, 70, 8, torch.float32, "hinge", "exclude", relative=relative, learnable=False)
        call.a[17, 0], call.b[:, 0] = special, call.b[:, 0].abs()
        total = call.truth()[2].sum()
        (value, *_), _ = call.run()
        torch.testing.assert_close(value.cpu().double(), total.detach(), rtol=1e-5, atol=0, equal_nan=True)


@few
def test_what_is_too_large_or_empty_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 50)
    for n, m, declined in ((40, 50, False), (40, 51, True), (0, 5, True), (5, 0, True)):
        call = Sum(n, m, 8, torch.float32, "abs", "include")
        numbers, constants, *options = call.arguments()
        inputs = (call.a, call.b, *numbers, *constants, *options)
        needs = [True, True]
        assert (device_ops.route("score_sums", *inputs, "sum", 1.0, needs) == "chunks") == declined
        assert (device_ops.route("score_sums", *inputs, "none", 1.0, needs) == "chunks") == declined
        gradients = [torch.zeros(n)] * 5
        assert (
            device_ops.route("score_sums_backward", *gradients, *inputs, "none", 1.0, needs) == "chunks"
        ) == declined
        assert device_ops.route("score_sums_backward", *gradients, *inputs, "sum", 1.0, needs) == "triton"


@few
def test_the_same_inputs_give_the_same_bits():
    call = Sum(50, 97, 24, torch.float32, "hinge", "exclude", relative=True, learnable=False)
    for x, y in zip(call.run()[1], call.run()[1], strict=True):
        assert torch.equal(x, y)


# Many scores by row panels, by Triton


@row_panels
@row_panel_checks.every_panel_size
@pytest.mark.parametrize("ids", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize(("kind", "positives"), [("softplus", "negate"), ("hinge", "exclude"), ("square", "include")])
@pytest.mark.parametrize(("n", "m", "d"), row_panel_checks.SHAPES[1:4])
def test_sums_and_gradients_by_row_panels(monkeypatch, n, m, d, kind, positives, ids, scores):
    monkeypatch.setattr(tiles, "ROW_PANEL_SCORES", scores)
    a, b = row_panel_checks.sides(n, m, d)
    labels = [torch.randint(0, 9, (k,), device=DEVICE) for k in (n, m)] if ids else [None, None]
    scale, bias = torch.tensor(0.9, device=DEVICE), torch.tensor(-0.4, device=DEVICE)
    expected, right = row_panel_checks.true_sums(fp64_leaves(a, b, scale, bias), labels, kind, positives, 0.25)

    options = (*labels, kind, positives, False)
    results = device_ops.total(a, b, scale, bias, 1.0, 0.0, *options, share=0.25, needs=[True, True])
    total, dscale, dbias, da, db = results
    for ours, truth in zip((total, dscale, dbias), (expected, *right[2:]), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=2e-5, atol=2e-5 * n * m / 100)
    for ours, truth in zip((da, db), right[:2], strict=True):  # κ, the share and grad_out are still to come
        row_panel_checks.close(0.25 * 0.9 * ours, truth)

    alone = device_ops.total(a, b, scale, bias, 1.0, 0.0, *options, share=0.25, needs=[False, False])
    assert [g.numel() for g in alone[3:]] == [0, 0]
    if scores == row_panel_checks.PANEL_SCORES[0]:
        return
    for ours, whole in zip(alone[:3], results[:3], strict=True):
        torch.testing.assert_close(ours, whole)
    log = device_ops.total(a, b, scale.log(), bias, None, 0.0, *options, share=0.25, needs=[False, False])
    torch.testing.assert_close(log[0], total)


# The pass over a chunk of scores, by Triton


@few
@pytest.mark.parametrize("positives", ["include", "exclude", "negate"])
@pytest.mark.parametrize("kind", ["hinge", "softplus", "abs", "square"])
@pytest.mark.parametrize("columns", ["none", "some", "all"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (17, 33), (40, 70), (50, 7)])
def test_score_sums_pass(n, m, columns, kind, positives):
    s, scale = 2 * torch.randn(n, m), torch.tensor(0.8)
    k = {"none": 0, "some": (m + 1) // 2, "all": m}[columns]
    weighted, with_ids = kind != "abs", kind != "softplus"
    arguments = [
        s, scale, torch.tensor(-0.4), torch.randn(n), torch.randn(n) if weighted else None,
        torch.randn(k) if k else None, torch.randn(k) if k and weighted else None,
        torch.arange(n) % 5 - 2**40 if with_ids else None, torch.arange(m) % 3 - 2**40 if with_ids else None,
        3, kind, positives, columns != "some", torch.empty(3, n), torch.randn(2, k),
    ]  # fmt: skip
    for got, expected in both_passes("score_sums_pass", arguments, (0, 13, 14)):
        if expected.numel():
            close(got, expected, torch.float32, rtol=1e-5)


@few
def test_special_values_pass_through_the_sums():
    s = torch.tensor([[0.0, NAN, INF, -INF, 1e30, -1e30]]).repeat(3, 1)
    for kind in ("hinge", "softplus", "abs", "square"):
        arguments = [
            s,
            torch.ones(()),
            torch.zeros(()),
            *[None] * 6,
            0,
            kind,
            "include",
            True,
            torch.empty(3, 3),
            torch.empty(2, 0),
        ]
        slopes, _ = both_passes("score_sums_pass", arguments, (0, 13))
        assert torch.equal(slopes[0].float().nan_to_num(9), slopes[1].float().nan_to_num(9))


# How many kernels a step launches


@every_small_batch({"none": (lambda x, y, t: gk.sum_scores(x, y, "abs", scale=t, reduction="none"), (2, 2))})
def test_launches(loss, expected, n, dtype):
    check_count(loss, expected, n, dtype)
