"""The definitions of losses with `pairs` against loops over single scores, written from the docstrings alone.

`test_pairs.py` compares the fused losses with these definitions.
"""

import math

import pytest
import torch
from pair_problems import KINDS, SHAPES, allowed, problem

from gssf_kernels import reference

M, KAPPA, BETA = 0.3, 6.0, -2.0
SMALL = [shape for shape in SHAPES if shape != "tiles"]
CASES = [(shape, kind) for shape in SMALL for kind in KINDS if allowed(shape, kind)]


class Scores:
    """Single scores of a problem, and what each is: a pair, a positive or of equal id."""

    def __init__(self, x, y, options, same_id="positive"):
        self.s = [[math.fsum(u * v for u, v in zip(a, b, strict=True)) for b in y.tolist()] for a in x.tolist()]
        self.n, self.m, self.pairs = len(x), len(y), options.get("pairs")
        x_ids, y_ids = (options[k].tolist() if k in options else None for k in ("x_ids", "y_ids"))
        self.equal = {(i, j) for i in range(self.n) for j in range(self.m) if x_ids and x_ids[i] == y_ids[j]}
        if self.pairs is None:
            self.paired = {(i, i) for i in range(self.n)}
        elif isinstance(self.pairs, str):
            self.paired = self.equal
        else:
            self.paired = {(i, j) for i, j in self.pairs.tolist()}
        by_id = self.pairs is None and same_id == "positive"
        self.positives = self.paired | self.equal if by_id else self.paired
        self.left_out = self.equal - self.positives

    def line(self, side, k):
        """The places of row k (side 0) or of column k (side 1)."""
        return [(k, j) for j in range(self.m)] if side == 0 else [(i, k) for i in range(self.n)]

    def at(self, place):
        return self.s[place[0]][place[1]]

    def below_limit(self, side, k, margin, places):
        """Those of places that a false-negative margin keeps for anchor k."""
        lowest = min((self.at(e) for e in self.line(side, k) if e in self.positives), default=math.inf)
        return [e for e in places if margin is None or self.at(e) <= lowest + margin]

    def negatives(self, side, k, margin):
        """The scores of the negatives of anchor k."""
        places = [e for e in self.line(side, k) if e not in self.paired | self.equal]
        return [self.at(e) for e in self.below_limit(side, k, margin, places)]


def hinge(t):
    return max(t, 0.0)


def softplus(t):
    return math.log1p(math.exp(t))


def hardest(term):
    return lambda p, negatives: term(p, max(negatives)) if negatives else 0.0


def semihard(p, negatives):
    below = [n for n in negatives if n < p] or negatives
    return hinge(M + max(below) - p) if below else 0.0


TERMS = {
    "hardest": (reference.triplet_loss, {"margin": M}, hardest(lambda p, n: hinge(M + n - p))),
    "semihard": (reference.triplet_loss, {"margin": M, "negatives": "semihard"}, semihard),
    "all": (
        reference.triplet_loss,
        {"margin": M, "negatives": "all"},
        lambda p, negatives: math.fsum(hinge(M + n - p) for n in negatives),
    ),
    "nca con": (reference.goal_loss, {"tau": 3.0}, hardest(lambda p, n: softplus(-3 * (p - n)) / 3)),
}


def close(value, expected):
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:x_ids, y_ids")
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_a_term_for_each_pair(shape, kind, symmetric, margin, name):
    function, settings, term = TERMS[name]
    x, y, options = problem(shape, kind)
    scores = Scores(x, y, options)
    pairs = sorted(scores.paired)
    terms = {e: 0.0 for e in pairs}
    for e in pairs:
        for side in range(1 + symmetric):
            terms[e] += term(scores.at(e), scores.negatives(side, e[side], margin))
    options = {**options, **settings, "symmetric": symmetric, "false_negative_margin": margin}
    total = math.fsum(terms.values())
    close(function(x, y, **options, reduction="sum"), total)
    close(function(x, y, **options, reduction="mean"), total / max(len(pairs), 1))
    if kind == "ids" and not symmetric:
        expected = [math.fsum(terms[e] for e in pairs if e[0] == i) for i in range(len(x))]
        close(function(x, y, **options, reduction="none"), expected)
    elif kind != "ids":
        order = pairs if scores.pairs is None else [tuple(e) for e in scores.pairs.tolist()]
        expected = [terms[e] if e not in order[:k] else 0.0 for k, e in enumerate(order)]
        close(function(x, y, **options, reduction="none"), expected)


@pytest.mark.filterwarnings("ignore:x_ids, y_ids")
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_info_nce(shape, kind, symmetric, biased, margin, same_id):
    if kind == "ids" and same_id == "ignore":
        pytest.skip("no such combination")
    x, y, options = problem(shape, kind)
    scores = Scores(x, y, options, same_id)
    bias = torch.linspace(-1, 1, len(y), dtype=x.dtype) if biased else None
    means = []
    for side in range(1 + symmetric):
        terms, biases = [], bias.tolist() if biased and side == 0 else [0.0] * scores.m
        logit = {e: KAPPA * scores.at(e) + biases[e[1]] for i in range(scores.n) for e in scores.line(0, i)}
        anchors = (scores.n, scores.n if scores.pairs is None else scores.m)[side]
        for k in range(anchors):
            positives = [e for e in scores.line(side, k) if e in scores.positives]
            others = [e for e in scores.line(side, k) if e not in scores.positives | scores.left_out]
            candidates = positives + scores.below_limit(side, k, margin, others)
            if positives:
                target = math.fsum(logit[e] for e in positives) / len(positives)
                terms.append(math.log(math.fsum(math.exp(logit[e]) for e in candidates)) - target)
        means.append(math.fsum(terms) / max(len(terms), 1))
    options |= {"same_id": same_id, "symmetric": symmetric, "false_negative_margin": margin}
    loss = reference.info_nce_loss(x, y, scale=KAPPA, y_bias=bias, **options)
    close(loss, math.fsum(means) / len(means))


@pytest.mark.filterwarnings("ignore:x_ids, y_ids")
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_sigmoid(shape, kind, margin, same_id):
    if kind == "ids" and same_id == "ignore":
        pytest.skip("no such combination")
    x, y, options = problem(shape, kind)
    scores = Scores(x, y, options, same_id)
    places = [(i, j) for i in range(scores.n) for j in range(scores.m)]
    negatives = {e for e in places if e not in scores.positives | scores.left_out}
    for side in range(2):
        for k in range((scores.n, scores.m)[side]):
            line = [e for e in scores.line(side, k) if e in negatives]
            negatives -= set(line) - set(scores.below_limit(side, k, margin, line))
    anchors = {i for i, _ in scores.paired}
    terms = [0.0] * scores.n
    for i, j in places:
        logit = KAPPA * scores.at((i, j)) + BETA
        if i in anchors and (i, j) in scores.positives | negatives:
            terms[i] += softplus(-logit if (i, j) in scores.positives else logit)
    options |= {"same_id": same_id, "false_negative_margin": margin, "scale": KAPPA, "bias": BETA}
    close(reference.sigmoid_loss(x, y, **options, reduction="none"), terms)
    close(reference.sigmoid_loss(x, y, **options, reduction="mean"), math.fsum(terms) / max(len(anchors), 1))
