from planting import Fault

FAULTS = [
    Fault(
        "sum: a tile's maximum does not join when a greater one comes",
        "csrc/epilogues.h",
        "merged",
        "(loser.sum + 1) * std::exp",
        "loser.sum * std::exp",
    ),
    Fault(
        "mask: a column's own maximum is one of its terms",
        "csrc/vector_relative.h",
        "tile_terms",
        "close & (col_index != static_cast<Lane>(i))",
        "close",
    ),
    Fault(
        "tie: maxima of two tiles that are equal count as a distance of 0",
        "csrc/epilogues.h",
        "merged",
        "winner.ties += loser.ties + 1",
        "winner.ties += loser.ties",
    ),
]
