"""Options of the two-sided losses against their definitions: pairs, one direction, false negatives by margin.

The definitions are checked number by number in `test_definition_of_pairs.py`.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk

SHAPES = {"wide": (9, 14), "square": (12, 12), "tall": (21, 13), "one": (1, 3), "tiles": (70, 530)}


def normal(n, d, seed, dtype=torch.float64):
    return F.normalize(torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=1)


def problem(shape, kind, dtype=torch.float64, d=6):
    """(x, y, options): rows with ids, of which some have no partner; listed pairs with repetition, ids or neither."""
    n, m = SHAPES[shape]
    random = torch.Generator().manual_seed(n * m)
    x, y = normal(n, d, n, dtype), normal(m, d, m + 1, dtype)
    x_ids, y_ids = (torch.randint(0, max(k // 3, 2), (k,), generator=random) for k in (n, m))
    if kind == "none":
        return x, y, {}
    if kind == "rows":
        return x, y, {"x_ids": x_ids, "y_ids": y_ids}
    if kind == "ids":
        x_ids[0] = 99  # without a partner
        return x, y, {"pairs": "ids", "x_ids": x_ids, "y_ids": y_ids}
    count = n + m
    pairs = torch.stack([torch.randint(0, k, (count,), generator=random) for k in (n, m)], 1)
    pairs = torch.cat((pairs, pairs[:3]))  # listed again
    ids = {"x_ids": x_ids, "y_ids": y_ids} if kind == "listed with ids" else {}
    return x, y, {"pairs": pairs, **ids}


KINDS = ["none", "rows", "ids", "listed", "listed with ids"]
LOSSES = {
    "hardest": (gk.triplet_loss, {"margin": 0.3}),
    "all": (gk.triplet_loss, {"margin": 0.3, "negatives": "all"}),
    "semihard": (gk.triplet_loss, {"margin": 0.3, "negatives": "semihard"}),
    "goal": (gk.goal_loss, {"pair": "lin"}),
    "goal, a loss": (gk.goal_loss, {"triplet": "cir", "pair": "lin"}),
    "goal, linear": (gk.goal_loss, {"triplet": "con", "pair": "lin_ms"}),
    "goal, exponential": (gk.goal_loss, {"pair": "sig_ms"}),
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
        results.append((value, *(t.grad for t in inputs), *(statistics[0] if statistics else ())))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=tolerance, atol=tolerance)


def allowed(shape, kind, reduction="sum", symmetric=True):
    n, m = SHAPES[shape]
    if kind in ("none", "rows") and m < n:
        return False
    return not (kind == "ids" and reduction == "none" and symmetric)


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
            more = {"symmetric": symmetric, "false_negative_margin": margin, "reduction": reduction}
            check(function, x, y, options, diagnostics=True, **more, **settings)


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
