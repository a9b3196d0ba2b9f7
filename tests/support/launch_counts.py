"""How many kernels a step launches on CUDA: what a small batch's time is made of.

Counted without a card (`device_path.py`): Triton's launches, and PyTorch's ops that are no views, each as one (a
sort is several). The figures in the tests are of this version: a change that raises one has to say so there.
"""

import pytest
import torch
from kernel_modules import FOUND

import gssf_kernels as gk

if FOUND:
    from gssf_kernels.device_path import DEVICE, device_path
else:  # every test that counts is skipped
    DEVICE, device_path = "meta", None

counted = pytest.mark.skipif(not FOUND, reason="there is no Triton")
FP32_AND_BF16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
SIZES = pytest.mark.parametrize("n", [128, 256, 512, 1024])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def ids_of(x):
    return torch.empty(len(x), dtype=torch.int64, device=DEVICE)


def metric_of(dtype, **options):
    order = torch.randperm(512) if options.get("block_size", 16) else None
    return gk.StructuredSimilarity(512, permutation=order, dtype=dtype, **options).to(DEVICE)


def launches(loss, n, dtype=torch.float32, extra=0, metric=None, of=None, **options):
    """(forward's, backward's) of inputs [n, 512] and [n + extra, 512]; of: a module, whose parameters get gradients."""
    x, y = (torch.empty(k, 512, dtype=dtype, device=DEVICE, requires_grad=True) for k in (n, n + extra))
    t = torch.empty((), device=DEVICE, requires_grad=True)
    options = options if metric is None else {**options, "metric": metric}
    weights = [] if metric is None else list(metric.parameters())
    weights += [] if of is None else list(of.parameters())
    with device_path() as path:
        value = loss(x, y, t, **options)
        forward = list(path.launches)
        upstream = torch.empty(value.shape, device=DEVICE)
        torch.autograd.grad(value, [x, y, t, *weights], upstream, allow_unused=True)
    return forward, path.launches[len(forward) :]


def every_small_batch(steps):
    """A test of (loss, expected, n, dtype) for each of steps, {name: (a loss of x, y and t, (forward, backward))}."""

    def decorate(test):
        named = pytest.mark.parametrize(("loss", "expected"), steps.values(), ids=steps)
        return counted(FP32_AND_BF16(SIZES(named(test))))

    return decorate


def check_count(loss, expected, n, dtype):
    forward, backward = launches(loss, n, dtype)
    assert (len(forward), len(backward)) == expected, (forward, backward)


def every_reduction_by_a_metric(steps):
    """The same of (loss, expected, reduction, dtype), for losses that take options: a reduction, a metric and ids."""

    def decorate(test):
        named = pytest.mark.parametrize(("loss", "expected"), steps.values(), ids=steps)
        return counted(FP32_AND_BF16(REDUCTIONS(named(test))))

    return decorate


def check_count_by_a_metric(loss, expected, reduction, dtype):
    """With ids and without, and with more rows of y; the metric's weights are learned too."""
    forward, backward = expected
    backward += reduction == "none" and backward == 2  # scores made again in the place of kept gradients
    for options in ({}, {"normalize": False}, {"block_size": None}, {"diagonal": False}):
        metric = metric_of(dtype, **options)
        for n, extra in ((128, 0), (1000, 24)):
            kernels = launches(loss, n, dtype, extra, metric, reduction=reduction)
            assert tuple(map(len, kernels)) == (forward, backward), kernels
            ids = {"x_ids": ids_of(range(n)), "y_ids": ids_of(range(n + extra))}
            kernels = launches(loss, n, dtype, extra, metric, reduction=reduction, **ids)
            assert tuple(map(len, kernels)) == (forward, backward), kernels


def check_learnt_logarithm(loss):
    """Of a module that learns the logarithm of its scale: the exponential takes no launch."""
    for metric, most in ((None, 2), (metric_of(torch.float32), 3)):
        loss.to(DEVICE).metric = metric
        kernels = launches(lambda x, y, t: loss(x, y), 256, of=loss)
        assert [len(part) <= most for part in kernels] == [True, True], kernels


def check_one_side_twice_by_a_metric(loss, reduction):
    """Both its factors' gradients go back in one launch."""
    kernels = launches(loss, 256, metric=metric_of(torch.float32), reduction=reduction)
    assert [len(part) <= 3 for part in kernels] == [True, True], kernels
