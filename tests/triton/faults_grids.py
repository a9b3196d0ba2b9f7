from planting import Fault

FAULTS = [
    Fault(
        "grids: a pass has a grid of two dimensions",
        "gssf_kernels/triton/sweep.py",
        "Chunk.run",
        "chunk_kernel[(self.row_blocks * self.column_blocks,)](",
        "chunk_kernel[(self.row_blocks, self.column_blocks)](",
    ),
    Fault(
        "grids: tiles of a pass are numbered row by row",
        "gssf_kernels/triton/sweep.py",
        "chunk_kernel",
        "tl.program_id(0) % blocks, tl.program_id(0) // blocks",
        "tl.program_id(0) % tl.cdiv(M, BM), tl.program_id(0) // tl.cdiv(M, BM)",
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
