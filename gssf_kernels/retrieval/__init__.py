"""Search, ranks and mining, without the matrix of scores."""

from gssf_kernels.reference import PositiveRanks, Ranks, RankSegments, TopScores, TwoSidedTopScores
from gssf_kernels.retrieval.ranks import ranks
from gssf_kernels.retrieval.search import top_scores

__all__ = [
    "PositiveRanks",
    "RankSegments",
    "Ranks",
    "TopScores",
    "TwoSidedTopScores",
    "ranks",
    "top_scores",
]
