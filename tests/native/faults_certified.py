from planting import Fault

CERTIFIED_H = "csrc/certified.h"

FAULTS = [
    Fault(
        "certified: what b's rounding loses is left out of the bound",
        CERTIFIED_H,
        "of",
        "lost * norm + mine * residue + sum_",
        "lost * norm + sum_",
    ),
    Fault(
        "certified: a line's bound is its largest rounded score",
        CERTIFIED_H,
        "least",
        "static_cast<float>(top - error), kNone)",
        "static_cast<float>(top + error), kNone)",
    ),
    Fault(
        "certified: exact ties to the highest index",
        CERTIFIED_H,
        "add",
        "(other == score && at < index)",
        "(other == score && at > index)",
    ),
]
