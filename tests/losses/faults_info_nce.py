from planting import Fault

INFO_NCE_KERNELS = "gssf_kernels/triton/info_nce.py"
INFO_NCE_OP = "gssf_kernels/ops/info_nce.py"

FAULTS = [
    Fault(
        "InfoNCE: columns' targets push instead of pull",
        INFO_NCE_KERNELS,
        "info_nce_slope_tile",
        "g -= tl.where(positive, g_positive[None, :], 0.0)",
        "g += tl.where(positive, g_positive[None, :], 0.0)",
    ),
    Fault(
        "InfoNCE: rows' targets push instead of pull",
        INFO_NCE_KERNELS,
        "info_nce_slope_tile",
        "- tl.where(positive, g_positive[:, None], 0.0)",
        "+ tl.where(positive, g_positive[:, None], 0.0)",
    ),
    Fault(
        "InfoNCE: smoothing of rows pushes",
        INFO_NCE_KERNELS,
        "info_nce_slope_tile",
        "g -= (g_anchor * (epsilon / M))[:, None]",
        "g += (g_anchor * (epsilon / M))[:, None]",
    ),
    Fault(
        "InfoNCE: smoothing of columns is over those of y",
        INFO_NCE_KERNELS,
        "info_nce_slope_tile",
        "(epsilon / N))[None, :]",
        "(epsilon / M))[None, :]",
    ),
    Fault(
        "InfoNCE: columns past N have terms",
        INFO_NCE_KERNELS,
        "info_nce_slope_tile",
        "0.5 * tl.where(j < N, upstream",
        "0.5 * tl.where(j < M, upstream",
    ),
    Fault(
        "InfoNCE: a column has as many positives as the row",
        INFO_NCE_KERNELS,
        "info_nce_slope_tile",
        "tl.load(col_count + j,",
        "tl.load(row_count + j,",
    ),
    Fault(
        "InfoNCE: a target is smoothed the other way",
        INFO_NCE_KERNELS,
        "log_ratio",
        "target += epsilon *",
        "target -= epsilon *",
    ),
    Fault(
        "InfoNCE: columns' terms are subtracted",
        INFO_NCE_KERNELS,
        "info_nce_merged_terms",
        "0.5 * (terms + col_terms)",
        "0.5 * (terms - col_terms)",
    ),
    Fault(
        "InfoNCE: negatives count as positives of columns",
        INFO_NCE_KERNELS,
        "info_nce_tile",
        "tl.sum(positive.to(tl.float32), 0)",
        "tl.sum(inside_both.to(tl.float32), 0)",
    ),
    Fault(
        "InfoNCE: the pair of an anchor is among its other positives in the backward",
        INFO_NCE_OP,
        "_target_gradients",
        "dy[:count] -= torch.where(",
        "dy[:count] += torch.where(",
    ),
    Fault(
        "InfoNCE: the gradient of κ lacks the other positives",
        INFO_NCE_OP,
        "_target_gradients",
        "dscale + weight @ _scores(anchors, further)",
        "dscale",
    ),
    Fault(
        "InfoNCE: the gradient of κ lacks smoothing's part",
        INFO_NCE_OP,
        "_target_gradients",
        "dscale + weighted_sum @ mean",
        "dscale - weighted_sum @ mean",
    ),
    Fault(
        "dense: InfoNCE is the sum of its directions",
        "csrc/terms.cpp",
        "info_nce_terms",
        "+ cl[i])) / 2 :",
        "+ cl[i])) :",
    ),
]
