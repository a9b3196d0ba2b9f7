from planting import Fault

LOGSUMEXP_KERNELS = "gssf_kernels/triton/logsumexp.py"
GRADIENTS_KERNELS = "gssf_kernels/triton/gradients.py"
SLABS_KERNELS = "gssf_kernels/triton/slabs.py"
CAUGHT_BY = "ops/test_logsumexp ops/test_sums losses/test_info_nce"
CAUGHT_BY_2 = "ops/test_logsumexp ops/test_sums"

FAULTS = [
    Fault(
        "small: a row's log-sum is that of its first parts",
        LOGSUMEXP_KERNELS,
        "merge_logs_kernel",
        "row_sums, lane, rows, tl.cdiv(M, BM), BP)",
        "row_sums, lane, rows, 1, BP)",
    ),
    Fault(
        "small: scores past M get a share of a row's gradient in κ",
        LOGSUMEXP_KERNELS,
        "softmax_tile",
        "tl.where((j < M)[None, :], g * s, 0.0)",
        "g * s",
    ),
    Fault(
        "small: one side given twice gets the rows' half alone",
        GRADIENTS_KERNELS,
        "gradients_kernel",
        "if SAME:",
        "if SAME and N < 0:",
        tests=CAUGHT_BY,
    ),
    Fault(
        "small: gradients of scores are rounded to halves",
        GRADIENTS_KERNELS,
        "room",
        "dtype = a.dtype if a.dtype != torch.float16 else torch.float32",
        "dtype = a.dtype",
        tests=CAUGHT_BY,
    ),
    Fault(
        "small: a pair's own score gets what its row's slopes are, not its column's",
        GRADIENTS_KERNELS,
        "own_weights",
        "part_sums(of_cols, r, M, N, down, BP)",
        "part_sums(of_cols, r, M, N, 0 * down, BP)",
        tests=CAUGHT_BY,
    ),
    Fault(
        "logarithm: κ's gradient is given for its logarithm's",
        GRADIENTS_KERNELS,
        "gradients_kernel",
        "total *= outer_slope(scale, constant)",
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
        LOGSUMEXP_KERNELS,
        "merge_logs_kernel",
        "before = (j < M) & (first > 0)",
        "before = (j < M) & (first < 0)",
    ),
    Fault(
        "slabs: every slab takes its columns' logarithms",
        LOGSUMEXP_KERNELS,
        "merge_logs_kernel",
        "last = (first + blocks) * BN >= N",
        "last = first >= 0",
    ),
    Fault(
        "slabs: db is of the last slab",
        SLABS_KERNELS,
        "gradients_by_slabs",
        "db, add=first > 0)",
        "db)",
        tests=CAUGHT_BY_2,
    ),
    Fault(
        "slabs: the last slab has rows past the end",
        SLABS_KERNELS,
        "gradients_by_slabs",
        "part = ds[: rows.stop - rows.start]",
        "part = ds",
        tests=CAUGHT_BY_2,
    ),
    Fault(
        "slabs: sums of the last slab alone",
        SLABS_KERNELS,
        "gradients_by_slabs",
        "return da, db, sums.sum(0)",
        "return da, db, sums[-1]",
        tests=CAUGHT_BY_2,
    ),
    Fault(
        "slabs: κ is not in the gradients of log-sums",
        LOGSUMEXP_KERNELS,
        "_by_slabs",
        "return da.mul_(kappa).to(a.dtype), db",
        "return da.to(a.dtype), db",
    ),
]
