"""GOAL with relative terms of small problems: its Triton kernels against fp64. See interpreted.py for where it runs."""

import pytest
import torch
from interpreted import DEVICE, DTYPES, where_triton_runs

from gssf_kernels import plan, reference
from gssf_kernels.kernels import pairs, relative_goal, tiles
from gssf_kernels.statistics import relative_goal as statistics
from gssf_kernels.statistics.goal import Constants, anchor_weights

INF, NAN = float("inf"), float("nan")
MODES = [(triplet, pair) for triplet in ("con", "nca", "cir") for pair in ("lin_ms", "sig_ms")]
NUMBERS = (3.0, 2.0, 6.0, 0.4)  # τ, α, β, λ
NEAR = (0.125, 0.25)  # thresholds of positives and negatives: of exact scores, some stand on them
SHAPES = [(1, 1, 3), (1, 40, 5), (2, 2, 8), (16, 32, 16), (17, 33, 17), (40, 70, 24), (50, 50, 20)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_mode = pytest.mark.parametrize(("triplet", "pair"), MODES)
every_reduction = pytest.mark.parametrize("reduction", ["sum", "mean", "none"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tiles.Sweep(16, 32, 16, 4, 2))
    monkeypatch.setattr(tiles, "MERGE_PARTS", 2)
    monkeypatch.setattr(tiles, "TERM_LANES", 16)
    monkeypatch.setattr(tiles, "TERMS", 16)
    monkeypatch.setattr(tiles, "CLOSE", tiles.Pass(8, 16, 4))
    monkeypatch.setattr(tiles, "SCAN_EDGES", 8)
    monkeypatch.setattr(tiles, "EDGE_CHANNELS", 32)


def given(n, m, d, dtype=torch.float32, ids=False):
    """Rows in eighths: scores are exact and tie often, and no rounding carries one across a threshold."""
    a, b = ((torch.randint(-2, 3, (rows, d)) / 8).to(dtype) for rows in (n, m))
    b[:n] = torch.where(torch.rand(n, 1) < 0.5, a, b[:n])  # pairs that score well
    labels = (torch.arange(n) % 5 - 2**40, torch.arange(m) % 3 - 2**40) if ids else (None, None)
    return a, b, *labels


def on_device(*tensors):
    return [t if t is None else t.to(DEVICE) for t in tensors]


def close(got, expected, dtype, size=None):
    rtol = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    atol = rtol * float(expected.nan_to_num(0, 0, 0).abs().max() if size is None else size)
    torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def check(a, b, a_ids, b_ids, triplet, pair, reduction, numbers=NUMBERS, near=NEAR):
    """Loss and gradients against the definition, what is found against the reference."""
    grad = torch.randn(len(a)) if reduction == "none" else torch.tensor(0.75)
    leaves = [t.double().requires_grad_() for t in (a, b)]
    options = dict(zip(("tau", "alpha", "beta", "lam"), numbers, strict=True))
    options |= dict(zip(("positive_threshold", "negative_threshold"), near, strict=True))
    options |= {"triplet": triplet, "pair": pair, "x_ids": a_ids, "y_ids": b_ids}
    expected = reference.goal_loss(*leaves, reduction=reduction, **options)
    expected.backward(grad.double())

    on = on_device(a, b, a_ids, b_ids)
    loss, *found, weights = relative_goal.relative_goal(*on, triplet, pair, *numbers, *near, reduction)
    assert loss.dtype == weights.dtype == torch.float32
    assert loss.shape == expected.shape
    close(loss, expected.detach(), torch.float32, size=2 * len(a) * float((a.double() @ b.double().T).abs().max()))
    hardest = reference.hardest_negatives(a.double(), b.double(), a_ids=a_ids, b_ids=b_ids)
    for got, known in zip(found, (reference.pair_scores(a.double(), b.double()), *hardest), strict=True):
        assert torch.equal(got.cpu(), known.to(got.dtype))
    lines = relative_goal.relative_goal_backward(grad.to(DEVICE), weights, len(b), reduction)
    gradients = pairs.hardest_negatives_backward(*lines, found[2], found[4], *on[:2], [True, True])
    for got, leaf in zip(gradients, leaves, strict=True):
        assert got.dtype == a.dtype
        close(got, leaf.grad, a.dtype)
    return loss, weights


@every_mode
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_loss_and_gradients(n, m, d, triplet, pair):
    check(*given(n, m, d, ids=n % 2 == 1), triplet, pair, ("sum", "mean", "none")[n % 3])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES[2:5])
def test_halves(n, m, d, pair, dtype):
    check(*given(n, m, d, dtype, ids=n % 2 == 1), "cir", pair, "mean")


@every_reduction
@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
def test_every_reduction(pair, reduction):
    for ids in (False, True):
        check(*given(33, 50, 24, ids=ids), "nca", pair, reduction)


@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
@pytest.mark.parametrize("near", [(0.0, 0.0), (0.0, 2.0), (2.0, 0.0), (8.0, 8.0)])
def test_every_threshold(near, pair):
    """From none but those level with the hardest, or with the least positive, to all."""
    for numbers in (NUMBERS, (0.5, 4.0, 1.0, -0.25)):
        check(*given(40, 50, 24), "con", pair, "none", numbers, near)


def weights_of(a, b, a_ids, b_ids, pair, near=NEAR):
    """(ours, those of the definition in fp64), [4, N]"""
    *_, ours = relative_goal.relative_goal(*on_device(a, b, a_ids, b_ids), "nca", pair, *NUMBERS, *near, "none")
    s = a.double() @ b.double().T
    relative = reference.RelativeTerms(statistics.RELATIVE[pair], *NUMBERS[1:3], *near)
    masked, known = s.masked_fill(reference.positives(a, b, a_ids, b_ids), -INF), []
    for side in (masked, masked[:, : len(a)].mT):
        anchor, hardest = reference.anchor_statistics(s.diagonal(), side, relative)
        both = anchor_weights(anchor, "nca", pair, Constants(*NUMBERS))
        known += [torch.where(hardest >= 0, weight, 0) for weight in both]
    return ours.cpu(), torch.stack(known)


@every_dtype
@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
def test_weights(pair, dtype):
    for ids in (False, True):
        close(*weights_of(*given(33, 70, 24, dtype, ids), pair), torch.float32)


@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
@pytest.mark.parametrize("place", ["pair", "row", "bank"])
def test_nan(place, pair):
    a, b, *ids = given(40, 70, 8)
    if place == "pair":
        a[17] = NAN
    elif place == "row":
        b[3, 1] = NAN
    else:
        b[60] = NAN
    ours, known = weights_of(a, b, *ids, pair)
    assert torch.equal(ours.isnan(), known.isnan())
    close(ours, known, torch.float32)


@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
def test_infinite_scores(pair):
    """-inf is no hardest negative, and below every threshold; a row of it has none."""
    a, b, *ids = given(40, 70, 8)
    a[:, 0], b[:, 0] = 1.0, 0.0
    b[50, 0] = b[3, 0] = -INF
    close(*weights_of(a, b, *ids, pair), torch.float32)
    b[:, 0] = -INF
    ours, known = weights_of(a, b, *ids, pair)
    assert not known.any()
    assert not ours.any()


@pytest.mark.parametrize("infinity", [INF, -INF])
@pytest.mark.parametrize("near", [(0.125, 8.0), (8.0, 8.0)], ids=["few close", "all close"])
@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
def test_pairs_of_infinite_scores(pair, near, infinity):
    """The distance of one infinity from another is NaN, and no tie."""
    a, b, *ids = given(20, 30, 8)
    a[:, 0], b[:, 0] = 1.0, 0.0
    b[3, 0] = b[5, 0] = infinity
    ours, known = weights_of(a, b, *ids, pair, near)
    assert torch.equal(ours.isnan(), known.isnan())
    close(ours, known, torch.float32)


@every_reduction
@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
def test_without_negatives_there_is_nothing(pair, reduction):
    a, b, *_ = given(20, 33, 8)
    loss, weights = check(a, b, torch.zeros(20).long(), torch.zeros(33).long(), "nca", pair, reduction)
    assert not loss.any()
    assert not weights.any()


@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
def test_all_alike(pair):
    """Every score ties with every other: distances are of no one, powers are of all others and 1."""
    ones = torch.full((40, 4), 0.5)
    _, weights = check(ones, ones.clone(), None, None, "con", pair, "sum", (1.0, 2.0, 6.0, 1.0), (0.1, 0.1))
    pull, push = (0.0, 1.0) if pair == "lin_ms" else (0.5, 0.5)
    expected = torch.tensor([pull, push, pull, push])[:, None].expand(4, 40)
    torch.testing.assert_close(weights.cpu(), expected)


def test_backward_takes_expanded_gradients():
    weights = torch.randn(4, 20).to(DEVICE)
    got = relative_goal.relative_goal_backward(torch.tensor(0.5).expand(20).to(DEVICE), weights, 23, "none")
    for one, known in zip(
        got, statistics._reference_backward(torch.tensor(0.5), weights.cpu(), 23, "sum"), strict=True
    ):
        torch.testing.assert_close(one.cpu(), known)


def test_the_same_inputs_give_the_same_bits():
    a, b = torch.randn(50, 24), torch.randn(97, 24)
    options = (None, None, "cir", "sig_ms", *NUMBERS, *NEAR, "sum")
    runs = [relative_goal.relative_goal(*on_device(a, b), *options) for _ in range(2)]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


def test_what_is_large_or_empty_is_declined(monkeypatch):
    options = ("nca", "lin_ms", *NUMBERS, *NEAR, "sum")

    def declined(n, m):
        return relative_goal.relative_goal(*on_device(*given(n, m, 8)), *options) is NotImplemented

    monkeypatch.setattr(plan, "SMALL", 40 * 50)
    assert [declined(40, 50), declined(40, 51), declined(0, 5)] == [False, True, True]
    monkeypatch.setattr(plan, "LONGEST_ROW", 48)
    assert [declined(20, 48), declined(20, 49)] == [False, True]


def test_fp64_is_refused():
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        relative_goal.relative_goal(x, x, None, None, "nca", "lin_ms", *NUMBERS, *NEAR, "sum")


where_triton_runs(globals())
