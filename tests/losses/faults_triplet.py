from planting import Fault

TERMS_CPP = "csrc/terms.cpp"
CAUGHT_BY = "ops/test_definition ops/test_values ops/test_contracts"

FAULTS = [
    Fault(
        "sign: the margin is subtracted",
        TERMS_CPP,
        "rows",
        "return margin + row[i]",
        "return -margin + row[i]",
        tests=CAUGHT_BY,
    ),
    Fault(
        "direction: columns give the rows' terms",
        TERMS_CPP,
        "cols",
        "return margin + col[i]",
        "return margin + row[i]",
        tests=CAUGHT_BY,
    ),
    Fault(
        "few: columns' terms are the rows'",
        "gssf_kernels/kernels/hardest.py",
        "merge_hinge_kernel",
        "col, over_col = hinge(p, col, margin)",
        "col, over_col = row, over_row",
    ),
    Fault(
        "backward: grad_output is ignored",
        TERMS_CPP,
        "hinge_terms_backward",
        "const A g = above[i * stride] / share;",
        "const A g = A(1) / share;",
        tests=CAUGHT_BY,
    ),
    Fault(
        "warm-up: it goes from the hardest to all",
        "gssf_kernels/losses/triplet.py",
        "forward",
        '(1 - share) * self._loss(x, y, x_ids, y_ids, "all", False) + share * hardest',
        'share * self._loss(x, y, x_ids, y_ids, "all", False) + (1 - share) * hardest',
    ),
]
