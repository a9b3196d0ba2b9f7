"""Options of the two-sided losses against their definitions: pairs, one direction, false negatives by margin.

The definitions are checked number by number in `test_definition_of_pairs.py`.
"""

import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pair_problems import KINDS, SHAPES, allowed, normal, problem

import gssf_kernels as gk
from gssf_kernels import _checks, plan

LOSSES = {
    "hardest": (gk.triplet_loss, {"margin": 0.3}),
    "all": (gk.triplet_loss, {"margin": 0.3, "negatives": "all"}),
    "semihard": (gk.triplet_loss, {"margin": 0.3, "negatives": "semihard"}),
    "goal": (gk.goal_loss, {"pair": "lin"}),
    "goal, a loss": (gk.goal_loss, {"triplet": "cir", "pair": "lin"}),
    "goal, linear": (gk.goal_loss, {"triplet": "con", "pair": "lin_ms"}),
    "goal, exponential": (gk.goal_loss, {"pair": "sig_ms"}),
}
DENSE = {
    "info_nce": (gk.info_nce_loss, {"scale": 6.0}),
    "sigmoid": (gk.sigmoid_loss, {"scale": 6.0, "bias": -2.0}),
}


def check(function, x, y, options, tolerance=1e-11, **settings):
    definition = getattr(gk.reference, function.__name__)
    results = []
    for f, cast in ((function, lambda t: t), (definition, lambda t: t.double())):
        inputs = [cast(t).clone().requires_grad_() for t in (x, y)]
        value = f(*inputs, **options, **settings)
        value, *statistics = value if isinstance(value, tuple) else (value,)
        weight = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
        (value * weight).sum().backward()
        diagnostics = statistics[0]._asdict().values() if statistics else ()
        results.append((value, *(t.grad for t in inputs), *diagnostics))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=tolerance, atol=tolerance)


COMBINATIONS = [
    (shape, kind, symmetric, margin)
    for shape, kind, symmetric, margin in itertools.product(SHAPES, KINDS, (True, False), (None, 0.2))
    if allowed(shape, kind)
]


@pytest.mark.filterwarnings("ignore:x_ids, y_ids")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("shape", "kind", "symmetric", "margin"), COMBINATIONS)
def test_every_option_together(loss, shape, kind, symmetric, margin):
    function, settings = LOSSES[loss]
    x, y, options = problem(shape, kind)
    for reduction in ("sum", "mean", "none"):
        if allowed(shape, kind, reduction, symmetric):
            switches = {"symmetric": symmetric, "false_negative_margin": margin, "reduction": reduction}
            check(function, x, y, options, diagnostics=True, **switches, **settings)


@pytest.mark.filterwarnings("ignore:x_ids, y_ids")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_that_ties_with_the_pair_is_not_semihard(kind, symmetric):
    """Whole numbers, so that ties are exact: a term of a tie would be the margin, and the next score's is less."""
    _, _, options = problem("wide", kind)
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randint(-1, 2, (n, 3), generator=generator).double() for n in SHAPES["wide"])
    check(gk.triplet_loss, x, y, options, margin=1.5, negatives="semihard", symmetric=symmetric)


@pytest.mark.parametrize("limits", [1, 2, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("margin", [None, 0.2])
def test_semihard_with_more_pairs_than_limits_of_a_sweep(limits, symmetric, margin, monkeypatch):
    """Rows with 0 to 7 pairs; one sweep at a time compares with so many."""
    monkeypatch.setattr(plan, "LIMITS", limits)
    x, y = normal(9, 5, 1), normal(40, 5, 2)
    ids = {"x_ids": torch.arange(9) // 2, "y_ids": torch.arange(40) % 6}
    switches = {"symmetric": symmetric, "false_negative_margin": margin, "negatives": "semihard"}
    check(gk.triplet_loss, x, y, {"pairs": "ids", **ids}, margin=0.7, **switches)


@pytest.mark.parametrize("kind", ["none", "ids", "listed", "listed with ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hardest_negatives(kind, dtype):
    x, y, options = problem("wide" if kind == "none" else "tiles", kind, dtype)
    options = {name.replace("x_", "a_").replace("y_", "b_"): value for name, value in options.items()}
    results = []
    for module in (gk, gk.reference):
        a, b = (t.double() if module is gk.reference else t for t in (x, y))
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        hardest = module.hardest_negatives(a, b, **options)
        scores = [t for t in (hardest.row_score, hardest.col_score, hardest.pair_score) if t is not None]
        sum(
            (t.where(t > -torch.inf, 0) * torch.linspace(0.5, 1, len(t), dtype=t.dtype)).sum() for t in scores
        ).backward()
        results.append([t for t in (*hardest, a.grad, b.grad) if t is not None])
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=1e-5, atol=1e-5)


def test_equal_scores_tie_with_those_of_the_pairs():
    """Captions that stand twice: a strict and a lenient recall differ by exactly the ties."""
    captions = normal(300, 64, 3, torch.float32)[torch.arange(600) % 300]
    pictures = F.normalize(captions + 0.02 * normal(600, 64, 4, torch.float32), dim=1)
    for pairs in (None, torch.arange(600)[:, None].expand(600, 2)):
        hardest = gk.hardest_negatives(pictures, captions, pairs=pairs)
        assert (hardest.pair_score == hardest.row_score).all()  # the best negative is the same caption again


@pytest.fixture(params=["one chunk", "chunks"])
def chunked(request, monkeypatch):
    """Several chunks, of scores that a pass takes apart again."""
    if request.param == "chunks":
        monkeypatch.setattr(plan, "CHUNK_SCORES", {"cpu": 16 * 24})
        monkeypatch.setattr(plan, "KEPT_SCORES", {"cpu": 0})


@pytest.mark.filterwarnings("ignore:x_ids, y_ids")
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("loss", DENSE)
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
@pytest.mark.parametrize(("shape", "kind", "symmetric", "margin"), COMBINATIONS)
def test_every_option_of_losses_over_every_score(loss, shape, kind, symmetric, margin, same_id):
    function, settings = DENSE[loss]
    if (kind == "ids" and same_id == "ignore") or (loss == "sigmoid" and not symmetric):
        pytest.skip("no such combination")
    x, y, options = problem(shape, kind)
    switches = {"same_id": same_id, "false_negative_margin": margin}
    if loss == "info_nce":
        switches["symmetric"] = symmetric
    for reduction in ("sum", "mean", "none"):
        if reduction == "none" and loss == "info_nce" and symmetric and "pairs" in options:
            with pytest.raises(ValueError, match=r"^reduction: .*symmetric=True"):
                function(x, y, **options, **switches, **settings, reduction="none")
            continue
        check(function, x, y, options, **switches, **settings, reduction=reduction)


@pytest.mark.filterwarnings("ignore:x_ids, y_ids")
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("margin", "smoothing"), [(None, 0.0), (0.2, 0.0), (None, 0.3)])
def test_a_bias_of_candidates(kind, symmetric, margin, smoothing):
    x, y, options = problem("wide", kind)
    if kind == "listed with ids" and smoothing:
        with pytest.raises(ValueError, match=r"^label_smoothing: .*left out"):
            gk.info_nce_loss(x, y, scale=6.0, label_smoothing=smoothing, **options)
        return
    bias = torch.linspace(-2, 1, len(y), dtype=x.dtype)
    switches = {"false_negative_margin": margin, "label_smoothing": smoothing, "symmetric": symmetric, "y_bias": bias}
    check(gk.info_nce_loss, x, y, options, scale=6.0, **switches)
    plain = gk.info_nce_loss(x, y, scale=6.0, **options, **{**switches, "y_bias": None})
    assert not torch.isclose(plain, gk.info_nce_loss(x, y, scale=6.0, **options, **switches))


SCALARS = {
    "info_nce": lambda x, y, scale, bias, **o: gk.info_nce_loss(
        x, y, scale=scale, y_bias=bias * torch.ones(len(y)), **o
    ),
    "sigmoid": lambda x, y, scale, bias, **o: gk.sigmoid_loss(x, y, scale=scale, bias=bias, **o),
}


@pytest.mark.filterwarnings("ignore:x_ids, y_ids")
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("loss", SCALARS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(loss, kind):
    x, y, options = problem("wide", kind)
    scale, bias = (torch.tensor(t, dtype=x.dtype, requires_grad=True) for t in (5.0, -1.0))

    def value(x, y, scale, bias):
        return SCALARS[loss](x, y, scale, bias, false_negative_margin=0.25, **options)

    if loss == "info_nce":  # its bias is constant to autograd
        bias = bias.detach()
    torch.autograd.gradcheck(value, (x.requires_grad_(), y.requires_grad_(), scale, bias))


@pytest.mark.parametrize("function", ["triplet_loss", "goal_loss", "info_nce_loss", "sigmoid_loss"])
@pytest.mark.parametrize("pairs", ["ids", torch.zeros(0, 2, dtype=torch.int64)], ids=["ids", "listed"])
def test_no_pair_gives_a_differentiable_zero(function, pairs):
    x, y = normal(4, 3, 1).requires_grad_(), normal(7, 3, 2).requires_grad_()
    ids = {"x_ids": torch.arange(4), "y_ids": torch.arange(7) + 9}
    scalars = {"info_nce_loss": {"scale": 3.0}, "sigmoid_loss": {"scale": 3.0, "bias": 1.0}}.get(function, {})
    for reduction in ("sum", "mean"):
        loss = getattr(gk, function)(x, y, pairs=pairs, reduction=reduction, **ids, **scalars)
        loss.backward()
        assert loss == 0
    assert not x.grad.any()
    assert not y.grad.any()


@pytest.mark.parametrize("triplet", ["con", "nca", "cir"])
@pytest.mark.parametrize("pairs", ["ids", torch.tensor([[0, 1], [3, 6]])], ids=["ids", "listed"])
def test_goal_of_anchors_without_a_negative_is_zero(pairs, triplet):
    x, y = normal(4, 3, 1).requires_grad_(), normal(7, 3, 2).requires_grad_()
    ids = {"x_ids": torch.zeros(4, dtype=torch.int64), "y_ids": torch.zeros(7, dtype=torch.int64)}
    loss = gk.goal_loss(x, y, triplet=triplet, pair="lin", pairs=pairs, **ids)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert not y.grad.any()


PAIRS = torch.tensor([[0, 1], [3, 6]])
BAD = [
    ({"pairs": "id"}, ValueError, """pairs: expected None, "ids" or .*, got 'id'"""),
    ({"pairs": 3}, TypeError, "pairs: expected .*got int"),
    ({"pairs": PAIRS.float()}, TypeError, "pairs: .*got torch.float32"),
    ({"pairs": PAIRS.bool()}, TypeError, "pairs: .*got torch.bool"),
    ({"pairs": PAIRS.to(torch.uint64)}, TypeError, "pairs: .*got torch.uint64"),
    ({"pairs": PAIRS[:, :1]}, ValueError, r"pairs: .*\[P, 2\], got \[2, 1\]"),
    ({"pairs": PAIRS[0]}, ValueError, r"pairs: .*got \[2\]"),
    ({"pairs": PAIRS + 1}, ValueError, r"pairs: .*0..3 and 0..6, got \(4, 7\) at place 1"),
    ({"pairs": -PAIRS}, ValueError, r"pairs: .*got \(0, -1\) at place 0"),
    ({"pairs": PAIRS.to("meta")}, ValueError, "pairs: expected device cpu, got meta"),
    ({"pairs": "ids"}, ValueError, "x_ids: expected ids with pairs"),
    ({"false_negative_margin": -0.1}, ValueError, "false_negative_margin: .*got -0.1"),
    ({"false_negative_margin": float("nan")}, ValueError, "false_negative_margin: .*got nan"),
    ({"false_negative_margin": "0.1"}, TypeError, "false_negative_margin: .*got str"),
]
ONLY = {
    "info_nce_loss": [
        ({"same_id": "other"}, ValueError, "same_id: .*got 'other'"),
        ({"y_bias": [1.0]}, TypeError, "y_bias: .*got list"),
        ({"y_bias": torch.ones(4)}, ValueError, r"y_bias: expected shape \[7\], got \[4\]"),
        ({"y_bias": torch.ones(7).long()}, TypeError, "y_bias: .*got torch.int64"),
        ({"symmetric": 1}, TypeError, "symmetric: .*got int"),
    ],
    "sigmoid_loss": [({"same_id": None}, ValueError, "same_id: .*got None")],
    "triplet_loss": [({"symmetric": None}, TypeError, "symmetric: .*got NoneType")],
    "goal_loss": [({"symmetric": 0}, TypeError, "symmetric: .*got int")],
}


@pytest.mark.parametrize("function", ["triplet_loss", "goal_loss", "info_nce_loss", "sigmoid_loss"])
def test_bad_arguments(function):
    scalars = {"info_nce_loss": {"scale": 3.0}, "sigmoid_loss": {"scale": 3.0, "bias": 1.0}}.get(function, {})
    for options, kind, message in (*BAD, *ONLY[function]):
        with pytest.raises(kind, match=f"^{message}"):
            getattr(gk, function)(normal(4, 3, 1), normal(7, 3, 2), **options, **scalars)


def test_ids_that_deny_the_pairs_are_told_once(monkeypatch):
    monkeypatch.setattr(_checks, "_WARNED", set())
    x, y, ids = normal(4, 3, 1), normal(4, 3, 2), torch.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.triplet_loss(x, y, x_ids=ids)
        gk.triplet_loss(x, y, x_ids=ids, y_ids=ids.clone())
        gk.triplet_loss(x, y, pairs="ids", x_ids=ids, y_ids=ids.flip(0))
    for loss in (gk.triplet_loss, gk.goal_loss, partial(gk.info_nce_loss, scale=1.0)):
        monkeypatch.setattr(_checks, "_WARNED", set())
        with pytest.warns(UserWarning, match='pairs="ids"'):
            loss(x, y, x_ids=ids, y_ids=ids.flip(0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(x, y, x_ids=ids, y_ids=ids.flip(0))
