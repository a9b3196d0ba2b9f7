from planting import Fault

FAULTS = [
    Fault(
        "persistent: a program makes its first tile alone",
        "gssf_kernels/triton/sweep.py",
        "sweep_kernel",
        "tl.range(tl.program_id(0), rows * columns, tl.num_programs(0)",
        "tl.range(tl.program_id(0), tl.num_programs(0), tl.num_programs(0)",
    ),
    Fault(
        "persistent: half of the tiles, and some below the diagonal",
        "gssf_kernels/triton/sweep.py",
        "tile_of",
        "column < length, row, 2 * rows - 1 - row",
        "column < length, row, 2 * rows - 2 - row",
    ),
]
