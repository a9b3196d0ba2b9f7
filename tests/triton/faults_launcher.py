from planting import Fault

PLAN = "gssf_kernels/plan.py"

FAULTS = [
    Fault(
        "launcher: kernels are started on fp64",
        "gssf_kernels/_library.py",
        "Op.launch",
        "if dtype not in KERNEL_DTYPES), None)",
        "if dtype in ()), None)",
        tests="ops/test_hardest_negatives",
    ),
    Fault(
        "plan: a problem of exactly SMALL scores is not small",
        PLAN,
        "Scores.small",
        "self.count <= SMALL",
        "self.count < SMALL",
        tests="ops/test_logsumexp ops/test_sums",
    ),
    Fault(
        "plan: mining is certified from one score later on",
        PLAN,
        "hardest_sweeps",
        "scores.count >= CERTIFIED",
        "scores.count > CERTIFIED",
        tests="losses/test_triplet",
    ),
    Fault(
        "plan: symmetric bf16 scores take row panels",
        PLAN,
        "dense",
        "and not scores.symmetric",
        "",
        tests="triton/test_row_panels",
    ),
    Fault(
        "plan: a symmetric sweep computes all tiles",
        PLAN,
        "hardest_sweeps",
        "upper = (twice or symmetric) and scores.count > SMALL",
        "upper = (twice or symmetric) and scores.count < 0",
        tests="ops/test_explain",
    ),
]
