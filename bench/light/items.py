"""The one table of what is checked: op families × products × shapes × variants, and the inputs of each.

An op whose gradient follows a choice among scores (a hardest negative) gets whole numbers times a power of two: all
products and sums are exact, equal scores are many, and any other choice is wrong. The other ops get unit rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gssf_kernels as gk
from bench.case import PRODUCTS

# N, M, D: nothing on an edge of a tile; few channels, with whole tiles; many channels.
SHAPES = {"ragged": (129, 257, 40), "narrow": (4224, 4352, 320), "wide": (4224, 4352, 1040)}
REDUCED = 8  # by how much rows are divided where the CPU stands in for the card
BLOCK = 8  # of the metric's blocks; divides every D
SPREAD = 0.15  # standard deviation of scores of whole numbers, about
TWICE = "b = a"
BETWEEN = "two sides"
MASKED = "masks"
REGIONS, WORDS = 33, 17  # of a picture, of a caption


class Item(NamedTuple):
    """One call, forward and backward. Travels between processes as JSON."""

    family: str
    product: str  # of bench.case.PRODUCTS
    n: int
    m: int
    d: int
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.family} {self.product} {self.n}x{self.m}x{self.d} {self.variant}".rstrip()

    @property
    def dtype(self) -> torch.dtype:
        return PRODUCTS[self.product][0]

    @property
    def precision(self) -> str:
        """For torch.set_float32_matmul_precision."""
        return PRODUCTS[self.product][1]

    def fields(self) -> dict[str, Any]:
        """What it is, for those who read findings by machine."""
        dtype = str(self.dtype).removeprefix("torch.")
        shape = {"n": self.n, "m": self.m, "d": self.d}
        op = FAMILIES[self.family].function
        return {"op": op, "dtype": dtype, "precision": self.precision, **shape, "variant": self.variant}

    @property
    def exact(self) -> bool:
        """Whether every score is exact, so that every choice among them is determined."""
        return FAMILIES[self.family].exact

    def reduced(self) -> Item:
        """With fewer rows, where there are thousands."""
        if self.n < 1000:
            return self
        return self._replace(n=self.n // REDUCED + 1, m=self.m // REDUCED + 1)

    def inputs(self, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors with gradients, options); the same numbers on every device."""
        g = torch.Generator().manual_seed(0)
        tensors, options = FAMILIES[self.family].make(self, g)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        # Numbers (0-d) stay fp32, as parameters are.
        tensors = {k: t.to(device, self.dtype if t.dim() else torch.float32) for k, t in tensors.items()}
        return {k: t.requires_grad_() for k, t in tensors.items()}, options

    def run(self, module: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
        """The op's outputs by name; module: gssf_kernels or its reference."""
        tensors = dict(tensors)
        if self.variant == TWICE:
            first, second = ("a", "b") if "a" in tensors else ("x", "y")
            tensors[second] = tensors[first]
        function = FAMILIES[self.family].function
        if "diag" in tensors and function != "project":
            result = _with_metric(getattr(module, function), tensors, options)
        else:
            result = getattr(module, function)(**tensors, **options)
        if isinstance(result, Tensor):
            return {"output": result}
        names = getattr(result, "_fields", [f"output {k}" for k in range(len(result))])
        return dict(zip(names, result, strict=True))


class _Criterion(torch.nn.Module):
    """A loss with a metric whose weights `functional_call` can put in place of its own."""

    def __init__(self, loss: Callable, metric: torch.nn.Module) -> None:
        super().__init__()
        self.loss, self.metric = loss, metric

    def forward(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return self.loss(x, y, metric=self.metric, **options)


def _with_metric(loss: Callable, tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    x, y = tensors["x"], tensors["y"]
    metric = gk.StructuredSimilarity(x.shape[1], BLOCK, normalize=False, device=x.device, dtype=x.dtype)
    weights = {f"metric.{name}": tensors[name] for name in ("diag", "blocks")}
    return torch.func.functional_call(_Criterion(loss, metric), weights, (x, y), options)


def _whole(g: torch.Generator, n: int, d: int) -> Tensor:
    """[n, d] of -2 … 2 times a power of two, for scores of about SPREAD."""
    power = round(math.log2(2 * math.sqrt(d) / SPREAD) / 2)
    return torch.randint(-2, 3, (n, d), generator=g).float() * 2.0**-power


def _unit(g: torch.Generator, n: int, d: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)


def _labels(g: torch.Generator, n: int, groups: int) -> Tensor:
    return torch.randint(0, groups, (n,), generator=g)


def _sides(item: Item, g: torch.Generator, rows: Callable, names: tuple[str, str]) -> tuple[dict, dict]:
    """Both sides, or one for `b = a`; and their ids where the variant says so."""
    tensors = {names[0]: rows(g, item.n, item.d)}
    if item.variant != TWICE:
        tensors[names[1]] = rows(g, item.m, item.d)
    options = {}
    if item.variant == "ids":
        groups = item.n // 2
        options = {f"{names[0]}_ids": _labels(g, item.n, groups), f"{names[1]}_ids": _labels(g, item.m, groups)}
    return tensors, options


def _two_sided(rows: Callable, names: tuple[str, str] = ("x", "y"), **settings: Any) -> Callable:
    """A maker of inputs; of the settings, tensors get gradients."""

    def make(item: Item, g: torch.Generator) -> tuple[dict, dict]:
        tensors, options = _sides(item, g, rows, names)
        numbers = {k: torch.tensor(v) for k, v in settings.items() if k in LEARNED}
        return {**tensors, **numbers}, {**options, **{k: v for k, v in settings.items() if k not in LEARNED}}

    return make


LEARNED = ("scale", "bias", "lam", "tau")


def _metric(item: Item, g: torch.Generator) -> tuple[dict, dict]:
    """Weights of few bits: projected rows are exact in 16 bits too."""
    tensors, options = _sides(item, g, _whole, ("x", "y"))
    diag = 2.0 ** torch.randint(-1, 2, (item.d,), generator=g)
    blocks = torch.randint(-1, 2, (item.d // BLOCK, BLOCK, BLOCK), generator=g) / 4
    return {**tensors, "diag": diag, "blocks": blocks}, {**options, "margin": 0.25}


def _project(item: Item, g: torch.Generator) -> tuple[dict, dict]:
    x = torch.randn(item.n, item.d, generator=g)
    blocks = torch.randn(item.d // BLOCK, BLOCK, BLOCK, generator=g) / BLOCK**0.5
    options: dict[str, Any] = {"normalize": True}
    if item.variant == "permuted":
        options["permutation"] = torch.randperm(item.d, generator=g)
    return {"x": x, "diag": 1 + 0.5 * torch.randn(item.d, generator=g), "blocks": blocks}, options


def _pairs(item: Item, g: torch.Generator) -> tuple[dict, dict]:
    index = torch.randint(-1, item.m, (item.n,), generator=g)  # -1: none
    return {"a": _unit(g, item.n, item.d), "b": _unit(g, item.m, item.d)}, {"index": index}


def _listed(item: Item, g: torch.Generator) -> tuple[dict, dict]:
    """Two pairs for each row of a, of which a few are the same."""
    tensors, options = _sides(item, g, _whole, ("a", "b"))
    rows = torch.arange(item.n).repeat(2)
    return tensors, {**options, "pairs": torch.stack((rows, torch.randint(0, item.m, (2 * item.n,), generator=g)), 1)}


def _searched(item: Item, g: torch.Generator) -> tuple[dict, dict]:
    """The 200 best of rows and columns, which several sweeps find; with ids the 10 best of other ids."""
    tensors, options = _sides(item, g, _whole, ("a", "b"))
    if item.variant == "ids":
        return tensors, {**options, "k": 10, "exclude_same_id": True}
    return tensors, {**options, "k": 200, "columns": True, "exclude_self": item.variant == TWICE}


def _labelled(item: Item, g: torch.Generator) -> tuple[dict, dict]:
    return {"x": _whole(g, item.n, item.d)}, {"labels": _labels(g, item.n, item.n // 3), "margin": 0.25}


def _by_label(**settings: Any) -> Callable:
    def make(item: Item, g: torch.Generator) -> tuple[dict, dict]:
        tensors, labels = {"x": _unit(g, item.n, item.d)}, {"labels": _labels(g, item.n, item.n // 3)}
        if item.variant == BETWEEN:
            tensors["y"] = _unit(g, item.m, item.d)
            labels["y_labels"] = _labels(g, item.m, item.n // 3)
        return tensors, {**labels, **settings}

    return make


def _graph(item: Item, g: torch.Generator) -> tuple[dict, dict]:
    """Two representations of either modality."""
    options = {"ids": _labels(g, item.n, item.n // 2)} if item.variant == "ids" else {}
    nodes = {name: torch.stack([_whole(g, item.n, item.d) for _ in range(2)]) for name in ("xs", "ys")}
    return nodes, {**options, "margin": 0.25}


def _fragments(**settings: Any) -> Callable:
    """About item.n regions of pictures and item.m words of captions, with masks where the variant says so."""

    def make(item: Item, g: torch.Generator) -> tuple[dict, dict]:
        regions, words = _whole(g, item.n, item.d), _whole(g, item.m, item.d)
        tensors = {
            name: rows[: len(rows) // size * size].view(-1, size, item.d)
            for name, rows, size in (("regions", regions, REGIONS), ("words", words, WORDS))
        }
        options = {}
        if item.variant == MASKED:
            options = {f"{name}_mask": torch.rand(t.shape[:2], generator=g) > 0.3 for name, t in tensors.items()}
        return tensors, {**options, **settings}

    return make


def _distillation(item: Item, g: torch.Generator) -> tuple[dict, dict]:
    teachers = {"image_teacher": _unit(g, item.n, item.d), "text_teacher": _unit(g, item.n, item.d // 2)}
    numbers = {"lam": torch.tensor(0.3), "tau": torch.tensor(0.5)}
    kind = "mse" if item.variant == "squared" else "mae"
    # Teachers get no gradient; they follow the dtype.
    options = {name: t.to(item.dtype) for name, t in teachers.items()}
    return {"student": _unit(g, item.n, item.d), **numbers}, {**options, "kind": kind}


class Family(NamedTuple):
    """An op on inputs of one kind."""

    function: str  # of gssf_kernels and of its reference
    make: Callable[[Item, torch.Generator], tuple[dict[str, Tensor], dict[str, Any]]]
    variants: tuple[str, ...] = ("", "ids", TWICE)
    exact: bool = False


# Certified mining takes fp32 of `plan.CERTIFIED` scores and more, and gives the choices of exact scores.
CERTIFIED = {"square": (4096, 4096, 1024), "ragged": (2500, 3001, 77), "one channel": (2100, 2100, 1)}

FAMILIES = {
    "certified": Family("hardest_negatives", _two_sided(_unit, ("a", "b")), exact=True),
    "hardest_negatives": Family("hardest_negatives", _two_sided(_whole, ("a", "b")), exact=True),
    "listed_pairs": Family("hardest_negatives", _listed, ("", "ids"), exact=True),
    "pairs_by_id": Family("triplet_loss", _two_sided(_whole, margin=0.25, pairs="ids"), ("ids",), exact=True),
    "triplet": Family("triplet_loss", _two_sided(_whole, margin=0.25), exact=True),
    "triplet_metric": Family("triplet_loss", _metric, ("", "ids"), exact=True),
    "triplet_all": Family("triplet_loss", _two_sided(_whole, margin=0.25, negatives="all"), exact=True),
    "goal": Family("goal_loss", _two_sided(_whole, triplet="cir", pair="sig"), ("", "ids"), exact=True),
    "goal_ms": Family("goal_loss", _two_sided(_whole, triplet="nca", pair="sig_ms"), exact=True),
    "graph_pattern": Family("graph_pattern_loss", _graph, ("", "ids"), exact=True),
    "late_interaction": Family("late_interaction", _fragments(reduce="sum"), ("", MASKED), exact=True),
    "late_interaction_triplet": Family(
        "late_interaction_triplet_loss", _fragments(reduce="sum", margin=0.25), ("", MASKED), exact=True
    ),
    "attention_pooling": Family("attention_pooling", _fragments(), ("", MASKED)),
    "top_scores": Family("top_scores", _searched, exact=True),
    "ranks": Family("ranks", _two_sided(_whole), exact=True),
    "batch_hard": Family("batch_hard_loss", _labelled, ("",), exact=True),
    "circle": Family("circle_loss", _by_label(margin=0.25, scale=4.0), ("", BETWEEN)),
    "multi_similarity": Family("multi_similarity_loss", _by_label(beta=5.0), ("", BETWEEN)),
    "nt_xent": Family("nt_xent_loss", _by_label(scale=4.0), ("", BETWEEN)),
    "contrast_by_id": Family("info_nce_loss", _two_sided(_unit, scale=4.0, pairs="ids"), ("ids",)),
    "info_nce": Family("info_nce_loss", _two_sided(_unit, scale=4.0)),
    "sigmoid": Family("sigmoid_loss", _two_sided(_unit, scale=10.0, bias=-5.0)),
    "logsumexp": Family("logsumexp_scores", _two_sided(_unit, ("a", "b"), scale=14.0), ("", TWICE)),
    "sum_scores": Family("sum_scores", _two_sided(_unit, ("a", "b"), kind="square", scale=4.0, reduction="none")),
    "distillation": Family("relational_distillation_loss", _distillation, ("", "squared")),
    "project": Family("project", _project, ("", "permuted")),
    "pair_scores": Family("pair_scores", _pairs, ("",)),
}


def _of_family(family: str) -> Iterator[Item]:
    certified = family == "certified"
    for shape in (CERTIFIED if certified else SHAPES).values():
        for product in ("ieee",) if certified else PRODUCTS:
            for variant in FAMILIES[family].variants:
                yield Item(family, product, *shape, variant)


# InfoNCE and SigLIP of more than 2^26 scores: gradients are summed over several row panels.
PANELS = [Item(family, "bf16", 16384, 16384, 256) for family in ("info_nce", "sigmoid")]
ITEMS = {family: list(_of_family(family)) for family in FAMILIES}
ITEMS["panels"] = PANELS
