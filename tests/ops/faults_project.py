from planting import Fault

PROJECT_KERNELS = "gssf_kernels/kernels/project.py"
CAUGHT_BY = "ops/test_definition ops/test_values ops/test_contracts"

FAULTS = [
    Fault(
        "small: by a metric, y's gradient goes through W as x's does",
        PROJECT_KERNELS,
        "sides_kernel",
        "NORMALIZE, True, False,",
        "NORMALIZE, True, True,",
    ),
    Fault(
        "small: by a metric, rows that are not normalised are gathered",
        PROJECT_KERNELS,
        "hardest_project_backward",
        "above, below, normalize, norm)",
        "above, below, False, norm)",
    ),
    Fault(
        "few: y goes through the diagonal too",
        PROJECT_KERNELS,
        "sides_kernel",
        "y, below, None, y_out, None, None, None,",
        "y, below, None, y_out, diag, None, None,",
    ),
    Fault(
        "few: weights' gradients take the lengths of other rows",
        "gssf_kernels/kernels/pairs.py",
        "scan_kernel",
        "i = (p - of_rows) * BE + tl.arange(0, BE)",
        "i = (p - of_rows) + tl.arange(0, BE)",
    ),
    Fault(
        "sums and contrast: a pair's x is not normalised",
        PROJECT_KERNELS,
        "pair_rows",
        "p = p / x_length",
        "p = p / y_length",
    ),
    Fault(
        "sums and contrast: a pair is of factors that are not rounded",
        PROJECT_KERNELS,
        "pair_rows",
        "p.to(x.dtype.element_ty).to(tl.float32)",
        "p",
    ),
    Fault(
        "sums and contrast: one side twice loses its second factor in the norm",
        PROJECT_KERNELS,
        "project_rows",
        "h += besides(",
        "h += 0 * besides(",
    ),
    Fault(
        "sums and contrast: one side twice takes its second factor off",
        PROJECT_KERNELS,
        "project_rows",
        "t += besides(",
        "t -= besides(",
    ),
    Fault(
        "sums and contrast: lengths are kept squared",
        PROJECT_KERNELS,
        "project_rows",
        "tl.store(lengths + i, tl.where(norm < eps, eps, norm)",
        "tl.store(lengths + i, tl.where(norm < eps, eps, squares)",
    ),
    Fault(
        "sums and contrast: ŷ goes back through W",
        PROJECT_KERNELS,
        "launch_sides",
        "WEIGHTED=weighted",
        "WEIGHTED=backward",
    ),
    Fault(
        "scale: dx is not divided by the norm",
        "csrc/vector_project.h",
        "backward_chunk",
        "(row[k] - xhat[k] * along) / divisor",
        "(row[k] - xhat[k] * along)",
        tests=CAUGHT_BY,
    ),
    Fault(
        "transpose: dx goes through B instead of its transpose",
        "csrc/vector_project.h",
        "backward_chunk",
        "weights.transposed, g, scratch.out",
        "weights.blocks, g, scratch.out",
        tests=CAUGHT_BY,
    ),
    Fault(
        "chunk: rows past the first chunk use its offset",
        "csrc/project.cpp",
        "project",
        "p.mutable_data_ptr<scalar_t>() + first * dim",
        "p.mutable_data_ptr<scalar_t>()",
        tests=CAUGHT_BY,
    ),
]
