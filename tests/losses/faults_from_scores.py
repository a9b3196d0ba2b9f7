from planting import Fault

LOSS = "gssf_kernels/losses/from_scores.py"

FAULTS = [
    Fault(
        "scores: columns are compared as rows",
        LOSS,
        "triplet_from_scores",
        "(s[:, :n].mT, same[:, :n].mT)",
        "(s, same)",
    ),
    Fault("scores: a tie is semi-hard", LOSS, "_negative", "masked >= positive_score", "masked > positive_score"),
    Fault(
        "scores: every negative includes the pair",
        LOSS,
        "triplet_from_scores",
        "torch.where(no_negative, 0, ",
        "torch.where(no_negative, margin, ",
    ),
]
