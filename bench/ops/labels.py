"""Losses of labelled embeddings, of one side on unit-length inputs: circle loss, and multi-similarity loss with and
without its mining. Four rows have each label."""

import torch
import torch.nn.functional as F

import gssf_kernels as gk
from bench.problem import Op, Problem, Work, compiled, normal, product_flop
from bench.whole import Rows, sweep

MARGIN, SCALE = 0.4, 80.0
ALPHA, BETA, BASE, EPSILON = 2.0, 50.0, 0.5, 0.1
OF_ONE_LABEL = 4
SHARE = 0.3  # of its label's direction in a row; the rest is noise. Mining keeps some scores and leaves some out


def circle_terms(s, positive, negative):
    """The formula of arXiv 2002.10857, of each row of s."""
    pull = -SCALE * (1 + MARGIN - s.detach()).relu() * (s - 1 + MARGIN)
    push = SCALE * (s.detach() + MARGIN).relu() * (s - MARGIN)
    of_positives = pull.masked_fill(~positive, -torch.inf).logsumexp(1)
    z = of_positives + push.masked_fill(~negative, -torch.inf).logsumexp(1)
    return torch.logaddexp(z, torch.zeros_like(z))  # F.softplus is z over 20: 2e-9 off, which fp64 shows


def multi_similarity_terms(s, positive, negative):
    """The formula of the paper, CVPR 2019."""
    pull = torch.exp(-ALPHA * (s - BASE)).masked_fill(~positive, 0).sum(1)
    push = torch.exp(BETA * (s - BASE)).masked_fill(~negative, 0).sum(1)
    return torch.log1p(pull) / ALPHA + torch.log1p(push) / BETA


def mined_terms(s, positive, negative):
    """The same of the scores that the paper's mining keeps."""
    least = s.detach().masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    largest = s.detach().masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    return multi_similarity_terms(s, positive & (s < largest + EPSILON), negative & (s > least - EPSILON))


def _masks(s, rows, labels):
    """(positives, negatives) of the rows."""
    same = labels[rows, None] == labels
    positive = same.clone()
    positive.diagonal(rows.start).fill_(False)
    return positive, ~same


def _naive(terms):
    def naive(problem: Problem):
        s = problem.x @ problem.x.t()
        return terms(s, *_masks(s, slice(0, len(s)), problem.places)).mean()

    return naive


def _whole(terms):
    def whole(exact: Problem, dtype: torch.dtype):
        x = exact.x.detach()

        def slope(s, rows):
            s = s.detach().requires_grad_()
            loss = terms(s, *_masks(s, rows, exact.places)).sum()
            (ds,) = torch.autograd.grad(loss, s)
            return ds, [loss.detach()]

        seen = sweep(x, x, slope)
        return [seen.sums[0] / len(x), Rows((seen.da + seen.db) / len(x), seen.directions)]

    return whole


def inputs(shape, dtype, device, seed):
    """Rows on their way to their label's direction."""
    labels = torch.arange(shape.n, device=device) // OF_ONE_LABEL
    centres, noise = normal(shape, torch.float32, device, seed, 2, unit=True)
    x = F.normalize(SHARE * centres[labels] + (1 - SHARE) * noise, dim=1).to(dtype)
    return Problem(x.requires_grad_(), x.detach(), places=labels)


def _work(passes: int):
    def work(shape, itemsize):
        """Scores are symmetric, so that half a product is enough for them, in each pass; dscores + dscoresᵀ times x."""
        g, side = product_flop(shape), float(shape.n * shape.d * itemsize)
        return Work(passes * 0.5 * g, g, side, 2 * side)

    return work


def _op(name, summary, terms, ours, passes=1):
    naive = _naive(terms)
    variants = {"ours": lambda: ours, "naive": lambda: naive, "compile": compiled(naive)}
    return Op(name, summary, inputs, naive, variants, _work(passes), _whole(terms))


CIRCLE = _op(
    "circle",
    "circle loss of labelled embeddings",
    circle_terms,
    lambda problem: gk.circle_loss(problem.x, problem.places, margin=MARGIN, scale=SCALE),
)
MULTI_SIMILARITY = _op(
    "multi_similarity",
    "multi-similarity loss of labelled embeddings",
    multi_similarity_terms,
    lambda problem: gk.multi_similarity_loss(problem.x, problem.places, alpha=ALPHA, beta=BETA, base=BASE),
)
MINED = _op(
    "multi_similarity_mined",
    "multi-similarity loss with its mining",
    mined_terms,
    lambda problem: gk.multi_similarity_loss(
        problem.x, problem.places, alpha=ALPHA, beta=BETA, base=BASE, epsilon=EPSILON
    ),
    passes=2,
)
