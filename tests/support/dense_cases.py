"""What tests of the gradient sweep's losses share: the losses themselves, on inputs, and comparisons of gradients."""

import math

import torch

import gssf_kernels as gk

INF, NAN = math.inf, math.nan
X, Y = torch.randn(4, 8), torch.randn(6, 8)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def value_and_gradients(loss, tensors):
    tensors = leaves(*tensors)
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def assert_same(got, expected, rtol=1e-11, atol=1e-12):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=rtol, atol=atol)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def _ids(x):
    return torch.arange(x.shape[0], device=x.device) % 7


def _with_ids(x, y, scale, module=gk):
    return module.info_nce_loss(x, y, scale=scale, x_ids=_ids(x), y_ids=_ids(y), label_smoothing=0.1)


# of x, y and scalar parameters, in gk or gk.reference
LOSSES = {
    "logsumexp": lambda x, y, scale, module=gk: torch.cat(module.logsumexp_scores(x, y, scale=scale)).square().sum(),
    "info_nce": lambda x, y, scale, module=gk: module.info_nce_loss(x, y, scale=scale),
    "info_nce ids": _with_ids,
    "sums": lambda x, y, scale, bias, module=gk: module.sum_scores(x, y, "softplus", scale=scale, bias=bias),
    "rows' sums": lambda x, y, scale, bias, module=gk: _weighted(
        module.sum_scores(x, y, "square", scale=scale, bias=bias, positives="negate", reduction="none")
    ),
    "sigmoid": lambda x, y, scale, bias, module=gk: module.sigmoid_loss(x, y, scale=scale, bias=bias),
    "sigmoid ids": lambda x, y, scale, bias, module=gk: module.sigmoid_loss(
        x, y, scale=scale, bias=bias, x_ids=_ids(x), y_ids=_ids(y)
    ),
    "distillation": lambda x, y, lam, tau, module=gk: _distil(x, y, lam, tau, "mse", module),
    "triplet": lambda x, y, module=gk: module.triplet_loss(x, y, negatives="all", x_ids=_ids(x), y_ids=_ids(y)),
}
SCALARS = {"logsumexp": (0.7,), "info_nce": (0.7,), "info_nce ids": (0.7,), "sums": (0.7, -1.0)}
SCALARS |= {"rows' sums": (0.7, -1.0), "sigmoid": (0.7, -1.0), "sigmoid ids": (0.7, -1.0), "triplet": ()}
SCALARS |= {"distillation": (0.3, 0.5)}


def _distil(x, y, lam, tau, kind, module):
    """y gets no gradient: the teachers are constants, rows that follow from the place alone."""
    places = torch.arange(1, x.shape[0] * x.shape[1] + 1, device=x.device).to(x).view(x.shape)
    teachers = places.cos(), places.sqrt().sin()
    return module.relational_distillation_loss(x, *teachers, lam=lam, tau=tau, kind=kind) + 0 * y.sum()


def _weighted(t):
    return (t * torch.arange(1, t.shape[0] + 1).to(t)).sum()


def sample(name, n, m, d, dtype=torch.float64):
    """Inputs of LOSSES[name]."""
    scalars = [torch.tensor(v, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for v in SCALARS[name]]
    return [normal(n, d, dtype=dtype), normal(m, d, dtype=dtype), *scalars]


def check_learnt_scale(loss, reference, reduction):
    """A module's gradient in the logarithm of its scale is that of autograd through the exponential."""
    criterion = loss(scale=3.0, reduction=reduction, dtype=torch.float64)
    x, y, weight = normal(20, 5), normal(25, 5), normal(20, 1)[:, 0]
    tensors = [*leaves(x, y), *criterion.parameters()]
    value = criterion(*tensors[:2])
    results = [[value, *torch.autograd.grad((value * weight).sum(), tensors)]]
    twins = leaves(*tensors)
    options = {"scale": twins[2].exp(), "reduction": reduction}
    if len(twins) > 3:
        options["bias"] = twins[3]
    value = reference(*twins[:2], **options)
    results.append([value, *torch.autograd.grad((value * weight).sum(), twins)])
    assert_same(*results, 1e-9)
