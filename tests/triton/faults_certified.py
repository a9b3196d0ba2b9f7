from planting import Fault

CERTIFIED_KERNELS = "gssf_kernels/triton/certified.py"

FAULTS = [
    Fault(
        "certified on a GPU: what the other side's rounding loses is left out of the bound",
        CERTIFIED_KERNELS,
        "error_bound",
        "+ norm * block_lost + gamma",
        "+ gamma",
    ),
    Fault(
        "certified on a GPU: an anchor's maximum is at least its largest rounded score",
        CERTIFIED_KERNELS,
        "next_partial",
        "tl.where(bounded, s - bound, float",
        "tl.where(bounded, s + bound, float",
    ),
    Fault(
        "certified on a GPU: only a tile's largest score is computed again",
        CERTIFIED_KERNELS,
        "rescore_kernel",
        "scan = seconds",
        "scan = seconds\n        part = tl.full([BL], 0, tl.int32) + parts",
    ),
    Fault(
        "certified on a GPU: positives of a tile that is computed again are not left out",
        CERTIFIED_KERNELS,
        "rescore_kernel",
        "counted &= id_i != tl.load",
        "counted &= id_i != 1 + tl.load",
    ),
    Fault(
        "certified on a GPU: sums folded by neighbours",
        CERTIFIED_KERNELS,
        "exact_scores",
        "[j.shape[0], j.shape[1], 2, total.shape[2] // 2]), 2)",
        "[j.shape[0], j.shape[1], total.shape[2] // 2, 2]), 3)",
    ),
    Fault(
        "certified on a GPU: a slab forgets what columns are at least",
        CERTIFIED_KERNELS,
        "rescore_kernel",
        "tl.store(low + i, least, mask=inside)",
        "",
    ),
]
