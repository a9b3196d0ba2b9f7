from planting import Fault

FAULTS = [
    Fault(
        "diagnostics: columns past N count",
        "gssf_kernels/diagnostics.py",
        "diagnose",
        "hardest.col_score.detach()[:count]",
        "hardest.col_score.detach()[-count:]",
    ),
]
