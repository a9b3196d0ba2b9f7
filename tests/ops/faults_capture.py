from planting import Fault

FAULTS = [
    Fault(
        "GPU: a loss looks at a value",
        "gssf_kernels/diagnostics.py",
        "diagnose",
        "found = negative != -torch.inf  # NaN is found",
        "found = negative != (-torch.inf if float(negative.sum()) else torch.inf)",
    ),
]
