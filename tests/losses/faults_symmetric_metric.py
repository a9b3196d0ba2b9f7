from planting import Fault

SIMILARITY = "gssf_kernels/similarity.py"
DENSE = "gssf_kernels/dense.py"
NEGATIVES = "ops/test_negatives"

FAULTS = [
    Fault("symmetric: W is B", SIMILARITY, "weights", "(blocks + blocks.mT) / 2", "(blocks + blocks) / 2"),
    Fault("symmetric: all of the gradient goes to both", SIMILARITY, "backward", "grad_out / 2", "grad_out / 1"),
    Fault(
        "symmetric: the gradient is a product with a",
        DENSE,
        "triangle",
        "Right(factors[0], dtype)",
        "Right(lefts[0], dtype)",
    ),
    Fault(
        "symmetric: the scores are those of a with itself", DENSE, "triangle", "for y in factors]", "for y in lefts]"
    ),
    Fault("symmetric: a square has scores and mirrors", DENSE, "triangle", "if other is not None:", "if False:"),
    Fault(
        "symmetric: batch-hard computes all scores",
        "gssf_kernels/losses/batch_hard.py",
        "batch_hard_loss",
        "metric.is_symmetric",
        "False",
    ),
    Fault(
        "symmetric: C++ leaves out the mirror",
        "csrc/hardest.cpp",
        "",
        "if (symmetric) merge_symmetric(epilogue.rows(), epilogue.cols(), n);\n    });\n  }\n  if (!columns)",
        "});\n  }\n  if (!columns)",
        NEGATIVES,
    ),
    Fault(
        "symmetric: the plan computes all tiles",
        "gssf_kernels/plan.py",
        "hardest",
        "mirrored and call.symmetric",
        "False",
        NEGATIVES,
    ),
]
