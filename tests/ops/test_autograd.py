"""Derivatives and transforms: gradcheck, opcheck, torch.compile, torch.func, autocast."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, randn
from torch._dynamo.testing import CompileCounterWithBackend

import gssf_kernels as gk
from gssf_kernels import _checks, _library, plan

SMALL = [case for case in CASES if sum(t.numel() for t in case.inputs(torch.float64)[0].values()) <= 900]
INTEGRABLE = [case for case in SMALL if case.integrable]
FULL_JACOBIAN = 300  # numbers of all inputs, up to which it is
ONE_EACH = {case.function: case for case in SMALL if not case.name.startswith("metric")}


@pytest.mark.parametrize("which", ["ours", "reference"])
@pytest.mark.parametrize("case", INTEGRABLE, ids=str)
def test_gradcheck(case, which):
    tensors, options = case.inputs(torch.float64, seed=1)
    names = list(tensors)

    def run(*values):
        results = getattr(case, which)(dict(zip(names, values, strict=True)), options)
        return tuple(torch.where(t.isfinite(), t, 0) for t in results)

    # The step is far below the gaps between candidates of these seeded inputs, so no argmax moves. Every entry of the
    # Jacobian is compared where there are few; of many, one random combination of them, as PyTorch's own tests do.
    leaves = tuple(t.clone().requires_grad_() for t in tensors.values())
    many = sum(t.numel() for t in leaves) > FULL_JACOBIAN
    assert torch.autograd.gradcheck(run, leaves, eps=1e-7, atol=1e-6, rtol=1e-6, nondet_tol=0.0, fast_mode=many)


def _op_samples():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, diag, blocks = (t.to(dtype) for t in (randn(g, 20, 12), randn(g, 12), randn(g, 3, 4, 4)))
        a, b = randn(g, 9, 12).to(dtype), randn(g, 14, 12).to(dtype)
        order = torch.randperm(12, generator=g)
        ids = (torch.arange(9) // 2, torch.arange(14) // 2)
        rows, cols = torch.randint(-1, 9, (30,), generator=g), torch.randint(-1, 14, (30,), generator=g)
        yield "project", (x, None, diag, blocks, order, True)
        yield "project", (x, None, None, None, None, True)
        yield "project", (a, b, diag, blocks, order, True)
        yield "project", (a, b, None, None, None, True)
        yield "project", (a, b, diag, blocks, order, False, True)
        unit, of = torch.empty(0, dtype=plan.accumulation_dtype(dtype)), (diag, blocks, order, True)
        yield "project_backward", (a.flip(0), b.flip(0), unit, a, b, *of, [True] * 4)
        yield "project_backward", (a.flip(0), b[:9], unit, a, None, *of, [True, False, True, True])
        yield "project_backward", (None, b.flip(0), unit, a, b, *of, [False, True, False, False])
        yield "project_backward", (a.flip(0), None, unit, a, b, diag, None, None, False, [True] + 3 * [False])
        yield "project_backward", (x.flip(0), None, unit, x, None, *of, [True, False, True, True])
        blocks_alone = (None, blocks, None, False)
        yield "project_backward", (x.flip(0), None, unit, x, None, *blocks_alone, [True, False, True, False])
        pairs = (torch.randn(30, dtype=plan.accumulation_dtype(dtype)), rows, cols)
        yield "hardest_negatives", (a, b, None, None)
        limit = torch.zeros(a.shape[0], dtype=plan.accumulation_dtype(a.dtype))
        yield "top_scores", (a, b, 2, None, None, False, None, False)
        yield "top_scores", (a, b, 9, *ids, True, limit, True)
        levels = torch.zeros(b.shape[0], dtype=limit.dtype)
        yield "score_counts", (a, b, limit)
        yield "score_counts", (a, b, limit, torch.arange(a.shape[0] + 1), levels, None, *ids, True)
        yield "hardest_negatives", (a, b, *ids, "sweep")
        threshold = torch.tensor(-0.1, dtype=plan.accumulation_dtype(dtype))
        yield "relative_negatives", (a, b, None, None, threshold, None)
        yield "relative_negatives", (a, b, *ids, threshold, 10.0)
        yield "pair_scores", (a, b, rows, cols)
        yield "pair_scores_backward", (*pairs, a, b, [True, True])
        yield "pair_scores_backward", (*pairs, a, b, [False, True])
        yield "hardest_positives", (a, ids[0])
        places = torch.randint(-1, 14, (9,), generator=g), torch.randint(-1, 9, (14,), generator=g)
        lines = [randn(g, n).to(plan.accumulation_dtype(dtype)) for n in (9, 9, 14)]
        metric, none = (diag, blocks, order), (None, None, None)
        for needs in ([True, True, False, False], [False, True, False, False]):
            yield "hardest_negatives_backward", (*lines, *places, a, b, *none, False, needs)
        yield "hardest_negatives_backward", (*lines, *places, a, b, *metric, True, [True] * 4)
        yield "hardest_negatives_backward", (*lines, *places, a, b, *none, True, [False, True, False, False])
        for reduction in ("sum", "mean", "none"):
            grad_out = lines[0] if reduction == "none" else lines[0][0].clone()
            cols = [randn(g, n).to(lines[0]) for n in (14, 14, 9)]
            rows_of = (*lines[:2], lines[0].flip(0))
            for of_cols in (cols, [None, None, None], [*cols[:2], None]):
                yield "anchor_terms", ("info_nce", [*rows_of, *of_cols], [], reduction)
                yield "anchor_terms_backward", (grad_out, "info_nce", [*rows_of, *of_cols], [], reduction)
            for formula, constants in (("hinge", [0.2]), ("goal cir sig", [1.0, 2.0, 10.0, 0.5])):
                yield "hardest_terms", (a, b, *ids, formula, constants, reduction)
                yield "anchor_terms", (formula, lines, constants, reduction)
                yield "anchor_terms_backward", (grad_out, formula, lines, constants, reduction)
            for pair, pair_ids in (("lin_ms", ids), ("sig_ms", (None, None))):
                constants = [1.0, 2.0, 10.0, 0.5, 0.1, 0.1]
                yield "hardest_terms", (a, b, *pair_ids, f"goal nca {pair}", constants, reduction)
            weights = torch.stack([lines[k % 2] for k in range(4)])
            yield "anchor_terms_backward", (grad_out, "weights", [weights, lines[2]], [], reduction)
            yield "batch_hard", (a, ids[0], 0.2, reduction)
            partners = torch.randint(-1, 9, (2, 9), generator=g).unbind()
            yield "batch_hard_backward", (grad_out, *lines[:2], *partners, a, 0.2, reduction)
        yield from _fragment_samples(a, b)
        yield from _dense_samples(a, b, g)


def _fragment_samples(a, b):
    """The scores of fragments, of rows of a [9, D] and of b [14, D]."""
    a, b = a.view(3, 3, -1), b.view(2, 7, -1)
    grad_out = a.new_ones(3, 2, dtype=plan.accumulation_dtype(a.dtype))
    for masks in ((None, None), (torch.arange(9).view(3, 3) % 4 > 0, torch.arange(14).view(2, 7) % 3 > 0)):
        for keep in (True, False):
            yield "late_interaction", (a, b, *masks, keep, keep)
            best = torch.arange(42).view(3, 2, 7) % 4 - 1 if keep else None
            best = None if best is None else best.to(torch.int16)
            yield "late_interaction_backward", (grad_out, best, a, b, *masks, keep, [True, keep])
            yield "attention_pooling", (a, a * 0.5, b, *masks, 2.0, keep)
            yield "attention_pooling_backward", (grad_out, a, a * 0.5, b, *masks, 2.0, keep)


def _dense_samples(a, b, g):
    """The ops of :mod:`gssf_kernels.dense` and its passes on a and b."""
    wide = plan.accumulation_dtype(a.dtype)
    n, m, scale = a.shape[0], b.shape[0], torch.tensor(0.5, dtype=wide)
    rows, cols = randn(g, 4, n).to(wide).unbind(), randn(g, 4, m).to(wide).unbind()
    chunk = randn(g, n, m).to(wide)
    yield "logsumexp_scores", (a, b, scale, 1.0)
    yield "logsumexp_scores", (a, b, scale, 1.0, "scores")
    rows_only = ("scaled", [], None, None, None, False, None, False)
    yield "logsumexp_scores", (a, b, scale, 1.0, "means", *rows_only)
    sides, kept = (rows[2], None, rows[3], a, b, scale, 1.0, *rows[:2]), (chunk @ b.to(wide), "means")
    empty = rows[0].new_empty(0), rows[0].new_empty(0)
    yield "logsumexp_scores_backward", (*sides, *empty, [True, False, True], *kept, *rows_only)
    yield "logsumexp_scores", (a, None, None, 0.5)
    of_two = ("scaled", [], None, None, None, False, a + 0.5)
    yield "logsumexp_scores", (a, None, None, 0.5, "", *of_two)
    lines = (rows[0], rows[1].abs(), cols[0], cols[1].abs())
    yield "logsumexp_scores_backward", (rows[2], cols[2], rows[3], a, b, scale, 1.0, *lines, [True, True, True])
    yield "logsumexp_scores_backward", (rows[2], None, None, a, b, scale, 1.0, *lines, [False, False, True])
    kept = chunk, "scores"
    yield "logsumexp_scores_backward", (rows[2], None, None, a, b, scale, 1.0, *lines, [True, True, False], *kept)
    square = (lines[0], lines[1], lines[0], lines[1])
    yield "logsumexp_scores_backward", (rows[2], None, rows[3], a, None, None, 0.5, *square, [True, False, False])
    scaled = ("scaled", [], None, None, None, None, 0, False)
    yield "logsumexp_pass", (chunk, scale, *scaled, *(t.clone() for t in (*rows[:2], *cols[:2])))
    for score, constants in (("circle", [0.25, 0.02]), ("multi_similarity", [0.2, 0.3, 0.5])):
        labels, bounds = (torch.arange(n) % 3, torch.arange(m) % 3), randn(g, 2, n).to(wide)
        both = randn(g, 3, 2, n).to(wide).unbind()
        by_label = (score, constants, *labels, bounds, False)
        yield "logsumexp_scores", (a, b, None, 1.0, "scores", *by_label)
        statistics = (both[0], both[1].abs(), rows[0].new_empty(0), rows[0].new_empty(0))
        sides = (both[2], None, None, a, b, None, 1.0)
        yield "logsumexp_scores_backward", (*sides, *statistics, [True, True, False], None, "", *by_label)
        alone = (score, constants, labels[0], labels[0].clone(), bounds, True)
        yield "logsumexp_scores", (a, None, None, 1.0, "", *alone)
        sides = (both[2], None, None, a, None, None, 1.0)
        yield "logsumexp_scores_backward", (*sides, *statistics, [True, False, False], None, "", *alone)
        of_chunk = (score, constants, *labels, bounds, None, 0, False)
        yield "logsumexp_pass", (chunk, scale, *of_chunk, both[0].clone(), both[1].clone(), None, None)
        yield "softmax_pass", (chunk.clone(), scale, *of_chunk, *both, None, None, None, rows[3].clone())
    yield from _samples_with_options(a, b, g)
    ids = torch.arange(n) // 2, torch.arange(m) // 2
    counts = rows[0].new_ones(2, n).unbind()
    for reduction, epsilon, symmetric in (("mean", 0.0, True), ("none", 0.2, True), ("sum", 0.2, False)):
        grad_out = rows[2] if reduction == "none" else rows[2][0].clone()
        options, known = (epsilon, symmetric, reduction), (*lines, *counts)
        yield "info_nce", (a, b, scale, 1.0, None, None, *options, "scores")
        yield "info_nce", (a, b, scale, 1.0, None, None, *options, "means")
        yield "info_nce", (a, b, scale, None, *ids, *options)
        yield "info_nce", (a, None, None, 0.5, ids[0], ids[0].clone(), *options)
        yield "info_nce_backward", (grad_out, a, b, scale, None, *ids, *options, *known, [True] * 3)
        empty = (rows[0].new_empty(0), rows[0].new_empty(0))
        plain = (a, b, scale, 1.0, None, None, *options, *lines, *empty)
        yield "info_nce_backward", (grad_out, *plain, [True, False, True], chunk)
        same = (a, None, None, 0.5, ids[0], ids[0].clone(), *options, *square, *counts)
        yield "info_nce_backward", (grad_out, *same, [True, False, False])
    for kind, positives in (("hinge", "exclude"), ("softplus", "negate"), ("abs", "include")):
        weights = (rows[0], rows[1], cols[0][:n], cols[1][:n]) if kind == "hinge" else (rows[0], None, None, None)
        relative = kind == "hinge"
        numbers = (None, None, 1.0, 0.3) if relative else (scale, rows[0][0].clone(), 1.0, 0.0)
        needs = [True, kind != "abs"]
        yield "score_sums", (a, b, *numbers, *ids, kind, positives, relative, "sum", 0.5, needs)
        yield "score_sums", (a, None, *numbers, ids[0], None, kind, positives, False, "sum", 0.5, [True, False])
        gradients = [randn(g, *t.shape if need else (0,)).to(wide) for t, need in zip((a, b), needs, strict=True)]
        call = (a, b, *numbers, *ids, kind, positives, relative)
        positive_score = rows[1] if relative else None
        yield "score_sums", (*call, "none", 1.0, [False, False])
        yield "score_sums", (*call, "none", 1.0, [False, False], positive_score)
        empty = rows[0].new_empty(4, 0).unbind()
        yield "score_sums_backward", (rows[2], *empty, *call, "none", 1.0, needs, positive_score)
        scalars = (rows[0][k].clone() for k in range(3))
        yield "score_sums_backward", (*scalars, *gradients, *call, "sum", 0.5, needs)
        out = torch.zeros(3, n, dtype=wide), torch.zeros(2, n if kind == "hinge" else 0, dtype=wide)
        yield "score_sums_pass", (chunk.clone(), scale, scale.clone(), *weights, *ids, 0, kind, positives, True, *out)
    h = a[:, :5]
    for kind in ("abs", "square"):
        yield "relation_loss", (a, h, a.flip(0), scale, scale.abs(), 0.0, 1.0, [2.0, 1.0, 0.5], kind, True)
        yield "relation_loss", (a, h, a.flip(0), None, None, 0.3, 0.5, [2.0, 1.0, 0.5], kind, False)
        square = [chunk[:, k : n + k].contiguous() for k in range(3)]
        yield "relation_pass", (*square, scale, kind, True, torch.zeros(3, n, dtype=wide))
    yield "softmax_pass", (chunk.clone(), scale, *scaled, *rows[:3], *cols[:2], None, rows[3].clone())


def _samples_with_options(a, b, g):
    """Ops with listed pairs, limits, one direction, and what else leaves scores out."""
    wide = plan.accumulation_dtype(a.dtype)
    n, m = a.shape[0], b.shape[0]
    ids, limits = (torch.arange(n) // 2, torch.arange(m) // 2), (randn(g, n).to(wide), randn(g, m).to(wide))
    rows = torch.arange(n)
    listed = torch.arange(n + 1), torch.arange(n) % m
    for columns in (True, False):
        for tail in ((False, columns), (False, columns, *listed, *limits)):
            yield "hardest_negatives", (a, b, *ids, "", *tail)
            yield "relative_negatives", (a, b, *ids, torch.zeros((), dtype=wide), 2.0, *tail)
    for formula, constants, col_score in (("hinge", [0.2], limits[1]), ("goal nca con", [1.0, 2.0, 3.0, 0.5], None)):
        yield "segment_terms", (a, b, *ids, limits[0], col_score, formula, constants, None, True)
    yield "segment_terms", (a, b, *ids, limits[0], None, "hinge", [0.2], limits[0].abs(), True)
    yield "segment_terms", (a, b, *ids, None, None, "lowest", [], None, False)
    mask = (True, rows, rows % m, *limits)  # ignore, listed pairs, limits
    options = ("softplus", "negate", False, "sum", 0.5, [True, True], None, True, False, *mask)
    yield "score_sums", (a, b, None, None, 2.0, 0.1, *ids, *options)
    options = ("hinge", "exclude", True, "none", 1.0, [False, False], limits[0], False, False, False, None, None)
    yield "score_sums", (a, b, None, None, 1.0, 0.1, *ids, *options, limits[0])
    empty = limits[0].new_empty(4, 0).unbind()
    yield "score_sums_backward", (limits[0], *empty, a, b, None, None, 1.0, 0.1, *ids, *options, limits[0])
    for taking in ((True, True, *ids, limits[1], True, *mask), (False, False, None, None, limits[1])):
        plain = ("scaled", [], None, None, None, False, None)
        yield "logsumexp_scores", (a, b, None, 1.5, "scores", *plain, *taking)
        columns = limits[1] if taking[0] else limits[1].new_empty(0)
        statistics = (limits[0], limits[0].abs(), columns, columns.abs())
        sides = (limits[0], limits[1] if taking[0] else None, None, a, b, None, 1.5)
        yield "logsumexp_scores_backward", (*sides, *statistics, [True, True, False], None, "", *plain, *taking)


@pytest.mark.parametrize(("op", "arguments"), list(_op_samples()), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.gssf, op).default, arguments)


def test_opcheck_covers_every_op():
    assert {op for op, _ in _op_samples()} == set(gk.backends())


@pytest.mark.parametrize("case", ONE_EACH.values(), ids=str)
def test_compile_whole_graph(case):
    tensors, options = case.inputs(torch.float32)
    eager = case.ours(tensors, options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda values: case.ours(values, options), fullgraph=True)
    leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    plain = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    for got, expected in zip(compiled(leaves), eager, strict=True):
        torch.testing.assert_close(got, expected)

    def total(results):
        return sum(torch.where(t.isfinite(), t, 0).sum() for t in results)

    total(compiled(leaves)).backward()
    total(case.ours(plain, options)).backward()
    for name in leaves:
        torch.testing.assert_close(leaves[name].grad, plain[name].grad)


@pytest.mark.parametrize("how", ["one tensor twice", "shared ids", "same ids given twice"])
def test_compile_takes_a_tensor_twice(how):
    """torch.compile refuses one tensor twice in an autograd.Function; we hand it views."""
    torch._dynamo.reset()
    x, y, ids = torch.randn(8, 16), torch.randn(8, 16), torch.arange(8) // 2
    metric = gk.StructuredSimilarity(16, 4)

    def step(x, y):
        if how == "one tensor twice":
            return gk.triplet_loss(x, x, x_ids=ids) + gk.pair_scores(x, x).sum()
        options = {"x_ids": ids} if how == "shared ids" else {"x_ids": ids, "y_ids": ids}
        return gk.triplet_loss(x, y, **options) + gk.triplet_loss(x, y, metric=metric, **options)

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        run(*leaves).backward()
        results.append([t.grad for t in leaves if t.grad is not None])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_compile_a_module_with_its_metric():
    torch._dynamo.reset()
    x, y, ids = torch.randn(8, 16), torch.randn(8, 16), torch.arange(8) // 2
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        criterion = gk.TripletLoss(metric=gk.StructuredSimilarity(16, 4, permutation=torch.arange(15, -1, -1)))
        run = torch.compile(criterion, fullgraph=True) if compiled else criterion
        run(x, y, ids, ids).backward()
        grads.append([p.grad for p in criterion.parameters()])
    for got, expected in zip(*grads, strict=True):
        assert expected.any()
        torch.testing.assert_close(got, expected)


def test_compile_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: gk.triplet_loss(x, y), fullgraph=True, dynamic=True)
    for n, m in ((8, 8), (13, 20), (50, 51)):
        x, y = torch.randn(n, 16), torch.randn(m, 16)
        torch.testing.assert_close(compiled(x, y), gk.reference.triplet_loss(x, y))


COMPILED_ALONE = {
    "triplet": lambda x, y: gk.triplet_loss(x, y),
    "info_nce": lambda x, y: gk.info_nce_loss(x, y, scale=10.0),
    "goal": lambda x, y: gk.goal_loss(x, y, pair="sig_ms"),
    "sigmoid": lambda x, y: gk.sigmoid_loss(x, y, scale=10.0, bias=-1.0),
    "distillation": lambda x, y: gk.relational_distillation_loss(x, y, y[:, :8], lam=0.5, tau=0.07, kind="mse"),
    "batch-hard": lambda x, y: gk.batch_hard_loss(x, torch.arange(12) // 3),
}


@pytest.mark.parametrize("name", COMPILED_ALONE)
def test_a_loss_compiled_alone_compiles_once(name):
    """Its inputs are then the batch's tensors themselves: nothing may hang on which object each is."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(COMPILED_ALONE[name], backend=counter, fullgraph=True)
    for _ in range(3):
        x, y = torch.randn(12, 16, requires_grad=True), torch.randn(12, 16)
        torch.testing.assert_close(compiled(x, y), COMPILED_ALONE[name](x, y))
    assert counter.frame_count == 1


@pytest.mark.parametrize("region", [None, torch.bfloat16], ids=["no region", "bf16"])
def test_autocast_gives_one_tensor_given_twice_as_one(region):
    """Of one side twice half of the scores are made; a cast must not hide that, nor make a second copy."""
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    with torch.autocast("cpu", region, enabled=region is not None):
        cast = _checks.autocast(x, y, x, None, None)
        first, other, again, *nothing = cast
    assert first is again
    assert other is not first
    assert nothing == [None, None]
    for got, t in ((first, x), (other, y)):
        assert torch.equal(got, t.to(region or t.dtype))
        assert (got is t) == (region is None)


@pytest.mark.parametrize("name", ["goal_loss", "gradient_space_loss", "batch_hard_loss"])
def test_func_grad_of_a_loss(name):
    for case in (case for case in SMALL if case.function == name):
        tensors, options = case.inputs(torch.float64)

        def total(values, run, options=options):
            return sum(t.sum() for t in run(values, options))

        ours, plain = (torch.func.grad(total)(tensors, run) for run in (case.ours, case.reference))
        for key in tensors:
            torch.testing.assert_close(ours[key], plain[key])


def test_func_grad():
    x, y = torch.randn(12, 8, dtype=torch.float64), torch.randn(15, 8, dtype=torch.float64)
    diag, blocks = torch.randn(8, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)

    def loss(module, x, y, diag, blocks):
        return module.triplet_loss(module.project(x, diag, blocks, normalize=True), y)

    ours = torch.func.grad(lambda *t: loss(gk, *t), argnums=(0, 1, 2, 3))(x, y, diag, blocks)
    plain = torch.func.grad(lambda *t: loss(gk.reference, *t), argnums=(0, 1, 2, 3))(x, y, diag, blocks)
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected)


_ONCE = {
    "triplet": lambda x: gk.triplet_loss(x, x.flip(0)).square(),
    "metric": lambda x: gk.triplet_loss(x, x.flip(0), metric=gk.StructuredSimilarity(8, 4)).square(),
    "goal": lambda x: gk.goal_loss(x, x.flip(0), pair="sig_ms").square(),
    "goal-relative-metric": lambda x: gk.goal_loss(
        x, x.flip(0), pair="lin_ms", metric=gk.StructuredSimilarity(8, 4)
    ).square(),
    "goal-metric": lambda x: gk.goal_loss(x, x.flip(0), metric=gk.StructuredSimilarity(8, 4)).square(),
    "batch-hard": lambda x: gk.batch_hard_loss(x, torch.tensor([0, 0, 1, 1])).square(),
    "pairs": lambda x: gk.pair_scores(x, x.flip(0)).square().sum(),
    "project": lambda x: gk.project(x, x[0].detach(), normalize=True).pow(3).sum(),
}


@pytest.mark.parametrize("name", sorted(_ONCE))
def test_second_derivatives_are_refused(name):
    """By every route: none may give a silent zero."""
    f, x = _ONCE[name], torch.randn(4, 8)
    leaf = x.clone().requires_grad_()
    for finish in (lambda g: g.sum().backward(), lambda g: torch.autograd.grad(g.square().sum(), leaf)):
        (grad,) = torch.autograd.grad(f(leaf) + leaf.pow(4).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            finish(grad)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(x)


def test_gradients_only_where_asked():
    x, y = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    gk.triplet_loss(x, y, margin=5.0).backward()
    assert y.grad is None
    for wanted in range(3):
        leaves = [torch.randn(*shape) for shape in ((5, 8), (8,), (2, 4, 4))]
        leaves[wanted].requires_grad_()
        gk.project(*leaves, normalize=True).square().sum().backward()
        reference = leaves[wanted].detach().clone().requires_grad_()
        twins = [reference if k == wanted else t for k, t in enumerate(leaves)]
        gk.reference.project(*twins, normalize=True).square().sum().backward()
        torch.testing.assert_close(leaves[wanted].grad, reference.grad)
        assert [t.grad is None for t in leaves] == [k != wanted for k in range(3)]


def test_indices_carry_no_gradient():
    found = gk.hardest_negatives(torch.randn(4, 8, requires_grad=True), torch.randn(6, 8))
    assert found.row_score.requires_grad
    assert found.col_score.requires_grad
    assert not found.row_index.requires_grad
    assert not found.col_index.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_scores_in_its_dtype_and_sums_in_fp32(dtype):
    x, y = torch.randn(40, 32, requires_grad=True), torch.randn(50, 32)
    metric = gk.StructuredSimilarity(32, 8)
    with torch.autocast("cpu", dtype):
        a, b = metric.factors(x, y)
        assert a.dtype == b.dtype == dtype
        inside = gk.triplet_loss(x, y)
        assert metric(x, y).dtype == dtype
    assert inside.dtype == torch.float32
    rounded = gk.reference.triplet_loss(x.to(dtype).double(), y.to(dtype).double())
    torch.testing.assert_close(inside.double(), rounded, rtol=1e-5, atol=1e-5)
    inside.backward()
    assert x.grad.dtype == torch.float32
    x64 = x.detach().to(dtype).double().requires_grad_()
    gk.reference.triplet_loss(x64, y.to(dtype).double()).backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-2, atol=1e-2)


def test_autocast_reaches_metric_weights_and_pairs():
    x, y = torch.randn(20, 16, requires_grad=True), torch.randn(30, 16)
    criterion = gk.TripletLoss(metric=gk.StructuredSimilarity(16, 4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(x, y)
        pairs = gk.pair_scores(x, y)
    rounded = x.detach().bfloat16().float(), y.bfloat16().float()
    torch.testing.assert_close(pairs, gk.reference.pair_scores(*rounded))
    torch.testing.assert_close(loss, gk.reference.triplet_loss(*rounded, metric=criterion.metric), rtol=2e-2, atol=2e-2)
    loss.backward()
    assert criterion.metric.diag.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_inputs_of_goal_and_batch_hard_once(dtype):
    """Whatever runs below: scores are sums in fp32, and are not rounded to the region's dtype again."""
    x, y = (F.normalize(torch.randn(n, 32), dim=1) for n in (40, 50))
    rounded, labels = [t.to(dtype).double() for t in (x, y)], torch.arange(40) // 3
    with torch.autocast("cpu", dtype):
        losses = [gk.goal_loss(x, y, pair=pair, diagnostics=True) for pair in ("sig", "sig_ms", "lin_ms")]
        hard = gk.batch_hard_loss(x, labels)
    for (loss, found), pair in zip(losses, ("sig", "sig_ms", "lin_ms"), strict=True):
        expected, _ = gk.reference.goal_loss(*rounded, pair=pair, diagnostics=True)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        assert {t.dtype for t in (loss, *found)} == {torch.float32}
    torch.testing.assert_close(hard.double(), gk.reference.batch_hard_loss(rounded[0], labels), rtol=1e-5, atol=0)


def test_autocast_leaves_fp64_alone():
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert gk.triplet_loss(x, x).dtype == torch.float64


def test_modules_train_and_print_their_settings():
    loss = gk.TripletLoss(margin=0.3, reduction="mean", metric=gk.StructuredSimilarity(16, 4))
    assert "margin=0.3" in repr(loss)
    assert "reduction='mean'" in repr(loss)
    assert "block_size=4" in repr(loss)
    assert sorted(dict(loss.named_parameters())) == ["metric.blocks", "metric.diag"]
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    x, y = F.normalize(x), F.normalize(x + 0.3 * y)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    values = []
    for _ in range(30):
        value = loss(x, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.8 * values[0]
    state = loss.state_dict()
    other = gk.TripletLoss(margin=0.3, reduction="mean", metric=gk.StructuredSimilarity(16, 4))
    other.load_state_dict(state)
    assert float(other(x, y)) == float(loss(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_scores_kept_for_the_backward_change_nothing(dtype, monkeypatch):
    """Small s of InfoNCE: the same bits as where it is made again, and left as it was for a second backward."""
    x, y = (torch.nn.functional.normalize(torch.randn(n, 40), dim=1).to(dtype).requires_grad_() for n in (60, 75))
    scale = torch.tensor(7.0, requires_grad=True)

    def step():
        loss = gk.info_nce_loss(x, y, scale=scale)
        found = [torch.autograd.grad(loss, (x, y, scale), retain_graph=True) for _ in range(2)]
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        return found[0]

    asked = []
    real = torch.ops.gssf.logsumexp_scores_backward

    def recorded(*arguments, **named):
        asked.append(arguments[-2])
        return real(*arguments, **named)

    monkeypatch.setattr(torch.ops.gssf, "logsumexp_scores_backward", recorded)
    kept = step()
    monkeypatch.setattr(plan, "KEPT_SCORES", {})
    for got, expected in zip(step(), kept, strict=True):
        assert torch.equal(got, expected)
    assert [t.numel() for t in asked] == [60 * 75] * 2 + [0] * 2


def _weighted(base):
    """A Function of that base whose forward has a default."""

    class Weighted(base):
        @staticmethod
        def forward(x, factor, shift=1.0):
            return x * factor + shift

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.inputs = inputs

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.inputs[1], None, None

    return Weighted


_Weighted, _Plain = _weighted(_library.Function), _weighted(torch.autograd.Function)


def test_a_function_binds_its_arguments_as_pytorch_does():
    """Its signature is at hand, and says what forward asks for; all that PyTorch's own does with it stays."""

    assert list(inspect.signature(_Weighted.forward).parameters) == ["x", "factor", "shift"]
    assert "__signature__" not in vars(_Plain.forward)
    x = torch.ones(3, requires_grad=True)
    assert _Weighted.apply(x, 2.0).grad_fn.inputs[1:] == (2.0, 1.0)
    calls = [((x, 2.0, 3.0), {}), ((x, 2.0), {}), ((x,), {"factor": 2.0, "shift": 3.0}), ((x,), {"factor": 2.0})]
    outcomes = []
    for function in (_Weighted, _Plain):
        outcomes.append([])
        for arguments, named in calls:
            try:
                value = function.apply(*arguments, **named)
            except TypeError as refused:  # PyTorch 2.11 takes none by name
                outcomes[-1].append(str(refused))
                continue
            (gradient,) = torch.autograd.grad(value.sum(), x)
            outcomes[-1].append((value.tolist(), value.grad_fn.inputs[1:], gradient.tolist()))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][:2] == [([5.0] * 3, (2.0, 3.0), [2.0] * 3), ([3.0] * 3, (2.0, 1.0), [2.0] * 3)]
    assert torch.func.grad(lambda t: _Weighted.apply(t, 2.0, 3.0).sum())(x).tolist() == [2.0] * 3
    for arguments in ((x,), (x, 1.0, 2.0, 3.0)):
        with pytest.raises(TypeError, match="argument"):
            _Weighted.apply(*arguments)


def test_a_function_without_a_forward_of_its_own_leaves_pytorchs_alone():
    type("Between", (_library.Function,), {})
    assert "__signature__" not in vars(torch.autograd.Function.forward)
    assert "__signature__" in vars(_Weighted.forward)
