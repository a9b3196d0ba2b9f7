"""The calls of dense losses' launchers, for `bench/calls.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from bench.case import PRODUCTS, Case, zeros
from gssf_kernels.kernels import contrast, dense, logsumexp, relations, sums


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


def _total(dtype: torch.dtype, n: int, d: int, of: tuple, learned: bool, sides: str) -> tuple:
    kind, positives, relative = of
    a, b = torch.zeros(n, d, dtype=dtype), None if sides == "a" else torch.zeros(n + 1, d, dtype=dtype)
    ids = [torch.zeros(size, dtype=torch.int64) if learned else None for size in (n, n + 1)]
    number = torch.ones(()) if learned else None
    needs, constant = [sides != "none", sides == "ab"], None if learned and sides == "a" else 1.0  # None: of log κ
    return (
        a,
        b,
        number,
        number,
        constant,
        0.5,
        ids[0],
        None if b is None else ids[1],
        kind,
        positives,
        relative,
        0.5,
        needs,
    )


def _total_backward(dtype: torch.dtype, n: int, d: int, learned: bool, sides: str) -> tuple:
    a, b = torch.zeros(n, d, dtype=dtype), None if sides == "a" else torch.zeros(n + 1, d, dtype=dtype)
    da, db = torch.zeros(n, d), torch.zeros(n + 1, d) if sides == "ab" else torch.zeros(0)
    number = torch.ones(()) if learned else None
    constant = None if learned and sides == "a" else 1.0
    return (*(torch.ones(()) for _ in range(3)), da, db, a, b, number, number, constant, 0.5)


def _totals(product: str) -> Iterator[Case]:
    dtype, _ = PRODUCTS[product]
    kernels, others = ("sweep_kernel", "gradients_kernel"), ("hinge", "abs", "square") if product == "ieee" else ()
    for name, n, d, of, learned, sides in (
        ("softplus negate", 128, 256, ("softplus", "negate", False), False, "ab"),
        ("softplus negate learnable ragged", 129, 200, ("softplus", "negate", False), True, "ab"),
        ("softplus negate of one side twice", 128, 256, ("softplus", "negate", False), True, "a"),
        ("softplus without gradients", 128, 256, ("softplus", "negate", False), True, "none"),
        ("hinge relative", 128, 256, ("hinge", "exclude", True), False, "ab"),
        ("hinge relative ragged", 129, 200, ("hinge", "exclude", True), True, "ab"),
        ("hinge relative without gradients", 128, 256, ("hinge", "exclude", True), False, "none"),
        *((f"{kind} include", 128, 256, (kind, "include", False), False, "ab") for kind in others),
    ):
        make = partial(_total, dtype, n, d, of, learned, sides)
        launched = ("pair_scores_kernel", *kernels) if of[2] else kernels
        yield Case(f"score_total {name}", sums.score_total, make, launched, product)
    for name, learned, sides in (("", False, "ab"), (" learnable", True, "ab"), (" of one side twice", True, "a")):
        make, launcher = partial(_total_backward, dtype, 128, 256, learned, sides), sums.score_total_backward
        yield Case("score_total_backward" + name, launcher, make, ("scaled_kernel",), product)


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
            yield Case(f"relation_loss {kind}{name}", relations.relation_loss, make, kernels, product)


def _small() -> Iterator[Case]:
    """Dense losses of small problems; ragged ones have neither rows nor channels on 16 bytes."""
    for product, (dtype, _) in PRODUCTS.items():
        for name, n, d, scaled, twice in (
            ("", 128, 256, False, False),
            (" learnable", 128, 256, True, False),
            (" learnable ragged", 129, 200, True, False),
            (" of one side twice", 128, 256, True, True),
        ):
            launcher: Callable = logsumexp.logsumexp_scores
            make = partial(_logsumexp_small, dtype, n, d, scaled, twice)
            yield Case("logsumexp_scores" + name, launcher, make, ("sweep_kernel", "merge_logs_kernel"), product)
            launcher = logsumexp.logsumexp_scores_backward
            needs = [True, not twice, scaled]
            make = partial(_logsumexp_small_backward, dtype, n, d, scaled, twice, "row col pair", needs)
            yield Case(
                "logsumexp_scores_backward" + name, launcher, make, ("sweep_kernel", "gradients_kernel"), product
            )
        yield from _totals(product)
        yield from _distillations(product)
        yield from _rows_sums(product)
        yield from _contrasts(product)
    for lines, needs in (
        ("row", [True, False, False]),
        ("col pair", [False, True, True]),
        ("pair", [False] * 2 + [True]),
    ):
        make = partial(_logsumexp_small_backward, torch.float32, 128, 256, True, False, lines, needs)
        name = f"logsumexp_scores_backward {lines} {needs}"
        yield Case(name, logsumexp.logsumexp_scores_backward, make, ("sweep_kernel", "gradients_kernel"))


def _slabs() -> Iterator[Case]:
    """Dense losses of more bf16 scores; ragged ones have neither rows nor channels on 16 bytes."""
    for name, n, d, learned in (("", 1024, 512, False), (" learnable ragged", 1025, 200, True)):
        launcher: Callable = logsumexp.logsumexp_scores
        make = partial(_logsumexp_small, torch.bfloat16, n, d, learned)
        yield Case("logsumexp_scores slabs" + name, launcher, make, ("sweep_kernel", "merge_logs_kernel"), "bf16")
        launcher, needs = logsumexp.logsumexp_scores_backward, [True, True, learned]
        make = partial(_logsumexp_small_backward, torch.bfloat16, n, d, learned, False, "row col pair", needs)
        yield Case("logsumexp_scores_backward slabs" + name, launcher, make, ("sweep_kernel",), "bf16")
        for of, sides in ((("softplus", "negate", False), "ab"), (("hinge", "exclude", False), "none")):
            make = partial(_total, torch.bfloat16, n, d, of, learned, sides)
            yield Case(f"score_total slabs {of[0]} {sides}{name}", sums.score_total, make, ("sweep_kernel",), "bf16")


def _rows_call(dtype: torch.dtype, n: int, d: int, of: tuple, learned: bool, sides: str) -> tuple:
    *given, _, needs = _total(dtype, n, d, of, learned, sides)
    return *given, torch.zeros(n) if of[2] and learned else None, needs


def _rows_forward(*options: Any) -> tuple:
    return _rows_call(*options)[:-1]


def _rows_backward(dtype: torch.dtype, n: int, *options: Any) -> tuple:
    *given, _, needs = _rows_call(dtype, n, *options)
    return torch.zeros(n), *given, torch.zeros(n) if given[-1] else None, needs


def _rows_sums(product: str) -> Iterator[Case]:
    for name, n, d, of, learned, sides in (
        ("softplus negate", 128, 256, ("softplus", "negate", False), False, "ab"),
        ("softplus negate learnable ragged", 129, 200, ("softplus", "negate", False), True, "ab"),
        ("softplus negate of one side twice", 128, 256, ("softplus", "negate", False), True, "a"),
        ("hinge relative", 128, 256, ("hinge", "exclude", True), False, "ab"),
        ("hinge relative of known pairs ragged", 129, 200, ("hinge", "exclude", True), True, "ab"),
    ):
        given, kernels = (PRODUCTS[product][0], n, d, of, learned, sides), ("sweep_kernel", "merge_sums_kernel")
        launched = ("pair_scores_kernel", *kernels) if of[2] and not learned else kernels
        make, launcher = partial(_rows_forward, *given), cast(Callable, sums.score_rows)
        yield Case(f"score_rows {name}", launcher, make, launched, product)
        make, launcher = partial(_rows_backward, *given), sums.score_rows_backward
        yield Case(f"score_rows_backward {name}", launcher, make, ("sweep_kernel", "gradients_kernel"), product)


class _Contrast(NamedTuple):
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
        given, m = self.forward(dtype), self.n + (not self.twice)
        lines = zeros(self.n, self.n, m, m, *(self.n if self.ids else 0,) * 2)
        grad = torch.zeros(self.n if self.reduction == "none" else ())
        return grad, *given, *lines, [True, not self.twice, self.scaled]


def _contrasts(product: str) -> Iterator[Case]:
    for name, call in (
        ("", _Contrast(128, 256, False, False, 0.0, True, "mean")),
        (" learnable sum ragged", _Contrast(129, 200, True, False, 0.0, True, "sum")),
        (" learnable ids smoothed", _Contrast(128, 256, True, True, 0.1, True, "mean")),
        (" ids none ragged", _Contrast(129, 200, True, True, 0.0, True, "none")),
        (" rows smoothed", _Contrast(128, 256, True, False, 0.1, False, "mean")),
        (" of one side twice", _Contrast(128, 256, True, False, 0.0, True, "mean", True)),
    ):
        make, launcher = partial(call.forward, PRODUCTS[product][0]), cast(Callable, contrast.contrast)
        yield Case("contrast" + name, launcher, make, ("sweep_kernel", "merge_info_nce_kernel"), product)
        make, launcher = partial(call.backward, PRODUCTS[product][0]), contrast.contrast_backward
        yield Case("contrast_backward" + name, launcher, make, ("sweep_kernel", "gradients_kernel"), product)


R, K = 64, 1024  # rows of a chunk of scores, and those of its columns that have a bias


def _logsumexp(m: int) -> tuple:
    return torch.zeros(R, m), torch.ones(()), *zeros(R, R, m, m)


def _softmax(m: int, directions: str) -> tuple:
    (row, row_grad, along), (col, col_grad) = zeros(R, R, R), zeros(m, m)
    rows = (row, row, row_grad if directions != "columns" else None)
    cols = (col, col, col_grad if directions != "rows" else None)
    return torch.zeros(R, m), torch.ones(()), *rows, *cols, along


def _score_sums(m: int, kind: str, positives: str, columns: bool, weighted: bool, gradient: bool) -> tuple:
    row, col = zeros(R, K)
    terms = [row, row if weighted else None]
    terms += [col, col if weighted else None] if columns else [None, None]
    ids = [torch.zeros(size, dtype=torch.int64) if positives != "include" else None for size in (R, m)]
    out = torch.zeros(3, R), torch.zeros(2, K if columns else 0)
    return torch.zeros(R, m), torch.ones(()), *terms, *ids, 0, kind, positives, gradient, *out


def _relation(m: int, kind: str, gradient: bool) -> tuple:
    s = torch.zeros(R, m)
    return s, s, s, torch.ones(()), kind, gradient, torch.zeros(3, R)


def _passes() -> Iterator[Case]:
    """Over chunks of fp32 scores [R, M]; ragged ones have odd rows."""

    def case(name: str, make: Callable[[], tuple]) -> Case:
        of = name.partition(" ")[0]
        merge = ("merge_logs_kernel",) if of == "logsumexp_pass" else ()
        return Case(name, getattr(dense, of), make, (of.replace("_pass", "_kernel"), *merge))

    for m, ragged in ((4096, ""), (4099, " ragged")):
        yield case("logsumexp_pass" + ragged, partial(_logsumexp, m))
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
    dtype, call = torch.float32, _Contrast(1, 1, True, True, 0.1, True, "mean")
    relative = (dtype, 1, 1, ("hinge", "exclude", True), True, "ab")
    for launcher, make, kernels in (
        (contrast.contrast, partial(call.forward, dtype), ("sweep_kernel", "merge_info_nce_kernel")),
        (contrast.contrast_backward, partial(call.backward, dtype), ("sweep_kernel", "gradients_kernel")),
        (sums.score_rows_backward, partial(_rows_backward, *relative), ("sweep_kernel", "gradients_kernel")),
        (relations.relation_loss, partial(_relation_loss, dtype, 1, 1, "abs", True, True),
         ("relation_tile_kernel", "relation_loss_kernel")),
        (dense.logsumexp_pass, partial(_logsumexp, 1), ("logsumexp_kernel", "merge_logs_kernel")),
    ):  # fmt: skip
        yield Case(f"{launcher.__name__} of one", launcher, make, kernels)


def _told_apart(case: Case) -> bool:
    """Whether to compile a call: of TF32 and fp16, whose code is that of fp32 and bf16 but for a word, few are."""
    return case.product in ("ieee", "bf16") or "ragged" in case.name or " " not in case.name


DENSE_CASES = [*filter(_told_apart, _small()), *_slabs(), *_passes(), *_of_one()]
