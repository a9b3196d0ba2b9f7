from planting import Fault

CERTIFIED_H = "csrc/certified.h"

FAULTS = [
    Fault(
        "certified: what b's rounding loses is left out of the bound",
        CERTIFIED_H,
        "of",
        "residue * block_norm + norm * block_residue + sum_",
        "residue * block_norm + sum_",
    ),
    Fault(
        "certified: an anchor's bound is its largest rounded score",
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
