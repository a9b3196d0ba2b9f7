"""Triton launchers with flat arguments, as tests call them: on a GPU, or under the interpreter on the CPU.

NotImplemented says that the plan sends the call to plain PyTorch. fp64 reaches the launcher, which has to refuse it.
"""

import torch

from gssf_kernels import plan as planning
from gssf_kernels._library import OPS


def launch(name, *arguments):
    """What op ``name`` gives on CUDA by its launcher."""
    op = OPS[name]
    call = op.call(*arguments)
    plan = planning.choose(name, op.plans, call)
    if plan.composite and any(t.dtype == torch.float64 for t in tensors(call)):
        plan = planning.Plan("small", "a launcher takes no fp64")
    if plan.composite:
        return NotImplemented
    return op.launch(call, plan)


def route(name, *arguments):
    """The route that the plan of op ``name`` takes on CUDA."""
    op = OPS[name]
    return planning.choose(name, op.plans, op.call(*arguments)).route


def tensors(call):
    flat = [t for value in call for t in (value if isinstance(value, list) else [value])]
    return [t for t in flat if isinstance(t, torch.Tensor)]


def hardest_negatives(a, b, a_ids=None, b_ids=None):
    return launch("hardest_negatives", a, b, a_ids, b_ids)[:5]


def certified_negatives(a, b, a_ids=None, b_ids=None, counted=False):
    """And, if counted, how many scores were made in fp64."""
    return launch("hardest_negatives", a, b, a_ids, b_ids, "certified")[: 6 if counted else 5]


def hardest_negatives_backward(dpositive, drow, dcol, row_index, col_index, a, b, needs):
    metric = (None, None, None, False)
    arguments = (dpositive, drow, dcol, row_index, col_index, a, b, *metric, [*needs, False, False])
    return launch("hardest_negatives_backward", *arguments)[:2]


def hardest_project_backward(*arguments):
    return launch("hardest_negatives_backward", *arguments)


def terms_of(a, b, a_ids, b_ids, formula, constants, reduction):
    return launch("hardest_terms", a, b, a_ids, b_ids, formula, list(constants), reduction)


def hardest_hinge(a, b, a_ids, b_ids, margin, reduction):
    results = terms_of(a, b, a_ids, b_ids, "hinge", [margin], reduction)
    return results if results is NotImplemented else results[:6]


def hardest_goal(a, b, a_ids, b_ids, triplet, pair, *constants):
    *constants, reduction = constants
    results = terms_of(a, b, a_ids, b_ids, f"goal {triplet} {pair}", constants, reduction)
    return results if results is NotImplemented else results[:6]


def relative_goal(a, b, a_ids, b_ids, triplet, pair, *constants):
    *constants, reduction = constants
    return terms_of(a, b, a_ids, b_ids, f"goal {triplet} {pair}", constants, reduction)


def relative_goal_backward(grad, weights, columns, reduction):
    return launch("line_terms_backward", grad, "weights", [weights, weights.new_empty(columns)], [], reduction)


def relative_negatives(*arguments):
    return launch("relative_negatives", *arguments)


def hinge_terms(positive_score, row_score, col_score, margin, reduction):
    return launch("line_terms", "hinge", [positive_score, row_score, col_score], [margin], reduction)


def hinge_terms_backward(grad, positive_score, row_score, col_score, margin, reduction):
    statistics = [positive_score, row_score, col_score]
    return launch("line_terms_backward", grad, "hinge", statistics, [margin], reduction)


def goal_terms(positive_score, row_score, col_score, triplet, pair, *constants):
    *constants, reduction = constants
    statistics = [positive_score, row_score, col_score]
    return launch("line_terms", f"goal {triplet} {pair}", statistics, constants, reduction)


def goal_terms_backward(grad, positive_score, row_score, col_score, triplet, pair, *constants):
    *constants, reduction = constants
    statistics = [positive_score, row_score, col_score]
    return launch("line_terms_backward", grad, f"goal {triplet} {pair}", statistics, constants, reduction)


def contrast_terms(*arguments):
    *statistics, reduction = arguments
    return launch("line_terms", "contrast", statistics, [], reduction)


def contrast_terms_backward(grad, row_log, col_log, shared, reduction):
    statistics = [None, row_log, None, None, col_log, None if shared else row_log]
    return launch("line_terms_backward", grad, "contrast", statistics, [], reduction)


def batch_hard(*arguments):
    return launch("batch_hard", *arguments)


def batch_hard_backward(*arguments):
    return launch("batch_hard_backward", *arguments)


def hardest_positives(x, labels):
    return launch("hardest_positives", x, labels)


def pair_scores(a, b, rows, cols):
    return launch("pair_scores", a, b, rows, cols)


def pair_scores_backward(*arguments):
    return launch("pair_scores_backward", *arguments)


def project(x, diag, blocks, permutation, normalize):
    results = launch("project", x, None, diag, blocks, permutation, normalize)
    return results if results is NotImplemented else results[0]


def project_backward(grad, x, diag, blocks, permutation, normalize, needs):
    needs, norm = [needs[0], False, *needs[1:]], x.new_empty(0)
    results = launch("project_backward", grad, None, norm, x, None, diag, blocks, permutation, normalize, needs)
    return results if results is NotImplemented else (results[0], *results[2:])


def project_sides(x, y, diag, blocks, permutation, normalize=True, pairs=False):
    return launch("project", x, y, diag, blocks, permutation, normalize, pairs)


def project_sides_backward(*arguments):
    return launch("project_backward", *arguments)


def pairs_project_backward(grad, rows, cols, x, y, diag, blocks, permutation, normalize, needs):
    """What `hardest_negatives_backward` does to one side where pairs are sorted."""
    from gssf_kernels.triton.project import Weights, pairs_backward

    weights = Weights(diag, blocks, permutation, normalize)
    return pairs_backward((grad, rows.contiguous(), cols.contiguous()), x, y, weights, needs)
