"""Certified mining: problems that are hard for it, and what its winners are held to."""

import torch

from gssf_kernels import _library

INF = torch.inf
UNIT = _library.bf16_unit()


def certified(a, b, a_ids=None, b_ids=None, limits=(None, None)):
    """(the five of hardest_negatives, how many scores were made in fp64)."""
    options = True, True, None, None, *limits  # pairs (i, i), and columns are anchors
    *results, rescored = torch.ops.gssf.hardest_negatives(a, b, a_ids, b_ids, "certified", *options)
    return results, rescored


def some_limits(a, b):
    """Limits of rows and of columns, about a third of the scores above them.

    +inf where it is not sure whether a score, rounded to fp32, exceeds the limit.
    """
    s = a.double() @ b.double().T
    close = 1e-12 * (a.double().abs() @ b.double().abs().T)
    limits = []
    for t, near in ((s, close), (s.T, close.T)):
        limit = t.quantile(0.65, dim=1).float()
        next_number = torch.nextafter(limit, limit.new_tensor(INF))
        halfway = (limit.double() + next_number.double()) / 2  # what exceeds it rounds to a greater number
        unsure = ((t - halfway[:, None]).abs() <= near).any(1)
        limits.append(torch.where(unsure, INF, limit))
    return limits


def exact(a, b, a_ids=None, b_ids=None):
    """The same of fp64 scores: products of fp32 numbers are exact, and PyTorch's sum is good to 1e-15."""
    s = a.double() @ b.double().T
    pair = s.diagonal().clone()
    no = torch.eye(*s.shape, dtype=torch.bool)
    if a_ids is not None:
        no |= a_ids[:, None] == b_ids
    s = s.masked_fill(no, -INF)
    return s, pair


def check(a, b, a_ids=None, b_ids=None, ties=False, by=certified, limits=None):
    """Winners to the bit; where scores tie in fp64 but for its own rounding, by their scores, and exactly if `ties`."""
    named = {} if limits is None else {"limits": limits}
    (pair, row_score, row_index, col_score, col_index), rescored = by(a, b, a_ids, b_ids, **named)
    s, pairs = exact(a, b, a_ids, b_ids)
    size = a.double().abs() @ b.double().abs().T  # what fp64's own rounding of a score is relative to
    noise = 2.0**-50 * max(a.shape[1], 8)
    beyond = pairs.float().isinf()
    assert torch.equal(pair[beyond], pairs.float()[beyond])
    off = (pair.double() - pairs).abs()[~beyond]
    assert (off <= (2.0**-24 * pairs.abs() + noise * size.diagonal() + 1e-45)[~beyond]).all()
    rows, cols = s, s.T
    if limits is not None:
        rows, cols = (
            t.masked_fill(t.float() > limit[:, None], -INF) for t, limit in zip((s, s.T), limits, strict=True)
        )
    for score, index, t, abs_t in ((row_score, row_index, rows, size), (col_score, col_index, cols, size.T)):
        best, place = t.max(1)
        none = best == -INF
        assert torch.equal(index == -1, none)
        assert (score[none] == -INF).all()
        t, abs_t, score, index, best, place = (v[~none] for v in (t, abs_t, score, index, best, place))
        chosen = t.gather(1, index[:, None])[:, 0]
        slack = noise * abs_t.amax(1)
        assert (chosen >= best - slack).all()
        clear = (t >= (best - 2 * slack)[:, None]).sum(1) == 1
        assert torch.equal(index[clear], place[clear])
        if ties:
            assert torch.equal(index, (t == best[:, None]).int().argmax(1))
        rounded = best.float()
        near = (best - rounded.double()).abs() < 0.49999 * (torch.nextafter(rounded, rounded.new_tensor(INF)) - rounded)
        assert torch.equal(score[clear & near], rounded[clear & near])
    return rescored


def unit(x):
    return torch.nn.functional.normalize(x, dim=1)


def near_ties(n, m, d):
    """Columns that differ by one ulp of one channel."""
    a, b = unit(torch.randn(n, d)), unit(torch.randn(1, d)).repeat(m, 1)
    up = torch.nextafter(b, torch.full_like(b, INF))
    b[torch.arange(m), torch.arange(m) % d] = up[torch.arange(m), torch.arange(m) % d]
    return a, b


def duplicates(n, m, d):
    pool = torch.randn(7, d)
    return pool[torch.randint(0, 7, (n,))], pool[torch.randint(0, 7, (m,))]


def scaled(low, high):
    def make(n, m, d):
        decades = torch.empty(n + m).uniform_(low, high)
        x = torch.randn(n + m, d) * 10.0 ** decades[:, None]
        return x[:n].clone(), x[n:].clone()

    return make


def hubs(n, m, d):
    a, b = unit(torch.randn(n, d)), unit(torch.randn(m, d))
    b[::10] = unit(a.mean(0, keepdim=True)) + 1e-6 * torch.randn(len(b[::10]), d)
    return a, b


def low_rank(n, m, d):
    basis = torch.randn(2, d)
    return torch.randn(n, 2) @ basis, torch.randn(m, 2) @ basis


def sparse(n, m, d):
    return torch.randn(n, d) * (torch.rand(n, d) < 0.05), torch.randn(m, d) * (torch.rand(m, d) < 0.05)


def mixed_channels(n, m, d):
    scale = 10.0 ** torch.empty(d).uniform_(-15, 15)
    return torch.randn(n, d) * scale, torch.randn(m, d) / scale


def halfway(n, m, d):
    """Numbers in the middle of two bf16 numbers, all of one sign: the rounding residue is as large as it can be."""
    a, b = (((torch.randint(128, 256, (k, d)) * 2 + 1) / 512).float() for k in (n, m))
    return a, b


MAKERS = {
    "unit": lambda n, m, d: (unit(torch.randn(n, d)), unit(torch.randn(m, d))),
    "normal": lambda n, m, d: (torch.randn(n, d), torch.randn(m, d)),
    "near ties": near_ties,
    "duplicates": duplicates,
    "halfway": halfway,
    "hubs": hubs,
    "low rank": low_rank,
    "sparse": sparse,
    "mixed channels": mixed_channels,
    "mixed norms": scaled(-6, 6),
    "tiny": scaled(-22, -19),
    "subnormal": scaled(-42, -36),
    "huge": scaled(17, 18),
    "beyond": scaled(19, 37),
    "zeros": lambda n, m, d: (torch.zeros(n, d), torch.zeros(m, d)),
}
