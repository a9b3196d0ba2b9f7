from planting import Fault

EPILOGUES_H = "csrc/epilogues.h"
VECTOR_MAXIMA_H = "csrc/vector_maxima.h"
CAUGHT_BY = "ops/test_definition ops/test_values ops/test_contracts"

FAULTS = [
    Fault(
        "mask: the diagonal stays a negative",
        EPILOGUES_H,
        "tile",
        "negatives_.positive_score[i] = score;\n      score = kNone;",
        "negatives_.positive_score[i] = score;",
        tests=CAUGHT_BY,
    ),
    Fault(
        "mask: ids are compared with the wrong row",
        EPILOGUES_H,
        "tile",
        "has_ids ? row_id_.data() + i0 : nullptr",
        "has_ids ? row_id_.data() : nullptr",
        tests=CAUGHT_BY,
    ),
    Fault(
        "tie: the later index wins in a tile",
        VECTOR_MAXIMA_H,
        "displaces",
        "(v > m) |",
        "(v >= m) |",
        tests=CAUGHT_BY,
    ),
    Fault(
        "tie: the later tile wins",
        EPILOGUES_H,
        "displaces",
        "return v > m ||",
        "return v >= m ||",
        tests=CAUGHT_BY,
    ),
    Fault(
        "NaN: not sticky",
        VECTOR_MAXIMA_H,
        "displaces",
        "((v != v) & (m == m))",
        "((v != v) & (m != m))",
        tests=CAUGHT_BY,
    ),
    Fault(
        "edge: the last column of a tile is dropped",
        "csrc/factors.h",
        "tile",
        ".m = at.m,",
        ".m = at.m - 1,",
        tests=CAUGHT_BY,
    ),
    Fault(
        "edge: padding behind a tile is not cleared",
        EPILOGUES_H,
        "tile",
        "i < n && m % Simd<A>::lanes; ++i",
        "i < 0 && m % Simd<A>::lanes; ++i",
        tests=CAUGHT_BY,
    ),
    Fault(
        "stride: the tile's rows are read too close",
        VECTOR_MAXIMA_H,
        "tile_maxima",
        "V v = load<V>(s + i * kTileMost",
        "V v = load<V>(s + i * (kTileMost - 1)",
        tests=CAUGHT_BY,
    ),
    Fault(
        "offset: column maxima carry the tile's own row numbers",
        EPILOGUES_H,
        "fold_cols",
        "cols_.fold(at.j0, at.m, maxima.cols, at.i0)",
        "cols_.fold(at.j0, at.m, maxima.cols, 0)",
        tests=CAUGHT_BY,
    ),
    Fault(
        "transpose: y's gradient goes through Wᵀ too",
        "gssf_kernels/project.py",
        "pairs_project_backward",
        "None if call.blocks is None else call.blocks.mT",
        "call.blocks",
        tests=CAUGHT_BY,
    ),
]
