from planting import Fault

FAULTS = [
    Fault(
        "dense: scores kept for the backward are written over",
        "gssf_kernels/dense.py",
        "chunks",
        "s.copy_(scores[first : first + rows])",
        "s = scores[first : first + rows]",
    ),
    Fault(
        "compile: a guard on which object a tensor is",
        "gssf_kernels/_checks.py",
        "autocast",
        "if other is t]",
        "if id(other) == id(t)]",
    ),
]
