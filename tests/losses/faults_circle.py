from planting import Fault

PYTORCH = "gssf_kernels/ops/score_functions.py"
TRITON = "gssf_kernels/triton/score_functions.py"
LOGSUMEXP_KERNELS = "gssf_kernels/triton/logsumexp.py"
CPP = "csrc/vector_dense.h"

FAULTS = [
    Fault(
        "circle: positives push and negatives pull, in PyTorch",
        PYTORCH,
        "circle",
        "torch.where(positive, -weight, weight)",
        "torch.where(positive, weight, -weight)",
    ),
    Fault(
        "circle: positives push and negatives pull, in Triton",
        TRITON,
        "circle",
        "tl.where(positive, -weight, weight)",
        "tl.where(positive, weight, -weight)",
    ),
    Fault(
        "circle: positives push and negatives pull, in C++",
        CPP,
        "logit",
        "slope = positive ? -weight : weight;",
        "slope = positive ? weight : -weight;",
    ),
    Fault(
        "circle: a negative's weight is its distance from +m, in Triton",
        TRITON,
        "circle",
        "1.0 + margin - s, s + margin)",
        "1.0 + margin - s, s - margin)",
    ),
    Fault(
        "by label: a row meets itself, in PyTorch",
        PYTORCH,
        "members",
        "if by_label.leave_out:",
        "if by_label.leave_out and False:",
    ),
    Fault(
        "by label: a row meets itself, in Triton",
        TRITON,
        "logits",
        "if LEAVE_OUT:",
        "if LEAVE_OUT and False:",
    ),
    Fault(
        "by label: a row meets itself, in C++",
        CPP,
        "members",
        "if (tile.leave_out) row",
        "if (!tile.leave_out) row",
    ),
    Fault(
        "by label: the merge exchanges positives and negatives, in Triton",
        "gssf_kernels/triton/reductions.py",
        "merge_kernel",
        "row_partial[0] + k * strides[0], row_partial[1] + k * strides[0]",
        "row_partial[0] + (1 - k) * strides[0], row_partial[1] + (1 - k) * strides[0]",
    ),
    Fault(
        "by label: the merge exchanges positives and negatives, in C++",
        "csrc/dense.cpp",
        "logsumexp_pass",
        "sums.row_max[c][i], sums.row_sum[c][i]",
        "sums.row_max[C - 1 - c][i], sums.row_sum[C - 1 - c][i]",
    ),
    Fault(
        "by label: the gradient takes negatives for positives, in Triton",
        TRITON,
        "logsumexp_slope",
        "tl.where(positive, g, other)",
        "tl.where(positive, other, g)",
    ),
    Fault(
        "by label: log-sums of positives and negatives are exchanged",
        "gssf_kernels/ops/labels.py",
        "log_sums",
        "positive, negative = (row_max + row_log).unbind()",
        "negative, positive = (row_max + row_log).unbind()",
        tests="losses/test_multi_similarity",
    ),
    Fault(
        "labels: constants of logits are rounded to fp32, in PyTorch",
        "gssf_kernels/ops/score_functions.py",
        "_choose",
        "torch.where(positive, s.new_full((), for_positives), s.new_full((), for_negatives))",
        "torch.where(positive, for_positives, for_negatives).to(s.dtype)",
    ),
]
