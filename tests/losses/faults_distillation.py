from planting import Fault

RELATIONS_KERNELS = "gssf_kernels/triton/relations.py"
SCORE_FUNCTIONS = "gssf_kernels/triton/score_functions.py"

FAULTS = [
    Fault(
        "relations: a tile off the diagonal stands for itself alone",
        RELATIONS_KERNELS,
        "relation_tile_kernel",
        "times = tl.where(tile_i == tile_j, 1.0, 2.0)",
        "times = tl.where(tile_i == tile_j, 1.0, 1.0)",
    ),
    Fault(
        "relations: what is below the diagonal gets no gradient",
        RELATIONS_KERNELS,
        "relation_tile_kernel",
        "inside = inside & (tile_i != tile_j)",
        "inside = inside & (tile_i > N)",
    ),
    Fault(
        "relations: the diagonal counts",
        RELATIONS_KERNELS,
        "relation_tile_kernel",
        "& (i[:, None] != j[None, :])",
        "& (i[:, None] >= 0)",
    ),
    Fault(
        "relations: rows past N count",
        RELATIONS_KERNELS,
        "relation_tile_kernel",
        "counted = (i < N)[:, None] & (j < N)[None, :] &",
        "counted =",
    ),
    Fault(
        "relations: e is of the other sign",
        SCORE_FUNCTIONS,
        "relation_terms",
        "pointwise((f - u) - lam * gap, KIND)",
        "pointwise(lam * gap - (f - u), KIND)",
    ),
    Fault(
        "relations: λ mixes the other way round",
        SCORE_FUNCTIONS,
        "relation_terms",
        "gap = w - u",
        "gap = u - w",
    ),
    Fault(
        "relations: λ's gradient by way of the student has the other sign",
        RELATIONS_KERNELS,
        "relation_loss_kernel",
        "* between - toward_text) / pairs",
        "* between + toward_text) / pairs",
    ),
    Fault(
        "relations: λ's gradient by way of the teachers has the other sign",
        RELATIONS_KERNELS,
        "relation_loss_kernel",
        "to_image * at_size - to_text * at_rest",
        "to_image * at_size + to_text * at_rest",
    ),
    Fault(
        "relations: τ's gradient has the other sign",
        RELATIONS_KERNELS,
        "relation_loss_kernel",
        "by_tau = -total",
        "by_tau = total",
    ),
    Fault(
        "relations: a pair's two places count once in the student's gradient",
        RELATIONS_KERNELS,
        "relation_loss_kernel",
        "(2.0 * to_student * share / pairs)",
        "(to_student * share / pairs)",
    ),
    Fault(
        "relations: the teachers' weights are exchanged",
        RELATIONS_KERNELS,
        "relation_loss_kernel",
        "(to_image * size + to_text * rest)",
        "(to_image * rest + to_text * size)",
    ),
    Fault(
        "dense: a pair's two places count once in the student's gradient",
        "gssf_kernels/ops/relations.py",
        "_formula",
        "slope = 2 * w0",
        "slope = w0",
    ),
]
