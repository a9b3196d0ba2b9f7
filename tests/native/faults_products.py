from planting import Fault

FAULTS = [
    Fault(
        "symmetric sums: the gradient of one side alone",
        "gssf_kernels/ops/sums.py",
        "_symmetric",
        "da = da.mul_(2) if da is not None",
        "da = da.mul_(1) if da is not None",
    ),
    Fault(
        "products: a part of the channels alone",
        "csrc/vector_product.h",
        "tile",
        "add ? load<V>(c + r * c_row + v * L) : V{}",
        "V{}",
    ),
    Fault(
        "bf16 products: a part of the channels alone",
        "csrc/bf16.cpp",
        "options",
        ".add = add || l > 0",
        ".add = add",
    ),
    Fault(
        "bf16 products: columns behind the last whole panel forget what they are added to",
        "csrc/bf16.cpp",
        "run",
        "add ? to[r * c_row + at] + sum : sum",
        "sum",
    ),
    Fault(
        "bf16 products: a panel's part begins at a column inside it",
        "gssf_kernels/dense.py",
        "__init__",
        "self.width = 64 if unit else 32",
        "self.width = 32",
    ),
    Fault(
        "bf16 products: numbers are cut off, not rounded",
        "csrc/vector_product.h",
        "bf16_bits",
        "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
        "bits >> 16",
    ),
]
