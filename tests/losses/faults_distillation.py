from planting import Fault

RELATIONS_KERNELS = "gssf_kernels/triton/relations.py"

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
        RELATIONS_KERNELS,
        "relation_tile_kernel",
        "pointwise((f - u) - load_scalar(lam, lam_number) * gap, KIND)",
        "pointwise(load_scalar(lam, lam_number) * gap - (f - u), KIND)",
    ),
    Fault(
        "relations: λ mixes the other way round",
        RELATIONS_KERNELS,
        "relation_tile_kernel",
        "gap = w - u",
        "gap = u - w",
    ),
    Fault(
        "relations: what λ gets by the student has the other sign",
        RELATIONS_KERNELS,
        "relation_loss_kernel",
        "* between - along) / pairs",
        "* between + along) / pairs",
    ),
    Fault(
        "relations: what λ gets by the teachers has the other sign",
        RELATIONS_KERNELS,
        "relation_loss_kernel",
        "to_image * at_size - to_text * at_rest",
        "to_image * at_size + to_text * at_rest",
    ),
    Fault(
        "relations: what τ gets has the other sign",
        RELATIONS_KERNELS,
        "relation_loss_kernel",
        "by_tau = -total",
        "by_tau = total",
    ),
    Fault(
        "relations: a pair's two places count once in the student's gradient",
        RELATIONS_KERNELS,
        "relation_loss_kernel",
        "(2.0 * own * share / pairs)",
        "(own * share / pairs)",
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
