from planting import Fault

FAULTS = [
    Fault(
        "bench: a wrong variant is timed",
        "bench/measure.py",
        "__call__",
        "if not e <= a]",
        "if e != e]",
    ),
    Fault(
        "bench: ratios of the wrong way round",
        "bench/results.py",
        "ratio",
        "theirs / ours for theirs, ours in pairs",
        "ours / theirs for theirs, ours in pairs",
    ),
]
