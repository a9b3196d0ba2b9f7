"""The modules of Triton kernels; None where there is no Triton, and tests marked `triton` are skipped."""

import importlib

from interpreter_process import FOUND

NAMES = (
    *("batch_hard", "certified", "contrast", "dense", "epilogues", "goal", "gradients", "hardest", "logsumexp"),
    *("pairs", "positives", "project", "relations", "relative", "relative_goal", "slabs", "sums", "sweep", "terms"),
)


def _module(name):
    return importlib.import_module(f"gssf_kernels.kernels.{name}") if FOUND else None


MODULES = tuple(map(_module, NAMES))
batch_hard, certified, contrast, dense, epilogues, goal, gradients, hardest, logsumexp = map(_module, NAMES[:9])
pairs, positives, project, relations, relative, relative_goal, slabs, sums, sweep, terms = map(_module, NAMES[9:])
tiles = _module("tiles")
