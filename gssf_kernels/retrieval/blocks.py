"""The loops over embeddings that stay in files: blocks of queries, and for each of them all candidates, chunk by chunk.

    for rows, a, cols, b in sweep.units(stage, state):     # the next chunk is read meanwhile
        state = merge(state, statistic of a bᵀ)

Memory: a block, two chunks and the state. A checkpoint holds the state and the next (block, chunk), so that nothing is
lost or counted twice.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gssf_kernels import _checks, work
from gssf_kernels._library import backends
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.retrieval.checkpoint import Checkpoint, described
from gssf_kernels.retrieval.sources import Rows, chunks, open_rows, read_ids
from gssf_kernels.similarity import StructuredSimilarity, metric_of

CHUNK_BYTES = 64 << 20  # of candidates, in fp32 or wider
BLOCK_BYTES = 64 << 20  # of queries
STATE_BYTES = 128 << 20  # of what merging the best scores of a block takes


class Pairs:
    """Pairs (row, column), sorted by row and then by column, each once."""

    def __init__(self, rows: Tensor, cols: Tensor, count: int) -> None:
        self.rows, self.cols = rows, cols
        self.starts = torch.searchsorted(rows, torch.arange(count + 1, device=rows.device))

    def within(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(places in the list, rows and columns, counted from the first of these) of the pairs in that rectangle."""
        if self.rows.shape[0] == 0:
            return self.rows, self.rows, self.cols
        first, last = int(self.starts[rows.start]), int(self.starts[rows.stop])
        of_rows = self.cols[first:last]
        places = ((of_rows >= cols.start) & (of_rows < cols.stop)).nonzero().squeeze(1) + first
        return places, self.rows[places] - rows.start, self.cols[places] - cols.start


class Sweep:
    """Queries, candidates and their ids, checked, and the loops over blocks and chunks.

    Args:
        sources: queries and candidates, as `open_rows` takes them; names: what they are called in errors.
        ids: those of queries and candidates; with N = M one serves both. id_names: what they are called.
        k: how many best scores are kept of each query; 0 for statistics of another kind.
        function: whose warning it is if rows were not normalised.
    """

    def __init__(
        self,
        sources: tuple,
        names: tuple[str, str],
        ids: tuple,
        id_names: tuple[str, str],
        *,
        k: int,
        metric: StructuredSimilarity | None,
        normalize: bool,
        block_rows: int | None,
        chunk_rows: int | None,
        device: torch.device | str | None,
        function: str,
    ) -> None:
        for count, name in ((block_rows, "block_rows"), (chunk_rows, "chunk_rows")):
            if count is not None:
                _checks.whole(count, name, 1)
        self.device = _device_of(device, *sources)
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            self.queries, self.candidates = (
                opened.enter_context(open_rows(source, name, "embeddings"))
                for source, name in zip(sources, names, strict=True)
            )
            self._check_both(names)
            self.query_ids, self.candidate_ids = self._ids(ids, names, id_names)
            head = self.queries.read(0, 256).to(self.device)
            self.metric = metric_of(metric, normalize, function, head)
            if self.metric is not None:
                _checks.metric_weights(head, *self.metric.weights, self.metric.permutation, names[0])
            self._closing = opened.pop_all()
        self.shape = len(self.queries), len(self.candidates)
        self.dtype = accumulation_dtype(self.queries.dtype)
        row_bytes = self.queries.shape[1] * self.dtype.itemsize
        merging = 12 * 8 * k  # bytes for each query: values and indices of twice as many, sorted twice
        block = min(BLOCK_BYTES // row_bytes, STATE_BYTES // merging if k else BLOCK_BYTES)
        self.block_rows = block_rows or max(block, 1)
        self.chunk_rows = chunk_rows or max(CHUNK_BYTES // row_bytes, 1)
        self.checkpoint: Checkpoint | None = None
        self.progress = False

    def _check_both(self, names: tuple[str, str]) -> None:
        one, other = self.queries, self.candidates
        if one.dtype != other.dtype:
            raise TypeError(f"{names[1]}: expected {one.dtype} as in {names[0]}, got {other.dtype}")
        if one.shape[1] != other.shape[1]:
            raise ValueError(
                f"{names[1]}: expected {one.shape[1]} columns to match {names[0]} {list(one.shape)}, "
                f"got {list(other.shape)}"
            )

    def _ids(self, ids: tuple, names: tuple[str, str], id_names: tuple[str, str]) -> list[Tensor | None]:
        counts = len(self.queries), len(self.candidates)
        if ids[0] is None and ids[1] is None:
            return [None, None]
        if (ids[0] is None or ids[1] is None) and counts[0] != counts[1]:
            raise ValueError(
                f"{id_names[0 if ids[0] is None else 1]}: expected ids too, because {names[0]} and {names[1]} have "
                f"{counts[0]} and {counts[1]} rows (the ids of one serve both only if these are equal), got None"
            )
        read = [read_ids(*t) for t in zip(ids, id_names, counts, names, strict=True)]
        read = [read[0] if read[1] is None else read[1] if t is None else t for t in read]
        return [None if t is None else t.to(self.device) for t in read]

    @property
    def route(self) -> str:
        """The route of `top_scores` on the whole: each chunk takes it, however small, so that all round alike."""
        if self.device.type != "cpu" or backends()["top_scores"]["cpu"] != "cpp":
            return ""
        width, dtype = self.queries.shape[1], self.queries.dtype
        a, b = (torch.empty(count, width, dtype=dtype, device="meta") for count in self.shape)
        # One rule in csrc/hardest.cpp decides for both ops.
        certified = work.on_cpu("top_scores", {"a": a, "b": b}).route == "certified"
        return "certified" if certified else "sweep"

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *_) -> None:
        self._closing.close()

    def keep(self, checkpoint: Any, progress: bool, settings: dict[str, Any], op: str) -> None:
        """Go on from the checkpoint, if there is one, and write it; settings: what else must be the same."""
        _checks.flag(progress, "progress")
        self.progress = progress
        if checkpoint is None:
            return
        inputs: dict[str, Any] = {"queries": self.queries, "candidates": self.candidates}
        inputs |= {"query_ids": self.query_ids, "candidate_ids": self.candidate_ids}
        if self.metric is not None:
            inputs |= {f"metric.{name}": t for name, t in self.metric.state_dict().items()}
            inputs["metric"] = self.metric.extra_repr()
        inputs |= settings
        inputs |= {"block_rows": self.block_rows, "chunk_rows": self.chunk_rows}
        inputs["torch"] = torch.__version__
        inputs["backend"] = backends()[op]["cuda" if self.device.type == "cuda" else "cpu"]
        self.checkpoint = Checkpoint(checkpoint, {name: described(value) for name, value in inputs.items()})

    def units(
        self,
        stage: int,
        state: dict[str, Tensor],
        text: str,
        queries: Rows | None = None,
        candidates: Rows | None = None,
        needs: Pairs | None = None,
    ) -> Iterator[tuple[slice, Tensor, slice, Tensor]]:
        """(rows, their factor a, columns, their factor b) of each block and chunk that is still to do.

        The caller changes ``state`` in place until it asks for the next. What a checkpoint holds is put into it; if
        that is of a later stage, there is nothing to do.

        Args:
            text: what the bar says.
            queries, candidates: a part of those of the sweep.
            needs: leave out chunks in which the block has no such pair.
        """
        queries, candidates = queries or self.queries, candidates or self.candidates
        spans = spans_of(len(candidates), self.chunk_rows)
        blocks = [slice(*span) for span in spans_of(len(queries), self.block_rows)]
        total, done = len(blocks) * len(spans), 0
        saved = self.checkpoint.saved if self.checkpoint is not None else None
        if saved is not None and saved.stage >= stage:
            state.update({name: t.to(self.device) for name, t in saved.state.items()})
            done = saved.unit if saved.stage == stage else total
        with _bar(text, total, done, self.progress) as bar:
            for number in range(done // max(len(spans), 1), len(blocks)):
                rows, first_unit = blocks[number], number * len(spans)
                rest = list(enumerate(spans, first_unit))[max(done - first_unit, 0) :]
                if needs is not None:
                    rest = [(unit, span) for unit, span in rest if needs.within(rows, slice(*span))[0].shape[0]]
                if not rest:
                    continue
                a = x = queries.read(rows.start, rows.stop).to(self.device)
                read = chunks(candidates, self.chunk_rows, [span for _, span in rest])
                for (unit, span), (_, y) in zip(rest, read, strict=True):
                    b = y.to(self.device)
                    if self.metric is not None:
                        a, b = _checks.autocast(*self.metric.factors(x, b))
                    yield rows, a, slice(*span), b
                    if self.checkpoint is not None:
                        self.checkpoint.step(stage, unit + 1, state)
                    bar.update(unit + 1 - bar.n)
                    del y, b
            bar.update(total - bar.n)

    def finish(self) -> None:
        """The results are complete: the checkpoint is removed."""
        if self.checkpoint is not None:
            self.checkpoint.remove()


def _device_of(device, *sources) -> torch.device:
    if device is None:
        return next((t.device for t in sources if isinstance(t, Tensor)), torch.device("cpu"))
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a torch.device or its name, got {device!r}") from error


def spans_of(count: int, size: int) -> list[tuple[int, int]]:
    """(first, last + 1) of the ranges of ``size`` of ``count``."""
    return [(first, min(first + size, count)) for first in range(0, count, size)]


class _Bar:
    """The part of a tqdm bar that is used, which draws nothing."""

    n = 0

    def update(self, count: int) -> None:
        self.n += count


@contextlib.contextmanager
def _bar(text: str, total: int, done: int, progress: bool) -> Iterator[Any]:
    tqdm: Any = None
    if progress and importlib.util.find_spec("tqdm"):
        tqdm = importlib.import_module("tqdm").tqdm
    if tqdm is None:
        bar = _Bar()
        bar.n = done
        yield bar
    else:
        with tqdm(desc=text, total=total, initial=done, unit="chunk", dynamic_ncols=True) as bar:
            yield bar
