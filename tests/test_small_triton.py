"""Small dense losses in few launches: their Triton kernels, and the triplet's by a metric, against fp64."""

import pytest
import torch
from interpreted import DEVICE, DTYPES, where_triton_runs

from gssf_kernels import plan, reference
from gssf_kernels.kernels import contrast, logsumexp, pairs, project, sums, tiles
from gssf_kernels.statistics.sums import pointwise

INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1, 1), (1, 40, 3), (40, 1, 8), (16, 32, 16), (17, 33, 17), (50, 97, 24), (70, 70, 40)]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tiles.Sweep(16, 32, 16, 4, 2))
    monkeypatch.setattr(tiles, "MERGE_PARTS", 2)
    monkeypatch.setattr(tiles, "MERGE_LANES", 32)
    monkeypatch.setattr(tiles, "TERM_LANES", 16)
    monkeypatch.setattr(tiles, "TERMS", 16)
    monkeypatch.setattr(tiles, "SCAN_EDGES", 8)
    monkeypatch.setattr(tiles, "EDGE_CHANNELS", 32)
    monkeypatch.setattr(tiles, "PROJECT", dict.fromkeys(tiles.PROJECT, tiles.Project(16, 16, 4, 2)))
    monkeypatch.setattr(tiles, "GRADIENTS", dict.fromkeys(tiles.GRADIENTS, tiles.Gradients(16, 32, 16, 4, 2)))


def given(n, m, d, dtype, twice=False):
    a = torch.randn(n, d, dtype=torch.float64).to(dtype)
    return a, None if twice else torch.randn(m, d, dtype=torch.float64).to(dtype)


def truth(a, b, scale):
    """(leaves, t, row and column log-sums, pairs) in fp64."""
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in (a, b, scale)]
    x, y = leaves[0], leaves[0] if b is None else leaves[1]
    t = leaves[2] * (x @ y.T)
    t.retain_grad()
    return leaves, t, t.logsumexp(1), t.logsumexp(0), t.diagonal()


def close(got, expected, dtype, like=None):
    """Within some roundings of dtype of the largest number."""
    rtol = 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    largest = (expected if like is None else like).nan_to_num(0, 0, 0).abs().max()
    atol = rtol * float(largest) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), expected, rtol=rtol, atol=atol, equal_nan=True)


def forward(a, b, scale, learnable=True):
    on = [t if t is None else t.to(DEVICE) for t in (a, b, scale if learnable else None)]
    constant = 1.0 if learnable else float(scale)
    return (*on, constant), logsumexp.logsumexp_scores(*on, constant)


@every_dtype
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_log_sums(n, m, d, learnable, dtype):
    a, b = given(n, m, d, dtype)
    scale = torch.tensor(0.75)
    _, (row_max, row_log, col_max, col_log, pair, _) = forward(a, b, scale, learnable)
    *_, rows, cols, own = truth(a, b, scale)
    for got, expected in ((row_max + row_log, rows), (col_max + col_log, cols), (pair, own)):
        assert got.dtype == torch.float32
        assert got.shape == expected.shape
        close(got, expected.detach(), torch.float32)


@pytest.mark.parametrize("special", [INF, -INF, NAN])
@pytest.mark.parametrize("place", ["row", "both"])
def test_log_sums_of_special_values(place, special):
    a, b = given(40, 70, 8, torch.float32)
    a[17, 0] = special
    if place == "both":
        b[3, 0] = b[33, 0] = special
    a[:, 1], b[:, 1] = 0, 0
    a[20, 1] = b[50, 1] = INF  # 0 times it is NaN
    scale = torch.tensor(0.75)
    _, (row_max, row_log, col_max, col_log, *_) = forward(a, b, scale)
    *_, rows, cols, _ = truth(a, b, scale)
    for got, expected in ((row_max + row_log, rows), (col_max + col_log, cols)):
        assert torch.equal(got.isnan().cpu(), expected.isnan())
        close(got, expected.detach(), torch.float32)


@every_dtype
@pytest.mark.parametrize("lines", ["row", "col", "pair", "row pair", "row col pair"])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_gradients(n, m, d, lines, dtype):
    check_gradients(n, m, d, lines, dtype, learnable=(n + m) % 2 == 0)


@every_dtype
@pytest.mark.parametrize("n", [1, 16, 33, 50])
def test_gradients_of_one_side_twice(n, dtype):
    check_gradients(n, n, 24, "row col pair", dtype, twice=True)
    check_gradients(n, n, 24, "row", dtype, twice=True)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_what_is_not_wanted_is_empty(needs):
    check_gradients(33, 50, 24, "row col pair", torch.float32, needs=needs)


@every_dtype
def test_gradients_below_the_smallest_half(dtype):
    """A mean over many leaves each score little: nothing of it may be lost."""
    check_gradients(33, 50, 24, "row col pair", dtype, needs=(True, False, True), size=1e-6)


def check_gradients(n, m, d, lines, dtype, twice=False, learnable=True, needs=(True,) * 3, size=1.0):
    a, b = given(n, m, d, dtype, twice)
    if size != 1:  # gradients that halves hold, of scores' gradients that they do not
        a, b = a / 512, b * 512
    scale = torch.tensor(0.75)
    inputs, found = forward(a, b, scale, learnable)
    leaves, t, *outputs = truth(a, b, scale)
    names = ("row", "col", "pair")
    grads = [
        size * torch.randn(len(t)) if name in lines.split() else None for name, t in zip(names, outputs, strict=True)
    ]
    sum((t * g.double()).sum() for t, g in zip(outputs, grads, strict=True) if g is not None).backward()
    on = [t if t is None else t.to(DEVICE) for t in grads]
    got = logsumexp.logsumexp_scores_backward(*on, *inputs, *found[:4], [*needs])
    for gradient, leaf, need in zip(got, leaves, needs, strict=True):
        if not need or leaf is None:
            assert gradient.numel() == 0
        else:
            assert gradient.shape == leaf.shape
            parts = t.grad * t.detach() / scale if leaf is leaves[2] else None  # which may cancel
            close(gradient, leaf.grad, dtype, like=None if parts is None else parts.abs().sum())


def test_a_line_of_nothing_gets_no_gradient():
    """All of a row at -inf: its log-sum is -inf, and nothing flows."""
    a, b = torch.full((3, 1), 1.0), torch.full((4, 1), -INF)
    inputs, found = forward(a, b, torch.tensor(1.0))
    assert found[0].tolist() == [-INF] * 3
    assert found[1].tolist() == [-INF] * 3
    drow = torch.ones(3).to(DEVICE)
    _, db, _ = logsumexp.logsumexp_scores_backward(drow, None, None, *inputs, *found[:4], [False, True, False])
    assert db.tolist() == [[0.0]] * 4


# InfoNCE


def labels(n, m, ids):
    """Ids in common and not, one that none of the other side has, and none of the pairs' own."""
    return (torch.arange(n) % 5 - 2**40, (torch.arange(m) + 1) % 7 - 2**40) if ids else (None, None)


class Contrast:
    """A call of `contrast` and its truth in fp64, by the definition."""

    def __init__(self, n, m, d, dtype, reduction="mean", ids=False, epsilon=0.0, symmetric=True, learnable=True,
                 twice=False):  # fmt: skip
        self.a, self.b = given(n, m, d, dtype, twice)
        self.ids = labels(n, n if twice else m, ids)
        self.options = epsilon, symmetric, reduction
        self.scale, self.learnable = torch.tensor(0.75), learnable

    def truth(self):
        """(leaves, t, log-sums and targets [N], each of both directions or their sum or mean)"""
        leaves, t, rows, cols, _ = truth(self.a, self.b, self.scale)
        epsilon, symmetric, reduction = self.options
        n, m = t.shape
        same = torch.eye(n, m, dtype=torch.bool)
        if self.ids[0] is not None:
            same = same | (self.ids[0][:, None] == self.ids[1])

        def direction(t, same, log_sums):
            same = same.double()
            target = torch.where(same > 0, t * same / same.sum(1, keepdim=True), 0).sum(1) * (1 - epsilon)
            return torch.stack((log_sums, target + epsilon * t.mean(1) if epsilon else target))

        found = direction(t, same, rows)
        if symmetric:
            found = (found + direction(t[:, :n].T, same[:, :n].T, cols[:n])) / 2
        return leaves, t, *(reference.reduce(part, reduction) for part in found)

    def run(self, grad=None, needs=(True, True, True), logarithm=False):
        """(what is found, the gradients)"""
        scale = (self.scale.log() if logarithm else self.scale) if self.learnable else None
        on = [t if t is None else t.to(DEVICE) for t in (self.a, self.b, scale)]
        ids = [t if t is None else t.to(DEVICE) for t in self.ids]
        constant = None if logarithm else 1.0 if self.learnable else float(self.scale)
        inputs = (*on, constant, *ids, *self.options)
        found = contrast.contrast(*inputs)
        if found is NotImplemented or grad is None:
            return found, None
        needs = [needs[0], needs[1] and self.b is not None, needs[2] and self.learnable]
        return found, contrast.contrast_backward(grad.to(DEVICE), *inputs, *found[1:-1], needs)

    def check(self, needs=(True, True, True), size=1.0, expanded=False, logarithm=False):
        leaves, t, *parts = self.truth()
        loss = parts[0] - parts[1]
        grad = size * (torch.randn(loss.shape) if not expanded else torch.ones(()).expand(loss.shape))
        # the shares and the targets' weights of each score, which may cancel
        weights = sum(torch.autograd.grad(part, t, grad.double(), retain_graph=True)[0].abs() for part in parts)
        loss.backward(grad.double())
        x, y = self.a.double().abs(), (self.a if self.b is None else self.b).double().abs()
        of_a, of_b, of_scale = (w * self.scale for w in (weights @ y, weights.T @ x, weights * t.abs() / self.scale**2))
        likes = (torch.maximum(of_a, of_b) if self.b is None else of_a, of_b, of_scale.detach().sum())
        (got, *_), gradients = self.run(grad, needs, logarithm)
        if logarithm:
            leaves[2].grad *= self.scale
        sizes = t.detach().nan_to_num(0, 0, 0).abs().amax() * (len(t) if self.options[2] == "sum" else 1)
        assert got.dtype == torch.float32
        assert got.shape == loss.shape
        close(got, loss.detach(), torch.float32, like=2 * sizes + 4)
        wanted = (needs[0], needs[1] and self.b is not None, needs[2] and self.learnable)
        for gradient, leaf, need, like in zip(gradients, leaves, wanted, likes, strict=True):
            if not need:
                assert gradient.numel() == 0
                continue
            assert gradient.shape == leaf.shape
            assert gradient.dtype == (self.a.dtype if leaf.dim() else torch.float32)
            close(gradient, leaf.grad, self.a.dtype, like=like)


PAIRED = [shape for shape in SHAPES if shape[0] <= shape[1]]
every_reduction = pytest.mark.parametrize("reduction", ["sum", "mean", "none"])


@every_dtype
@every_reduction
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), PAIRED)
def test_contrast(n, m, d, symmetric, reduction, dtype):
    Contrast(n, m, d, dtype, reduction, symmetric=symmetric, learnable=n % 2 == 0).check()


@every_dtype
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("ids", "epsilon"), [(True, 0.0), (False, 0.25), (True, 0.25)])
@pytest.mark.parametrize(("n", "m", "d"), PAIRED)
def test_contrast_of_soft_targets(n, m, d, ids, epsilon, symmetric, dtype):
    Contrast(n, m, d, dtype, "none" if n == 33 else "mean", ids, epsilon, symmetric, learnable=n % 2 == 1).check()


@every_dtype
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [1, 16, 33, 50])
def test_contrast_of_one_side_twice(n, symmetric, dtype):
    Contrast(n, n, 24, dtype, symmetric=symmetric, twice=True).check()
    Contrast(n, n, 24, dtype, "none", True, 0.1, symmetric, twice=True).check()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_what_is_not_wanted_of_contrast_is_empty(needs):
    Contrast(33, 50, 24, torch.float32).check(needs=needs)


def test_contrast_of_a_logarithm():
    for dtype in DTYPES:
        Contrast(33, 50, 24, dtype, ids=True).check(logarithm=True)


def test_contrast_takes_expanded_gradients_and_small_ones():
    for dtype in DTYPES:
        Contrast(33, 50, 24, dtype, "none").check(expanded=True)
        call = Contrast(33, 50, 24, dtype)
        call.a, call.b = call.a / 512, call.b * 512
        call.check(needs=(True, False, True), size=1e-6)


@every_reduction
@pytest.mark.parametrize("special", [INF, -INF, NAN])
@pytest.mark.parametrize("place", ["row", "column", "extra column"])
def test_contrast_of_special_values(place, special, reduction):
    for ids in (False, True):
        call = Contrast(40, 70, 8, torch.float32, reduction, ids)
        call.a[:, 0], call.b[:, 0] = call.a[:, 0].abs(), call.b[:, 0].abs()
        (call.a if place == "row" else call.b)[{"row": 17, "column": 33, "extra column": 66}[place], 0] = special
        (value, *_), _ = call.run()
        log_sums, targets = call.truth()[2:]
        expected = (log_sums - targets).detach()
        assert torch.equal(value.isnan().cpu(), expected.isnan())
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_contrast_of_a_trained_model_keeps_a_small_loss():
    """A difference of large numbers, of which nothing may be left but what they differ by."""
    call = Contrast(40, 50, 8, torch.float32, "none")
    call.a = torch.nn.functional.normalize(call.a, dim=1)
    call.b[:40] = call.a
    call.b[40:] = torch.nn.functional.normalize(call.b[40:], dim=1)
    call.scale = torch.tensor(200.0)
    for ids in ((None, None), (torch.arange(40), torch.arange(50))):
        call.ids = ids
        (value, *_), _ = call.run()
        s = 200 * (call.a.double() @ call.b.double().T)
        expected = (s.logsumexp(1) + s.logsumexp(0)[:40]) / 2 - s.diagonal()
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-3, atol=1e-6)


# sums


class Sum:
    """A call of `score_total` and its truth in fp64."""

    def __init__(self, n, m, d, dtype, kind, positives, ids=False, relative=False, learnable=True, twice=False):
        self.a, self.b = given(n, m, d, dtype, twice)
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
        own = s.diagonal()
        return leaves, t, self.term(t - own[:, None], same) + self.term(t[:, :n] - own, same[:, :n], 0)

    def run(self, share=1.0, needs=(True, True), upstream=1.0):
        """(what is found, the gradients)"""
        on = [t if t is None else t.to(DEVICE) for t in (self.a, self.b)]
        numbers, constants, *given = self.given()
        needs = [needs[0], needs[1] and self.b is not None]
        found = sums.score_total(*on, *numbers, *constants, *given, share, needs)
        if found is NotImplemented:
            return found, None
        grad = torch.tensor(upstream).to(DEVICE)
        return found, sums.score_total_backward(grad, *found[1:], *on, *numbers, constants[0], share)

    def given(self):
        """(tensors of κ and β, numbers for them, ids, kind, positives, relative)"""
        scale = self.scale.log() if self.learnable == "log" else self.scale
        numbers = [t.to(DEVICE) if self.learnable else None for t in (scale, self.bias)]
        constants = (
            (None if self.learnable == "log" else 1.0, 0.0) if self.learnable else (float(self.scale), float(self.bias))
        )
        ids = [t if t is None else t.to(DEVICE) for t in self.ids]
        return numbers, constants, *ids, self.kind, self.positives, self.relative

    def check_rows(self, needs=(True, True), known=False, expanded=False):
        """`score_rows` and its gradient; known: with the pairs' scores given, and so in `score_total`."""
        dtype = self.a.dtype
        leaves, t, terms = self.truth()
        grad = torch.full((), 0.75).expand(len(terms)) if expanded else torch.randn(len(terms))
        (terms * grad.double()).sum().backward()
        if self.learnable == "log":
            leaves[2].grad *= self.scale
        on = [x if x is None else x.to(DEVICE) for x in (self.a, self.b)]
        numbers, constants, *given = self.given()
        inputs, needs = (*on, *numbers, *constants, *given), [needs[0], needs[1] and self.b is not None]
        pair = pairs.pair_scores(*on, None, None) if known else None
        found, own = sums.score_rows(*inputs, pair)
        assert found.dtype == torch.float32
        close(found, terms.detach(), torch.float32)
        assert own.shape == ((len(terms),) if self.relative and not known else (0,))
        pair = pair if known else own if self.relative else None
        gradients = sums.score_rows_backward(grad.to(DEVICE), *inputs, pair, needs)
        slopes = t.grad.abs() * (self.a.double() @ (self.a if self.b is None else self.b).double().T).abs()
        sizes = (None, None, slopes.sum(), t.grad.abs().sum())
        for gradient, leaf, need, like in zip(gradients, leaves, (*needs, True, True), sizes, strict=True):
            if not need:
                assert gradient.numel() == 0
            elif leaf.dim() or not self.relative:
                close(gradient, leaf.grad, dtype, like=like)
                assert gradient.dtype == (dtype if leaf.dim() else torch.float32)
        if known:
            value, *_ = sums.score_total(*inputs, 0.25, needs, pair)
            close(value, 0.25 * terms.sum().detach(), torch.float32)

    def check(self, share=0.25, upstream=2.0, needs=(True, True)):
        dtype = self.a.dtype
        leaves, t, total = self.truth()
        total = total.sum()
        total.backward()
        if self.learnable == "log":
            leaves[2].grad *= self.scale
        (value, *_), gradients = self.run(share, needs, upstream)
        close(value, share * total.detach(), torch.float32)
        slopes = t.grad.abs() * (self.a.double() @ (self.a if self.b is None else self.b).double().T).abs()
        sizes = (None, None, slopes.sum(), t.grad.abs().sum())
        wanted = (needs[0], needs[1] and self.b is not None, not self.relative, not self.relative)
        for gradient, leaf, need, like in zip(gradients, leaves, wanted, sizes, strict=True):
            if leaf is None or (leaf.dim() > 0 and not need):
                assert gradient.numel() == 0
            elif need:
                factor = share * upstream
                close(gradient, factor * leaf.grad, dtype, like=like if like is None else factor * like)
                assert gradient.dtype == (dtype if leaf.dim() else torch.float32)


@every_dtype
@pytest.mark.parametrize("positives", ["include", "exclude", "negate"])
@pytest.mark.parametrize("kind", ["hinge", "softplus", "abs", "square"])
def test_totals_of_every_kind(kind, positives, dtype):
    Sum(33, 50, 24, dtype, kind, positives).check()
    Sum(20, 17, 9, dtype, kind, positives, ids=True, learnable=False).check()


@every_dtype
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_totals(n, m, d, dtype):
    Sum(n, m, d, dtype, "softplus", "negate", ids=n > 20).check()


@every_dtype
@pytest.mark.parametrize("n", [1, 16, 33, 50])
def test_totals_of_one_side_twice(n, dtype):
    Sum(n, n, 24, dtype, "softplus", "negate", ids=n > 20, twice=True).check()


@every_dtype
@pytest.mark.parametrize(("n", "m", "d"), [shape for shape in SHAPES if shape[0] <= shape[1]])
def test_totals_relative_to_the_pairs(n, m, d, dtype):
    for ids in (False, True):
        Sum(n, m, d, dtype, "hinge", "exclude", ids, relative=True, learnable=False).check()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("relative", [True, False])
def test_what_is_not_wanted_of_a_total_is_empty(relative, needs):
    Sum(33, 50, 24, torch.float32, "hinge", "exclude", relative=relative, learnable=False).check(needs=needs)


@every_dtype
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_rows(n, m, d, dtype):
    Sum(n, m, d, dtype, "softplus", "negate", ids=n > 20, learnable=n % 2 == 0).check_rows(expanded=n == 16)
    Sum(n, m, d, dtype, "square", "exclude", ids=n < 20).check_rows()


@every_dtype
def test_sums_of_a_logarithm(dtype):
    call = Sum(33, 50, 24, dtype, "softplus", "negate", learnable="log")
    call.check()
    call.check_rows()


@every_dtype
@pytest.mark.parametrize("n", [1, 16, 50])
def test_rows_of_one_side_twice(n, dtype):
    Sum(n, n, 24, dtype, "softplus", "negate", ids=n > 20, twice=True).check_rows()


@every_dtype
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), [shape for shape in SHAPES if shape[0] <= shape[1]])
def test_rows_relative_to_the_pairs(n, m, d, known, dtype):
    for ids in (False, True):
        Sum(n, m, d, dtype, "hinge", "exclude", ids, relative=True, learnable=False).check_rows(known=known)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("relative", [True, False])
def test_what_is_not_wanted_of_rows_is_empty(relative, needs):
    Sum(33, 50, 24, torch.float32, "hinge", "exclude", relative=relative, learnable=False).check_rows(needs)


@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_rows_of_special_values(special):
    for relative in (False, True):
        call = Sum(40, 70, 8, torch.float32, "hinge", "exclude", relative=relative, learnable=False)
        call.a[17, 0], call.b[:, 0] = special, call.b[:, 0].abs()
        numbers, constants, *given = call.given()
        found, _ = sums.score_rows(call.a.to(DEVICE), call.b.to(DEVICE), *numbers, *constants, *given)
        expected = call.truth()[2].detach()
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_totals_of_special_values(special):
    for relative in (False, True):
        call = Sum(40, 70, 8, torch.float32, "hinge", "exclude", relative=relative, learnable=False)
        call.a[17, 0], call.b[:, 0] = special, call.b[:, 0].abs()
        total = call.truth()[2].sum()
        (value, *_), _ = call.run()
        torch.testing.assert_close(value.cpu().double(), total.detach(), rtol=1e-5, atol=0, equal_nan=True)


def test_pairs_of_all_rows():
    a, b = given(40, 50, 24, torch.float32)
    found = pairs.pair_scores(a.to(DEVICE), b.to(DEVICE), None, None)
    close(found, (a.double() * b[:40].double()).sum(1), torch.float32)


# the triplet with a metric


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
    x, y = given(n, m, d, dtype)
    diag, blocks = (torch.randn(*shape).to(dtype) for shape in ((d,), (d // b, b, b)))
    permutation = torch.randperm(d) if d > 4 else None
    rows, cols = torch.randint(-1, m, (n,)), torch.randint(-1, n, (m,))
    cols[::2] = n // 2  # a hub of more edges than one step takes
    dpair, drow, dcol = torch.randn(n), torch.randn(n), torch.randn(m)
    dpair[1::3] = dcol[1::5] = 0
    leaves = [t.double().requires_grad_() for t in (x, y, diag, blocks)]
    p = reference.project(leaves[0], *leaves[2:], permutation=permutation, normalize=normalize)
    s = p @ reference.project(leaves[1], normalize=normalize).T
    i, j = torch.arange(n), torch.arange(m)
    weight = torch.cat((dpair, drow, dcol)).double()
    edges = torch.cat((i, i, cols)), torch.cat((i, rows, j))
    real = (edges[0] >= 0) & (edges[1] >= 0)
    (weight[real] * s[edges[0][real], edges[1][real]]).sum().backward()
    on = [t if t is None else t.to(DEVICE) for t in (dpair, drow, dcol, rows, cols, x, y, diag, blocks, permutation)]
    found = project.hardest_project_backward(*on, normalize, [*needs])
    for got, leaf, need in zip(found, leaves, needs, strict=True):
        if need:
            assert got.dtype == dtype
            close(got, leaf.grad, dtype)
        else:
            assert got.numel() == 0


def test_by_a_metric_a_zero_gradient_adds_nothing_even_from_nan_rows():
    x, y, index = torch.randn(3, 8), torch.full((3, 8), NAN), torch.arange(3)
    zero, diag = torch.zeros(3), torch.randn(8)
    on = [t.to(DEVICE) for t in (zero, zero, zero, index, index, x, y, diag)]
    dx, _, ddiag, _ = project.hardest_project_backward(*on, None, None, True, [True, False, True, False])
    assert not dx.any()
    assert not ddiag.any()


def test_many_rows_of_a_metric_are_declined(monkeypatch):
    monkeypatch.setattr(plan, "SCAN_ROWS", 20)
    x, index, line = torch.randn(21, 8).to(DEVICE), torch.arange(21).to(DEVICE), torch.zeros(21).to(DEVICE)
    given = (line, line, line, index, index, x, x, None, None, None, True, [True] * 4)
    assert project.hardest_project_backward(*given) is NotImplemented


def test_what_is_too_large_or_empty_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 50)
    for n, m, declined in ((40, 50, False), (40, 51, True), (0, 5, True), (5, 0, True)):
        a, b = given(n, m, 8, torch.float32)
        assert (forward(a, b, torch.tensor(1.0))[1] is NotImplemented) == declined
        if n <= m:
            call = Contrast(n, m, 8, torch.float32)
            assert (call.run()[0] is NotImplemented) == declined
            lines = [torch.zeros(size) for size in (n, n, m, m, 0, 0)]
            options = (call.scale, 1.0, None, None, *call.options, *lines, [True] * 3)
            found = contrast.contrast_backward(torch.ones(()), call.a, call.b, *options) if declined else None
            assert (found is NotImplemented) == declined
        call = Sum(n, m, 8, torch.float32, "abs", "include")
        assert (call.run()[0] is NotImplemented) == declined
        numbers, constants, *options = call.given()
        inputs = (*(t.to(DEVICE) for t in (call.a, call.b, *numbers)), *constants, *options)
        assert (sums.score_rows(*inputs) is NotImplemented) == declined
        grad = torch.zeros(n).to(DEVICE)
        assert (sums.score_rows_backward(grad, *inputs, None, [True, True]) is NotImplemented) == declined


def test_the_same_inputs_give_the_same_bits():
    a, b = given(50, 97, 24, torch.float32)
    runs = []
    for _ in range(2):
        inputs, found = forward(a, b, torch.tensor(0.75))
        grads = (found[1], found[3], found[4])
        runs.append((*found, *logsumexp.logsumexp_scores_backward(*grads, *inputs, *found[:4], [True] * 3)))
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)
    call = Contrast(50, 97, 24, torch.float32, ids=True, epsilon=0.1)
    grad = torch.ones(())
    for x, y in zip(*((*found, *gradients) for found, gradients in (call.run(grad), call.run(grad))), strict=True):
        assert torch.equal(x, y)
    call = Sum(50, 97, 24, torch.float32, "hinge", "exclude", relative=True, learnable=False)
    for x, y in zip(call.run()[1], call.run()[1], strict=True):
        assert torch.equal(x, y)


where_triton_runs(globals())
