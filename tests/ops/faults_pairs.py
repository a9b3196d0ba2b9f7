from planting import Fault

CAUGHT_BY = "ops/test_definition ops/test_values ops/test_contracts"

FAULTS = [
    Fault(
        "backward: a destination's last edge is dropped",
        "csrc/vector_base.h",
        "gather_row",
        "g < groups.first[d + 1]; ++g",
        "g + 1 < groups.first[d + 1]; ++g",
        tests=CAUGHT_BY,
    ),
    Fault(
        "scale: gathered rows are not normalised",
        "csrc/vector_base.h",
        "gather_row",
        "const A weight = normalize ? dscores[e] / norm_divisor(std::sqrt(dot<A>(row, row, dim))) : dscores[e];",
        "const A weight = dscores[e];",
        tests=CAUGHT_BY,
    ),
]
