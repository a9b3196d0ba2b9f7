"""The ops that are measured: ``OPS[name]``."""

from bench.ops import (
    contrastive,
    distillation,
    fragments,
    goal,
    hardest_negatives,
    labels,
    rows,
    search,
    sum_hinge,
    triplet,
)

OPS = {
    op.name: op
    for op in (
        triplet.OP,
        *goal.GOAL,
        hardest_negatives.OP,
        contrastive.INFO_NCE,
        contrastive.SIGMOID,
        sum_hinge.OP,
        distillation.OP,
        labels.CIRCLE,
        labels.MULTI_SIMILARITY,
        labels.MINED,
        fragments.LATE_INTERACTION,
        fragments.LATE_SCORES,
        search.NEAREST,
        search.TOP_SCORES,
        rows.PROJECT,
        rows.PAIR_SCORES,
    )
}
