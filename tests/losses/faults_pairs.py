from planting import Fault

PAIRING, MINING = "gssf_kernels/ops/pairing.py", "gssf_kernels/ops/mining.py"
MASKS, SEGMENT_TERMS = "gssf_kernels/ops/masks.py", "gssf_kernels/ops/segment_terms.py"
NEGATIVES = "ops/test_negatives"

FAULTS = [
    Fault("pairs listed again count again", PAIRING, "_listed", "key[1:] == key[:-1]", "key[1:] != key[1:]"),
    Fault("pairs by id: each row's first column alone", PAIRING, "_listed_by_ids", "+ places - starts[rows]", "+ 0"),
    Fault("false negatives below the margin are left out", MINING, "limits_of", "rows + margin", "rows - margin"),
    Fault("lowest positive: without those of equal id", MINING, "lowest_positives", "torch.minimum(*both)", "both[0]"),
    Fault("semi-hard: a tie with the pair counts", MINING, "semihard", "-torch.inf))", "torch.inf))"),
    Fault(
        "a gradient of pairs goes to row i",
        MINING,
        "_gradients",
        "(pair_cols, row_index, j)",
        "(pair_rows, row_index, j)",
    ),
    Fault("pairs by id push apart", SEGMENT_TERMS, "_segment_terms", "ds -= torch", "ds += torch"),
    Fault(
        "pairs by id: no gradient of hardest negatives",
        SEGMENT_TERMS,
        "_segment_terms",
        "dn[part] += ",
        "dn[part] += 0 * ",
    ),
    Fault("ignored ids: the pair too", MASKS, "left_out", "out.diagonal(first)[:] = False", "pass"),
    Fault("limits leave positives of equal id out", MASKS, "left_out", "over &= ~same", "pass"),
    Fault(
        "a bias of candidates reaches the columns",
        MASKS,
        "Selection.logits",
        '''and direction == "rows"''',
        '''and direction != "neither"''',
    ),
    Fault(
        "sums: listed pairs repel",
        "gssf_kernels/ops/sums.py",
        "_listed_terms",
        "torch.where(here, -slope, 0)",
        "torch.where(here, slope, 0)",
    ),
    Fault(
        "Triton: a limit leaves equal scores out",
        "gssf_kernels/triton/epilogues.py",
        "within",
        "s > tl.expand_dims",
        "s >= tl.expand_dims",
        NEGATIVES,
    ),
    Fault(
        "Triton: one listed pair per tile alone",
        "gssf_kernels/triton/epilogues.py",
        "without_pairs",
        "at += (col < last).to(tl.int64)",
        "at = end",
        NEGATIVES,
    ),
    Fault(
        "C++: a limit of rows holds for columns",
        "csrc/vector_maxima.h",
        "tile_maxima",
        "limits.cols ? (v > load<V>(limits.cols + j)",
        "limits.cols ? (v > V{} + limits.rows[i]",
        NEGATIVES,
    ),
    Fault(
        "a ceiling of the scale lets it rise",
        "gssf_kernels/_modules.py",
        "_Ceiling.backward",
        "(grad_out <= 0)",
        "(grad_out >= 0)",
        "losses/test_modules",
    ),
    Fault(
        "NT-Xent: a row is its own positive",
        "gssf_kernels/ops/positive_means.py",
        "positive_means",
        "total - table",
        "total + 0 * table",
        "losses/test_nt_xent",
    ),
]
