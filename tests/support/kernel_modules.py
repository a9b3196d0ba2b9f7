"""The modules of Triton kernels; None where there is no Triton, and tests marked `triton` are skipped."""

import importlib

from interpreter_process import FOUND

NAMES = (
    *("batch_hard", "certified", "epilogues", "gradients", "hardest", "hardest_terms", "info_nce", "logsumexp"),
    *(
        "pairs",
        "positives",
        "project",
        "relations",
        "reductions",
        "relative",
        "row_panels",
        "sums",
        "sweep",
        "terms",
    ),
)


def _module(name):
    return importlib.import_module(f"gssf_kernels.kernels.{name}") if FOUND else None


MODULES = tuple(map(_module, NAMES))
batch_hard, certified, epilogues, gradients, hardest, hardest_terms, info_nce, logsumexp = map(_module, NAMES[:8])
pairs, positives, project, relations, reductions, relative, row_panels, sums, sweep, terms = map(_module, NAMES[8:])
tiles = _module("tiles")
