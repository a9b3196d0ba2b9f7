"""Ops as they are on CUDA, called with plain arguments: what `plan` chooses, most often a Triton launcher.

    device_ops.logsumexp_scores(a, b, None, 1.0)        device_ops.route("info_nce", a, b, …) == "small"

On a GPU, or on the CPU under Triton's interpreter. The functions below spare tests the arguments that they leave alone.
"""

from functools import partial

from gssf_kernels import _library, plan


def __getattr__(name):
    if name in _library.OPS:
        return partial(on_cuda, name)
    raise AttributeError(name)


def on_cuda(name, *arguments):
    """What the op gives on CUDA."""
    return _library.OPS[name].on_cuda(*arguments)


def route(name, *arguments):
    """The route of a call."""
    op = _library.OPS[name]
    return plan.choose(name, op.plans, op.call(*arguments)).route


def composite(name, *arguments):
    """The op in plain PyTorch."""
    op = _library.OPS[name]
    return op.composite(op.call(*arguments))


def launch(name, *arguments):
    """The op's launcher, also where the plan would not choose it."""
    op = _library.OPS[name]
    return op.launch(op.call(*arguments), plan.Plan("small", "forced"))


def hardest_negatives(a, b, a_ids=None, b_ids=None):
    """The scores and indices alone."""
    return on_cuda("hardest_negatives", a, b, a_ids, b_ids)[:5]


def backward_without_metric(dpositive, drow, dcol, row_index, col_index, a, b, needs):
    """(da, db) of `hardest_negatives_backward`."""
    gradients = (dpositive, drow, dcol, row_index, col_index)
    return on_cuda("hardest_negatives_backward", *gradients, a, b, None, None, None, False, [*needs, False, False])[:2]


def project_backward_of_x(grad, x, diag, blocks, permutation, normalize, needs):
    """(dx, ddiag, dblocks) of `project_backward` without y."""
    weights, needs = (diag, blocks, permutation, normalize), [needs[0], False, *needs[1:]]
    dx, _, ddiag, dblocks = on_cuda("project_backward", grad, None, x.new_empty(0), x, None, *weights, needs)
    return dx, ddiag, dblocks


def project_backward_of_pairs(grad, rows, cols, x, y, diag, blocks, permutation, normalize, needs):
    """What `hardest_negatives_backward` does to one side where pairs are sorted."""
    from gssf_kernels.triton.project import Weights, pairs_backward

    weights = Weights(diag, blocks, permutation, normalize)
    return pairs_backward((grad, rows.contiguous(), cols.contiguous()), x, y, weights, needs)


def total(*sides_and_term, share, needs, positive_score=None):
    """(value, dscale, dbias, da, db) of `score_sums`; sides_and_term: a, b, …, relative."""
    return on_cuda("score_sums", *sides_and_term, "sum", share, needs, positive_score)[:5]


def total_backward(grad_out, dscale, dbias, da, db, a, b, scale, bias, constant, share):
    """The gradients of a, b, κ and β of a sum."""
    options = (0.0, None, None, "square", "include", False, "sum", share, [False, False], None)
    return on_cuda("score_sums_backward", grad_out, dscale, dbias, da, db, a, b, scale, bias, constant, *options)[:4]


def rows(*sides_and_term, positive_score=None):
    """(rows' sums [N], the pairs' scores if they were made) of `score_sums`."""
    value, *_, new_positive_score = on_cuda("score_sums", *sides_and_term, "none", 1.0, [False, False], positive_score)
    return value, new_positive_score


def rows_backward(grad_out, *sides_and_term, positive_score, needs):
    """The gradients of a, b, κ and β of rows' sums."""
    of_forward = [grad_out.new_empty(0)] * 4  # read of "sum" alone
    arguments = (grad_out, *of_forward, *sides_and_term, "none", 1.0, needs, positive_score)
    return on_cuda("score_sums_backward", *arguments)[:4]
