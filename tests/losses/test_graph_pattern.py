"""Graph pattern loss: against a loop over its edges in fp64, with every option; one edge is a triplet loss."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk


def nodes(kx=2, ky=3, n=11, d=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(k, n, d, generator=generator, dtype=dtype), dim=2) for k in (kx, ky))


def metric(seed, dim=8, **settings):
    generator = torch.Generator().manual_seed(seed)
    made = gk.StructuredSimilarity(dim, block_size=4, dtype=torch.float64, **settings)
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return made


LISTED = torch.tensor([[0, 4], [3, 1], [2, 0], [0, 4]])
EDGES = {"all": ("all", 10), "cross": ("cross", 6), "listed": (LISTED, 4)}


def check(xs, ys, tolerance=1e-11, wrt=(), **options):
    """Values, per-edge values and gradients of ours and of the definition in fp64."""
    results = []
    for module in (gk, gk.reference):
        wide = module is gk.reference
        sides = [t.double() if wide else t for t in (xs, ys)]
        sides = [t.detach().clone().requires_grad_() for t in sides]
        loss, each = module.graph_pattern_loss(*sides, return_edges=True, **options)
        alone = module.graph_pattern_loss(*sides, **options)
        torch.testing.assert_close(alone, loss, rtol=tolerance, atol=tolerance)
        weight = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
        grads = torch.autograd.grad((alone * weight).sum(), (*sides, *wrt), allow_unused=True)
        results.append((loss, each, *(g for g in grads if g is not None)))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("negatives", ["hardest", "semihard", "all"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("which", EDGES)
@pytest.mark.parametrize("ids", [None, "shared"])
def test_every_edge(which, reduction, negatives, ids):
    edges, count = EDGES[which]
    ids = None if ids is None else torch.arange(11) // 2
    options = {"edges": edges, "reduction": reduction, "negatives": negatives, "ids": ids}
    check(*nodes(), margin=0.3, **options)
    weights = torch.linspace(0, 2, count, dtype=torch.float64).requires_grad_()
    margins = torch.linspace(0, 0.9, count, dtype=torch.float64)
    check(*nodes(), margin=margins, weights=weights, wrt=(weights,), **options)


@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_metrics(negatives):
    xs, ys = nodes()
    shared = metric(1)
    check(xs, ys, metric=shared, negatives=negatives, wrt=tuple(shared.parameters()))
    each = [metric(k, normalize=k % 2 == 0) for k in range(6)]
    weights = tuple(w for m in each for w in m.parameters())
    check(xs, ys, metric=each, edges="cross", negatives=negatives, wrt=weights)
    check(3 * xs, ys, normalize=True, negatives=negatives)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("negatives", ["hardest", "semihard", "all"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_edge_is_the_triplet_loss_to_the_bit(dtype, negatives, reduction):
    xs, ys = (t.to(dtype).requires_grad_() for t in nodes(1, 1, 300, 40))
    x, y = (t[0].detach().clone().requires_grad_() for t in (xs, ys))
    options = {"margin": 0.3, "negatives": negatives, "reduction": reduction}
    loss, right = gk.graph_pattern_loss(xs, ys, edges="cross", **options), gk.triplet_loss(x, y, **options)
    assert torch.equal(loss, right)
    loss.backward()
    right.backward()
    assert torch.equal(xs.grad[0], x.grad)
    assert torch.equal(ys.grad[0], y.grad)


def test_fp32_of_several_tiles():
    """Whole numbers: scores are exact, and many tie with the pair's."""
    generator = torch.Generator().manual_seed(1)
    xs, ys = (torch.randint(-2, 3, (2, 700, 12), generator=generator).float() for _ in range(2))
    for negatives in ("hardest", "semihard"):
        check(xs, ys, 1e-6, negatives=negatives, ids=torch.arange(700) // 3, margin=2.0)


def test_gradcheck():
    xs, ys = (t.requires_grad_() for t in nodes(2, 1, 5, 4))
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, y, w: gk.graph_pattern_loss(x, y, margin=0.4, weights=w), (xs, ys, weights)
    )


def test_nothing_to_compare_is_a_differentiable_zero():
    for kx, ky, n, edges in (
        (1, 1, 0, "all"),
        (1, 0, 4, "all"),
        (2, 1, 4, torch.zeros(0, 2, dtype=torch.int64)),
        (2, 2, 1, "cross"),
    ):
        xs, ys = (torch.randn(k, n, 3, requires_grad=True) for k in (kx, ky))
        for negatives in ("hardest", "semihard", "all"):
            loss = gk.graph_pattern_loss(xs, ys, edges=edges, negatives=negatives)
            assert loss == 0
            loss.backward()
            assert not xs.grad.any()


def test_nan_reaches_its_edges_alone():
    xs, ys = nodes()
    xs[1, 3, 0] = torch.nan
    _, each = gk.graph_pattern_loss(xs, ys, return_edges=True)
    touched = torch.tensor([1 in edge for edge in itertools.combinations(range(5), 2)])
    assert torch.equal(each.isnan(), touched)


def test_the_module_is_the_function():
    xs, ys = nodes()
    margins, weights = torch.rand(4).double(), torch.rand(4).double()
    settings = {"margin": margins, "edges": LISTED, "weights": weights, "negatives": "semihard", "reduction": "mean"}
    module = gk.GraphPatternLoss(**settings)
    assert module(xs, ys) == gk.graph_pattern_loss(xs, ys, **settings)
    assert set(module.state_dict()) == {"margin", "edges", "weights"}
    each = [metric(k) for k in range(10)]
    module = gk.GraphPatternLoss(metric=each, return_edges=True)
    assert len(list(module.parameters())) == 20
    for ours, right in zip(module(xs, ys), gk.graph_pattern_loss(xs, ys, metric=each, return_edges=True), strict=True):
        assert torch.equal(ours, right)


def test_compiles_whole():
    xs, ys = nodes(2, 2, 20, 8, torch.float32)
    for negatives in ("hardest", "semihard"):
        compiled = torch.compile(gk.GraphPatternLoss(negatives=negatives), fullgraph=True, backend="aot_eager")
        sides = [t.clone().requires_grad_() for t in (xs, ys)]
        compiled(*sides).backward()
        eager = [t.clone().requires_grad_() for t in (xs, ys)]
        gk.graph_pattern_loss(*eager, negatives=negatives).backward()
        for ours, right in zip(sides, eager, strict=True):
            torch.testing.assert_close(ours.grad, right.grad)


def test_numbers_of_edges_in_any_dtype():
    xs, ys = nodes(2, 1, 6, 8, torch.float32)
    for negatives in ("hardest", "all"):
        right = gk.graph_pattern_loss(xs, ys, margin=0.25, negatives=negatives)
        for dtype in (torch.float64, torch.float16):
            margin, weights = torch.full((3,), 0.25, dtype=dtype), torch.ones(3, dtype=dtype)
            loss = gk.graph_pattern_loss(xs, ys, margin=margin, weights=weights, negatives=negatives)
            torch.testing.assert_close(loss, right)
        for dtype in (torch.int8, torch.int32, torch.uint16, torch.uint32):
            edges = torch.tensor([[0, 1], [0, 2], [1, 2]]).to(dtype)
            assert gk.graph_pattern_loss(xs, ys, margin=0.25, negatives=negatives, edges=edges) == right


def test_a_call_explained():
    """All edges are one sweep and one merge; with every negative, sums for each edge."""
    xs, ys = (torch.empty(2, 512, 64, device="meta") for _ in range(2))
    for negatives, calls in (("hardest", 1), ("semihard", 2), ("all", 6)):
        ops = {op.name: op for op in gk.explain(gk.graph_pattern_loss, xs, ys, negatives=negatives).forward.ops}
        op = ops["score_sums" if negatives == "all" else "hardest_negatives"]
        assert op.calls == calls
        if negatives != "all":
            assert op.launches == {"sweep_kernel": calls, "merge_kernel": calls}
        assert gk.explain(gk.graph_pattern_loss, *(torch.ones(2, 9, 4) for _ in range(2)), negatives=negatives)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"weights": 3.0}, TypeError, "weights: .*got float"),
        ({"weights": [1.0]}, TypeError, "weights: .*got list"),
        ({"weights": torch.ones(2, 2)}, ValueError, "weights: "),
        ({"margin": torch.tensor([-1.0])}, ValueError, "margin: expected finite numbers >= 0"),
        ({"margin": -1.0}, ValueError, "margin: .*got -1.0"),
        ({"edges": [(0, 1)]}, TypeError, "edges: .*got list"),
        ({"edges": "some"}, ValueError, "edges: .*got 'some'"),
        ({"metric": [None]}, TypeError, "metric: .*got None"),
        ({"metric": [torch.nn.Linear(2, 2)]}, TypeError, "metric: .*got Linear"),
        ({"metric": metric(0), "normalize": True}, ValueError, "normalize: .*got True"),
    ],
)
def test_bad_settings(settings, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.GraphPatternLoss(**settings)


X, Y = torch.ones(2, 4, 3), torch.ones(1, 4, 3)
BAD = [
    ({"xs": torch.ones(4, 3)}, ValueError, r"xs: expected shape \[K, N, D\], got \[4, 3\]"),
    ({"xs": [X]}, TypeError, "xs: expected a tensor .*got list"),
    ({"xs": X.long()}, TypeError, "xs: expected dtype .*got torch.int64"),
    ({"ys": torch.ones(1, 5, 3)}, ValueError, r"ys: expected the N and D of xs \[2, 4, 3\], got \[1, 5, 3\]"),
    ({"ys": Y.double()}, TypeError, "ys: .*got torch.float64"),
    ({"margin": -0.1}, ValueError, "margin: .*got -0.1"),
    ({"margin": torch.ones(2)}, ValueError, r"margin: expected shape \[3\].*got \[2\]"),
    ({"margin": torch.tensor([0.1, torch.nan, 0.2])}, ValueError, "margin: expected finite"),
    ({"margin": torch.ones(3).long()}, TypeError, "margin: .*got torch.int64"),
    ({"edges": "some"}, ValueError, "edges: .*'all', 'cross'.*got 'some'"),
    ({"edges": [(0, 1)]}, TypeError, "edges: .*got list"),
    ({"edges": torch.ones(1, 2)}, TypeError, "edges: .*got torch.float32"),
    ({"edges": torch.ones(2, dtype=torch.int64)}, ValueError, r"edges: expected shape \[E, 2\], got \[2\]"),
    ({"edges": torch.tensor([[0, 1], [2, 3]])}, ValueError, r"edges: .*0..2, got \(2, 3\)"),
    ({"edges": torch.tensor([[-1, 1]])}, ValueError, r"edges: .*got \(-1, 1\)"),
    ({"edges": torch.tensor([[1, 1]])}, ValueError, r"edges: .*two different nodes.*got \(1, 1\)"),
    ({"weights": torch.ones(4)}, ValueError, r"weights: expected shape \[3\].*got \[4\]"),
    ({"weights": [1.0, 1.0, 1.0]}, TypeError, "weights: .*got list"),
    ({"negatives": "soft"}, ValueError, "negatives: .*got 'soft'"),
    ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"ids: .*got \[3\]"),
    ({"ids": torch.zeros(4)}, TypeError, "ids: .*got torch.float32"),
    ({"reduction": "max"}, ValueError, "reduction: .*got 'max'"),
    ({"return_edges": 1}, TypeError, "return_edges: .*got int"),
    ({"metric": "cosine"}, TypeError, "metric: .*got str"),
    (
        {"metric": [gk.StructuredSimilarity(3, None)]},
        ValueError,
        "metric: expected one, or one for each of 3 edges, got 1",
    ),
    ({"metric": [None] * 3}, TypeError, "metric: .*got None"),
    ({"metric": gk.StructuredSimilarity(3, None), "normalize": True}, ValueError, "normalize: .*got True"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_arguments(change, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.graph_pattern_loss(**{"xs": X, "ys": Y, **change})
