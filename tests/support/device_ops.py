"""Ops as they are on CUDA, called with plain arguments: what `plan` chooses, most often a Triton launcher.

device_ops.hardest_negatives(a, b, None, None)        device_ops.route("info_nce", a, b, …) == "small"
"""

import torch

from gssf_kernels import _library, plan


def __getattr__(name):
    if name in _library.OPS:
        return _library.OPS[name].on_cuda
    raise AttributeError(name)


def route(name, *arguments):
    """The route of a call."""
    op = _library.OPS[name]
    return plan.choose(name, op.plans, op.call(*arguments)).route


def composite(name, *arguments):
    """The op in plain PyTorch."""
    op = _library.OPS[name]
    return op.composite(op.call(*arguments))


def total(*sides_and_term, share, needs, positive_score=None):
    """(value, dscale, dbias, da, db) of `score_sums`; sides_and_term: a, b, …, relative."""
    arguments = (*sides_and_term, "sum", share, needs, positive_score)
    return _library.OPS["score_sums"].on_cuda(*arguments)[:5]


def total_backward(grad_out, dscale, dbias, da, db, a, b, scale, bias, constant, share):
    """The gradients of a, b, κ and β of a sum."""
    options = (0.0, None, None, "square", "include", False, "sum", share, [False, False], None)
    gradients = (grad_out, dscale, dbias, da, db)
    return _library.OPS["score_sums_backward"].on_cuda(*gradients, a, b, scale, bias, constant, *options)


def rows(*sides_and_term, positive_score=None):
    """(rows' sums [N], the pairs' scores if they were made) of `score_sums`."""
    arguments = (*sides_and_term, "none", 1.0, [False, False], positive_score)
    value, *_, positive = _library.OPS["score_sums"].on_cuda(*arguments)
    return value, positive


def rows_backward(grad_out, *sides_and_term, positive_score, needs):
    """The gradients of a, b, κ and β of rows' sums."""
    none = [torch.empty(0)] * 4
    arguments = (grad_out, *none, *sides_and_term, "none", 1.0, needs, positive_score)
    return _library.OPS["score_sums_backward"].on_cuda(*arguments)
