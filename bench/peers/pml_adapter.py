"""PyTorch Metric Learning: losses, miners and distances over labelled embeddings, in plain PyTorch.

``BatchHardMiner`` picks the hardest negative of every anchor and ``TripletMarginLoss`` takes the triplets, both over
``DotProductSimilarity``. Pair i has label i, so that the one positive of an anchor is its own row, and no negative.
Both directions: the sides take turns as anchors and as ``ref_emb``. The package knows no structured similarity: the
factors ``a [N, D]`` and ``b [N, D]`` are made in plain PyTorch, as its user would make them.

Each direction makes the N x N matrix twice, in the miner and in the loss, with int64 lists of all its pairs.
"""

import torch
import torch.nn.functional as F

from bench.ops import labels
from bench.ops.rows import project_naive
from bench.ops.triplet import MARGIN

PACKAGE = "pytorch-metric-learning"
DEVICES = ("cpu", "cuda")


def triplet():
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import SumReducer

    similarity = DotProductSimilarity(normalize_embeddings=False)
    miner = BatchHardMiner(distance=similarity)
    loss = TripletMarginLoss(margin=MARGIN, distance=similarity, reducer=SumReducer())

    def variant(problem):
        a, b = project_naive(problem), F.normalize(problem.y, dim=1)
        places = torch.arange(len(a), device=a.device)
        # One tensor as labels and ref_labels would mean one set of embeddings: no positive on the diagonal.
        ref_places = places.clone()
        total = 0.0
        for anchors, others in ((a, b), (b, a)):
            triplets = miner(anchors, places, ref_emb=others, ref_labels=ref_places)
            total = total + loss(anchors, indices_tuple=triplets, ref_emb=others)
        return total

    return variant


def sum_hinge():
    """``TripletMarginLoss`` alone takes all triplets: N(N − 1) a direction here, as lists of int64.

    In bf16 and fp16 the positives' gradients and the sum are accumulated in that dtype, and come out wrong at large N.
    """
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.reducers import SumReducer

    similarity = DotProductSimilarity(normalize_embeddings=False)
    loss = TripletMarginLoss(margin=MARGIN, distance=similarity, reducer=SumReducer())

    def variant(problem):
        places = torch.arange(len(problem.x), device=problem.x.device)
        ref_places = places.clone()  # as above
        rows = loss(problem.x, places, ref_emb=problem.y, ref_labels=ref_places)
        return rows + loss(problem.y, places, ref_emb=problem.x, ref_labels=ref_places)

    return variant


def _no_normalization():
    """Products of rows as they are. The default normalises them, and its gradient is orthogonal to each row."""
    from pytorch_metric_learning.distances import CosineSimilarity

    distance = CosineSimilarity()  # which the losses insist on, and which takes no other choice
    distance.normalize_embeddings = False
    return distance


def circle():
    from pytorch_metric_learning.losses import CircleLoss
    from pytorch_metric_learning.reducers import MeanReducer

    loss = CircleLoss(m=labels.MARGIN, gamma=labels.SCALE, distance=_no_normalization(), reducer=MeanReducer())
    return lambda problem: loss(problem.x, problem.places)


def _multi_similarity():
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.reducers import MeanReducer

    return MultiSimilarityLoss(
        labels.ALPHA, labels.BETA, labels.BASE, distance=_no_normalization(), reducer=MeanReducer()
    )


def multi_similarity():
    loss = _multi_similarity()
    return lambda problem: loss(problem.x, problem.places)


def multi_similarity_mined():
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    loss, miner = _multi_similarity(), MultiSimilarityMiner(labels.EPSILON, distance=_no_normalization())
    return lambda problem: loss(problem.x, problem.places, miner(problem.x, problem.places))


VARIANTS = {
    "triplet": triplet,
    "sum_hinge": sum_hinge,
    "circle": circle,
    "multi_similarity": multi_similarity,
    "multi_similarity_mined": multi_similarity_mined,
}
