from planting import Fault

FAULTS = [
    Fault(
        "persistent: the epilogue's branches wait for the products, each for itself",
        "gssf_kernels/triton/sweep.py",
        "reduce_tile",
        "s = complete(s)",
        "pass",
    ),
]
