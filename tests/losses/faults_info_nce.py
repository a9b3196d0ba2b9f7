from planting import Fault

CONTRAST_KERNELS = "gssf_kernels/triton/contrast.py"
CONTRAST_OP = "gssf_kernels/ops/contrast.py"

FAULTS = [
    Fault(
        "sums and contrast: columns' targets push instead of pull",
        CONTRAST_KERNELS,
        "contrast_slope_tile",
        "j < M, 0) - tl.where(same, own[None, :], 0.0)",
        "j < M, 0) + tl.where(same, own[None, :], 0.0)",
    ),
    Fault(
        "sums and contrast: rows' targets push instead of pull",
        CONTRAST_KERNELS,
        "contrast_slope_tile",
        "i < N, 1) - tl.where(same, own[:, None], 0.0)",
        "i < N, 1) + tl.where(same, own[:, None], 0.0)",
    ),
    Fault(
        "sums and contrast: smoothing of rows pushes",
        CONTRAST_KERNELS,
        "contrast_slope_tile",
        "g -= (above * (epsilon / M))[:, None]",
        "g += (above * (epsilon / M))[:, None]",
    ),
    Fault(
        "sums and contrast: smoothing of columns is over those of y",
        CONTRAST_KERNELS,
        "contrast_slope_tile",
        "(epsilon / N))[None, :]",
        "(epsilon / M))[None, :]",
    ),
    Fault(
        "sums and contrast: columns past N have terms",
        CONTRAST_KERNELS,
        "contrast_slope_tile",
        "0.5 * tl.where(j < N, upstream",
        "0.5 * tl.where(j < M, upstream",
    ),
    Fault(
        "sums and contrast: a column's positives are the row's",
        CONTRAST_KERNELS,
        "contrast_slope_tile",
        "tl.load(col_count + j,",
        "tl.load(row_count + j,",
    ),
    Fault(
        "sums and contrast: a target is smoothed the other way",
        CONTRAST_KERNELS,
        "line_ratio",
        "target += epsilon *",
        "target -= epsilon *",
    ),
    Fault(
        "sums and contrast: columns' terms are taken off",
        CONTRAST_KERNELS,
        "merge_info_nce_kernel",
        "0.5 * (terms + of_cols)",
        "0.5 * (terms - of_cols)",
    ),
    Fault(
        "sums and contrast: positives of columns are counted by rows",
        CONTRAST_KERNELS,
        "contrast_tile",
        "tl.sum(same.to(tl.float32), 0)",
        "tl.sum(same.to(tl.float32), 1)[0] + tl.zeros([BM], tl.float32)",
    ),
    Fault(
        "sums and contrast: a pair is its own other positive on the way back",
        CONTRAST_OP,
        "_target_gradients",
        "back[:count] -= torch.where(",
        "back[:count] += torch.where(",
    ),
    Fault(
        "sums and contrast: κ gets nothing of the other positives",
        CONTRAST_OP,
        "_target_gradients",
        "dscale + weight @ _scores(anchors, others)",
        "dscale",
    ),
    Fault(
        "sums and contrast: κ loses what smoothing gives",
        CONTRAST_OP,
        "_target_gradients",
        "dscale + drawn @ mean",
        "dscale - drawn @ mean",
    ),
    Fault(
        "dense: InfoNCE is the sum of its directions",
        "csrc/terms.cpp",
        "contrast_terms",
        "+ cl[i])) / 2 :",
        "+ cl[i])) :",
    ),
]
