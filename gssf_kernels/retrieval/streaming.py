"""Search and evaluation over embeddings that stay in files.

Each block of queries (64 MiB) reads all candidates once for a search, and twice for an evaluation; see
:mod:`gssf_kernels.retrieval.blocks`.
"""

import itertools
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels.ops.pairing import Pairing, listed_pairs
from gssf_kernels.ops.score_counts import ScoreCountsCall, swept_scores
from gssf_kernels.ops.top_scores import MOST, TopScoresCall, merged
from gssf_kernels.reference import RankSegments, TopScores
from gssf_kernels.retrieval.blocks import Pairs, Sweep
from gssf_kernels.retrieval.evaluate import check_folds, folds_of_listed, nan_scores
from gssf_kernels.retrieval.measures import RetrievalResult, mean_over_folds, of_queries, result_of, warn_of_nan
from gssf_kernels.retrieval.ranks import ByLevel
from gssf_kernels.retrieval.sources import SelectedRows
from gssf_kernels.similarity import StructuredSimilarity

COUNTS = ("row_greater", "row_reaching", "col_greater", "col_reaching")


def stream_top_scores(
    queries: Any,
    candidates: Any,
    k: int,
    *,
    query_ids: Any = None,
    candidate_ids: Any = None,
    exclude_same_id: bool = False,
    exclude_self: bool = False,
    max_score: float | Tensor | None = None,
    metric: StructuredSimilarity | None = None,
    normalize: bool = False,
    block_rows: int | None = None,
    chunk_rows: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> TopScores:
    """:func:`~gssf_kernels.top_scores` of embeddings that need not fit into memory, with the same results.

    Args:
        queries: [N, D] float: a tensor, a NumPy array or memory map, a file ``.npy`` or ``.safetensors``
            (``"file.safetensors::name"`` if it holds several tensors), or a directory of such files.
        candidates: [M, D] of the same dtype, likewise.
        k: how many, 1 to 1024.
        query_ids, candidate_ids: [N], [M] integers, likewise, for ``exclude_same_id``.
        exclude_same_id, exclude_self, max_score, metric, normalize: as in :func:`~gssf_kernels.top_scores`.
        block_rows, chunk_rows: how many queries, and candidates, are in memory at a time; by default 64 MiB.
        checkpoint: a file to write every few seconds. The same call goes on from it after a crash. It is removed at the
            end. That of other inputs or settings is refused.
        progress: draw a bar on stderr, if tqdm is installed.
        device: where scores are computed; by default where the queries, or else the candidates, are.

    Returns:
        named tuple ``(values [N, k], indices [N, k])``, on the device; not differentiable.

    Raises:
        FileNotFoundError, TypeError, ValueError: the argument, the file that is wrong, what was expected and what came.
    """
    _checks.whole(k, "k", 1)
    if k > MOST:
        raise ValueError(f"k: expected at most {MOST}, got {k}")
    for flag, name in ((exclude_same_id, "exclude_same_id"), (exclude_self, "exclude_self")):
        _checks.flag(flag, name)
    if exclude_same_id != (query_ids is not None or candidate_ids is not None):
        got = "none" if exclude_same_id else "ids"
        raise ValueError(
            f"query_ids, candidate_ids: expected ids with exclude_same_id=True and none without, got {got}"
        )
    sweep = Sweep(
        (queries, candidates),
        ("queries", "candidates"),
        (query_ids, candidate_ids),
        ("query_ids", "candidate_ids"),
        k=k,
        metric=metric,
        normalize=normalize,
        block_rows=block_rows,
        chunk_rows=chunk_rows,
        device=device,
        function="stream_top_scores",
    )
    with sweep, torch.no_grad():
        limit = _limit(max_score, sweep)
        both = torch.arange(min(sweep.shape) if exclude_self else 0, device=sweep.device)
        settings = {"k": k, "exclude_same_id": exclude_same_id, "exclude_self": exclude_self, "max_score": limit}
        sweep.keep(checkpoint, progress, settings, "top_scores")
        state = best_so_far(sweep.shape[0], k, sweep)
        list_of_self = Pairs(both, both, sweep.shape[0])
        for rows, a, cols, b in sweep.units(0, state, "search"):
            row_limit = None if limit is None else limit[rows]
            keep_best(state, rows, *top_of_chunk(sweep, rows, a, cols, b, k, row_limit, list_of_self))
        sweep.finish()
        return TopScores(state["values"], state["indices"])


def evaluate_files(
    images: Any,
    captions: Any,
    image_ids: Any = None,
    caption_ids: Any = None,
    *,
    ks: Iterable[int] = (1, 5, 10),
    folds: int = 1,
    metric: StructuredSimilarity | None = None,
    normalize: bool = False,
    block_rows: int | None = None,
    chunk_rows: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> RetrievalResult:
    """:func:`~gssf_kernels.evaluate` of embeddings that need not fit into memory, with the same results.

    The first pass computes the scores of the positives, the second counts which scores reach them.

    Args:
        images: [N, D] float: a tensor, a NumPy array or memory map, a file ``.npy`` or ``.safetensors``
            (``"file.safetensors::name"`` if it holds several tensors), or a directory of such files.
        captions: [M, D] of the same dtype, likewise.
        image_ids, caption_ids: [N], [M] integers, likewise. Equal ids are positives; without ids (i, i).
        ks: the K of R@K and NDCG@K.
        folds: as in :func:`~gssf_kernels.evaluate`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity`, which gives the scores.
        normalize: scores are cosines.
        block_rows, chunk_rows: how many images, and captions, are in memory at a time; by default 64 MiB.
        checkpoint: a file to write every few seconds. The same call goes on from it after a crash. It is removed at the
            end. That of other inputs or settings is refused.
        progress: draw a bar on stderr, if tqdm is installed.
        device: where scores are computed; by default where the images, or else the captions, are.

    Returns:
        :class:`RetrievalResult`; x are the images, y the captions.

    Raises:
        FileNotFoundError, TypeError, ValueError: the argument, the file that is wrong, what was expected and what came.

    Time: one N x M x D product, on a GPU two; images are read twice, captions twice for each block of images. Memory: a
    block, two chunks, the ids and about 200 bytes for each positive.
    """
    ks = _checks.cutoffs(ks, "ks")
    _checks.positive_int(folds, "folds")
    sweep = Sweep(
        (images, captions),
        ("images", "captions"),
        (image_ids, caption_ids),
        ("image_ids", "caption_ids"),
        k=0,
        metric=metric,
        normalize=normalize,
        block_rows=block_rows,
        chunk_rows=chunk_rows,
        device=device,
        function="evaluate_files",
    )
    with sweep, torch.no_grad():
        if folds > max(sweep.shape[0], 1):
            raise ValueError(f"folds: expected at most the {sweep.shape[0]} rows of images, got {folds}")
        counted = Counted(sweep, folds)
        sweep.keep(checkpoint, progress, {"folds": folds}, "score_counts")
        for number in range(folds):
            counted.sweep_fold(number)
        result = counted.result(ks)
        sweep.finish()
        return result


class Counted:
    """The ranks of all positives, fold by fold.

    state: of each positive, by row, its score, and how many negatives of its row, and of its column, are greater or
    reach it. In a fold, counts of rows are in the order of ``ByLevel`` of rows, those of columns in that of columns.
    """

    def __init__(self, sweep: Sweep, folds: int) -> None:
        self.sweep, self.folds = sweep, folds
        n, m = sweep.shape
        if sweep.query_ids is None or sweep.candidate_ids is None:
            if m < n or n == 0:
                raise ValueError(
                    f"captions: expected at least the {max(n, 1)} rows of images (row i pairs with row i), got {m}"
                )
            # (i, i) as pairs of equal id: places in a chunk are not those in the whole.
            sweep.query_ids, sweep.candidate_ids = (torch.arange(t, device=sweep.device) for t in (n, m))
        self.pairs = pairs_by_id(sweep)
        if self.pairs.rows.shape[0] == 0:
            raise ValueError(f"image_ids: expected at least one row with a positive, got none among {n} and {m} rows")
        row_fold = [fold * n // folds for fold in range(folds + 1)]
        self.bounds = list(itertools.pairwise(row_fold))
        self.columns = self._columns(torch.tensor(row_fold[1:], device=sweep.device))
        count, device = self.pairs.rows.shape[0], sweep.device
        self.state = {"scores": torch.full((count,), -torch.inf, dtype=sweep.dtype, device=device)}
        self.state |= {name: torch.zeros(count, dtype=torch.int64, device=device) for name in COUNTS}
        self.state["nan_scores"] = torch.zeros(folds, dtype=torch.int64, device=device)

    def _columns(self, ends: Tensor) -> list[Tensor | None]:
        """The columns of each fold, ascending: those with positives in it, and those without any. None: all."""
        if self.folds == 1:
            return [None]
        fold = torch.searchsorted(ends, self.pairs.rows, right=True)
        least, most = folds_of_listed(self.pairs.cols, fold, self.sweep.shape[1], self.folds)
        check_folds(least, most, fold, self.folds, "captions")
        return [((least == number) | (least == self.folds)).nonzero()[:, 0] for number in range(self.folds)]

    def fold(self, number: int) -> tuple[Pairs, slice, int, int]:
        """(the positives of a fold, in its rows and columns; their places in the state; its number of both)."""
        first, last = self.bounds[number]
        places = slice(int(self.pairs.starts[first]), int(self.pairs.starts[last]))
        rows, cols, columns = self.pairs.rows[places] - first, self.pairs.cols[places], self.columns[number]
        if columns is not None:
            cols = torch.searchsorted(columns, cols)
        return (
            Pairs(rows, cols, last - first),
            places,
            last - first,
            self.sweep.shape[1] if columns is None else len(columns),
        )

    def levels(self, number: int) -> tuple[ByLevel, ByLevel, Tensor]:
        """(the levels of the rows of a fold, of its columns, the order of its positives by column)."""
        pairs, places, n, m = self.fold(number)
        scores = self.state["scores"][places]
        by_col = pairs.cols.argsort(stable=True)
        by_row = ByLevel(pairs.rows, pairs.cols, scores, n)
        return by_row, ByLevel(pairs.cols[by_col], pairs.rows[by_col], scores[by_col], m), by_col

    def sweep_fold(self, number: int) -> None:
        """Both passes over a fold."""
        sweep, state, columns = self.sweep, self.state, self.columns[number]
        pairs, places, *_ = self.fold(number)
        assert sweep.query_ids is not None
        assert sweep.candidate_ids is not None
        ids, other_ids = sweep.query_ids[slice(*self.bounds[number])], sweep.candidate_ids
        queries, candidates = sweep.queries, sweep.candidates
        text = ""
        if columns is not None:
            text, other_ids = f"fold {number + 1} of {self.folds}: ", other_ids[columns]
            selected = torch.arange(*self.bounds[number]), columns.cpu()
            queries, candidates = SelectedRows(queries, selected[0]), SelectedRows(candidates, selected[1])
        parts = queries, candidates
        for rows, a, cols, b in sweep.units(2 * number, state, f"{text}positives", *parts, needs=pairs):
            listed, pair_rows, pair_cols = pairs.within(rows, cols)
            scores = swept_scores(a, b, pair_rows, pair_cols)
            state["scores"][places][listed] = torch.where(scores.isnan(), -torch.inf, scores)
        by_row, by_col, _ = self.levels(number)
        for rows, a, cols, b in sweep.units(2 * number + 1, state, f"{text}ranks", *parts):
            of_rows, row_levels, row_starts = segment(by_row, rows)
            of_cols, col_levels, col_starts = segment(by_col, cols)
            call = ScoreCountsCall(a, b, row_levels, row_starts, col_levels, col_starts, ids[rows], other_ids[cols])
            counts = torch.ops.gssf.score_counts(*call)
            for name, count, of in zip(COUNTS, counts, (of_rows, of_rows, of_cols, of_cols), strict=True):
                state[name][places][of] += count
            state["nan_scores"][number] += nan_scores(a, b)

    def result(self, ks: tuple[int, ...]) -> RetrievalResult:
        """The measures, as `evaluate` gives them."""
        results = []
        for number in range(self.folds):
            pairs, places, *_ = self.fold(number)
            by_row, by_col, order = self.levels(number)
            row_greater, row_reaching, col_greater, col_reaching = (self.state[name][places] for name in COUNTS)
            rows = RankSegments(by_row.starts, pairs.cols, by_row.ranks(row_reaching), by_row.ranks(row_greater))
            ways = {"x_to_y": of_queries(rows, ks)}
            cols = RankSegments(by_col.starts, pairs.rows[order], by_col.ranks(col_reaching), by_col.ranks(col_greater))
            ways["y_to_x"] = of_queries(cols, ks)
            results.append(result_of(ways, ks, int(self.state["nan_scores"][number])))
        result = mean_over_folds(results)
        totals = result.to_dict()
        for way, anchors, count in zip(
            ("x_to_y", "y_to_x"), (self.pairs.rows, self.pairs.cols), self.sweep.shape, strict=True
        ):
            # A caption without a positive is in every fold, and counts once.
            without = count - int((torch.bincount(anchors, minlength=count) > 0).sum())
            totals |= {f"{way}.queries": count, f"{way}.without_positive": without}
        warn_of_nan(int(totals["nan_scores"]), "evaluate_files", stacklevel=4)
        return RetrievalResult(totals, result.best_ranks, ks)


def segment(side: ByLevel, anchors: slice) -> tuple[slice, Tensor, Tensor]:
    """(places, levels, where those of each anchor begin) of the levels of a range of anchors."""
    starts = side.starts[anchors.start : anchors.stop + 1]
    places = slice(int(starts[0]), int(starts[-1]))
    return places, side.levels[places], starts - starts[0]


def pairs_by_id(sweep: Sweep) -> Pairs:
    """All pairs of equal id."""
    pairing = Pairing("ids", sweep.query_ids, sweep.candidate_ids)
    lists = list(listed_pairs(pairing, sweep.shape[0], sweep.device))
    lists.append((torch.empty(0, dtype=torch.int64, device=sweep.device),) * 2)
    rows, cols = (torch.cat(t) for t in zip(*lists, strict=True))
    return Pairs(rows, cols, sweep.shape[0])


def _limit(max_score, sweep: Sweep) -> Tensor | None:
    """max_score as [N] in the dtype of scores."""
    if max_score is None:
        return None
    count = sweep.shape[0]
    if not isinstance(max_score, Tensor):
        number = _checks.number(max_score, "max_score")
        return torch.full((count,), number, dtype=sweep.dtype, device=sweep.device)
    _checks.floating(max_score, "max_score", "[N]")
    if max_score.shape != (count,):
        raise ValueError(f"max_score: expected a number or shape [{count}], got {list(max_score.shape)}")
    return max_score.detach().to(sweep.device, sweep.dtype)


def best_so_far(count: int, k: int, sweep: Sweep) -> dict[str, Tensor]:
    """The state of a search: no score yet."""
    return {
        "values": torch.full((count, k), -torch.inf, dtype=sweep.dtype, device=sweep.device),
        "indices": torch.full((count, k), -1, device=sweep.device),
    }


def keep_best(state: dict[str, Tensor], rows: slice, values: Tensor, indices: Tensor) -> None:
    """Merge the best scores of a chunk into those of these rows."""
    values, indices = torch.cat((state["values"][rows], values), 1), torch.cat((state["indices"][rows], indices), 1)
    state["values"][rows], state["indices"][rows] = merged(values, indices, state["values"].shape[1])


def top_of_chunk(
    sweep: Sweep,
    rows: slice,
    a: Tensor,
    cols: slice,
    b: Tensor,
    k: int,
    row_limit: Tensor | None,
    left_out: Pairs,
    usable: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best of a bᵀ for queries ``rows`` and candidates ``cols``, with indices among all candidates.

    Left out are scores of equal id, greater than the limit, listed pairs and columns that are not ``usable``.
    """
    a_ids = b_ids = None
    if sweep.query_ids is not None and sweep.candidate_ids is not None:
        a_ids, b_ids = sweep.query_ids[rows], sweep.candidate_ids[cols]
    _, pair_rows, pair_cols = left_out.within(rows, cols)
    columns = None
    if usable is not None and not bool(usable.all()):
        columns = usable.nonzero().squeeze(1)
        b, b_ids = b[columns], None if b_ids is None else b_ids[columns]
        usable_pairs = usable[pair_cols]
        pair_rows = pair_rows[usable_pairs]
        pair_cols = (usable.cumsum(0) - 1)[pair_cols[usable_pairs]]
    call = TopScoresCall(a, b, k, a_ids, b_ids, False, row_limit, route=sweep.route)
    values, indices = _top_without(call, pair_rows, pair_cols)
    if columns is not None and columns.shape[0]:
        indices = torch.where(indices < 0, -1, columns[indices.clamp_min(0)])
    return values, torch.where(indices < 0, -1, indices + cols.start)


def _top_without(call: TopScoresCall, pair_rows: Tensor, pair_cols: Tensor) -> tuple[Tensor, Tensor]:
    """The k best scores of each row but for those of listed pairs, which are sorted.

    As many further scores are asked for as a row has pairs here. Where that is too many, b is halved.
    """
    if pair_rows.shape[0] == 0:
        return torch.ops.gssf.top_scores(*call)[:2]
    k, width = call.k, call.b.shape[0]
    asked = min(k + int(pair_rows.bincount().max()), width)
    if asked > MOST:
        all_values, all_indices = [], []
        for first, last in ((0, width // 2), (width // 2, width)):
            inside = (pair_cols >= first) & (pair_cols < last)
            part = call._replace(b=call.b[first:last], b_ids=None if call.b_ids is None else call.b_ids[first:last])
            values, indices = _top_without(part, pair_rows[inside], pair_cols[inside] - first)
            all_values.append(values)
            all_indices.append(torch.where(indices < 0, -1, indices + first))
        return merged(torch.cat(all_values, 1), torch.cat(all_indices, 1), k)
    values, indices = torch.ops.gssf.top_scores(*call._replace(k=asked))[:2]
    anchors = torch.arange(indices.shape[0], device=indices.device)[:, None]
    listed = torch.isin(anchors * width + indices, pair_rows * width + pair_cols) & (indices >= 0)
    return merged(torch.where(listed, -torch.inf, values), torch.where(listed, -1, indices), k)
