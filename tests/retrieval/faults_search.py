from planting import Fault

OP = "gssf_kernels/ops/top_scores.py"
COUNTS = "gssf_kernels/ops/score_counts.py"
RANKS = "gssf_kernels/retrieval/ranks.py"
TRITON = "gssf_kernels/triton/top_scores.py"
TRITON_COUNTS = "gssf_kernels/triton/score_counts.py"
SEARCH, RANKED = "test_search", "test_ranks_of_positives"

FAULTS = [
    Fault(
        "search: the last of equal scores",
        OP,
        "merged",
        "indices.argsort(dim=1, stable=True)",
        "(-indices).argsort(dim=1, stable=True)",
        SEARCH,
    ),
    Fault("search: columns of a chunk begin at 0", OP, "_top_scores", "place + first", "place", SEARCH),
    Fault(
        "search: places without a score have a gradient",
        OP,
        "_TopScores.backward",
        "(pair[1].flatten())",
        "(pair[1].flatten().clamp_min(0))",
        SEARCH,
    ),
    Fault(
        "search: no gradient by columns",
        OP,
        "_TopScores.backward",
        "(dcol_values, col_index, True)",
        "(None, col_index, True)",
        SEARCH,
    ),
    Fault(
        "search: the limit itself is left out",
        "gssf_kernels/reference/retrieval.py",
        "top_scores",
        "s > limit.expand",
        "s >= limit.expand",
        SEARCH,
    ),
    Fault(
        "search: Triton's ties go to the highest index",
        TRITON,
        "key_of",
        "- column.to(tl.int64) + LAST_COLUMN",
        "+ column.to(tl.int64)",
        SEARCH,
    ),
    Fault("search: Triton has -0 below 0", TRITON, "ordered", "(s + 0.0).to", "s.to", "test_top_scores_order"),
    Fault(
        "search: Triton searches for the first rows again",
        TRITON,
        "top_scores_kernel",
        "i0 = first_row + block * BN",
        "i0 = block * BN",
        SEARCH,
    ),
    Fault("search: Triton sweeps no split again", TRITON, "best_keys", "triton.cdiv(k, tile.LIST)", "1", SEARCH),
    Fault(
        "search: Triton drops the best of its list",
        TRITON,
        "top_scores_kernel",
        "worst = tl.min(top, 1)",
        "worst = tl.max(top, 1)",
        SEARCH,
    ),
    Fault(
        "search: C++ keeps the k worst",
        "csrc/best.h",
        "BestOfAnchors",
        "if (!before(candidate, heap[0])) return;",
        "if (before(candidate, heap[0])) return;",
        SEARCH,
    ),
    Fault(
        "search: C++ keeps the last of equal scores",
        "csrc/best.h",
        "before",
        "x.index < y.index",
        "x.index > y.index",
        SEARCH,
    ),
    Fault("search: C++ leaves no pair out", "csrc/best.h", "LeftOut", "self && i <", "!self && i <", SEARCH),
    Fault(
        "ranks: counted are the scores below",
        COUNTS,
        "_score_counts",
        "(of >= level).sum(1)",
        "(of <= level).sum(1)",
        RANKED,
    ),
    Fault(
        "ranks: a NaN helps",
        COUNTS,
        "_score_counts",
        "torch.where(s.isnan(), torch.inf, s)",
        "torch.where(s.isnan(), -torch.inf, s)",
        RANKED,
    ),
    Fault("ranks: (i, i) counts", RANKS, "counts", 'exclude_self or pairing.kind == "rows"', "exclude_self", RANKED),
    Fault("ranks: the worst positive", RANKS, "best_rank", '"amax"', '"amin"', RANKED),
    Fault(
        "ranks: equal positives share a rank", RANKS, "ByLevel.ranks", "1 + count + self.before", "1 + count", RANKED
    ),
    Fault("ranks: the higher index of equal positives is first", RANKS, "ByLevel.__init__", ".flip(0)", "", RANKED),
    Fault(
        "ranks: Triton counts what is left out",
        TRITON_COUNTS,
        "count_tile",
        "s = only_negatives(s, i0, j0, N, M, negatives, None, BN, BM)",
        "s = s",
        RANKED,
    ),
    Fault(
        "ranks: Triton's levels are not reached by their equals",
        TRITON_COUNTS,
        "add_counts",
        "s >= level",
        "s > level",
        RANKED,
    ),
    Fault(
        "ranks: C++ counts no equals of many levels",
        "csrc/vector_search.h",
        "count_levels",
        "*last == v",
        "*last > v",
        RANKED,
    ),
    Fault(
        "ranks: C++ counts no equals", "csrc/vector_search.h", "count_level", "equal -= v == V{} + level;", "", RANKED
    ),
    Fault(
        "ranks: C++ counts listed pairs",
        "csrc/score_counts.cpp",
        "CountScores",
        "s[(i - i0) * kTileMost + *e - j0] = kLeftOut;",
        ";",
        RANKED,
    ),
]
