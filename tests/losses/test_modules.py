"""The losses as modules: parameters that stay fp32, ceilings of scales, schedules, states."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gssf_kernels as gk

HALVES = [torch.bfloat16, torch.float16]


def rows(n, d=16, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1).to(dtype)


MODULES = {
    "info_nce": lambda: gk.InfoNCELoss(metric=gk.StructuredSimilarity(16, 4)),
    "sigmoid": lambda: gk.SigmoidLoss(metric=gk.StructuredSimilarity(16, 4)),
    "nt_xent": lambda: gk.NTXentLoss(learnable=True, metric=gk.StructuredSimilarity(16, 4)),
    "triplet": lambda: gk.TripletLoss(metric=gk.StructuredSimilarity(16, 4)),
    "goal": lambda: gk.GoalLoss(metric=gk.StructuredSimilarity(16, 4)),
}


def loss_of(module, x, y):
    return module(x, torch.arange(len(x)) // 2) if isinstance(module, gk.NTXentLoss) else module(x, y)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MODULES)
def test_a_cast_model_keeps_fp32_weights(name, dtype):
    tower = nn.Linear(16, 16)
    model = nn.ModuleDict({"tower": tower, "loss": MODULES[name]()})
    with torch.no_grad():
        for p in model["loss"].parameters():
            p.mul_(1.0 + 2.0**-12)  # which no 16-bit number near it can hold
    before = {k: p.detach().clone() for k, p in model["loss"].named_parameters()}
    model.to(dtype)
    assert tower.weight.dtype == dtype
    for k, p in model["loss"].named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[k])
    x, y = rows(24, dtype=dtype), rows(24, seed=1, dtype=dtype)
    loss_of(model["loss"], x, y).backward()
    assert all(p.grad.dtype == torch.float32 for p in model["loss"].parameters())
    assert all(p.dtype == torch.float64 for p in model.double().parameters())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("block_size", [None, 4])
def test_fp32_weights_compare_16_bit_rows(dtype, block_size):
    metric = gk.StructuredSimilarity(16, block_size)
    with torch.no_grad():
        for p in metric.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    x, y = rows(30, dtype=dtype), rows(30, seed=1, dtype=dtype)
    grads = []
    for wide in (False, True):
        inputs = (x.double(), y.double()) if wide else (x, y)
        metric.double() if wide else metric
        loss = gk.info_nce_loss(*inputs, scale=5.0, metric=metric)
        grads.append((loss, *torch.autograd.grad(loss, list(metric.parameters()))))
    for ours, right in zip(*grads, strict=True):
        assert (ours.double() - right).norm() <= (2e-2 if dtype == torch.bfloat16 else 3e-3) * right.norm()


def test_a_step_that_a_16_bit_scale_would_lose():
    loss = gk.SigmoidLoss().bfloat16()
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e-3)
    before = [float(p) for p in loss.parameters()]
    loss(rows(32, dtype=torch.bfloat16), rows(32, seed=1, dtype=torch.bfloat16)).backward()
    optimizer.step()
    assert all(float(p) != b for p, b in zip(loss.parameters(), before, strict=True))


CEILED = {
    "info_nce": lambda: gk.InfoNCELoss(8.0, max_scale=8.0),
    "sigmoid": lambda: gk.SigmoidLoss(8.0, -9.0, max_scale=8.0),
    "nt_xent": lambda: gk.NTXentLoss(8.0, learnable=True, max_scale=8.0),
}


@pytest.mark.parametrize("name", CEILED)
def test_a_scale_at_its_ceiling_can_only_fall(name):
    x = rows(24)
    right, wrong = x + 0.01 * rows(24, seed=5), x.flip(0)
    for y, raises in ((right, True), (wrong, False)):
        module = CEILED[name]()
        inputs = (torch.cat((x, y)), torch.arange(24).repeat(2)) if name == "nt_xent" else (x, y)
        free = module.log_scale.detach().exp().requires_grad_()
        bound = module(*inputs)
        open_loss = module(*inputs, scale=free)
        torch.testing.assert_close(bound, open_loss)
        (gradient,) = torch.autograd.grad(open_loss, free)
        assert (gradient < 0) == raises  # a step of descent would raise the scale
        bound.backward()
        torch.testing.assert_close(module.log_scale.grad, torch.zeros(()) if raises else gradient * 8.0)
        (nan,) = torch.autograd.grad(module(*inputs) * math.nan, module.log_scale)
        assert nan.isnan()
        with torch.no_grad():
            module.log_scale.fill_(math.log(50.0))  # as an optimizer's momentum may leave it
        torch.testing.assert_close(module(*inputs), open_loss)


@pytest.mark.parametrize("name", ["info_nce", "sigmoid", "nt_xent"])
def test_a_constant_scale_is_no_parameter(name):
    classes = {"info_nce": gk.InfoNCELoss, "sigmoid": gk.SigmoidLoss, "nt_xent": gk.NTXentLoss}
    module = classes[name](5.0, learnable=False)
    assert not list(module.parameters())
    assert "log_scale" in module.state_dict()


def test_scales_of_a_model_that_owns_them():
    x, y, scale, bias = rows(20), rows(20, seed=1), torch.tensor(3.0, requires_grad=True), torch.tensor(-1.0)
    assert torch.equal(gk.InfoNCELoss()(x, y, scale=scale), gk.info_nce_loss(x, y, scale=scale))
    assert torch.equal(gk.SigmoidLoss()(x, y, scale=scale, bias=bias), gk.sigmoid_loss(x, y, scale=scale, bias=bias))


# TripletLoss: warm-up, negatives, states


def test_warm_up_counts_steps_with_gradients_alone():
    loss, x, y = gk.TripletLoss(warmup=3), rows(10), rows(10, seed=1)
    with torch.no_grad():
        for _ in range(5):
            loss(x, y)
    assert int(loss.step) == 0
    loss(x, y)
    assert int(loss.step) == 1


def test_negatives_can_be_set():
    loss, x, y = gk.TripletLoss(), rows(10), rows(10, seed=1)
    for which in ("all", "semihard", "hardest"):
        loss.set_negatives(which)
        assert torch.equal(loss(x, y), gk.triplet_loss(x, y, negatives=which))
    with pytest.raises(ValueError, match=r"^negatives: expected one of .*got 'easy'"):
        loss.set_negatives("easy")
    with pytest.raises(ValueError, match=r"^negatives: expected 'hardest' during the 4 steps"):
        gk.TripletLoss(warmup=4).set_negatives("all")


def test_states_with_and_without_a_step():
    warm, plain = gk.TripletLoss(warmup=5), gk.TripletLoss()
    warm(rows(4), rows(4, seed=1))
    plain.load_state_dict(warm.state_dict())
    assert "step" in warm.state_dict()  # the user's dictionary is not touched
    warm.load_state_dict(plain.state_dict())
    assert int(warm.step) == 1
    nested = nn.ModuleDict({"loss": gk.TripletLoss(warmup=5)})
    nested.load_state_dict({"loss.step": torch.tensor(4)})
    assert int(nested["loss"].step) == 4
