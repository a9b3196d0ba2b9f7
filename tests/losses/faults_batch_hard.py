from planting import Fault

FAULTS = [
    Fault(
        "few: a row is its own positive",
        "gssf_kernels/triton/batch_hard.py",
        "batch_tile",
        "positive = inside & same & (i[:, None] != j[None, :])",
        "positive = inside & same",
    ),
    Fault(
        "few: a row's positive does not hear of it",
        "gssf_kernels/triton/batch_hard.py",
        "batch_scan_kernel",
        "tl.where(p_of_e == i, -weight, 0.0)",
        "0.0",
    ),
    Fault(
        "batch-hard: a row's positive is pulled on one side alone",
        "gssf_kernels/ops/batch_hard.py",
        "_batch_hard_backward",
        "torch.cat((weight, -weight)).repeat(2)",
        "torch.cat((weight, -weight, weight, 0 * weight))",
    ),
    Fault(
        "batch-hard: a row is its own positive",
        "gssf_kernels/ops/positives.py",
        "_hardest_positives",
        "s.diagonal(i0 - j0)",
        "s.diagonal(j0 - i0)",
    ),
    Fault(
        "batch-hard: a later tile wins a tie",
        "gssf_kernels/ops/positives.py",
        "_hardest_positives",
        "wins = (least < best)",
        "wins = (least <= best) & (least < torch.inf)",
    ),
    Fault(
        "batch-hard: a later tile of the GPU's kernel wins a tie",
        "gssf_kernels/triton/reductions.py",
        "take_larger",
        "better = (new_score > score)",
        'better = (new_score >= score) & (new_score > float("-inf"))',
    ),
]
