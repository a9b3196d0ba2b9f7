from planting import Fault

PROJECT_KERNELS = "gssf_kernels/triton/project.py"
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
        "gssf_kernels/triton/pairs.py",
        "scan",
        "NORMALIZE=call.normalize",
        "NORMALIZE=False",
    ),
    Fault(
        "few: y goes through the diagonal too",
        PROJECT_KERNELS,
        "sides_kernel",
        "y, dunit, None, y_out, None, None, None,",
        "y, dunit, None, y_out, diag, None, None,",
    ),
    Fault(
        "few: weights' gradients take the lengths of other rows",
        "gssf_kernels/triton/pairs.py",
        "scan_kernel",
        "i = (p - row_programs) * BE + tl.arange(0, BE)",
        "i = (p - row_programs) + tl.arange(0, BE)",
    ),
    Fault(
        "sums and InfoNCE: a pair's x is not normalised",
        PROJECT_KERNELS,
        "positive_rows",
        "p = p / x_length",
        "p = p / y_length",
    ),
    Fault(
        "sums and InfoNCE: a pair is of factors that are not rounded",
        PROJECT_KERNELS,
        "positive_rows",
        "p.to(x.dtype.element_ty).to(tl.float32)",
        "p",
    ),
    Fault(
        "sums and InfoNCE: one side twice loses its second factor in the norm",
        PROJECT_KERNELS,
        "project_rows",
        "h += load_addend(",
        "h += 0 * load_addend(",
    ),
    Fault(
        "sums and InfoNCE: one side twice takes its second factor off",
        PROJECT_KERNELS,
        "project_rows",
        "t += load_addend(",
        "t -= load_addend(",
    ),
    Fault(
        "sums and InfoNCE: lengths are kept squared",
        PROJECT_KERNELS,
        "project_rows",
        "tl.store(lengths + i, tl.where(norm < eps, eps, norm)",
        "tl.store(lengths + i, tl.where(norm < eps, eps, squares)",
    ),
    Fault(
        "sums and InfoNCE: ŷ goes back through W",
        PROJECT_KERNELS,
        "launch_sides",
        "WEIGHTED=weighted",
        "WEIGHTED=backward",
    ),
    Fault(
        "scale: dx is not divided by the norm",
        "csrc/vector_project.h",
        "backward_chunk",
        "(row[k] - xhat[k] * inner) / divisor",
        "(row[k] - xhat[k] * inner)",
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
        "project_side",
        "p.mutable_data_ptr<scalar_t>() + first * dim",
        "p.mutable_data_ptr<scalar_t>()",
        tests=CAUGHT_BY,
    ),
]
