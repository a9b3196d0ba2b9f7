from planting import Fault

LOGSUMEXP_KERNELS = "gssf_kernels/triton/logsumexp.py"
GRADIENTS_KERNELS = "gssf_kernels/triton/gradients.py"
SWEEP = "gssf_kernels/triton/sweep.py"
CAUGHT_BY = "ops/test_logsumexp ops/test_sums losses/test_info_nce"
CAUGHT_BY_2 = "ops/test_logsumexp ops/test_sums"

FAULTS = [
    Fault(
        "small: a row's log-sum is that of its first partial",
        "gssf_kernels/triton/reductions.py",
        "merge_rows",
        "lane, rows, tl.cdiv(M, BM), 0",
        "lane, rows, 1, 0",
    ),
    Fault(
        "small: scores past M get a share of a row's gradient in κ",
        LOGSUMEXP_KERNELS,
        "softmax_tile",
        "tl.where((j < M)[None, :], g * s, 0.0)",
        "g * s",
    ),
    Fault(
        "small: of symmetric scores only the rows' half reaches da",
        GRADIENTS_KERNELS,
        "gradients_kernel",
        "if SAME:",
        "if SAME and N < 0:",
        tests=CAUGHT_BY,
    ),
    Fault(
        "small: gradients of scores are rounded to halves",
        SWEEP,
        "empty_dscores",
        "dtype = a.dtype if a.dtype != torch.float16 else torch.float32",
        "dtype = a.dtype",
        tests=CAUGHT_BY,
    ),
    Fault(
        "small: a positive's score has the gradient of its row's terms alone",
        GRADIENTS_KERNELS,
        "dpositive",
        "merge_sums(col_slopes, r, M, N, down, BP)",
        "merge_sums(col_slopes, r, M, N, 0 * down, BP)",
        tests=CAUGHT_BY,
    ),
    Fault(
        "logarithm: κ's gradient is returned for its logarithm's",
        GRADIENTS_KERNELS,
        "gradients_kernel",
        "total *= logarithm_slope(scale, constant)",
        "total *= 1.0",
        tests=CAUGHT_BY,
    ),
    Fault(
        "dense: db keeps the last chunk alone",
        "gssf_kernels/dense.py",
        "chunks",
        "Right(part, dtype).product(ds.mT, db, add=first > 0)",
        "Right(part, dtype).product(ds.mT, db)",
    ),
    Fault(
        "slabs: columns' log-sums of the slabs before are lost",
        "gssf_kernels/triton/reductions.py",
        "merge_columns",
        "before & (first > 0)",
        "before & (first < 0)",
    ),
    Fault(
        "slabs: every slab stores its columns' logarithms",
        "gssf_kernels/triton/reductions.py",
        "merge_columns",
        "(first + blocks) * BN >= N",
        "first >= 0",
    ),
    Fault(
        "row panels: db is that of the last panel",
        SWEEP,
        "gradients_by_row_panels",
        "db, add=first > 0)",
        "db)",
        tests=CAUGHT_BY_2,
    ),
    Fault(
        "row panels: the last panel has rows past the end",
        SWEEP,
        "gradients_by_row_panels",
        "panel = dscores[: rows.stop - rows.start]",
        "panel = dscores",
        tests=CAUGHT_BY_2,
    ),
    Fault(
        "row panels: sums are those of the last panel",
        SWEEP,
        "gradients_by_row_panels",
        "return da, db, sums.sum(0)",
        "return da, db, sums[-1]",
        tests=CAUGHT_BY_2,
    ),
    Fault(
        "row panels: κ is not in the gradients of log-sums",
        LOGSUMEXP_KERNELS,
        "logsumexp_scores_backward",
        "return da.mul_(kappa).to(a.dtype), db",
        "return da.to(a.dtype), db",
    ),
]
