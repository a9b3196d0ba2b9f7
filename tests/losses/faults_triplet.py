from planting import Fault

TERMS_CPP = "csrc/terms.cpp"
CAUGHT_BY = "ops/test_definition ops/test_values ops/test_contracts"

FAULTS = [
    Fault(
        "sign: the margin is subtracted",
        TERMS_CPP,
        "Hinge.term",
        "margin + n - p;",
        "-margin + n - p;",
        tests=CAUGHT_BY,
    ),
    Fault(
        "direction: columns give the rows' terms",
        TERMS_CPP,
        "anchor_terms",
        "function.term(p[i], col[i])",
        "function.term(p[i], row[i])",
        tests=CAUGHT_BY,
    ),
    Fault(
        "few: columns' terms are the rows'",
        "gssf_kernels/triton/hardest.py",
        "hardest_merged_terms",
        "+ FUNCTION(p, col, constants",
        "+ FUNCTION(p, row, constants",
    ),
    Fault(
        "backward: grad_output is ignored",
        TERMS_CPP,
        "gradient",
        "out[i] = from[i * stride] / share;",
        "out[i] = A(1) / share;",
        tests=CAUGHT_BY,
    ),
    Fault(
        "warm-up: it goes from the hardest to all",
        "gssf_kernels/losses/triplet.py",
        "forward",
        '(1 - share) * self._loss(*inputs, "all", False) + share * hardest',
        'share * self._loss(*inputs, "all", False) + (1 - share) * hardest',
    ),
]
