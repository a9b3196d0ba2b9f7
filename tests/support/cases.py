"""The one table of tests: ops × sample inputs × truth.

A `Case` names a public function and builds its inputs; `ours` runs it, `reference` is the plain twin
that truth (fp64) and tolerance (the twin in the same dtype) come from. Adding an op adds entries here;
`test_values`, `test_autograd`, `test_contracts` and the fuzzing go through the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import gssf_kernels as gk

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Errors below this share of the truth's norm are the rounding of the result itself: an ulp. The truth is
# fp64 too, so for fp64 the floor is what sums of a thousand terms in another order may differ by.
FLOOR = {torch.float32: 1.2e-7, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class Case:
    """One public function on one set of inputs; `tensors` are differentiable, `options` are not."""

    name: str
    function: str
    make: Callable[[torch.Generator], tuple[dict[str, torch.Tensor], dict]]
    integrable: bool = True  # False: the gradient is designed, and not the derivative of the value

    def inputs(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu"):
        """(tensors in dtype, options), on device; the values are those of fp64 rounded to dtype."""
        tensors, options = self.make(torch.Generator().manual_seed(seed))
        movable = (torch.Tensor, torch.nn.Module)
        options = {k: v.to(device) if isinstance(v, movable) else v for k, v in options.items()}
        options = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}
        return {k: t.to(device, dtype) for k, t in tensors.items()}, options

    def ours(self, tensors, options):
        return outputs(self.run(gk, tensors, options))

    def reference(self, tensors, options):
        return outputs(self.run(gk.reference, tensors, options))

    def run(self, module, tensors, options):
        dtype = next(iter(tensors.values())).dtype  # that of constants too: the truth has all in fp64
        options = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}
        if "metric" in options:
            return _with_metric(getattr(module, self.function), tensors, options)
        return getattr(module, self.function)(**tensors, **options)

    def __str__(self):
        return self.name


class _Criterion(torch.nn.Module):
    """A loss with a metric whose weights `functional_call` can put in place of its own."""

    def __init__(self, loss, metric):
        super().__init__()
        self.loss, self.metric = loss, metric

    def forward(self, x, y, **options):
        return self.loss(x, y, metric=self.metric, **options)


def _with_metric(loss, tensors, options):
    options = dict(options)
    weights = {f"metric.{k}": t for k, t in tensors.items() if k in ("diag", "blocks")}
    criterion = _Criterion(loss, options.pop("metric"))
    return torch.func.functional_call(criterion, weights, (tensors["x"], tensors["y"]), options)


def outputs(result) -> list[torch.Tensor]:
    """Floating outputs of a function, as a list."""
    result = result if isinstance(result, tuple) else (result,)
    return [t for t in result if t.is_floating_point()]


def weighted(results) -> torch.Tensor:
    """A scalar through which every finite output gets a gradient of its own."""
    total = 0.0
    for place, t in enumerate(results):
        weights = torch.cos(torch.arange(t.numel(), dtype=torch.float64) + place).view(t.shape).to(t)
        total = total + (torch.where(t.isfinite(), t, 0) * weights).sum()
    return total


def randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _sides(n, m, d, layout="plain"):
    def make(g):
        if layout == "plain":
            return randn(g, n, d), randn(g, m, d)
        if layout == "transposed":
            return randn(g, d, n).t(), randn(g, d, m).t()
        if layout == "sliced":
            return randn(g, 2 * n, d + 3)[::2, 1 : d + 1], randn(g, m, 2 * d)[:, ::2]
        if layout == "expanded":
            return randn(g, 1, d).expand(n, d), randn(g, m, d)
        return randn(g, n, d)[torch.zeros(n, dtype=torch.long)], randn(g, m, d)  # "repeated"

    return make


IDS = {
    "none": lambda g, n, m: (None, None),
    "unique": lambda g, n, m: (torch.arange(n), torch.arange(m)),
    "equal": lambda g, n, m: (torch.zeros(n, dtype=torch.long), torch.zeros(m, dtype=torch.long)),
    "five": lambda g, n, m: (torch.arange(n) // 5, torch.arange(m) // 5),
    "random": lambda g, n, m: (
        torch.randint(0, max(n // 3, 1), (n,), generator=g),
        torch.randint(0, max(n // 3, 1), (m,), generator=g),
    ),
    # extremes of int64, and values that agree in their low 32 bits without being equal
    "wide": lambda g, n, m: (
        torch.tensor([-(2**63), 2**63 - 1, 7, 7 + 2**32, -1, 0])[torch.randint(0, 6, (n,), generator=g)],
        torch.tensor([-(2**63), 2**63 - 1, 7, 7 + 2**32, -1, 0])[torch.randint(0, 6, (m,), generator=g)],
    ),
    "disjoint": lambda g, n, m: (torch.arange(n), torch.arange(m) + 10_000),
}


def _metric(n, d, b, *, diag=True, permuted=False, normalize=True, lead=(), rows="plain"):
    def make(g):
        x = randn(g, *lead, n, d)
        if rows == "zero":
            x[0] = 0
        if rows == "scaled":
            x = x * torch.logspace(-6, 4, n, dtype=torch.float64)[:, None]
        tensors = {"x": x}
        if diag:
            tensors["diag"] = 1 + 0.5 * randn(g, d)
        if b is not None:
            tensors["blocks"] = randn(g, d // b, b, b) / b**0.5
        options = {"normalize": normalize}
        if permuted:
            options["permutation"] = torch.randperm(d, generator=g)
        return tensors, options

    return make


def _metric_loss(n, m, d, b, ids="none", *, diagonal=True, permuted=False, normalize=True, **settings):
    def make(g):
        order = torch.randperm(d, generator=g) if permuted else None
        metric = gk.StructuredSimilarity(d, b, diagonal, normalize, permutation=order)
        tensors = {"x": randn(g, n, d), "y": randn(g, m, d)}
        if diagonal:
            tensors["diag"] = 1 + 0.5 * randn(g, d)
        if b is not None:
            tensors["blocks"] = randn(g, d // b, b, b) / b**0.5
        x_ids, y_ids = IDS[ids](g, n, m)
        return tensors, {"metric": metric, "x_ids": x_ids, "y_ids": y_ids, **settings}

    return make


def _scored(n, m, d, ids="none", layout="plain", names=("a", "b", "a_ids", "b_ids"), **options):
    def make(g):
        a, b = _sides(n, m, d, layout)(g)
        a_ids, b_ids = IDS[ids](g, n, m)
        return {names[0]: a, names[1]: b}, {names[2]: a_ids, names[3]: b_ids, **options}

    return make


_XY = ("x", "y", "x_ids", "y_ids")

# N, M, D on and around the edges of vectors (8, 16), tiles (128, 512) and of what a batch can be
SHAPES = [(1, 1, 1), (1, 2, 3), (2, 2, 17), (3, 130, 8), (16, 16, 16), (17, 31, 33), (128, 128, 64), (129, 257, 40)]
SHAPES += [(513, 513, 24), (511, 1030, 100)]
LAYOUTS = ("transposed", "sliced", "expanded", "repeated")


def _pairs(n, m, d, index=None):
    def make(g):
        a, b = _sides(n, m, d)(g)
        return {"a": a, "b": b}, {} if index is None else {"index": index(g)}

    return make


def _similarity(n, m, d, b):
    def make(g):
        tensors, options = _metric(n, d, b)(g)
        return {**tensors, "y": randn(g, m, d)}, options

    return make


def _project_cases():
    for b in (1, 3, 16, 32, 96):
        for permuted in (False, True):
            for normalize in (False, True):
                name = f"project-b{b}" + "-permuted" * permuted + "-normalized" * normalize
                yield Case(name, "project", _metric(70, 192, b, permuted=permuted, normalize=normalize))
    for n, d, b in ((1, 2, 1), (2, 7, 7), (65, 40, 8), (513, 48, 24), (600, 130, 65)):
        yield Case(f"project-n{n}-d{d}-b{b}", "project", _metric(n, d, b))
    yield Case("project-n1-d1", "project", _metric(1, 1, 1, normalize=False))
    yield Case("project-diag", "project", _metric(33, 50, None))
    yield Case("project-blocks", "project", _metric(33, 48, 12, diag=False))
    yield Case("project-normalize", "project", _metric(33, 50, None, diag=False))
    yield Case("project-batched", "project", _metric(9, 32, 8, lead=(2, 3)))
    yield Case("project-scaled", "project", _metric(40, 32, 8, rows="scaled"))
    yield Case("similarity", "similarity", _similarity(20, 27, 32, 8))


def _hardest_cases():
    for n, m, d in SHAPES:
        for ids in ("none", "random"):
            yield Case(f"hardest-{n}x{m}x{d}-{ids}", "hardest_negatives", _scored(n, m, d, ids))
    for ids in IDS:
        yield Case(f"hardest-ids-{ids}", "hardest_negatives", _scored(37, 61, 16, ids))
    for layout in LAYOUTS:
        yield Case(f"hardest-{layout}", "hardest_negatives", _scored(40, 70, 24, "five", layout))


def _search_cases():
    for n, m, d, k in ((1, 1, 1, 1), (7, 5, 3, 8), (129, 257, 40, 10), (513, 600, 24, 70)):
        for columns in (False, True):
            name = f"top-{n}x{m}x{d}-{k}" + "-columns" * columns
            yield Case(name, "top_scores", _scored(n, m, d, k=k, columns=columns))
    options = {"exclude_same_id": True, "exclude_self": True, "columns": True, "max_score": 1.0}
    yield Case("top-left-out", "top_scores", _scored(60, 70, 16, "random", k=5, **options))


def _pair_cases():
    yield Case("pairs", "pair_scores", _pairs(40, 30, 24, lambda g: torch.randint(-1, 30, (40,), generator=g)))
    yield Case("pairs-diagonal", "pair_scores", _pairs(40, 45, 24))
    yield Case("pairs-hub", "pair_scores", _pairs(300, 5, 24, lambda g: torch.full((300,), 3)))


def _triplet_cases():
    def case(name, *arguments, **options):
        return Case(f"triplet-{name}", "triplet_loss", _scored(*arguments, names=_XY, **options))

    for n, m, d in SHAPES:
        for ids in ("none", "five"):
            yield case(f"{n}x{m}x{d}-{ids}", n, m, d, ids)
    for layout in LAYOUTS:
        yield case(layout, 40, 70, 24, "random", layout)
    for how in ("sum", "mean", "none"):
        yield case(how, 50, 80, 24, "five", reduction=how, margin=1.5)
    for which in ("all", "semihard"):
        for ids in ("none", "five"):
            yield case(f"{which}-{ids}", 30, 40, 24, ids, negatives=which)
    for n, m, d in SHAPES:
        yield case(f"all-{n}x{m}x{d}", n, m, d, "random", negatives="all", margin=0.5)
    for how in ("mean", "none"):
        yield case(f"all-{how}", 33, 47, 8, "five", negatives="all", reduction=how)


def _metric_cases():
    def case(name, *arguments, **options):
        return Case(f"metric-{name}", "triplet_loss", _metric_loss(*arguments, margin=0.5, **options))

    for n, m, d, b in ((1, 1, 4, 2), (2, 5, 6, 3), (17, 31, 24, 8), (130, 200, 64, 16), (600, 601, 48, 12)):
        yield case(f"{n}x{m}x{d}-b{b}", n, m, d, b, "five")
    yield case("plain", 20, 25, 24, 8)
    yield case("permuted", 20, 25, 24, 8, "random", permuted=True)
    yield case("permuted-plain-norm", 20, 25, 24, 8, permuted=True, normalize=False)
    yield case("diag", 20, 25, 24, None, "five")
    yield case("blocks", 20, 25, 24, 8, diagonal=False)
    yield case("cosine", 20, 25, 24, None, diagonal=False)
    yield case("product", 20, 25, 24, None, diagonal=False, normalize=False)


TRIPLETS, PAIRS = ("con", "nca", "cir"), ("con", "lin", "sig", "lin_ms", "sig_ms")
INTEGRABLE = (("con", "con"), ("con", "lin"), ("con", "sig"), ("nca", "con"), ("cir", "lin"))


def _cosines(make):
    """The same with rows of length 1, which GOAL's weights are meant for."""

    def normalised(g):
        tensors, options = make(g)
        return {k: torch.nn.functional.normalize(t, dim=1) for k, t in tensors.items()}, options

    return normalised


def _goal_cases():
    def case(name, triplet, pair, *arguments, **options):
        make = _cosines(_scored(*arguments, names=_XY, triplet=triplet, pair=pair, **options))
        return Case(f"goal-{name}", "goal_loss", make, (triplet, pair) in INTEGRABLE)

    def on_metric(name, triplet, pair, *arguments, **options):
        make = _metric_loss(*arguments, triplet=triplet, pair=pair, **options)
        return Case(f"metric-goal-{name}", "goal_loss", make, (triplet, pair) in INTEGRABLE)

    for n, m, d in SHAPES:
        for pair in ("con", "lin_ms", "sig_ms"):
            yield case(f"{n}x{m}x{d}-{pair}", "nca", pair, n, m, d, "five")
    for ids in IDS:
        yield case(f"ids-{ids}", "cir", "sig_ms", 37, 61, 16, ids)
    for how in ("mean", "none"):
        yield case(how, "cir", "lin_ms", 20, 27, 12, "five", reduction=how)
    numbers = {"tau": 3.0, "alpha": 5.0, "beta": 20.0, "lam": 0.2}
    for triplet, pair in (("nca", "sig_ms"), ("cir", "lin_ms"), ("con", "sig")):
        yield case(f"numbers-{triplet}-{pair}", triplet, pair, 20, 27, 12, **numbers, negative_threshold=0.3)
    yield on_metric("nca-con", "nca", "con", 17, 31, 24, 8, "five")
    yield on_metric("nca-sig_ms", "nca", "sig_ms", 130, 200, 64, 16, "five")
    yield on_metric("cir-lin_ms", "cir", "lin_ms", 20, 25, 24, 8, "random", permuted=True)
    for triplet in TRIPLETS:
        for pair in PAIRS:
            yield case(f"{triplet}-{pair}", triplet, pair, 20, 27, 12, "five")


def cubic(anchor):
    """Weights that are the derivative of `cubic_value`."""
    return (1 - anchor.positive).square(), anchor.negative.square()


def cubic_value(anchor):
    return ((1 - anchor.positive).pow(3) + anchor.negative.pow(3)) / 3


def shaped(anchor):
    """Weights that use all there is, and are the derivative of nothing."""
    return torch.exp(-anchor.relative_positive), anchor.negative.sigmoid() * (1 + anchor.relative_negative)


def _gradient_space_cases():
    yield Case(
        "space-relative",
        "gradient_space_loss",
        _cosines(_scored(20, 27, 12, "random", names=_XY, weights=shaped, relative=gk.RelativeTerms(beta=4.0))),
        integrable=False,
    )
    integrable = _scored(20, 27, 12, "five", names=_XY, weights=cubic, value=cubic_value)
    yield Case("space-integrable", "gradient_space_loss", _cosines(integrable))


def _labelled(n, d, labels, **options):
    return lambda g: ({"x": randn(g, n, d)}, {"labels": labels(g, n), **options})


LABELS = {
    "fours": lambda g, n: torch.arange(n) // 4,
    "random": lambda g, n: torch.randint(0, max(n // 3, 1), (n,), generator=g),
    "one": lambda g, n: torch.zeros(n, dtype=torch.long),
    "two": lambda g, n: (torch.arange(n) >= n // 3).long(),
    "unique": lambda g, n: torch.randperm(n, generator=g),
}


def _batch_hard_cases():
    for labels in LABELS:
        for n, d in ((1, 1), (2, 3), (33, 8), (300, 24)):
            yield Case(f"batch-hard-{labels}-{n}x{d}", "batch_hard_loss", _labelled(n, d, LABELS[labels]))
    for how in ("sum", "none"):
        options = {"reduction": how, "margin": 1.0}
        yield Case(f"batch-hard-{how}", "batch_hard_loss", _labelled(40, 8, LABELS["random"], **options))


def _between(n, m, d, labels, **options):
    """Rows of x against those of y."""

    def make(g):
        sides = {"x": randn(g, n, d), "y": randn(g, m, d)}
        return sides, {"labels": LABELS[labels](g, n), "y_labels": LABELS[labels](g, m), **options}

    return make


def _label_cases(function, integrable, **options):
    for labels in LABELS:
        for n, d in ((1, 1), (2, 3), (33, 8), (300, 24)):
            make = _labelled(n, d, LABELS[labels], **options)
            yield Case(f"{function}-{labels}-{n}x{d}", function, make, integrable)
        make = _between(33, 70, 8, labels, **options)
        yield Case(f"{function}-between-{labels}", function, make, integrable)
    for how in ("sum", "none"):
        make = _labelled(40, 8, LABELS["random"], reduction=how, **options)
        yield Case(f"{function}-{how}", function, make, integrable)


def _logsumexp_cases():
    def make(n, m, d):
        return lambda g: ({"a": randn(g, n, d), "b": randn(g, m, d)}, {"scale": 2 * d**-0.5})

    for n, m, d in [*SHAPES, (40, 17, 8)]:
        yield Case(f"logsumexp-{n}x{m}x{d}", "logsumexp_scores", make(n, m, d))


def _info_nce_cases():
    def case(name, *arguments, scale=0.3, **options):
        return Case(f"infonce-{name}", "info_nce_loss", _scored(*arguments, names=_XY, scale=scale, **options))

    for n, m, d in SHAPES:
        yield case(f"{n}x{m}x{d}", n, m, d, scale=2 * d**-0.5)
    for ids in IDS:
        yield case(f"ids-{ids}", 37, 61, 16, ids)
    for layout in LAYOUTS:
        yield case(layout, 40, 70, 24, "five", layout)
    for how in ("sum", "mean", "none"):
        yield case(how, 50, 80, 24, "five", reduction=how)
    yield case("smoothed", 30, 40, 24, label_smoothing=0.1)
    yield case("smoothed-ids", 20, 24, 8, "five", label_smoothing=0.2, reduction="none")
    yield case("rows", 20, 24, 8, "five", symmetric=False)
    yield case("rows-smoothed", 20, 24, 8, label_smoothing=0.2, symmetric=False)


def _sum_cases():
    def case(name, *arguments, **options):
        return Case(f"sum-{name}", "sum_scores", _scored(*arguments, **options))

    for kind in ("hinge", "softplus", "abs", "square"):
        for positives in ("include", "exclude", "negate"):
            options = {"kind": kind, "positives": positives, "scale": 0.2, "bias": 0.3}
            yield case(f"{kind}-{positives}", 11, 14, 9, "five", **options)
        yield case(f"{kind}-rows", 70, 33, 9, kind=kind, positives="negate", bias=-1.0, reduction="none")
    for n, m, d in SHAPES:
        yield case(f"{n}x{m}x{d}", n, m, d, kind="softplus", positives="negate", scale=d**-0.5)


def _sigmoid_cases():
    def case(name, *arguments, scale=0.4, bias=-1.0, **options):
        return Case(
            f"sigmoid-{name}", "sigmoid_loss", _scored(*arguments, names=_XY, scale=scale, bias=bias, **options)
        )

    for n, m, d in SHAPES:
        yield case(f"{n}x{m}x{d}", n, m, d)
    for ids in IDS:
        yield case(f"ids-{ids}", 37, 61, 16, ids)
    for how in ("sum", "mean", "none"):
        yield case(how, 50, 80, 24, "five", reduction=how)


def _distillation_cases():
    def make(n, d, image, text, **options):
        def inputs(g):
            teachers = {"image_teacher": randn(g, n, image) / 4, "text_teacher": randn(g, n, text) / 4}
            return {"student": randn(g, n, d) / 4}, {"lam": 0.3, "tau": 0.5, **teachers, **options}

        return inputs

    for kind in ("mae", "mse"):
        for n, d, image, text in ((1, 3, 3, 3), (2, 5, 4, 3), (17, 33, 16, 9), (40, 9, 9, 9), (130, 20, 30, 40)):
            name = f"distillation-{kind}-{n}x{d}"
            yield Case(name, "relational_distillation_loss", make(n, d, image, text, kind=kind))
        weights = make(60, 8, 8, 8, kind=kind, weights=(0.5, 0.0, 3.0), lam=1.7)
        yield Case(f"distillation-{kind}-weights", "relational_distillation_loss", weights)


def _nodes(kx, ky, n, d, ids="none", **options):
    def make(g):
        shared = {} if ids == "none" else {"ids": torch.arange(n) // 2}
        return {"xs": randn(g, kx * n, d).view(kx, n, d), "ys": randn(g, ky * n, d).view(ky, n, d)}, {
            **shared,
            **options,
        }

    return make


def _graph_cases():
    for kx, ky, n, d in ((1, 1, 1, 1), (2, 1, 7, 5), (2, 2, 33, 16), (3, 1, 70, 24)):
        for ids in ("none", "pairs"):
            yield Case(f"graph-{kx}+{ky}-{n}x{d}-{ids}", "graph_pattern_loss", _nodes(kx, ky, n, d, ids))
    for how in ("mean", "none"):
        yield Case(f"graph-{how}", "graph_pattern_loss", _nodes(2, 2, 20, 8, edges="cross", reduction=how))
    yield Case("graph-semihard", "graph_pattern_loss", _nodes(2, 2, 20, 8, negatives="semihard"))


def _fragments(n, r, m, t, d, masked, **options):
    def make(g):
        tensors = {"regions": randn(g, n, r, d), "words": randn(g, m, t, d)}
        if masked:
            options.update({f"{k}_mask": torch.rand(v.shape[:2], generator=g) > 0.3 for k, v in tensors.items()})
        return tensors, dict(options)

    return make


def _fragment_cases():
    for shape in ((1, 1, 1, 1, 1), (3, 5, 4, 2, 17), (9, 36, 13, 11, 24), (2, 600, 3, 70, 8)):
        for masked in (False, True):
            name = "x".join(map(str, shape)) + "-masked" * masked
            yield Case(f"late-{name}", "late_interaction", _fragments(*shape, masked))
            yield Case(f"pooling-{name}", "attention_pooling", _fragments(*shape, masked, scale=1.0))
    small = 9, 7, 13, 5, 24
    yield Case("late-sum", "late_interaction", _fragments(*small, True, reduce="sum"))
    yield Case("pooling-words", "attention_pooling", _fragments(*small, True, over="words", scale=1.0))
    for how in ("sum", "mean", "none"):
        make = _fragments(*small, True, margin=0.5, reduction=how)
        yield Case(f"late-triplet-{how}", "late_interaction_triplet_loss", make)


CASES = [
    *_project_cases(),
    *_hardest_cases(),
    *_pair_cases(),
    *_search_cases(),
    *_triplet_cases(),
    *_metric_cases(),
    *_logsumexp_cases(),
    *_info_nce_cases(),
    *_sum_cases(),
    *_sigmoid_cases(),
    *_distillation_cases(),
    *_goal_cases(),
    *_gradient_space_cases(),
    *_batch_hard_cases(),
    *_graph_cases(),
    *_fragment_cases(),
    *_label_cases("circle_loss", False, margin=0.25, scale=2.0),
    *_label_cases("multi_similarity_loss", True, beta=5.0),
]


def _large_cases():
    """More than 2^20 scores, fewer and more than 512 channels, rows on and off 16 bytes: for a card."""
    shapes = {
        "narrow": (1100, 1300, 256),
        "wide": (1040, 1300, 1024),
        "ragged": (1101, 1299, 520),
        "odd": (1101, 1299, 577),
    }
    for name, shape in shapes.items():
        for ids in ("none", "random"):
            yield Case(f"large-hardest-{name}-{ids}", "hardest_negatives", _scored(*shape, ids))
        for pair in ("lin_ms", "sig_ms"):
            goal = _cosines(_scored(*shape, "five", names=_XY, triplet="nca", pair=pair))
            yield Case(f"large-goal-{pair}-{name}", "goal_loss", goal, integrable=False)
        scale = 2 * shape[2] ** -0.5
        scored = _scored(*shape, "random", names=_XY, scale=scale)
        yield Case(f"large-infonce-{name}", "info_nce_loss", scored)
    n, m, d = shapes["narrow"]
    yield Case("large-metric", "triplet_loss", _metric_loss(n, m, d, 32, "five", margin=0.5))
    yield Case("large-metric-permuted", "triplet_loss", _metric_loss(n, m, 384, 24, permuted=True, margin=0.5))
    yield Case("large-all", "triplet_loss", _scored(n, m, d, "five", names=_XY, negatives="all", margin=0.5))
    yield Case("large-sigmoid", "sigmoid_loss", _scored(n, m, d, "five", names=_XY, scale=d**-0.5, bias=-1.0))
    for kind in ("square", "softplus"):
        yield Case(f"large-sum-{kind}", "sum_scores", _scored(n, m, d, kind=kind, scale=d**-0.5, reduction="none"))
    yield Case("large-project", "project", _metric(5000, 1024, 32, permuted=True))
    yield Case("large-batch-hard", "batch_hard_loss", _labelled(1300, 256, lambda g, n: torch.arange(n) // 3 % 200))

    def distillation(g):
        teachers = {"image_teacher": randn(g, 1100, 200) / 14, "text_teacher": randn(g, 1100, 300) / 17}
        return {"student": randn(g, 1100, 256) / 16}, {"lam": 0.3, "tau": 0.5, "kind": "mse", **teachers}

    yield Case("large-distillation", "relational_distillation_loss", distillation)


LARGE = list(_large_cases())
