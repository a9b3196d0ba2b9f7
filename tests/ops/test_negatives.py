"""Which scores are negatives: both sweeps with listed pairs, limits and one direction, on the CPU and by Triton.

Rows hold small whole numbers, so scores are exact, and the results must equal loops over single scores to the bit.
"""

import itertools

import device_ops
import pytest
import torch
from interpreted import DEVICE
from triton_checks import INF, NAN, many, own_tiles

import gssf_kernels as gk
from gssf_kernels import dense, plan
from gssf_kernels._library import OPS
from gssf_kernels.ops.negatives import Negatives

SHAPES = [(37, 66), (70, 41), (1, 5), (5, 1), (33, 33)]
KINDS = ["paired", "ids", "listed", "listed with ids"]


def problem(n, m, kind, columns, limits):
    """(a, b, a_ids, b_ids, negatives, the set of pairs); limits: how many each anchor has, 1 as vectors."""
    random = torch.Generator().manual_seed(n * m)
    a, b = (torch.randint(-3, 4, (k, 9), generator=random).float() for k in (n, m))
    ids = tuple(torch.randint(0, 7, (k,), generator=random) for k in (n, m)) if "ids" in kind else (None, None)
    negatives = Negatives(kind == "paired", columns)
    pairs = {(i, i) for i in range(min(n, m))} if kind == "paired" else set()
    if "listed" in kind:
        pairs = {
            (int(i), int(j))
            for i, j in zip(*(torch.randint(0, k, (2 * n,), generator=random) for k in (n, m)), strict=True)
        }
        rows, cols = torch.tensor(sorted(pairs)).T.contiguous()
        starts = torch.searchsorted(rows, torch.arange(n + 1))
        negatives = negatives._replace(pair_starts=starts, pair_cols=cols)
    if limits:
        row_limit, col_limit = (torch.randint(-9, 30, (limits, k), generator=random).float() for k in (n, m))
        row_limit[0, 0], col_limit[-1, -1] = INF, -INF
        if limits == 1:
            row_limit, col_limit = row_limit[0], col_limit[0]
        negatives = negatives._replace(row_limit=row_limit, col_limit=col_limit)
    return a, b, *ids, negatives, sorted(pairs)


def loops(a, b, a_ids, b_ids, negatives, pairs):
    """[(score, index) of each row], limit by limit, the same of columns, and the scores of the pairs."""
    s, excluded = (a.double() @ b.double().T).tolist(), set(pairs)
    n, m = len(a), len(b)

    def best(i, j, limit):
        free = (i, j) not in excluded and (a_ids is None or a_ids[i] != b_ids[j])
        return s[i][j] if free and (limit is None or s[i][j] <= limit) else -INF

    results = []
    row_limit, col_limit = negatives.row_limit, negatives.col_limit
    for anchors, others, limits, score in (
        (n, m, row_limit, lambda k, other, limit: best(k, other, limit)),
        (m, n, col_limit, lambda k, other, limit: best(other, k, limit)),
    ):
        direction = []
        for limit, k in itertools.product([None] if limits is None else limits.view(-1, anchors), range(anchors)):
            scores = [score(k, other, None if limit is None else float(limit[k])) for other in range(others)]
            top = max(scores, default=-INF)
            direction.append((top, scores.index(top) if top > -INF else -1))
        results.append(direction)
    return *results, [s[i][j] for i, j in pairs]


def compare(results, expected, columns):
    positive_score, row_score, row_index, col_score, col_index, *_ = (t.cpu() for t in results)
    rows, cols, positives = expected
    assert positive_score.tolist() == positives
    assert listed(row_score, row_index) == rows
    assert listed(col_score, col_index) == (cols if columns else [])


def listed(score, index):
    return list(zip(score.flatten().tolist(), index.flatten().tolist(), strict=True))


every_kind = pytest.mark.parametrize("kind", KINDS)
every_option = pytest.mark.parametrize(("columns", "limits"), list(itertools.product((True, False), (0, 1, 3))))
every_option_of_one_limit = pytest.mark.parametrize(
    ("columns", "limits"), list(itertools.product((True, False), (0, 1)))
)


@every_option
@every_kind
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_on_the_cpu(n, m, kind, columns, limits):
    if kind == "paired" and m < n:
        pytest.skip("M >= N for pairs (i, i)")
    a, b, *ids, negatives, pairs = problem(n, m, kind, columns, limits)
    expected = loops(a, b, *ids, negatives, pairs)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        results = torch.ops.gssf.hardest_negatives(a.to(dtype), b.to(dtype), *ids, "", *negatives)
        compare(results, expected, columns)
    for ours, right in zip(results, device_ops.composite("hardest_negatives", a, b, *ids, "", *negatives), strict=True):
        assert torch.equal(ours, right)


@every_option
@every_kind
@pytest.mark.parametrize(("n", "m"), [(600, 1100), (1030, 530)])
def test_many_tiles_on_the_cpu(n, m, kind, columns, limits):
    if kind == "paired" and m < n:
        pytest.skip("M >= N for pairs (i, i)")
    inputs = problem(n, m, kind, columns, limits)
    call = (*inputs[:4], "", *inputs[4])
    definition = device_ops.composite("hardest_negatives", *call)
    for ours, right in zip(torch.ops.gssf.hardest_negatives(*call), definition, strict=True):
        assert torch.equal(ours, right)


@many
@every_option
@every_kind
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_by_triton(n, m, kind, columns, limits):
    if kind == "paired" and m < n:
        pytest.skip("M >= N for pairs (i, i)")
    a, b, *ids, negatives, pairs = problem(n, m, kind, columns, limits)
    expected = loops(a, b, *ids, negatives, pairs)
    inputs = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in (a, b, *ids, "", *negatives)]
    compare(device_ops.on_cuda("hardest_negatives", *inputs), expected, columns)


@many
@every_option_of_one_limit
@every_kind
@pytest.mark.parametrize("beta", [None, 2.0])
def test_relative_by_triton(kind, columns, limits, beta):
    a, b, *ids, negatives, pairs = problem(37, 66, kind, columns, limits)
    inputs = (a, b, *ids, torch.tensor(-5.0), beta, *negatives)
    right = device_ops.composite("relative_negatives", *inputs)
    ours = device_ops.on_cuda(
        "relative_negatives", *(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in inputs)
    )
    compare(ours, loops(a, b, *ids, negatives, pairs), columns)
    for got, expected in zip(ours[5:], right[5:], strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-7)


@every_option_of_one_limit
@every_kind
@pytest.mark.parametrize("beta", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_on_the_cpu(kind, columns, limits, beta, dtype):
    a, b, *ids, negatives, _ = problem(520, 600, kind, columns, limits)
    inputs = (a.to(dtype), b.to(dtype), *ids, torch.tensor(-5.0, dtype=dtype), beta, *negatives)
    ours = torch.ops.gssf.relative_negatives(*inputs)
    right = device_ops.composite("relative_negatives", *(t.double() if is_float(t) else t for t in inputs))
    for got, expected in zip(ours, right, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-6)


def is_float(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


@pytest.mark.parametrize("columns", [True, False])
def test_one_side_twice_without_pairs(columns):
    """s is symmetric, and (i, i) is a negative like any other."""
    a = torch.randint(-3, 4, (600, 9), generator=torch.Generator().manual_seed(1)).float()
    ids = torch.arange(600) // 3
    for a_ids in (None, ids):
        options = a_ids, a_ids, "", False, columns
        expected = torch.ops.gssf.hardest_negatives(a, a.clone(), *options)
        for ours, right in zip(torch.ops.gssf.hardest_negatives(a, a, *options), expected, strict=True):
            assert torch.equal(ours, right)


def two_factors(n, ids):
    """Arguments for s = a bᵀ with a = b W and a symmetric W, of whole numbers."""
    random = torch.Generator().manual_seed(n)
    b, w = torch.randint(-3, 4, (n, 9), generator=random).float(), torch.randint(-2, 3, (9, 9), generator=random)
    ids = torch.randint(0, 7, (n,), generator=random) if ids else None
    return b @ (w + w.T).float(), b, ids, ids


@many
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("n", [1, 33, 70])
def test_a_symmetric_product_of_two_factors_by_triton(n, ids, columns):
    call = *two_factors(n, ids), "sweep", True, columns, None, None, None, None, None
    expected = device_ops.composite("hardest_negatives", *call)
    inputs = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in call]
    op = OPS["hardest_negatives"]
    assert plan.choose(op.name, op.plans, op.call(*inputs, True)).upper_triangle
    for ours, right in zip(device_ops.on_cuda("hardest_negatives", *inputs, True), expected, strict=True):
        assert torch.equal(ours.cpu(), right)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("ids", [True, False])
def test_a_symmetric_product_of_two_factors_on_the_cpu(ids, columns):
    call = *two_factors(700, ids), "sweep", True, columns, None, None, None, None, None
    expected = device_ops.composite("hardest_negatives", *call)
    for ours, right in zip(torch.ops.gssf.hardest_negatives(*call, True), expected, strict=True):
        assert torch.equal(ours, right)


EDGES = torch.tensor([[0, 1], [2, 0], [2, 1], [0, 1], [1, 1]])


def graph(n, m, ids, limits):
    """The arguments of the op for edges between three nodes and two."""
    random = torch.Generator().manual_seed(n + m)
    a, b = (torch.randint(-3, 4, (k, rows, 9), generator=random).float() for k, rows in ((3, n), (2, m)))
    a_ids, b_ids = (torch.randint(0, 7, (k,), generator=random) if ids else None for k in (n, m))
    bounds = [torch.randint(-9, 30, (len(EDGES), k), generator=random).float() if limits else None for k in (n, m)]
    return a, b, a_ids, b_ids, "sweep" if limits else "", True, True, None, None, *bounds, EDGES


@pytest.mark.parametrize("limits", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 5), (33, 33), (600, 600)])
def test_edges_on_the_cpu(n, m, ids, limits):
    call = graph(n, m, ids, limits)
    for ours, right in zip(
        torch.ops.gssf.hardest_negatives(*call), device_ops.composite("hardest_negatives", *call), strict=True
    ):
        assert torch.equal(ours, right)
    a, b, a_ids, b_ids, route, *_, row_limit, col_limit, edges = call
    for e, (left, right) in enumerate(edges.tolist()):  # an edge is as the op on its two nodes
        bounds = [None if t is None else t[e] for t in (row_limit, col_limit)]
        alone = torch.ops.gssf.hardest_negatives(
            a[left], b[right], a_ids, b_ids, route, True, True, None, None, *bounds
        )
        for ours, right_ in zip(torch.ops.gssf.hardest_negatives(*call)[:5], alone, strict=False):
            assert torch.equal(ours[e], right_)


@many
@pytest.mark.parametrize("slabs", ["one slab", "a slab for each edge"])
@pytest.mark.parametrize("limits", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("n", [1, 33, 70])
def test_edges_by_triton(n, ids, limits, slabs, monkeypatch):
    monkeypatch.setattr(plan.tiles, "SLAB_ENTRIES", 1 << 24 if slabs == "one slab" else 1)
    call = graph(n, n, ids, limits)
    right = device_ops.composite("hardest_negatives", *call)
    ours = device_ops.on_cuda("hardest_negatives", *(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in call))
    for got, expected in zip(ours, right, strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("edges", [[[0, 2]], [[3, 0]], [[-1, 0]]])
def test_edges_are_never_read_out_of_range(edges):
    call = graph(4, 4, False, False)
    with pytest.raises(ValueError, match="edges within"):
        torch.ops.gssf.hardest_negatives(*call[:-1], torch.tensor(edges))


def test_a_nan_is_within_every_limit():
    a, b = torch.ones(3, 4), torch.ones(4, 4)
    b[2] = NAN
    limit = torch.full((3,), 0.5), torch.full((4,), 0.5)
    negatives = Negatives(False, True, None, None, *limit)
    _, row_score, row_index, *_ = torch.ops.gssf.hardest_negatives(a, b, None, None, "", *negatives)
    assert row_score.isnan().all()
    assert row_index.tolist() == [2, 2, 2]


@own_tiles
def test_a_loop_over_listed_pairs_does_not_join_that_over_tiles(monkeypatch):
    monkeypatch.setattr(plan, "sweep_tile", lambda *_: plan.tiles.Sweep(16, 16, 16, 4, 2, persistent=3))
    for kind, persistent in (("listed", 0), ("ids", 3)):
        a, b, *ids, negatives, _ = problem(33, 33, kind, True, 0)
        op = OPS["hardest_negatives"]
        assert plan.choose(op.name, op.plans, op.call(a, b, *ids, "", *negatives)).tile.persistent == persistent


WRONG = {
    "a pair past the last column": ([0, 1, 1], [4]),
    "a negative column": ([0, 1, 1], [-1]),
    "starts that fall": ([0, 2, 1], [1]),
    "starts that do not end at P": ([0, 1, 3], [1]),
}


@pytest.mark.parametrize("which", WRONG)
def test_wrong_lists_are_never_read_out_of_range(which):
    starts, cols = (torch.tensor(t) for t in WRONG[which])
    with pytest.raises(ValueError, match="pair_starts from 0 to P"):
        torch.ops.gssf.hardest_negatives(
            torch.ones(2, 3), torch.ones(4, 3), None, None, "sweep", False, True, starts, cols
        )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize(("n", "d"), [(3, 1), (50, 3), (40, 16), (77, 65), (300, 200), (90, 1100)])
def test_scores_of_pairs_have_the_bits_of_the_sweep(n, d, dtype):
    if dtype == torch.bfloat16 and dense.bf16_unit() != "none":
        pytest.skip("a unit for bf16 products sums in another order")
    random = torch.Generator().manual_seed(n)
    a, b = (torch.randn(n, d, generator=random).to(dtype) for _ in range(2))
    index = torch.randint(0, n, (n,), generator=random)
    pairs = torch.stack((torch.arange(n), index), 1)
    assert torch.equal(gk.pair_scores(a, b), gk.hardest_negatives(a, b).pair_score)
    assert torch.equal(gk.pair_scores(a, b, index), gk.hardest_negatives(a, b, pairs=pairs).pair_score)
