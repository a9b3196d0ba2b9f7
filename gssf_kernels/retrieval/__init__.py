"""Search, ranks and mining, without the matrix of scores."""

from gssf_kernels.reference import PositiveRanks, Ranks, RankSegments, TopScores, TwoSidedTopScores
from gssf_kernels.retrieval.evaluate import evaluate, recall_at_k
from gssf_kernels.retrieval.measures import RetrievalResult
from gssf_kernels.retrieval.metric import RetrievalMetric
from gssf_kernels.retrieval.mining import HardNegatives, MiningReport, mine_hard_negatives
from gssf_kernels.retrieval.ranks import ranks
from gssf_kernels.retrieval.search import top_scores
from gssf_kernels.retrieval.streaming import evaluate_files, stream_top_scores

__all__ = [
    "HardNegatives",
    "MiningReport",
    "PositiveRanks",
    "RankSegments",
    "Ranks",
    "RetrievalMetric",
    "RetrievalResult",
    "TopScores",
    "TwoSidedTopScores",
    "evaluate",
    "evaluate_files",
    "mine_hard_negatives",
    "ranks",
    "recall_at_k",
    "stream_top_scores",
    "top_scores",
]
