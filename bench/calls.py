"""The one list of the launchers' calls: each line of the tile table, each dtype, and what launchers may leave out.

`bench/lowering.py` compiles them ahead of time, `bench/sanitize.py` runs them on a card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from bench.case import PRODUCTS, Case, zeros
from bench.dense_calls import DENSE_CASES
from gssf_kernels import plan
from gssf_kernels.kernels import (
    batch_hard,
    goal,
    hardest,
    pairs,
    positives,
    project,
    relative,
    relative_goal,
    terms,
)


def _sweep(launcher: Any, dtype: torch.dtype, n: int, d: int, ids: str, *rest: Any, twice: bool = False) -> tuple:
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
    """The launcher of hardest negatives takes this way from `plan.CERTIFIED` on."""
    kernels = ("round_kernel", "sweep_kernel", "rescore_kernel", "exact_pairs_kernel")
    n = math.isqrt(plan.CERTIFIED - 1) + 1
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
    return (*zeros(40, 40, 40), index, index, a, a, needs)


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
    return torch.zeros(n if reduction == "none" else ()), *zeros(n, n), place, place, x, *options


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
    return (*zeros(n, n, n + 7), *options)


def _goal_backward(n: int, options: tuple) -> tuple:
    return torch.zeros(n if options[-1] == "none" else ()), *_goal(n, options)


def _hinge(n: int, reduction: str) -> tuple:
    return (*zeros(n, n, n + 7), 0.2, reduction)


def _hinge_backward(n: int, reduction: str) -> tuple:
    return torch.zeros(n if reduction == "none" else ()), *_hinge(n, reduction)


def _contrast(n: int, sides: str, reduction: str) -> tuple:
    cols: list = zeros(n + 7, n + 7, n) if sides != "rows" else [None] * 3
    return (*zeros(n, n, n), *cols[:2], cols[2] if sides == "both" else None, reduction)


def _contrast_backward(n: int, sides: str, reduction: str) -> tuple:
    grad, row = torch.zeros(n if reduction == "none" else ()), torch.zeros(n)
    return grad, row, torch.zeros(n + 7) if sides != "rows" else None, sides == "one target", reduction


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

    def project(self, dtype: torch.dtype, n: int = 80, most: int = 1024) -> tuple:
        d = most // self.block * self.block
        return (
            torch.zeros(n, d, dtype=dtype),
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

    def pairs_project_backward(self, dtype: torch.dtype, n: int = 80, most: int = 1024) -> tuple:
        x, *rest = self.project(dtype, n, most)
        index = torch.zeros(n, dtype=torch.int64)
        return torch.zeros(n), index, index, x, x, *rest, [True] * 3

    def hardest_project_backward(self, dtype: torch.dtype, n: int = 80, most: int = 1024) -> tuple:
        x, *rest = self.project(dtype, n, most)
        index = torch.zeros(n, dtype=torch.int64)
        return (*zeros(n, n, n), index, index, x, x, *rest, [True] * 4)


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


def _of_one() -> Iterator[Case]:
    """One row of one channel: Triton compiles the number 1 in, which then has none of a tensor's methods."""
    dtype, off, metric = torch.float32, "off 16 bytes", _Weights(1, True, True, True, True)
    options = ("nca", "sig_ms", 1.0, 2.0, 10.0, 0.5, 0.1, 0.1, "mean")
    certified = ("round_kernel", "sweep_kernel", "rescore_kernel", "exact_pairs_kernel")
    n = math.isqrt(plan.CERTIFIED - 1) + 1
    for launcher, make, kernels in (
        (hardest.hardest_negatives, partial(_sweep, hardest.hardest_negatives, dtype, n, 1, off), certified),
        (relative.relative_negatives, partial(_sweep, hardest.hardest_negatives, dtype, 1, 1, off, torch.ones(()), 2.0),
         ("sweep_kernel", "merge_kernel", "terms_kernel")),
        (relative_goal.relative_goal, partial(_sweep, hardest.hardest_negatives, dtype, 1, 1, off, *options),
         ("sweep_kernel", "relative_goal_kernel")),
        (batch_hard.batch_hard_backward, partial(_batch_hard_backward, dtype, 1, 1, "none"), ("batch_scan_kernel",)),
        (positives.hardest_positives, partial(_labelled, dtype, 1, 1), ("positives_kernel",)),
        (pairs.pair_scores, partial(_pair_forward, dtype, 1), ("pair_scores_kernel",)),
        (project.pairs_project_backward, partial(metric.pairs_project_backward, dtype, 1, 1),
         ("segment_sum_kernel", "project_kernel", "parameter_kernel")),
        (project.hardest_project_backward, partial(metric.hardest_project_backward, dtype, 1, 1),
         ("scan_kernel", "sides_kernel")),
    ):  # fmt: skip
        yield Case(f"{launcher.__name__} of one", launcher, make, kernels)


CASES = [
    *_sweeps(),
    *_pairs(),
    *_hinges(),
    *_goals(),
    *_relative_goals(),
    *_batch_hards(),
    *_positives(),
    *_projections(),
    *_of_one(),
    *DENSE_CASES,
]
