from planting import Fault

FAULTS = [
    Fault(
        "grids: a pass has a program for each tile along two dimensions",
        "gssf_kernels/triton/dense.py",
        "softmax_pass",
        "softmax_kernel[(down * across,)](",
        "softmax_kernel[(down, across)](",
    ),
    Fault(
        "grids: tiles of a pass are counted along the rows",
        "gssf_kernels/triton/dense.py",
        "tile_places",
        "down = tl.cdiv(R, BR)",
        "down = tl.cdiv(M, BM)",
        tests="ops/test_logsumexp ops/test_sums",
    ),
    Fault(
        "grids: the pieces of a segment's sum are counted as rows",
        "gssf_kernels/triton/pairs.py",
        "segment_sum_kernel",
        "d = tl.program_id(0) % pieces * BD",
        "d = tl.program_id(0) // pieces * BD",
        tests="ops/test_pairs ops/test_hardest_negatives",
    ),
]
