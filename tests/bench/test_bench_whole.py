"""What is timed is checked at the shape that is timed: variants that are right at 1000 rows and wrong past them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import measure, whole
from bench.measure import Case, TimedShape
from bench.ops import OPS
from bench.ops.triplet import MARGIN
from bench.problem import Shape
from bench.whole import Rows

N, D, TILE = 2048, 32, 128
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def timed():
    """timed(op, dtype="float32", n=N): its variants' judge, made once."""
    made = {}

    def get(name, dtype="float32", n=N):
        key = name, dtype, n
        if key not in made:
            made[key] = TimedShape(OPS[name], Case(name, n, D, 16, dtype, "cpu"))
        return made[key]

    return get


def naive(name):
    return OPS[name].variants["naive"]()


@pytest.mark.parametrize("scores", [1, 7000, 1 << 30], ids=["a row", "ragged chunks", "one chunk"])
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.whole is not None])
def test_truth_in_chunks_is_the_definition(name, scores, monkeypatch):
    monkeypatch.setitem(whole.CHUNK_SCORES, "cpu", scores)
    op = OPS[name]
    exact = op.inputs(Shape(150, D, 16), torch.float64, CPU, 3)
    expected = measure.results(op, op.truth, exact, exact)
    results = op.whole(exact, torch.float64)
    assert len(results) == len(expected)
    for ours, right in zip(results, expected, strict=True):
        assert whole.error(right, ours) < 1e-12
    if op.differentiable:
        lines = [t for t in results if isinstance(t, Rows)]
        assert len(lines) == sum(leaf is exact.x or leaf is exact.y for leaf in exact.leaves())


def test_every_op_of_a_matrix_has_one():
    """Of the others the definition itself is made at any size."""
    assert [name for name, op in OPS.items() if op.whole is None] == ["project", "pair_scores"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["triplet", "goal_nca_sig_ms", "hardest_negatives", "info_nce", "sigmoid", "sum_hinge",
                                  "distillation", "top_scores", "project", "pair_scores"])  # fmt: skip
def test_what_is_right_passes(timed, name, dtype):
    judge = timed(name, dtype)
    for way in ("ours", "naive"):
        variant = OPS[name].variants[way]()
        if variant is not None:
            assert judge.why_wrong(variant) is None


def hooked(problem, name, hook):
    """The problem, with what one of its leaves gets changed on the way."""
    leaf = getattr(problem, name).clone()
    leaf.register_hook(hook)
    return problem._replace(**{name: leaf})


# One gradient row of a thousand

GRADIENTS = {"triplet": "xy", "goal_con_lin": "xy", "info_nce": "xy", "sigmoid": "xy", "sum_hinge": "xy",
             "distillation": "x", "project": "x", "pair_scores": "xy"}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "side"), [(name, side) for name, sides in GRADIENTS.items() for side in sides])
def test_one_gradient_row_of_a_thousand(timed, name, side, dtype):
    judge = timed(name, dtype)
    lines = [t for t in judge.truth if isinstance(t, Rows) and t.truth.dim() == 2]
    rows = torch.tensor([1000, 2000])
    sure = lines["xy".index(side)].sure if name != "project" else None
    if sure is not None:  # or the next that hangs on no near-tie
        rows = torch.tensor([int(sure[row:].nonzero()[0]) + row for row in rows.tolist()])

    def wrong(problem):
        return naive(name)(hooked(problem, side, lambda grad: grad.index_fill(0, rows, 0)))

    place = 1 + "xy".index(side)
    assert judge.why_wrong(wrong).startswith(f"at N = 2048: the worst row of result {place} is off by")


# The last tile


def lacks_last_tile(side):
    """InfoNCE whose gradient of one side misses the scores of the other side's last tile."""

    def wrong(problem):
        x, y = problem.x, problem.y
        last = len(x) - TILE if len(x) > measure.CHECK_ROWS else len(x)
        if side == "x":
            s = torch.cat((x @ y[:last].T, x.detach() @ y[last:].T), 1)
        else:
            s = torch.cat((x[:last] @ y.T, x[last:] @ y.detach().T))
        t = problem.scale.to(x.dtype) * s
        labels = torch.arange(len(x))
        return (F.cross_entropy(t, labels) + F.cross_entropy(t.T, labels)) / 2

    return wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["x", "y"])
def test_a_gradient_that_lacks_the_last_tile(timed, side, dtype):
    small = OPS["info_nce"].inputs(Shape(200, D, 16), torch.float32, CPU, 0)
    torch.testing.assert_close(lacks_last_tile(side)(small), naive("info_nce")(small))
    place = 1 + "xy".index(side)
    why = timed("info_nce", dtype).why_wrong(lacks_last_tile(side))
    assert why.startswith(f"at N = 2048: the worst row of result {place} is off by")


def test_a_value_that_lacks_the_last_row(timed):
    def wrong(problem):
        x, y = problem.x.detach(), problem.y.detach()
        return naive("sum_hinge")(problem) - (MARGIN + x[-1] @ y.T - x[-1] @ y[-1]).clamp(min=0).sum()

    why = timed("sum_hinge").why_wrong(wrong)
    assert why.startswith("at N = 2048: result 0 is off by")


NUMBERS = [("info_nce", "scale", 3), ("sigmoid", "bias", 4), ("distillation", "lam", 2), ("distillation", "tau", 3)]


@pytest.mark.parametrize(("name", "leaf", "place"), NUMBERS)
def test_the_gradient_of_a_number(timed, name, leaf, place):
    def wrong(problem):
        return naive(name)(hooked(problem, leaf, lambda grad: grad * 1.01))

    assert timed(name).why_wrong(wrong).startswith(f"at N = 2048: result {place} is off by 1.0e-02")


def test_the_gradient_of_a_weight(timed):
    def wrong(problem):
        blocks = problem.metric.blocks.clone()
        blocks.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), 0))
        return naive("triplet")(problem._replace(metric=SimpleNamespace(diag=problem.metric.diag, blocks=blocks)))

    assert timed("triplet").why_wrong(wrong).startswith("at N = 2048: result 4 is off by")


# Choices


def second_best(rows):
    """Hardest negatives, of these rows the second best."""

    def wrong(problem):
        s = (problem.x @ problem.y.T).fill_diagonal_(-torch.inf)
        score, place = s.topk(2, dim=1)
        row_score, row_index = score[:, 0].clone(), place[:, 0].clone()
        row_index[rows], row_score[rows] = place[rows, 1], score[rows, 1]
        col = s.max(0)
        return row_score, row_index, col.values, col.indices

    return wrong


def test_another_choice_is_right_where_it_is_nearly_the_best(timed):
    judge = timed("hardest_negatives", "bfloat16")
    exact = judge.exact
    top = (exact.x @ exact.y.T).fill_diagonal_(-torch.inf).topk(2, dim=1).values
    order = (top[:, 0] - top[:, 1]).argsort()
    assert judge.why_wrong(second_best(order[:0])) is None
    assert judge.why_wrong(second_best(order[:40])) is None
    assert judge.why_wrong(second_best(order[-1:])).startswith("at N = 2048: the worst row of result 0 is off by")


def test_a_place_that_is_not_the_score_s_own(timed):
    def wrong(problem):
        results = naive("hardest_negatives")(problem)
        results[3][1500] = (results[3][1500] + 1) % N
        return results

    assert timed("hardest_negatives").why_wrong(wrong).startswith("at N = 2048: the worst row of result 3 is off by")


@pytest.mark.parametrize("name", ["triplet", "goal_nca_con"])
def test_equal_rows_may_be_chosen_for_one_another(name):
    """Every row of y twice: what is hardest is a tie, whose last row flipping chooses."""
    op, n = OPS[name], 300

    def inputs(shape, dtype, device, seed):
        problem = op.inputs(shape, dtype, device, seed)
        half = len(problem.y) // 2
        twice = torch.cat((problem.y[:half], problem.y[:half])).detach().requires_grad_()
        return problem._replace(y=twice)

    def flipped(problem):
        return naive(name)(problem._replace(x=problem.x.flip(0), y=problem.y.flip(0)))

    judge = TimedShape(op._replace(inputs=inputs), Case(name, n, D, 16, "float32", "cpu"))
    for variant in (naive(name), flipped):
        assert judge.why_wrong(variant) is None
    results = measure.results(op, flipped, judge.problem, judge.exact)
    of_y = judge.truth[2]
    assert of_y._replace(sure=None).error(results[2]) > 0.1
    assert of_y.error(results[2]) < 1e-5


def test_rows_that_hang_on_a_hinge():
    """A hinge that is shut by less than rounding: either side of the kink is right."""
    a = F.normalize(torch.randn(50, 8, dtype=torch.float64), dim=1).requires_grad_()
    b = F.normalize(torch.randn(50, 8, dtype=torch.float64), dim=1).requires_grad_()
    s = (a @ b.T).detach()
    of_rows, _ = whole.hardest(a.detach(), b.detach(), torch.zeros_like)
    level = float(s[7, 7] - of_rows.score[7])  # the margin at which the hinge of row 7 opens

    def terms(p, n, q, k, anchors):
        cost = level + n - p
        return cost.clamp(min=0), cost.detach().abs() <= 1e-9

    _, of_a, of_b = whole.by_choice([a, b], a, b, torch.zeros_like, terms)
    assert (~of_a.sure).nonzero().flatten().tolist() == [7]
    assert (~of_b.sure).nonzero().flatten().tolist() == sorted({7, int(of_rows.place[7])})


def test_hardest_are_those_of_the_matrix(monkeypatch):
    monkeypatch.setitem(whole.CHUNK_SCORES, "cpu", 40 * 7)
    a, b = (torch.randint(-2, 3, (40, 5)).double() for _ in range(2))
    s = (a @ b.T).fill_diagonal_(-torch.inf)
    for anchors, side in zip(whole.hardest(a, b, torch.zeros_like), (s, s.T), strict=True):
        top = side.topk(2, dim=1).values
        assert torch.equal(anchors.score, top[:, 0])
        assert torch.equal(side.gather(1, anchors.place[:, None])[:, 0], top[:, 0])
        assert torch.equal(anchors.close, top[:, 0] == top[:, 1])
        assert 0 < anchors.close.sum() < 40


# The measure itself


def test_error_is_the_worst_row_s_in_norms_of_a_typical_one():
    truth = torch.full((10, 4), 1.0, dtype=torch.float64)
    results = truth.clone()
    results[9] = 0
    assert Rows(truth).error(results) == 1
    assert Rows(truth).error(truth) == 0
    assert Rows(truth, sure=torch.arange(10) < 9).error(results) == 0
    assert Rows(truth, sure=torch.arange(10) > 8).error(results) == 1
    results[9] = 20
    assert Rows(truth, sure=torch.arange(10) < 9).error(results) == float("inf")  # no near-tie is as wild
    assert Rows(truth).error(truth[:, :3]) == float("inf")
    assert Rows(truth).error(truth.log() / 0) == float("inf")
    assert whole.error(torch.tensor(float("nan")), torch.tensor(1.0)) == float("inf")
    assert whole.error(torch.tensor([2.0]), torch.tensor(1.0)) == float("inf")
    assert whole.error(torch.tensor(1.5), torch.tensor(1.0)) == 0.5


def test_no_row_is_lost_on_the_directions():
    """Of every row one random number is off by its norm."""
    u = whole.directions(64, CPU)
    truth = torch.randn(2000, 64, dtype=torch.float64)
    off = torch.zeros_like(truth)
    off.scatter_(1, torch.randint(64, (2000, 1)), truth.norm(dim=1, keepdim=True))
    rows = Rows(truth @ u, u)
    worst = [rows.error(truth + off * (torch.arange(2000) == k)[:, None]) for k in range(0, 2000, 10)]
    assert min(worst) > 0.2
    assert max(worst) < 3


def test_tolerance_where_plain_pytorch_does_not_fit(monkeypatch):
    """Its errors at half of the rows, or a quarter, are what counts then."""
    asked = []
    monkeypatch.setattr(measure, "naive_fits", lambda n, device: asked.append(n) or n <= 600)
    judge = TimedShape(OPS["info_nce"], Case("info_nce", 2400, D, 16, "bfloat16", "cpu"))
    assert asked == [2400, 1200]
    plain = TimedShape(OPS["info_nce"], Case("info_nce", 600, D, 16, "bfloat16", "cpu"))
    assert judge.allowed == plain.allowed
    assert len(judge.problem.x) == 2400
    assert judge.why_wrong(OPS["info_nce"].variants["ours"]()) is None
    assert "worst row" in judge.why_wrong(lacks_last_tile("x"))


def test_memory_is_asked_for(monkeypatch):
    assert measure.naive_fits(64, "cpu")
    assert not measure.naive_fits(1 << 24, "cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 4 * 1000**2, 1 << 40))
    assert measure.naive_fits(1000, "cuda")
    assert not measure.naive_fits(1001, "cuda")
