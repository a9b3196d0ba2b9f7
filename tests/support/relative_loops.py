"""GOAL's relative negatives as loops over single rows in fp64, which share nothing with the package."""

import math

import numpy as np
import torch

import gssf_kernels as gk


def plain(a, b, threshold, beta, a_ids=None, b_ids=None):
    """(r⁻ of the rows, of the columns) in plain PyTorch of the inputs' own accuracy."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    threshold = torch.tensor(threshold, dtype=dtype)
    return gk.reference.relative_negatives(a, b, threshold, beta=beta, a_ids=a_ids, b_ids=b_ids)


def one_line(s, threshold, beta):
    """(r⁻, largest score) of one row or column, from the scores of its negatives in order."""
    s = s[s != -math.inf]
    if s.size == 0:
        return 0.0, -math.inf
    place = int(s.argmax())  # the first NaN, else the first of the largest
    n, others = s[place], np.delete(s, place)
    others = others[~(others < threshold)]
    if beta is None:
        others = others[others != n]
    with np.errstate(invalid="ignore"):
        terms = n - others if beta is None else np.exp(-beta * (n - others))
    if terms.size == 0:
        return 0.0, n
    return (math.fsum(terms.tolist()) if np.isfinite(terms).all() else terms.sum()) / terms.size, n


def truth(a, b, threshold, beta, a_ids=None, b_ids=None):
    """{name: r⁻ and the maxima} by `one_line`, on scores of fp64."""
    with np.errstate(invalid="ignore"):
        s = a.double().numpy() @ b.double().numpy().T
    free = ~np.eye(*s.shape, dtype=bool)
    if a_ids is not None:
        free &= a_ids.numpy()[:, None] != b_ids.numpy()[None, :]
    rows = [one_line(s[i, free[i]], threshold, beta) for i in range(s.shape[0])]
    cols = [one_line(s[free[:, j], j], threshold, beta) for j in range(s.shape[1])]
    values = [[line[k] for line in lines] for lines in (rows, cols) for k in range(2)]
    names = ("row_relative", "row_score", "col_relative", "col_score")
    return dict(zip(names, (torch.tensor(v, dtype=torch.float64) for v in values), strict=True))


def gap(a, b, quantile):
    """A threshold about that quantile of the scores, in the widest gap near it: no rounding carries a score across."""
    s = (a.double() @ b.double().T).flatten().sort().values
    if len(s) == 1:
        return float(s[0]) - 1.0
    first = min(int(quantile * (len(s) - 1)), len(s) - 2)
    window = s[max(first - 100, 0) : first + 102]
    widest = int(window.diff().argmax())
    return float((window[widest] + window[widest + 1]) / 2)
