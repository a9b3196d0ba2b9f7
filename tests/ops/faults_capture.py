from planting import Fault

FAULTS = [
    Fault(
        "GPU: a loss looks at a value",
        "gssf_kernels/diagnostics.py",
        "_mean_negative",
        "valid = negative != -torch.inf  # NaN is valid",
        "valid = negative != (-torch.inf if float(negative.sum()) else torch.inf)",
    ),
]
