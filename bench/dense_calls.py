"""The calls of dense losses' launchers, for `bench/calls.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.case import PRODUCTS, Case, zeros
from gssf_kernels._library import OPS


def _launcher(name: str) -> Callable:
    """The op as it is on CUDA."""
    return OPS[name].on_cuda


def _logsumexp_small(dtype: torch.dtype, n: int, d: int, scaled: bool, twice: bool = False) -> tuple:
    a, b = torch.zeros(n, d, dtype=dtype), None if twice else torch.zeros(n + 1, d, dtype=dtype)
    return a, b, torch.ones(()) if scaled else None, 2.0


def _logsumexp_small_backward(
    dtype: torch.dtype, n: int, d: int, scaled: bool, twice: bool, lines: str, needs: list[bool]
) -> tuple:
    a, b, *scale = _logsumexp_small(dtype, n, d, scaled, twice)
    m = n + (b is not None)
    grads = [torch.zeros(size) if name in lines.split() else None for name, size in zip(LINES, (n, m, n), strict=True)]
    return (*grads, a, b, *scale, *zeros(n, n, m, m), needs)


LINES = ("row", "col", "pair")
_OF_ROWS: tuple = (
    "scaled",
    [],
    None,
    None,
    None,
    False,
    None,
    False,
)  # the arguments behind `keep`: columns have no statistics


def _of_rows(*arguments: Any) -> tuple:
    return (*_logsumexp_small(*arguments), "", *_OF_ROWS)


def _of_rows_backward(dtype: torch.dtype, n: int, d: int, scaled: bool) -> tuple:
    backward = _logsumexp_small_backward(dtype, n, d, scaled, False, "row pair", [True, True, True])
    return (*backward, None, "", *_OF_ROWS)


class _Term(NamedTuple):
    """f of scores, and which are positives' terms."""

    kind: str
    positives: str
    relative: bool


def _sides_and_term(dtype: torch.dtype, n: int, d: int, term: _Term, learned: bool, sides: str) -> tuple:
    """The arguments of `score_sums` up to its reduction; sides: those with gradients, "a" where there is but one."""
    a, b = torch.zeros(n, d, dtype=dtype), None if sides == "a" else torch.zeros(n + 1, d, dtype=dtype)
    ids = [torch.zeros(size, dtype=torch.int64) if learned else None for size in (n, n + 1)]
    number = torch.ones(()) if learned else None
    constant = None if learned and sides == "a" else 1.0  # None: of log κ
    return (a, b, number, number, constant, 0.5, ids[0], None if b is None else ids[1], *term)


def _needs(sides: str) -> list[bool]:
    return [sides != "none", sides == "ab"]


def _sum(*arguments: Any) -> tuple:
    return (*_sides_and_term(*arguments), "sum", 0.5, _needs(arguments[-1]))


def _sum_backward(dtype: torch.dtype, n: int, d: int, learned: bool, sides: str) -> tuple:
    da, db = torch.zeros(n, d), torch.zeros(n + 1, d) if sides == "ab" else torch.zeros(0)
    numbers = (torch.ones(()) for _ in range(3))
    return (*numbers, da, db, *_sum(dtype, n, d, _Term("softplus", "negate", False), learned, sides))


def _rows(dtype: torch.dtype, n: int, d: int, term: _Term, learned: bool, sides: str) -> tuple:
    positive_score = torch.zeros(n) if term.relative and learned else None
    call = _sides_and_term(dtype, n, d, term, learned, sides)
    return (*call, "none", 1.0, [False, False], positive_score)


def _rows_backward(dtype: torch.dtype, n: int, d: int, term: _Term, learned: bool, sides: str) -> tuple:
    call = _sides_and_term(dtype, n, d, term, learned, sides)
    positive_score = torch.zeros(n) if term.relative else None
    return (torch.zeros(n), *zeros(0, 0, 0, 0), *call, "none", 1.0, _needs(sides), positive_score)


def _sums(product: str) -> Iterator[Case]:
    dtype, _ = PRODUCTS[product]
    softplus, hinge = _Term("softplus", "negate", False), _Term("hinge", "exclude", True)
    kernels, others = ("sweep_kernel", "gradients_kernel"), ("hinge", "abs", "square") if product == "ieee" else ()
    for name, n, d, term, learned, sides in (
        ("softplus negate", 128, 256, softplus, False, "ab"),
        ("softplus negate learnable ragged", 129, 200, softplus, True, "ab"),
        ("softplus negate of one side twice", 128, 256, softplus, True, "a"),
        ("softplus without gradients", 128, 256, softplus, True, "none"),
        ("hinge relative", 128, 256, hinge, False, "ab"),
        ("hinge relative ragged", 129, 200, hinge, True, "ab"),
        ("hinge relative without gradients", 128, 256, hinge, False, "none"),
        *((f"{kind} include", 128, 256, _Term(kind, "include", False), False, "ab") for kind in others),
    ):
        make = partial(_sum, dtype, n, d, term, learned, sides)
        launched = ("pair_scores_kernel", *kernels) if term.relative else kernels
        yield Case(f"score_sums {name}", _launcher("score_sums"), make, launched, product)
    for name, n, d, learned, sides in (
        ("", 128, 256, False, "ab"),
        (" learnable ragged", 129, 200, True, "ab"),
        (" of one side twice", 128, 256, True, "a"),
    ):
        make = partial(_sum_backward, dtype, n, d, learned, sides)
        yield Case("score_sums_backward" + name, _launcher("score_sums_backward"), make, ("scaled_kernel",), product)
    for name, n, d, term, learned, sides in (
        ("softplus negate", 128, 256, softplus, False, "ab"),
        ("softplus negate learnable ragged", 129, 200, softplus, True, "ab"),
        ("softplus negate of one side twice", 128, 256, softplus, True, "a"),
        ("hinge relative", 128, 256, hinge, False, "ab"),
        ("hinge relative of known pairs ragged", 129, 200, hinge, True, "ab"),
    ):
        options, kernels = (dtype, n, d, term, learned, sides), ("sweep_kernel", "merge_terms_kernel")
        launched = ("pair_scores_kernel", *kernels) if term.relative and not learned else kernels
        yield Case(f"score_sums rows {name}", _launcher("score_sums"), partial(_rows, *options), launched, product)
        make, kernels = partial(_rows_backward, *options), ("sweep_kernel", "gradients_kernel")
        yield Case(f"score_sums_backward rows {name}", _launcher("score_sums_backward"), make, kernels, product)


def _relation_loss(dtype: torch.dtype, n: int, d: int, kind: str, learned: bool, need: bool) -> tuple:
    sides = (torch.zeros(n, width, dtype=dtype) for width in (d, d + 1, 2 * d))
    return *sides, *(torch.ones(()) if learned else None for _ in range(2)), 0.5, 0.1, [2.0, 1.0, 1.0], kind, need


def _distillations(product: str) -> Iterator[Case]:
    for name, n, d, learned, need in (
        ("", 128, 256, False, True),
        (" learnable ragged", 129, 200, True, True),
        (" without gradients", 128, 256, True, False),
    ):
        for kind in ("abs", "square"):
            make = partial(_relation_loss, PRODUCTS[product][0], n, d, kind, learned, need)
            kernels = ("relation_tile_kernel", "relation_loss_kernel")
            yield Case(f"relation_loss {kind}{name}", _launcher("relation_loss"), make, kernels, product)


def _small() -> Iterator[Case]:
    """Dense losses of small problems; ragged ones have neither rows nor channels on 16 bytes."""
    for product, (dtype, _) in PRODUCTS.items():
        for name, n, d, scaled, twice in (
            ("", 128, 256, False, False),
            (" learnable", 128, 256, True, False),
            (" learnable ragged", 129, 200, True, False),
            (" of one side twice", 128, 256, True, True),
        ):
            launcher = _launcher("logsumexp_scores")
            make = partial(_logsumexp_small, dtype, n, d, scaled, twice)
            yield Case("logsumexp_scores" + name, launcher, make, ("sweep_kernel", "merge_kernel"), product)
            launcher = _launcher("logsumexp_scores_backward")
            needs = [True, not twice, scaled]
            make = partial(_logsumexp_small_backward, dtype, n, d, scaled, twice, "row col pair", needs)
            yield Case(
                "logsumexp_scores_backward" + name, launcher, make, ("sweep_kernel", "gradients_kernel"), product
            )
        make, kernels = partial(_of_rows, dtype, 129, 200, True), ("sweep_kernel", "merge_kernel")
        yield Case("logsumexp_scores of rows", _launcher("logsumexp_scores"), make, kernels, product)
        make, kernels = partial(_of_rows_backward, dtype, 129, 200, True), ("sweep_kernel", "gradients_kernel")
        yield Case("logsumexp_scores_backward of rows", _launcher("logsumexp_scores_backward"), make, kernels, product)
        yield from _sums(product)
        yield from _distillations(product)
        yield from _info_nces(product)
        yield from _labelled(product)
    for lines, needs in (
        ("row", [True, False, False]),
        ("col pair", [False, True, True]),
        ("pair", [False] * 2 + [True]),
    ):
        make = partial(_logsumexp_small_backward, torch.float32, 128, 256, True, False, lines, needs)
        name = f"logsumexp_scores_backward {lines} {needs}"
        yield Case(name, _launcher("logsumexp_scores_backward"), make, ("sweep_kernel", "gradients_kernel"))


SCORES: dict[str, list[float]] = {"circle": [0.4, 80.0], "multi_similarity": [2.0, 50.0, 0.5]}


def _by_label(dtype: torch.dtype, n: int, d: int, score: str, mined: bool, alone: bool) -> tuple:
    """The arguments of `logsumexp_scores` by label; alone: of one side."""
    a, b = torch.zeros(n, d, dtype=dtype), None if alone else torch.zeros(n + 1, d, dtype=dtype)
    labels = torch.zeros(n, dtype=torch.int64), torch.zeros(n if alone else n + 1, dtype=torch.int64)
    bounds = torch.zeros(2, n) if mined else None
    return a, b, None, 1.0, "", score, SCORES[score], *labels, bounds, alone


def _by_label_backward(*arguments: Any) -> tuple:
    a, b, scale, constant, _, *by_label = _by_label(*arguments)
    statistics = torch.zeros(2, len(a)), torch.zeros(2, len(a)), *zeros(0, 0)
    needs = [True, b is not None, False]
    return torch.zeros(2, len(a)), None, None, a, b, scale, constant, *statistics, needs, None, "", *by_label


def _labelled(product: str) -> Iterator[Case]:
    """Circle loss and multi-similarity; ragged ones have neither rows nor channels on 16 bytes."""
    dtype, _ = PRODUCTS[product]
    for name, n, d, score, mined, alone in (
        ("circle", 128, 256, "circle", False, True),
        ("circle of two sides ragged", 129, 200, "circle", False, False),
        ("multi_similarity mined", 128, 256, "multi_similarity", True, True),
        ("multi_similarity mined of two sides ragged", 129, 200, "multi_similarity", True, False),
    ):
        options = dtype, n, d, score, mined, alone
        make, kernels = partial(_by_label, *options), ("sweep_kernel", "merge_kernel")
        yield Case(f"logsumexp_scores {name}", _launcher("logsumexp_scores"), make, kernels, product)
        make, kernels = partial(_by_label_backward, *options), ("sweep_kernel", "gradients_kernel")
        yield Case(f"logsumexp_scores_backward {name}", _launcher("logsumexp_scores_backward"), make, kernels, product)


def _row_panels() -> Iterator[Case]:
    """Dense losses of more bf16 scores; ragged ones have neither rows nor channels on 16 bytes."""
    for name, n, d, learned in (("", 1024, 512, False), (" learnable ragged", 1025, 200, True)):
        launcher = _launcher("logsumexp_scores")
        make = partial(_logsumexp_small, torch.bfloat16, n, d, learned)
        yield Case("logsumexp_scores row panels" + name, launcher, make, ("sweep_kernel", "merge_kernel"), "bf16")
        launcher, needs = _launcher("logsumexp_scores_backward"), [True, True, learned]
        make = partial(_logsumexp_small_backward, torch.bfloat16, n, d, learned, False, "row col pair", needs)
        yield Case("logsumexp_scores_backward row panels" + name, launcher, make, ("sweep_kernel",), "bf16")
        for score in SCORES:
            options = torch.bfloat16, n, d, score, learned, False
            words = f"row panels {score}{name}"
            make, kernels = partial(_by_label, *options), ("sweep_kernel", "merge_kernel")
            yield Case(f"logsumexp_scores {words}", _launcher("logsumexp_scores"), make, kernels, "bf16")
            make, launcher = partial(_by_label_backward, *options), _launcher("logsumexp_scores_backward")
            yield Case(f"logsumexp_scores_backward {words}", launcher, make, ("sweep_kernel",), "bf16")
        for term, sides in ((_Term("softplus", "negate", False), "ab"), (_Term("hinge", "exclude", False), "none")):
            make = partial(_sum, torch.bfloat16, n, d, term, learned, sides)
            words = f"score_sums row panels {term.kind} {sides}{name}"
            yield Case(words, _launcher("score_sums"), make, ("sweep_kernel",), "bf16")


class _InfoNCE(NamedTuple):
    """A call of InfoNCE; ragged ones have neither rows nor channels on 16 bytes."""

    n: int
    d: int
    scaled: bool
    ids: bool
    epsilon: float
    symmetric: bool
    reduction: str
    twice: bool = False

    def forward(self, dtype: torch.dtype) -> tuple:
        a, b, *scale = _logsumexp_small(dtype, self.n, self.d, self.scaled, self.twice)
        ids = [torch.zeros(self.n + (k and b is not None), dtype=torch.int64) if self.ids else None for k in (0, 1)]
        scale[1] = None if self.twice else scale[1]  # None: of log κ
        return a, b, *scale, *ids, self.epsilon, self.symmetric, self.reduction

    def backward(self, dtype: torch.dtype) -> tuple:
        arguments, m = self.forward(dtype), self.n + (not self.twice)
        statistics = zeros(self.n, self.n, m, m, *(self.n if self.ids else 0,) * 2)
        grad = torch.zeros(self.n if self.reduction == "none" else ())
        return grad, *arguments, *statistics, [True, not self.twice, self.scaled]


def _info_nces(product: str) -> Iterator[Case]:
    for name, call in (
        ("", _InfoNCE(128, 256, False, False, 0.0, True, "mean")),
        (" learnable sum ragged", _InfoNCE(129, 200, True, False, 0.0, True, "sum")),
        (" learnable ids smoothed", _InfoNCE(128, 256, True, True, 0.1, True, "mean")),
        (" ids none ragged", _InfoNCE(129, 200, True, True, 0.0, True, "none")),
        (" rows smoothed", _InfoNCE(128, 256, True, False, 0.1, False, "mean")),
        (" of one side twice", _InfoNCE(128, 256, True, False, 0.0, True, "mean", True)),
    ):
        make, launcher = partial(call.forward, PRODUCTS[product][0]), _launcher("info_nce")
        yield Case("info_nce" + name, launcher, make, ("sweep_kernel", "merge_terms_kernel"), product)
        make, launcher = partial(call.backward, PRODUCTS[product][0]), _launcher("info_nce_backward")
        yield Case("info_nce_backward" + name, launcher, make, ("sweep_kernel", "gradients_kernel"), product)


R, K = 64, 1024  # rows of a chunk of scores, and its columns that have terms of their own
SCALED: tuple = ("scaled", [], None, None, None, None, 0, False)  # t = κ s, all alike


def _logsumexp(m: int, by_label: tuple = SCALED) -> tuple:
    one_class = by_label[0] not in SCORES
    columns = zeros(m, m) if one_class else [None, None]
    rows = zeros(R, R) if one_class else [torch.zeros(2, R), torch.zeros(2, R)]
    return torch.zeros(R, m), torch.ones(()), *by_label, *rows, *columns


def _labelled_chunk(m: int, score: str) -> tuple:
    """What a pass takes of chunks by label, mined."""
    labels = torch.zeros(R, dtype=torch.int64), torch.zeros(m, dtype=torch.int64)
    return score, SCORES[score], *labels, torch.zeros(2, R), torch.zeros(2, m), 0, True


def _limited(m: int, ids: bool) -> tuple:
    """What a pass takes of chunks with limits."""
    labels = [torch.zeros(size, dtype=torch.int64) if ids else None for size in (R, m)]
    return "limited", [], *labels, *zeros(R, m), 0, False


def _labelled_softmax(m: int, score: str) -> tuple:
    row, col = torch.zeros(2, R), torch.zeros(2, m)
    by_label = _labelled_chunk(m, score)
    return torch.zeros(R, m), torch.ones(()), *by_label, row, row, row, col, col, col, torch.zeros(R)


def _softmax(m: int, directions: str, by_label: tuple = SCALED) -> tuple:
    (row, row_grad, dot), (col, col_grad) = zeros(R, R, R), zeros(m, m)
    rows = (row, row, row_grad if directions != "columns" else None)
    cols = (col, col, col_grad if directions != "rows" else None)
    return torch.zeros(R, m), torch.ones(()), *by_label, *rows, *cols, dot


def _score_sums(m: int, kind: str, positives: str, columns: bool, weighted: bool, gradient: bool) -> tuple:
    row, col = zeros(R, K)
    terms = [row, row if weighted else None]
    terms += [col, col if weighted else None] if columns else [None, None]
    ids = [torch.zeros(size, dtype=torch.int64) if positives != "include" else None for size in (R, m)]
    out = torch.zeros(3, R), torch.zeros(2, K if columns else 0)
    numbers = torch.ones(()), torch.ones(())
    return torch.zeros(R, m), *numbers, *terms, *ids, 0, kind, positives, gradient, *out


def _relation(m: int, kind: str, gradient: bool) -> tuple:
    s = torch.zeros(R, m)
    return s, s, s, torch.ones(()), kind, gradient, torch.zeros(3, R)


def _passes() -> Iterator[Case]:
    """Over chunks of fp32 scores [R, M]; ragged ones have odd rows."""

    def case(name: str, make: Callable[[], tuple]) -> Case:
        op = name.partition(" ")[0]
        kernels = {
            "logsumexp_pass": ("chunk_kernel", "merge_kernel"),
            "relation_pass": ("relation_pass_kernel",),
        }
        return Case(name, _launcher(op), make, kernels.get(op, ("chunk_kernel",)))

    for m, ragged in ((4096, ""), (4099, " ragged")):
        yield case("logsumexp_pass" + ragged, partial(_logsumexp, m))
        for score in SCORES:
            make = partial(_logsumexp, m, _labelled_chunk(m, score))
            yield case(f"logsumexp_pass {score}{ragged}", make)
            yield case(f"softmax_pass {score}{ragged}", partial(_labelled_softmax, m, score))
        limited = _limited(m, not ragged)
        yield case(f"logsumexp_pass limited{ragged}", partial(_logsumexp, m, limited))
        yield case(f"softmax_pass limited{ragged}", partial(_softmax, m, "both", limited))
        for directions in ("both",) if ragged else ("both", "rows", "columns"):
            yield case(f"softmax_pass {directions}{ragged}", partial(_softmax, m, directions))
        for kind in ("softplus",) if ragged else ("hinge", "softplus", "abs", "square"):
            for which, *options in (
                ("include", False, False, True),
                ("exclude", True, True, True),
                ("negate", False, True, False),
            ):
                make = partial(_score_sums, m, kind, which, *options)
                yield case(f"score_sums_pass {kind} {which}{ragged}", make)
        for kind in ("abs", "square"):
            yield case(f"relation_pass {kind}{ragged}", partial(_relation, m, kind, not ragged))


def _of_one() -> Iterator[Case]:
    """One row of one channel: see `bench/calls.py`."""
    dtype, call = torch.float32, _InfoNCE(1, 1, True, True, 0.1, True, "mean")
    relative = (dtype, 1, 1, _Term("hinge", "exclude", True), True, "ab")
    for name, make, kernels in (
        ("info_nce", partial(call.forward, dtype), ("sweep_kernel", "merge_terms_kernel")),
        ("info_nce_backward", partial(call.backward, dtype), ("sweep_kernel", "gradients_kernel")),
        ("score_sums_backward", partial(_rows_backward, *relative), ("sweep_kernel", "gradients_kernel")),
        ("relation_loss", partial(_relation_loss, dtype, 1, 1, "abs", True, True),
         ("relation_tile_kernel", "relation_loss_kernel")),
        ("logsumexp_pass", partial(_logsumexp, 1), ("chunk_kernel", "merge_kernel")),
    ):  # fmt: skip
        yield Case(f"{name} of one", _launcher(name), make, kernels)


def _told_apart(case: Case) -> bool:
    """Whether to compile a call: of TF32 and fp16, whose code is that of fp32 and bf16 but for a word, few are."""
    return case.product in ("ieee", "bf16") or "ragged" in case.name or " " not in case.name


DENSE_CASES = [*filter(_told_apart, _small()), *_row_panels(), *_passes(), *_of_one()]
