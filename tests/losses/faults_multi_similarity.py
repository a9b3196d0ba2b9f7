from planting import Fault

PYTORCH = "gssf_kernels/ops/score_functions.py"
TRITON = "gssf_kernels/triton/score_functions.py"
CPP = "csrc/vector_dense.h"
MINED = "gssf_kernels/ops/mined_log_sums.py"
LOSS = "gssf_kernels/losses/multi_similarity.py"
BY_LABEL = "losses/test_circle"  # log-sums of both losses, by every route

FAULTS = [
    Fault(
        "multi-similarity: positives push and negatives pull, in PyTorch",
        PYTORCH,
        "multi_similarity",
        "_choose(positive, -alpha, beta, s)",
        "_choose(positive, alpha, -beta, s)",
        tests=BY_LABEL,
    ),
    Fault(
        "multi-similarity: positives push and negatives pull, in Triton",
        TRITON,
        "multi_similarity",
        "tl.where(positive, -alpha, beta)",
        "tl.where(positive, alpha, -beta)",
        tests=BY_LABEL,
    ),
    Fault(
        "multi-similarity: positives push and negatives pull, in C++",
        CPP,
        "logit",
        "slope = positive ? V{} - alpha : V{} + beta;",
        "slope = positive ? V{} + alpha : V{} - beta;",
    ),
    Fault(
        "mining: positives count at and over their bound, in PyTorch",
        PYTORCH,
        "members",
        "torch.where(positive, ~(s >= upper), ~(s <= lower))",
        "torch.where(positive, ~(s < upper), ~(s <= lower))",
        tests=BY_LABEL,
    ),
    Fault(
        "mining: positives count at and over their bound, in Triton",
        TRITON,
        "counted",
        "tl.where(positive, s >= positive_below, s <= negative_above) == 0",
        "tl.where(positive, s < positive_below, s <= negative_above) == 0",
        tests=BY_LABEL,
    ),
    Fault(
        "mining: negatives count at and below their bound, in C++",
        CPP,
        "members",
        "~(s >= upper) : ~(s <= lower)",
        "~(s >= upper) : ~(s > lower)",
    ),
    Fault(
        "mining: a positive counts below the largest negative less ε",
        MINED,
        "mined_log_sums",
        "largest_negative + epsilon",
        "largest_negative - epsilon",
    ),
    Fault(
        "mining: a negative counts above the least positive plus ε",
        MINED,
        "mined_log_sums",
        "least_positive - epsilon",
        "least_positive + epsilon",
    ),
    Fault(
        "mining: the bounds of positives and negatives are exchanged",
        MINED,
        "mined_log_sums",
        "(largest_negative + epsilon, least_positive - epsilon)",
        "(least_positive - epsilon, largest_negative + epsilon)",
    ),
    Fault(
        "multi-similarity: terms of negatives are divided by α",
        LOSS,
        "multi_similarity_loss",
        "torch.logaddexp(negative_lse, zero) / beta",
        "torch.logaddexp(negative_lse, zero) / alpha",
    ),
    Fault(
        "mining of listed positives: bounds as near as rounding leaves them",
        MINED,
        "_largest_negatives",
        "rows[~sure].unique()",
        "rows[:0]",
    ),
    Fault(
        "mining of listed positives: those above their bound count",
        MINED,
        "_log_sums_of",
        "p >= upper[rows]",
        "p < upper[rows]",
    ),
    Fault(
        "mining of listed positives: no bound",
        MINED,
        "_forward",
        "bounds[0] = _largest",
        "bounds[:1].clone()[0] = _largest",
    ),
]
