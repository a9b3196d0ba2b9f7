"""The ops that are measured: ``OPS[name]``."""

from bench.ops import contrastive, goal, hardest_negatives, rows, search, triplet

OPS = {
    op.name: op
    for op in (
        triplet.OP,
        *goal.GOAL,
        hardest_negatives.OP,
        contrastive.INFO_NCE,
        contrastive.SIGMOID,
        search.NEAREST,
        search.TOP_SCORES,
        rows.PROJECT,
        rows.PAIR_SCORES,
    )
}
