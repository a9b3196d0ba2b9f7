"""``normalize=True`` of every loss is its loss of cosines; and rows that nobody normalised are told of."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk
from gssf_kernels import _checks

X, Y = (3 * torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (20, 26))
LABELS = torch.arange(20) % 6
LOSSES = {
    "triplet_loss": {},
    "goal_loss": {"pair": "lin"},
    "gradient_space_loss": {"weights": lambda anchor: (1 - anchor.positive, anchor.negative)},
    "info_nce_loss": {"scale": 5.0},
    "sigmoid_loss": {"scale": 5.0, "bias": -1.0},
    "nt_xent_loss": {"scale": 5.0},
    "batch_hard_loss": {},
    "circle_loss": {},
    "multi_similarity_loss": {},
}
ONE_SIDED = ("nt_xent_loss", "batch_hard_loss", "circle_loss", "multi_similarity_loss")
OPTIONS = {
    "triplet_loss": [{"negatives": "all"}, {"negatives": "semihard"}, {"symmetric": False}, {"diagnostics": True}],
    "goal_loss": [{"pair": "sig_ms"}, {"symmetric": False}],
    "info_nce_loss": [{"false_negative_margin": 0.2}],
    "sigmoid_loss": [{"false_negative_margin": 0.2}],
}


def call(name, x, y, module=gk, **options):
    second = LABELS if name in ONE_SIDED else y
    result = getattr(module, name)(x, second, **{**LOSSES[name], **options})
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_loss_of_cosines(name):
    for options in ({}, *OPTIONS.get(name, [])):
        x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
        sides = {x} if name in ONE_SIDED else {x, y}
        ours = call(name, x, y, normalize=True, **options)
        right = call(name, F.normalize(x, dim=1), F.normalize(y, dim=1), **options)
        torch.testing.assert_close(ours, right)
        torch.testing.assert_close(call(name, x, y, gk.reference, normalize=True, **options), right)
        for got, expected in zip(torch.autograd.grad(ours, sides), torch.autograd.grad(right, sides), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_arguments(name):
    with pytest.raises(ValueError, match=r"^normalize: expected False with a metric"):
        call(name, X, Y, normalize=True, metric=gk.StructuredSimilarity(8, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"^normalize: expected True or False, got int"):
        call(name, X, Y, normalize=1)


MODULES = {
    "triplet_loss": gk.TripletLoss, "goal_loss": gk.GoalLoss, "info_nce_loss": gk.InfoNCELoss,
    "sigmoid_loss": gk.SigmoidLoss, "nt_xent_loss": gk.NTXentLoss, "batch_hard_loss": gk.BatchHardLoss,
    "circle_loss": gk.CircleLoss, "multi_similarity_loss": gk.MultiSimilarityLoss,
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    second = LABELS if name in ONE_SIDED else Y
    plain = LABELS if name in ONE_SIDED else F.normalize(Y, dim=1)
    right = MODULES[name]()(F.normalize(X, dim=1), plain)
    torch.testing.assert_close(MODULES[name](normalize=True)(X, second), right)


@pytest.mark.parametrize("name", LOSSES)
def test_long_rows_are_told_of_at_the_first_call_alone(name, monkeypatch):
    def fresh():
        monkeypatch.setattr(_checks, "_WARNED", set())
        monkeypatch.setattr(_checks, "_MEASURED", set())

    unit = F.normalize(X, dim=1), F.normalize(Y, dim=1)
    fresh()
    with pytest.warns(UserWarning, match=f"^{name}: the rows have a mean norm of .*normalize=True"):
        call(name, X, Y)
    metric = gk.StructuredSimilarity(8, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(name, X, Y)
        for options in ({"normalize": True}, {"metric": metric}):
            fresh()
            call(name, X, Y, **options)
        fresh()
        call(name, *unit)
        call(name, X, Y)  # no longer the first call
    fresh()
    with pytest.warns(UserWarning, match=f"^{name}: the rows have a mean norm of 0.1"):
        call(name, 0.1 * unit[0], 0.1 * unit[1])
