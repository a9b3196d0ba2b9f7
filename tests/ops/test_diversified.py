"""Diversified attention and the modality classifier: instance by instance in fp64, with masks of every kind."""

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk

B, L, IN, D, K = 5, 7, 6, 8, 3


def layer():
    torch.manual_seed(0)
    return gk.DiversifiedAttention(IN, D, K, hidden_dim=4, dtype=torch.float64)


def inputs():
    generator = torch.Generator().manual_seed(1)
    local = torch.randn(B, L, IN, generator=generator, dtype=torch.float64).requires_grad_()
    whole = torch.randn(B, IN, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(B, L, generator=generator) < 0.6
    mask[1] = False  # no feature at all
    mask[2] = True
    mask[3] = False
    mask[3, 4] = True  # one
    return local, whole, mask


def one_by_one(layer, local, whole, mask):
    representations, attention, penalties = [], [], []
    for f, g, m in zip(local, whole, mask, strict=True):
        mixed = torch.zeros(K, IN, dtype=torch.float64)
        maps = torch.zeros(K, L, dtype=torch.float64)
        if m.any():
            weights = torch.softmax(layer.queries @ torch.tanh(layer.hidden.weight @ f[m].T), 1)  # [K, places]
            mixed = weights @ f[m]
            maps = maps.index_copy(1, m.nonzero()[:, 0], weights)
            penalties.append((maps @ maps.T - torch.eye(K)).square().sum() / K**2)
        combined = layer.whole(g) + mixed @ layer.local.weight.T + layer.local.bias
        representations.append(F.layer_norm(combined, (D,), layer.norm.weight, layer.norm.bias))
        attention.append(maps)
    return torch.stack(representations, 1), torch.stack(attention), torch.stack(penalties).mean()


@pytest.mark.parametrize("masked", [True, False])
def test_instance_by_instance(masked):
    local, whole, mask = inputs()
    attention = layer()
    ours = attention(local, whole, mask if masked else None)
    right = one_by_one(attention, local, whole, mask if masked else torch.ones_like(mask))
    wrt = (local, whole, *attention.parameters())
    grads = []
    for result in (ours, right):
        value = (result[0] * torch.linspace(-1, 1, result[0].numel()).view_as(result[0])).sum() + 3 * result[2]
        grads.append(torch.autograd.grad(value, wrt))
    for got, expected in zip((*ours, *grads[0]), (*right, *grads[1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_what_is_masked_does_not_matter():
    local, whole, mask = inputs()
    spoiled = torch.where(mask[:, :, None], local, torch.nan)
    for ours, right in zip(layer()(spoiled, whole, mask), layer()(local, whole, mask), strict=True):
        assert torch.equal(ours, right)
    attention = layer()
    result = attention(spoiled, whole, mask)
    of_local, *of_weights = torch.autograd.grad(
        result.representations.square().sum() + result.penalty, (local, *attention.parameters())
    )
    assert all(t.isfinite().all() for t in (of_local, *of_weights))
    assert not of_local[~mask].any()


def test_maps_of_one_place_each_have_no_penalty():
    attention = layer()
    maps = torch.eye(K, L, dtype=torch.float64).expand(B, K, L)
    assert attention._penalty(maps, torch.ones(B, dtype=torch.bool)) == 0
    same = torch.eye(1, L, dtype=torch.float64).expand(B, K, L)
    assert attention._penalty(same, torch.ones(B, dtype=torch.bool)) == pytest.approx((K * K - K) / K**2)


def test_nothing_at_all():
    attention = layer()
    empty = attention(torch.zeros(0, L, IN).double(), torch.zeros(0, IN).double())
    assert empty.representations.shape == (K, 0, D)
    assert empty.penalty == 0
    local, whole, mask = inputs()
    assert attention(local, whole, torch.zeros_like(mask)).penalty == 0
    assert attention(local[:, :0], whole).representations.isfinite().all()


def test_gradcheck():
    attention = layer()
    local, whole, mask = inputs()
    assert torch.autograd.gradcheck(lambda f, g: attention(f, g, mask)[::2], (local, whole))


def test_the_classifier():
    classifier = gk.ModalityClassifier(D, dtype=torch.float64)
    xs, ys = torch.randn(2, 5, D).double(), torch.randn(3, 5, D).double()
    terms = [-classifier.logits(r).log_softmax(0)[k] for k, t in enumerate((xs, ys)) for r in t.reshape(-1, D)]
    torch.testing.assert_close(classifier(xs, ys), torch.stack(terms).mean())
    assert classifier(xs[:0], ys[:0]) == 0
    with pytest.raises(ValueError, match=r"^representations: expected 2 tensors, got 1"):
        classifier(xs)
    with pytest.raises(ValueError, match=r"^representations\[1\]: expected \[\.\.\., 8\] float"):
        classifier(xs, ys[..., 1:])
    with pytest.raises(TypeError, match=r"^representations\[0\]: .*got list"):
        classifier([xs], ys)


LOCAL, WHOLE = torch.ones(2, 3, IN), torch.ones(2, IN)
BAD = [
    ({"local": LOCAL[0]}, ValueError, "local: expected shape"),
    ({"local": LOCAL.long()}, TypeError, "local: .*got torch.int64"),
    ({"local": LOCAL[..., :5]}, ValueError, "local: expected 6 channels"),
    ({"whole": WHOLE[:1]}, ValueError, r"whole: expected shape \[2, 6\], got \[1, 6\]"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected a bool tensor .*got torch.float32"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask: expected shape \[2, 3\], got \[2, 4\]"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_arguments(change, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.DiversifiedAttention(IN, D)(**{"local": LOCAL, "whole": WHOLE, **change})


@pytest.mark.parametrize("name", ["in_dim", "dim", "representations", "hidden_dim"])
def test_bad_settings(name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        gk.DiversifiedAttention(**{"in_dim": IN, "dim": D, "representations": K, "hidden_dim": 2, name: 0})
