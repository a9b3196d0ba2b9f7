"""``python -m gssf_kernels mine``: hard negatives of embeddings in files, into a file."""

import argparse
from pathlib import Path

from gssf_kernels.retrieval.commands import EMBEDDINGS, check_output, written
from gssf_kernels.retrieval.mining import POOL, mine_hard_negatives
from gssf_kernels.retrieval.outputs import WRITERS, check_format, write_negatives


def add_mine(subparsers) -> None:
    """The subcommand ``mine``."""
    parser = subparsers.add_parser(
        "mine",
        help="hard negatives of queries from a corpus, in files",
        description="Find the k best-scoring negatives of every query. Files need not fit into memory.",
    )
    parser.add_argument("queries", metavar="QUERIES", help=f"[N, D]: {EMBEDDINGS}")
    parser.add_argument("corpus", metavar="CORPUS", help="[M, D], likewise")
    parser.add_argument("--k", type=int, required=True, metavar="K", help="how many negatives of each query")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=f"the file to write: {' or '.join(WRITERS)}"
    )
    parser.add_argument(
        "--ids",
        nargs=2,
        metavar=("QUERY_IDS", "CORPUS_IDS"),
        help="[N] and [M] integers in files; rows of equal id are positives",
    )
    parser.add_argument(
        "--positives",
        metavar="PAIRS",
        help="[P, 2] integers in a file: row of queries, row of corpus. Without this and --ids: row i and row i",
    )
    parser.add_argument(
        "--skip-top", type=int, default=0, metavar="S", help="leave out the S best that pass all limits"
    )
    parser.add_argument("--max-score", type=float, metavar="X", help="leave out greater scores")
    parser.add_argument("--min-score", type=float, metavar="X", help="leave out smaller scores")
    parser.add_argument(
        "--margin", type=float, metavar="X", help="leave out scores greater than the lowest positive's minus X"
    )
    parser.add_argument(
        "--relative-margin",
        type=float,
        metavar="R",
        help="leave out scores greater than the lowest positive's times 1 - R",
    )
    parser.add_argument(
        "--sampling", choices=("top", "random"), default="top", help='the k best, or with "random" K of the best POOL'
    )
    parser.add_argument("--pool", type=int, metavar="POOL", help=f"{POOL} K by default")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="of random sampling")
    parser.add_argument("--normalize", action="store_true", help="scores are cosines")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="write the state to FILE, from which the same command goes on"
    )
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    parser.set_defaults(run=run_mine, prog=parser.prog)


def run_mine(options: argparse.Namespace) -> None:
    """Mine and write; raises what is wrong."""
    check_format(options.out, "--out")
    check_output(options.out, "--out", options.force)
    query_ids, corpus_ids = options.ids or (None, None)
    mined = mine_hard_negatives(
        options.queries,
        options.corpus,
        k=options.k,
        query_ids=query_ids,
        corpus_ids=corpus_ids,
        positives=options.positives,
        skip_top=options.skip_top,
        max_score=options.max_score,
        min_score=options.min_score,
        margin_to_positive=options.margin,
        relative_margin=options.relative_margin,
        sampling=options.sampling,
        pool=options.pool,
        seed=options.seed,
        normalize=options.normalize,
        checkpoint=options.checkpoint,
        progress=True,
    )
    with written(options.out, "--out", options.force) as path:
        write_negatives(mined, path, options.out.suffix)
    print(mined.report)
