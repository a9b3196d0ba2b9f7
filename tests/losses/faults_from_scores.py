from planting import Fault

DEFINITION = "gssf_kernels/reference/triplet.py"
SCORES = "losses/test_from_scores"

FAULTS = [
    Fault(
        "scores: columns are compared as rows",
        DEFINITION,
        "triplet_from_scores",
        "left[:, : s.shape[0]].mT",
        "left",
        SCORES,
    ),
    Fault(
        "scores: a tie is semi-hard",
        DEFINITION,
        "terms_of_negatives",
        "left >= p[:, None]",
        "left > p[:, None]",
        SCORES,
    ),
    Fault(
        "scores: pairs are negatives",
        DEFINITION,
        "triplet_from_scores",
        "s.masked_fill(positives(s, s.mT, x_ids, y_ids), -torch.inf)",
        "s",
        SCORES,
    ),
]
