"""The one list of the launchers' calls: each line of the tile table, each dtype, and what launchers may leave out.

`bench/lowering.py` compiles them ahead of time, `bench/sanitize.py` runs them on a card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from gssf_kernels.kernels import (
    batch_hard,
    contrast,
    dense,
    goal,
    hardest,
    logsumexp,
    pairs,
    positives,
    project,
    relations,
    relative,
    relative_goal,
    sums,
    terms,
    tiles,
)

# A product: dtype, and torch.get_float32_matmul_precision().
PRODUCTS = {
    "ieee": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}


class Case(NamedTuple):
    """One call of a launcher."""

    name: str
    launcher: Callable
    arguments: Callable[[], tuple]
    kernels: tuple[str, ...]  # what it launches
    product: str = "ieee"

    def __str__(self) -> str:
        return f"{self.name} {self.product}".replace(" ", "-")


def _sweep(launcher: Callable, dtype: torch.dtype, n: int, d: int, ids: str, *rest: Any, twice: bool = False) -> tuple:
    x = torch.zeros(n, d, dtype=dtype)
    y = x if twice else x.clone()  # one side twice leaves tiles out
    first = int(ids == "off 16 bytes")
    labels = torch.zeros(n + first, dtype=torch.int64)[first:] if ids else None
    return (x, y, labels, labels, *rest)


def _sweeps() -> Iterator[Case]:
    """N, D of a problem of each size; ragged ones have neither rows, channels nor ids on 16 bytes."""
    sizes = {"small": (128, 256), "narrow": (1040, 256), "wide": (1040, 1024)}
    ragged = {"small": (129, 200), "narrow": (1041, 200), "wide": (1041, 1000)}
    aligned = "on 16 bytes"
    for product, (dtype, _) in PRODUCTS.items():
        launcher: Callable = hardest.hardest_negatives
        kernels: tuple[str, ...] = ("sweep_kernel", "merge_kernel")
        for size, shape in sizes.items():
            for ids in ("", aligned):
                make = partial(_sweep, launcher, dtype, *shape, ids)
                yield Case(f"hardest_negatives {size}{' with ids' if ids else ''}", launcher, make, kernels, product)
            make = partial(_sweep, launcher, dtype, *shape, aligned, twice=True)
            yield Case(f"hardest_negatives {size} of one side twice", launcher, make, kernels, product)
            make = partial(_sweep, launcher, dtype, *ragged[size], "off 16 bytes")
            yield Case(f"hardest_negatives {size} with ids ragged", launcher, make, kernels, product)
        for name, shape, labels, reduction in (
            ("sum", sizes["small"], "", "sum"),
            ("mean with ids", sizes["small"], aligned, "mean"),
            ("none with ids ragged", ragged["small"], "off 16 bytes", "none"),
        ):
            make = partial(_sweep, launcher, dtype, *shape, labels, 0.2, reduction)
            kernels = ("sweep_kernel", "merge_hinge_kernel")
            yield Case(f"hardest_hinge {name}", hardest.hardest_hinge, make, kernels, product)
        if product == "ieee":
            yield from _certified(aligned)
        launcher, kernels = relative.relative_negatives, ("sweep_kernel", "merge_kernel", "terms_kernel")
        for size, ids, beta in (
            ("small", aligned, None),
            ("small", "", 10.0),
            ("wide", aligned, None),
            ("wide", aligned, 10.0),
            ("wide", "", None),
            ("wide", "", 10.0),
            ("wide", "off 16 bytes", 10.0),
        ):
            shape = ragged[size] if ids == "off 16 bytes" else sizes[size]
            make = partial(_sweep, launcher, dtype, *shape, ids, torch.tensor(0.1), beta)
            words = (size, "with ids" if ids else "", "ragged" if shape is ragged[size] else "", f"beta={beta}")
            yield Case(f"relative_negatives {' '.join(filter(None, words))}", launcher, make, kernels, product)


def _certified(aligned: str) -> Iterator[Case]:
    """The launcher of hardest negatives takes this way from `tiles.CERTIFIED_SCORES` on."""
    kernels = ("round_kernel", "sweep_kernel", "rescore_kernel", "exact_pairs_kernel")
    n = math.isqrt(tiles.CERTIFIED_SCORES - 1) + 1
    for size, d in (("narrow", 256), ("wide", 1024)):
        for words, shape, ids, twice in (
            ("", (n, d), "", False),
            (" with ids", (n, d), aligned, False),
            (" of one side twice", (n, d), aligned, True),
            (" with ids ragged", (n + 1, d - 23), "off 16 bytes", False),
        ):
            make = partial(_sweep, hardest.hardest_negatives, torch.float32, *shape, ids, twice=twice)
            yield Case(f"hardest_negatives certified {size}{words}", hardest.hardest_negatives, make, kernels)


def _pair_forward(dtype: torch.dtype, d: int) -> tuple:
    a, index = torch.zeros(40, d, dtype=dtype), torch.zeros(80, dtype=torch.int64)
    return a, a, index, index


def _pair_backward(dtype: torch.dtype, d: int) -> tuple:
    a, _, index, _ = _pair_forward(dtype, d)
    return torch.zeros(80), index, index, a, a, [True, True]


def _pairs() -> Iterator[Case]:
    for product in ("ieee", "bf16", "fp16"):
        for d in (100, 1024):
            sides = PRODUCTS[product][0], d
            forward, backward = partial(_pair_forward, *sides), partial(_pair_backward, *sides)
            yield Case(f"pair_scores D={d}", pairs.pair_scores, forward, ("pair_scores_kernel",), product)
            name, launcher = f"pair_scores_backward D={d}", pairs.pair_scores_backward
            yield Case(name, launcher, backward, ("segment_sum_kernel",), product)


def _hardest_backward(dtype: torch.dtype, d: int, needs: list[bool]) -> tuple:
    a, index = torch.zeros(40, d, dtype=dtype), torch.zeros(40, dtype=torch.int64)
    return (*_zeros(40, 40, 40), index, index, a, a, needs)


def _hinges() -> Iterator[Case]:
    """And the gradient of hardest negatives, which goes with them."""
    for product in ("ieee", "bf16", "fp16"):
        for d, needs in ((100, [True, True]), (1024, [True, True]), (1024, [True, False]), (1024, [False, True])):
            name = f"hardest_negatives_backward D={d}{'' if all(needs) else f' {needs}'}"
            make = partial(_hardest_backward, PRODUCTS[product][0], d, needs)
            yield Case(name, pairs.hardest_negatives_backward, make, ("scan_kernel",), product)
    for reduction in ("sum", "mean", "none"):
        n = 129 if reduction == "none" else 128
        lines = partial(_hinge, n, reduction)
        yield Case(f"hinge_terms {reduction}", terms.hinge_terms, lines, ("hinge_kernel",))
        lines, launcher = partial(_hinge_backward, n, reduction), cast(Callable, terms.hinge_terms_backward)
        yield Case(f"hinge_terms_backward {reduction}", launcher, lines, ("hinge_backward_kernel",))
        for sides in ("both", "one target", "rows"):
            lines = partial(_contrast, n, sides, reduction)
            yield Case(f"contrast_terms {reduction} {sides}", terms.contrast_terms, lines, ("contrast_kernel",))
            lines = partial(_contrast_backward, n, sides, reduction)
            name, launcher = f"contrast_terms_backward {reduction} {sides}", terms.contrast_terms_backward
            yield Case(name, launcher, lines, ("contrast_backward_kernel",))


def _batch_hards() -> Iterator[Case]:
    for product in ("ieee", "bf16", "fp16"):
        for reduction, n, d in (("sum", 128, 256), ("mean", 1024, 1024), ("none", 129, 200)):
            given = PRODUCTS[product][0], n, d, reduction
            make, launcher = partial(_batch_hard, *given), cast(Callable, batch_hard.batch_hard)
            kernels: tuple[str, ...] = ("sweep_kernel", "merge_batch_kernel")
            yield Case(f"batch_hard {reduction}", launcher, make, kernels, product)
            make, launcher = partial(_batch_hard_backward, *given), batch_hard.batch_hard_backward
            yield Case(f"batch_hard_backward {reduction}", launcher, make, ("batch_scan_kernel",), product)


def _batch_hard(dtype: torch.dtype, n: int, d: int, reduction: str) -> tuple:
    return torch.zeros(n, d, dtype=dtype), torch.zeros(n, dtype=torch.int64), 0.2, reduction


def _batch_hard_backward(dtype: torch.dtype, n: int, d: int, reduction: str) -> tuple:
    x, place, *options = _batch_hard(dtype, n, d, reduction)
    return torch.zeros(n if reduction == "none" else ()), *_zeros(n, n), place, place, x, *options


def _goals() -> Iterator[Case]:
    modes = [(triplet, pair, "sum") for triplet in ("con", "nca", "cir") for pair in ("con", "lin", "sig")]
    for triplet, pair, reduction in (*modes, ("nca", "con", "none"), ("cir", "sig", "mean")):
        n, name = 129 if reduction == "none" else 128, f"{triplet} {pair} {reduction}"
        options = (triplet, pair, 1.0, 2.0, 10.0, 0.5, reduction)
        make = partial(_goal, n, options)
        yield Case(f"goal_terms {name}", goal.goal_terms, make, ("goal_kernel",))
        make, launcher = partial(_goal_backward, n, options), cast(Callable, goal.goal_terms_backward)
        yield Case(f"goal_terms_backward {name}", launcher, make, ("goal_backward_kernel",))
        given = (goal.hardest_goal, torch.float32, n, 256, "on 16 bytes", *options)
        make, kernels = partial(_sweep, *given), ("sweep_kernel", "merge_goal_kernel")
        yield Case(f"hardest_goal {name}", goal.hardest_goal, make, kernels)


def _relative_goals() -> Iterator[Case]:
    """GOAL with relative terms of small problems; ragged ones have neither rows, channels nor ids on 16 bytes."""
    kernels: tuple[str, ...] = ("sweep_kernel", "relative_goal_kernel")
    for product, (dtype, _) in PRODUCTS.items():
        for triplet, pair, reduction, shape, ids in (
            ("nca", "lin_ms", "sum", (128, 256), ""),
            ("con", "sig_ms", "mean", (128, 256), "on 16 bytes"),
            ("cir", "sig_ms", "none", (129, 200), "off 16 bytes"),
        ):
            launcher: Callable = relative_goal.relative_goal
            options = (triplet, pair, 1.0, 2.0, 10.0, 0.5, 0.1, 0.1, reduction)
            words = (triplet, pair, reduction, "with ids" if ids else "", "ragged" if shape[0] % 16 else "")
            make = partial(_sweep, launcher, dtype, *shape, ids, *options)
            yield Case(f"relative_goal {' '.join(filter(None, words))}", launcher, make, kernels, product)
    for reduction in ("sum", "mean", "none"):
        grad = (129,) if reduction == "none" else ()
        launcher, kernels = relative_goal.relative_goal_backward, ("relative_goal_backward_kernel",)
        make = partial(_relative_goal_backward, grad, reduction)
        yield Case(f"relative_goal_backward {reduction} ragged", launcher, make, kernels)


def _relative_goal_backward(grad: tuple[int, ...], reduction: str) -> tuple:
    return torch.zeros(grad), torch.zeros(4, 129), 136, reduction


def _goal(n: int, options: tuple) -> tuple:
    return (*_zeros(n, n, n + 7), *options)


def _goal_backward(n: int, options: tuple) -> tuple:
    return torch.zeros(n if options[-1] == "none" else ()), *_goal(n, options)


def _hinge(n: int, reduction: str) -> tuple:
    return (*_zeros(n, n, n + 7), 0.2, reduction)


def _hinge_backward(n: int, reduction: str) -> tuple:
    return torch.zeros(n if reduction == "none" else ()), *_hinge(n, reduction)


def _contrast(n: int, sides: str, reduction: str) -> tuple:
    cols: list = _zeros(n + 7, n + 7, n) if sides != "rows" else [None] * 3
    return (*_zeros(n, n, n), *cols[:2], cols[2] if sides == "both" else None, reduction)


def _contrast_backward(n: int, sides: str, reduction: str) -> tuple:
    grad, row = torch.zeros(n if reduction == "none" else ()), torch.zeros(n)
    return grad, row, torch.zeros(n + 7) if sides != "rows" else None, sides == "one target", reduction


def _logsumexp_small(dtype: torch.dtype, n: int, d: int, scaled: bool, twice: bool = False) -> tuple:
    a, b = torch.zeros(n, d, dtype=dtype), None if twice else torch.zeros(n + 1, d, dtype=dtype)
    return a, b, torch.ones(()) if scaled else None, 2.0


def _logsumexp_small_backward(
    dtype: torch.dtype, n: int, d: int, scaled: bool, twice: bool, lines: str, needs: list[bool]
) -> tuple:
    a, b, *scale = _logsumexp_small(dtype, n, d, scaled, twice)
    m = n + (b is not None)
    grads = [torch.zeros(size) if name in lines.split() else None for name, size in zip(LINES, (n, m, n), strict=True)]
    return (*grads, a, b, *scale, *_zeros(n, n, m, m), needs)


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
            yield Case("logsumexp_scores" + name, launcher, make, ("sweep_kernel", "log_lines_kernel"), product)
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
        yield Case("logsumexp_scores slabs" + name, launcher, make, ("sweep_kernel", "log_lines_kernel"), "bf16")
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
        given, kernels = (PRODUCTS[product][0], n, d, of, learned, sides), ("sweep_kernel", "line_sums_kernel")
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
        lines = _zeros(self.n, self.n, m, m, *(self.n if self.ids else 0,) * 2)
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
        yield Case("contrast" + name, launcher, make, ("sweep_kernel", "contrast_lines_kernel"), product)
        make, launcher = partial(call.backward, PRODUCTS[product][0]), contrast.contrast_backward
        yield Case("contrast_backward" + name, launcher, make, ("sweep_kernel", "gradients_kernel"), product)


def _labelled(dtype: torch.dtype, n: int, d: int) -> tuple:
    return torch.zeros(n, d, dtype=dtype), torch.zeros(n, dtype=torch.int64)


def _positives() -> Iterator[Case]:
    for product in ("ieee", "bf16", "fp16"):
        for n, d in ((128, 256), (129, 100)):
            make = partial(_labelled, PRODUCTS[product][0], n, d)
            name, launcher = f"hardest_positives D={d}", positives.hardest_positives
            yield Case(name, launcher, make, ("positives_kernel",), product)


class _Weights(NamedTuple):
    """What a projection has of them."""

    block: int
    permuted: bool
    normalize: bool
    diag: bool
    blocks: bool

    def project(self, dtype: torch.dtype) -> tuple:
        d = 1024 // self.block * self.block
        return (
            torch.zeros(80, d, dtype=dtype),
            torch.zeros(d, dtype=dtype) if self.diag else None,
            torch.zeros(d // self.block, self.block, self.block, dtype=dtype) if self.blocks else None,
            torch.arange(d) if self.permuted else None,
            self.normalize,
        )

    def project_backward(self, dtype: torch.dtype) -> tuple:
        x, *rest = self.project(dtype)
        return x, x, *rest, [True] * 3

    def project_sides(self, dtype: torch.dtype) -> tuple:
        x, *weights, _ = self.project(dtype)
        return x, torch.cat((x, x)), *weights

    def project_sides_with_pairs(self, dtype: torch.dtype) -> tuple:
        return *self.project_sides(dtype), self.normalize, True

    def project_sides_backward(self, dtype: torch.dtype) -> tuple:
        x, y, *weights = self.project_sides(dtype)
        return x, y, torch.zeros(len(x)), x, y, *weights, self.normalize, [True] * 4

    def project_sides_backward_twice(self, dtype: torch.dtype) -> tuple:
        dp, _, norm, x, _, *rest = self.project_sides_backward(dtype)
        return dp, dp, norm, x, None, *rest

    def pairs_project_backward(self, dtype: torch.dtype) -> tuple:
        x, *rest = self.project(dtype)
        index = torch.zeros(80, dtype=torch.int64)
        return torch.zeros(80), index, index, x, x, *rest, [True] * 3

    def hardest_project_backward(self, dtype: torch.dtype) -> tuple:
        x, *rest = self.project(dtype)
        index = torch.zeros(80, dtype=torch.int64)
        return (*_zeros(80, 80, 80), index, index, x, x, *rest, [True] * 4)


def _projections() -> Iterator[Case]:
    variants = {
        "b=3": _Weights(3, True, True, True, True),
        "b=16": _Weights(16, False, True, True, True),
        "b=1024": _Weights(1024, True, True, True, True),
        "blocks alone": _Weights(32, True, False, False, True),
        "diag alone": _Weights(1, False, True, True, False),
        "no weights": _Weights(1, False, True, False, False),
    }
    for product, (dtype, _) in PRODUCTS.items():
        for name, weights in variants.items():
            whole = weights.diag and weights.blocks
            if product == "tf32" and not whole:
                continue  # only the products tell it from ieee
            kernels: tuple[str, ...] = ("project_kernel",)
            yield Case(f"project {name}", project.project, partial(weights.project, dtype), kernels, product)
            kernels += ("parameter_kernel",) if weights.diag or weights.blocks else ()
            make, launcher = partial(weights.project_backward, dtype), cast(Callable, project.project_backward)
            yield Case(f"project_backward {name}", launcher, make, kernels, product)
            make, launcher = partial(weights.hardest_project_backward, dtype), project.hardest_project_backward
            yield Case(f"hardest_project_backward {name}", launcher, make, ("scan_kernel", "sides_kernel"), product)
            make, launcher = partial(weights.project_sides, dtype), cast(Callable, project.project_sides)
            if weights.normalize:
                yield Case(f"project_sides {name}", launcher, make, ("sides_kernel",), product)
            make = partial(weights.project_sides_with_pairs, dtype)
            yield Case(f"project_sides with pairs {name}", launcher, make, ("sides_kernel",), product)
            make, launcher = partial(weights.project_sides_backward, dtype), project.project_sides_backward
            yield Case(f"project_sides_backward {name}", launcher, make, ("sides_kernel",), product)
            if weights.normalize:
                make = partial(weights.project_sides_backward_twice, dtype)
                yield Case(f"project_sides_backward twice {name}", launcher, make, ("sides_kernel",), product)
            if whole:  # what is gathered is fp32, whatever x is
                kernels += ("segment_sum_kernel",)
                make, launcher = partial(weights.pairs_project_backward, dtype), project.pairs_project_backward
                yield Case(f"pairs_project_backward {name}", launcher, make, kernels, product)


R, K = 64, 1024  # rows of a chunk of scores, and those of its columns that have a bias


def _zeros(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(size) for size in sizes]


def _logsumexp(m: int) -> tuple:
    return torch.zeros(R, m), torch.ones(()), *_zeros(R, R, m, m)


def _softmax(m: int, directions: str) -> tuple:
    (row, row_grad, along), (col, col_grad) = _zeros(R, R, R), _zeros(m, m)
    rows = (row, row, row_grad if directions != "columns" else None)
    cols = (col, col, col_grad if directions != "rows" else None)
    return torch.zeros(R, m), torch.ones(()), *rows, *cols, along


def _score_sums(m: int, kind: str, positives: str, columns: bool, weighted: bool, gradient: bool) -> tuple:
    row, col = _zeros(R, K)
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


CASES = [
    *_sweeps(),
    *_pairs(),
    *_hinges(),
    *_goals(),
    *_relative_goals(),
    *_batch_hards(),
    *_positives(),
    *_projections(),
    *_passes(),
    *_small(),
    *_slabs(),
]
