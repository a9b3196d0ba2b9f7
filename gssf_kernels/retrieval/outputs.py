"""Mined negatives as a file: Parquet, or a line of JSON for each query.

query            int64, the row
negatives        list of int64, rows of the corpus, best first; shorter where there are fewer
scores           list of float, of each negative
positive_score   float, the lowest of the query's positives; null without one
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from gssf_kernels.retrieval.mining import HardNegatives

ROWS = 1 << 16  # queries of a row group


def check_format(path: Path, name: str) -> None:
    """The suffix is one that can be written here."""
    if path.suffix not in WRITERS:
        raise ValueError(f"{name}: expected a file {' or '.join(WRITERS)}, got {path}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{name}: writing {path} needs pyarrow: pip install pyarrow, or write .jsonl")


def write_negatives(mined: HardNegatives, path: Path, suffix: str) -> None:
    """Write to ``path`` in the format of ``suffix``, a part of the queries at a time."""
    WRITERS[suffix](mined, path)


def _parts(mined: HardNegatives) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(first query, indices, scores, positive scores) of ranges of queries, on the CPU."""
    for first in range(0, mined.indices.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        yield first, mined.indices[rows].cpu(), mined.scores[rows].cpu(), mined.positive_scores[rows].cpu()


def _write_jsonl(mined: HardNegatives, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for first, indices, scores, positive_scores in _parts(mined):
            counts = (indices >= 0).sum(1).tolist()
            columns = indices.tolist(), scores.tolist(), positive_scores.tolist()
            for query, (count, negatives, values, p) in enumerate(zip(counts, *columns, strict=True), first):
                row = {"query": query, "negatives": negatives[:count], "scores": values[:count]}
                file.write(json.dumps(row | {"positive_score": None if p != p else p}) + "\n")


def _write_parquet(mined: HardNegatives, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.from_numpy_dtype(mined.scores[:0].cpu().numpy().dtype)
    schema = pyarrow.schema(
        [
            ("query", pyarrow.int64()),
            ("negatives", pyarrow.list_(pyarrow.int64())),
            ("scores", pyarrow.list_(kind)),
            ("positive_score", kind),
        ]
    )
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for first, indices, scores, positive_scores in _parts(mined):
            has = indices >= 0
            ends = pyarrow.array([0, *has.sum(1).cumsum(0).tolist()], pyarrow.int32())
            lists = (pyarrow.ListArray.from_arrays(ends, pyarrow.array(t[has].numpy())) for t in (indices, scores))
            queries = pyarrow.array(range(first, first + indices.shape[0]), pyarrow.int64())
            p = pyarrow.array(positive_scores.numpy(), kind, mask=positive_scores.isnan().numpy())
            writer.write_table(pyarrow.Table.from_arrays([queries, *lists, p], schema=schema))


WRITERS = {".parquet": _write_parquet, ".jsonl": _write_jsonl}
