"""The one list of the launchers' calls: each line of the tile table, each dtype, and what launchers may leave out.

`bench/lowering.py` compiles them ahead of time, `bench/sanitize.py` runs them on a card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.case import PRODUCTS, Case, zeros
from bench.dense_calls import DENSE_CASES
from bench.retrieval_calls import RETRIEVAL_CASES
from gssf_kernels import plan
from gssf_kernels._library import OPS
from gssf_kernels.ops.negatives import Negatives


def _sweep(dtype: torch.dtype, n: int, d: int, ids: str, *rest: Any, twice: bool = False) -> tuple:
    x = torch.zeros(n, d, dtype=dtype)
    y = x if twice else x.clone()  # one side twice leaves tiles out
    first = int(ids == "off 16 bytes")
    labels = torch.zeros(n + first, dtype=torch.int64)[first:] if ids else None
    return (x, y, labels, labels, *rest)


GENERAL = ("by ids", "listed", "listed with ids, limits and no columns")


def _general(dtype: torch.dtype, n: int, d: int, kind: str, *rest: Any) -> tuple:
    """A sweep with pairs by id or listed ones."""
    x, y, a_ids, b_ids, *_ = _sweep(dtype, n, d, "on 16 bytes" if "ids" in kind else "")
    negatives = Negatives(paired=False)
    if "listed" in kind:
        negatives = negatives._replace(pair_starts=torch.arange(n + 1), pair_cols=torch.arange(n))
    if "no columns" in kind:
        negatives = negatives._replace(columns=False, row_limit=torch.zeros(n))
    if "several limits" in kind:
        negatives = negatives._replace(row_limit=torch.zeros(3, n), col_limit=torch.zeros(3, n))
    return (x, y, a_ids, b_ids, *(rest or ("",)), *negatives)


def _edges(dtype: torch.dtype, n: int, d: int, limits: bool) -> tuple:
    """Edges of a graph of two nodes for each modality."""
    nodes, ids = torch.zeros(4, n, d, dtype=dtype), torch.zeros(n, dtype=torch.int64)
    edges = torch.triu_indices(4, 4, 1).T.contiguous()
    limit = torch.zeros(len(edges), n) if limits else None
    return (nodes, nodes, ids, ids, "", True, True, None, None, limit, limit, edges)


def _sweeps() -> Iterator[Case]:
    """N, D of a problem of each size; ragged ones have neither rows, channels nor ids on 16 bytes."""
    sizes = {"small": (128, 256), "narrow": (1040, 256), "wide": (1040, 1024)}
    ragged = {"small": (129, 200), "narrow": (1041, 200), "wide": (1041, 1000)}
    aligned = "on 16 bytes"
    for product, (dtype, _) in PRODUCTS.items():
        launcher: Callable = OPS["hardest_negatives"].on_cuda
        kernels: tuple[str, ...] = ("sweep_kernel", "merge_kernel")
        for size, shape in sizes.items():
            for ids in ("", aligned):
                make = partial(_sweep, dtype, *shape, ids)
                yield Case(f"hardest_negatives {size}{' with ids' if ids else ''}", launcher, make, kernels, product)
            make = partial(_sweep, dtype, *shape, aligned, twice=True)
            yield Case(f"hardest_negatives {size} of one side twice", launcher, make, kernels, product)
            make = partial(_sweep, dtype, *ragged[size], "off 16 bytes")
            yield Case(f"hardest_negatives {size} with ids ragged", launcher, make, kernels, product)
        for name, shape, labels, reduction in (
            ("sum", sizes["small"], "", "sum"),
            ("mean with ids", sizes["small"], aligned, "mean"),
            ("none with ids ragged", ragged["small"], "off 16 bytes", "none"),
        ):
            make = partial(_sweep, dtype, *shape, labels, "hinge", [0.2], reduction)
            of_terms = ("sweep_kernel", "merge_terms_kernel")
            yield Case(f"hardest_terms hinge {name}", OPS["hardest_terms"].on_cuda, make, of_terms, product)
        for kind in (*GENERAL, "listed with ids and several limits"):
            make = partial(_general, dtype, *sizes["wide"], kind)
            yield Case(f"hardest_negatives wide {kind}", launcher, make, kernels, product)
        for size in ("small", "wide"):
            for limits in (False, True):
                name = f"hardest_negatives of edges {size} with ids{' and limits' if limits else ''}"
                yield Case(name, launcher, partial(_edges, dtype, *sizes[size], limits), kernels, product)
        if product == "ieee":
            yield from _certified(aligned)
        launcher = OPS["relative_negatives"].on_cuda
        kernels = ("sweep_kernel", "merge_kernel", "relative_terms_kernel")
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
            make = partial(_sweep, dtype, *shape, ids, torch.tensor(0.1), beta)
            words = (size, "with ids" if ids else "", "ragged" if shape is ragged[size] else "", f"beta={beta}")
            yield Case(f"relative_negatives {' '.join(filter(None, words))}", launcher, make, kernels, product)
        for kind in GENERAL:
            make = partial(_general, dtype, *sizes["wide"], kind, torch.tensor(0.1), 10.0)
            yield Case(f"relative_negatives wide {kind}", launcher, make, kernels, product)


def _certified(aligned: str) -> Iterator[Case]:
    """The route of fp32 from `plan.CERTIFIED` scores on."""
    kernels = ("round_kernel", "sweep_kernel", "rescore_kernel", "exact_positives_kernel")
    n = math.isqrt(plan.CERTIFIED - 1) + 1
    for size, d in (("narrow", 256), ("wide", 1024)):
        for words, shape, ids, twice in (
            ("", (n, d), "", False),
            (" with ids", (n, d), aligned, False),
            (" of one side twice", (n, d), aligned, True),
            (" with ids ragged", (n + 1, d - 23), "off 16 bytes", False),
        ):
            make = partial(_sweep, torch.float32, *shape, ids, twice=twice)
            yield Case(f"hardest_negatives certified {size}{words}", OPS["hardest_negatives"].on_cuda, make, kernels)


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
            launcher: Callable = OPS["pair_scores"].on_cuda
            yield Case(f"pair_scores D={d}", launcher, forward, ("pair_scores_kernel",), product)
            launcher = OPS["pair_scores_backward"].on_cuda
            yield Case(f"pair_scores_backward D={d}", launcher, backward, ("segment_sum_kernel",), product)


def _hardest_backward(dtype: torch.dtype, d: int, needs: list[bool]) -> tuple:
    a, index = torch.zeros(40, d, dtype=dtype), torch.zeros(40, dtype=torch.int64)
    return (*zeros(40, 40, 40), index, index, a, a, None, None, None, False, [*needs, False, False])


def _terms() -> Iterator[Case]:
    """Of every formula; and the gradient of hardest negatives, which follows."""
    for product in ("ieee", "bf16", "fp16"):
        for d, needs in ((100, [True, True]), (1024, [True, True]), (1024, [True, False]), (1024, [False, True])):
            name = f"hardest_negatives_backward D={d}{'' if all(needs) else f' {needs}'}"
            make = partial(_hardest_backward, PRODUCTS[product][0], d, needs)
            yield Case(name, OPS["hardest_negatives_backward"].on_cuda, make, ("scan_kernel",), product)
    goals = [f"goal {triplet} {pair}" for triplet in ("con", "nca", "cir") for pair in ("con", "lin", "sig")]
    every = [(formula, "sum") for formula in goals]
    every += [("goal nca con", "none"), ("goal cir sig", "mean")]
    every += [(formula, reduction) for reduction in ("sum", "mean", "none") for formula in ("hinge", *INFO_NCE)]
    for formula, reduction in every:
        call = formula.partition(",")[0], _statistics(formula, reduction), _constants(formula), reduction
        kernels: tuple[str, ...] = ("anchor_terms_kernel",)
        yield Case(f"anchor_terms {formula} {reduction}", OPS["anchor_terms"].on_cuda, partial(tuple, call), kernels)
    for formula, reduction in (*every, *(("weights", reduction) for reduction in ("sum", "mean", "none"))):
        grad = torch.zeros(_anchors(reduction) if reduction == "none" else ())
        call = formula.partition(",")[0], _statistics(formula, reduction), _constants(formula), reduction
        make, kernels = partial(tuple, (grad, *call)), ("anchor_terms_backward_kernel",)
        yield Case(f"anchor_terms_backward {formula} {reduction}", OPS["anchor_terms_backward"].on_cuda, make, kernels)
    for formula, reduction in every:
        if formula.startswith("goal"):
            options = (formula, _constants(formula), reduction)
            make = partial(_sweep, torch.float32, _anchors(reduction), 256, "on 16 bytes", *options)
            name, launcher = f"hardest_terms {formula} {reduction}", OPS["hardest_terms"].on_cuda
            yield Case(name, launcher, make, ("sweep_kernel", "merge_terms_kernel"))


INFO_NCE = ("info_nce, both targets", "info_nce, one target", "info_nce, rows")


def _anchors(reduction: str) -> int:
    return 129 if reduction == "none" else 128


def _constants(formula: str) -> list[float]:
    return [1.0, 2.0, 10.0, 0.5] if formula.startswith("goal") else [0.2] if formula == "hinge" else []


def _statistics(formula: str, reduction: str) -> list[torch.Tensor | None]:
    n = _anchors(reduction)
    if formula == "weights":
        return [torch.zeros(4, n), torch.zeros(n + 7)]
    if not formula.startswith("info_nce"):
        return [*zeros(n, n, n + 7)]
    rows, cols = zeros(n, n, n), zeros(n + 7, n + 7, n)
    shown = {"info_nce, both targets": 3, "info_nce, one target": 2, "info_nce, rows": 0}[formula]
    return [*rows, *cols[:shown], *[None] * (3 - shown)]


def _batch_hards() -> Iterator[Case]:
    for product in ("ieee", "bf16", "fp16"):
        for reduction, n, d in (("sum", 128, 256), ("mean", 1024, 1024), ("none", 129, 200)):
            problem = PRODUCTS[product][0], n, d, reduction
            make, launcher = partial(_batch_hard, *problem), OPS["batch_hard"].on_cuda
            kernels: tuple[str, ...] = ("sweep_kernel", "merge_terms_kernel")
            yield Case(f"batch_hard {reduction}", launcher, make, kernels, product)
            make, launcher = partial(_batch_hard_backward, *problem), OPS["batch_hard_backward"].on_cuda
            yield Case(f"batch_hard_backward {reduction}", launcher, make, ("batch_scan_kernel",), product)


def _batch_hard(dtype: torch.dtype, n: int, d: int, reduction: str) -> tuple:
    return torch.zeros(n, d, dtype=dtype), torch.zeros(n, dtype=torch.int64), 0.2, reduction


def _batch_hard_backward(dtype: torch.dtype, n: int, d: int, reduction: str) -> tuple:
    x, place, *options = _batch_hard(dtype, n, d, reduction)
    return torch.zeros(n if reduction == "none" else ()), *zeros(n, n), place, place, x, *options


def _relative_goals() -> Iterator[Case]:
    """GOAL with relative terms of small problems; ragged ones have neither rows, channels nor ids on 16 bytes."""
    kernels: tuple[str, ...] = ("sweep_kernel", "relative_goal_kernel")
    for product, (dtype, _) in PRODUCTS.items():
        for triplet, pair, reduction, shape, ids in (
            ("nca", "lin_ms", "sum", (128, 256), ""),
            ("con", "sig_ms", "mean", (128, 256), "on 16 bytes"),
            ("cir", "sig_ms", "none", (129, 200), "off 16 bytes"),
        ):
            options = (f"goal {triplet} {pair}", [1.0, 2.0, 10.0, 0.5, 0.1, 0.1], reduction)
            words = (triplet, pair, reduction, "with ids" if ids else "", "ragged" if shape[0] % 16 else "")
            make = partial(_sweep, dtype, *shape, ids, *options)
            name, launcher = f"hardest_terms {' '.join(filter(None, words))}", OPS["hardest_terms"].on_cuda
            yield Case(name, launcher, make, kernels, product)


def _labelled(dtype: torch.dtype, n: int, d: int) -> tuple:
    return torch.zeros(n, d, dtype=dtype), torch.zeros(n, dtype=torch.int64)


def _positives() -> Iterator[Case]:
    for product in ("ieee", "bf16", "fp16"):
        for n, d in ((128, 256), (129, 100)):
            make = partial(_labelled, PRODUCTS[product][0], n, d)
            name, launcher = f"hardest_positives D={d}", OPS["hardest_positives"].on_cuda
            yield Case(name, launcher, make, ("positives_kernel",), product)


def _fragments(dtype: torch.dtype, t: int, d: int, masks: bool) -> tuple:
    a, b = torch.zeros(40, 36, d, dtype=dtype), torch.zeros(24, t, d, dtype=dtype)
    of = (t.new_zeros(t.shape[:2], dtype=torch.bool) if masks else None for t in (a, b))
    return a, b, *of, masks  # with masks it is a mean


def _fragments_backward(dtype: torch.dtype, t: int, d: int, masks: bool, stored: bool) -> tuple:
    a, b, *rest = _fragments(dtype, t, d, masks)
    index = torch.zeros(40, 24, t, dtype=torch.int16) if stored else None
    return torch.zeros(40, 24), index, a, b, *rest, [True, True]


def _late_interactions() -> Iterator[Case]:
    """Of few words, several captions to a tile; of many, several tiles to a caption."""
    for product, (dtype, _) in PRODUCTS.items():
        for t, d, masks in ((20, 200, True), (32, 256, False), (300, 512, True)):
            name, problem = f"T={t} D={d}{' with masks' if masks else ''}", (dtype, t, d, masks)
            for keep in (True, False):
                launcher: Callable = OPS["late_interaction"].on_cuda
                make = partial(lambda keep, *problem: (*_fragments(*problem), keep), keep, *problem)
                words = f"late_interaction {name}{' kept' if keep else ''}"
                yield Case(words, launcher, make, ("late_interaction_kernel",), product)
            for stored in (True, False):
                launcher = OPS["late_interaction_backward"].on_cuda
                make = partial(_fragments_backward, *problem, stored)
                words = f"late_interaction_backward {name}{' stored' if stored else ''}"
                yield Case(words, launcher, make, ("regions_gradient_kernel", "words_gradient_kernel"), product)


class _Weights(NamedTuple):
    """What a projection has of them."""

    block: int
    permuted: bool
    normalize: bool
    diag: bool
    blocks: bool

    def weights(self, dtype: torch.dtype, d: int) -> tuple:
        return (
            torch.zeros(d, dtype=dtype) if self.diag else None,
            torch.zeros(d // self.block, self.block, self.block, dtype=dtype) if self.blocks else None,
            torch.arange(d) if self.permuted else None,
            self.normalize,
        )

    def x(self, dtype: torch.dtype, n: int = 80, most: int = 1024) -> torch.Tensor:
        return torch.zeros(n, most // self.block * self.block, dtype=dtype)

    def one_side(self, dtype: torch.dtype) -> tuple:
        x = self.x(dtype)
        return x, None, *self.weights(dtype, x.shape[1])

    def one_side_backward(self, dtype: torch.dtype) -> tuple:
        x = self.x(dtype)
        return x, None, x.new_zeros(0), x, None, *self.weights(dtype, x.shape[1]), [True, False, True, True]

    def sides(self, dtype: torch.dtype, pairs: bool = False) -> tuple:
        x = self.x(dtype)
        return x, torch.cat((x, x)), *self.weights(dtype, x.shape[1]), pairs

    def sides_backward(self, dtype: torch.dtype) -> tuple:
        x, y, *weights, _ = self.sides(dtype)
        return x, y, torch.zeros(len(x)), x, y, *weights, [True] * 4

    def sides_backward_twice(self, dtype: torch.dtype) -> tuple:
        dp, _, norm, x, _, *rest = self.sides_backward(dtype)
        return dp, dp, norm, x, None, *rest

    def hardest_backward(self, dtype: torch.dtype, n: int = 80, most: int = 1024) -> tuple:
        x = self.x(dtype, n, most)
        index = torch.zeros(n, dtype=torch.int64)
        return (*zeros(n, n, n), index, index, x, x, *self.weights(dtype, x.shape[1]), [True] * 4)


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
            of = {op: OPS[op].on_cuda for op in ("project", "project_backward", "hardest_negatives_backward")}
            launcher, back, of_scores = of.values()
            kernels: tuple[str, ...] = ("project_kernel",)
            yield Case(f"project {name}", launcher, partial(weights.one_side, dtype), kernels, product)
            kernels += ("parameter_kernel",) if weights.diag or weights.blocks else ()
            yield Case(f"project_backward {name}", back, partial(weights.one_side_backward, dtype), kernels, product)
            make = partial(weights.hardest_backward, dtype)
            yield Case(f"hardest_negatives_backward {name}", of_scores, make, ("scan_kernel", "sides_kernel"), product)
            kernels = ("sides_kernel",)
            if weights.normalize:
                yield Case(f"project of sides {name}", launcher, partial(weights.sides, dtype), kernels, product)
            make = partial(weights.sides, dtype, True)
            yield Case(f"project of sides with pairs {name}", launcher, make, kernels, product)
            yield Case(
                f"project_backward of sides {name}", back, partial(weights.sides_backward, dtype), kernels, product
            )
            if weights.normalize:
                make = partial(weights.sides_backward_twice, dtype)
                yield Case(f"project_backward of one side twice {name}", back, make, kernels, product)
            if whole:  # what is gathered is fp32, whatever x is
                kernels = ("segment_sum_kernel", "project_kernel", "parameter_kernel")
                make = partial(weights.hardest_backward, dtype, plan.SCAN_ROWS + 1)
                yield Case(f"hardest_negatives_backward of many {name}", of_scores, make, kernels, product)


def _of_one() -> Iterator[Case]:
    """One row of one channel: Triton compiles the number 1 in, which then has none of a tensor's methods."""
    dtype, off, metric = torch.float32, "off 16 bytes", _Weights(1, True, True, True, True)
    options = ("goal nca sig_ms", [1.0, 2.0, 10.0, 0.5, 0.1, 0.1], "mean")
    certified = ("round_kernel", "sweep_kernel", "rescore_kernel", "exact_positives_kernel")
    n = math.isqrt(plan.CERTIFIED - 1) + 1
    for op, make, kernels in (
        ("hardest_negatives", partial(_sweep, dtype, n, 1, off), certified),
        ("relative_negatives", partial(_sweep, dtype, 1, 1, off, torch.ones(()), 2.0),
         ("sweep_kernel", "merge_kernel", "relative_terms_kernel")),
        ("hardest_terms", partial(_sweep, dtype, 1, 1, off, *options), ("sweep_kernel", "relative_goal_kernel")),
        ("batch_hard_backward", partial(_batch_hard_backward, dtype, 1, 1, "none"), ("batch_scan_kernel",)),
        ("hardest_positives", partial(_labelled, dtype, 1, 1), ("positives_kernel",)),
        ("pair_scores", partial(_pair_forward, dtype, 1), ("pair_scores_kernel",)),
        ("hardest_negatives_backward", partial(metric.hardest_backward, dtype, 1, 1), ("scan_kernel", "sides_kernel")),
        ("hardest_negatives_backward", partial(metric.hardest_backward, dtype, plan.SCAN_ROWS + 1, 1),
         ("segment_sum_kernel", "project_kernel", "parameter_kernel")),
    ):  # fmt: skip
        many = " of many" if kernels[0] == "segment_sum_kernel" else ""
        yield Case(f"{op}{many} of one", OPS[op].on_cuda, make, kernels)


CASES = [
    *_sweeps(),
    *_pairs(),
    *_terms(),
    *_relative_goals(),
    *_batch_hards(),
    *_positives(),
    *_late_interactions(),
    *_projections(),
    *_of_one(),
    *DENSE_CASES,
    *RETRIEVAL_CASES,
]
