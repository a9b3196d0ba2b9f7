"""Certified mining: the winners of the exact scores of fp32 inputs, to the bit, and the bound that certifies them."""

from fractions import Fraction

import pytest
import torch
from certified_cases import INF, MAKERS, UNIT, certified, check, some_limits, unit

import gssf_kernels as gk

pytestmark = pytest.mark.skipif(UNIT == "none", reason="no bf16 unit on this processor, or no extension")


@pytest.mark.parametrize("name", MAKERS)
def test_eleven_thousand_small_problems_in_all(name):
    torch.manual_seed(len(name))
    for _ in range(740):
        n, extra_columns, d = (int(k) for k in torch.randint(1, 24, (3,)))
        a, b = MAKERS[name](n, n + extra_columns - 1, 2 * d - 1)
        ids = torch.randint(0, 6, (len(b),)) if extra_columns % 3 == 0 else None
        check(a, b, None if ids is None else ids[:n].clone(), ids)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "beyond"])
def test_the_bound_holds(internals, name):
    """For every score of the bf16 unit, by rows and by columns."""
    for seed, (n, m, d) in enumerate([(30, 40, 7), (65, 200, 64), (530, 610, 100), (17, 100, 1500), (5, 9, 40000)]):
        torch.manual_seed(seed)
        a, b = MAKERS[name](n, m, d)
        score, *bounds = (
            torch.from_numpy(x).view(n, m) for x in internals.certified.rounded_scores(a.numpy(), b.numpy())
        )
        off = (score.double() - a.double() @ b.double().T).abs()
        for bound in bounds:
            assert (off <= bound).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", MAKERS)
def test_winners_are_those_of_exact_scores(name, seed):
    """Several tiles, and several columns of candidates to a row."""
    torch.manual_seed(seed)
    n, m, d = [(40, 60, 33), (65, 200, 8), (130, 131, 100), (17, 700, 257), (64, 64, 512), (520, 600, 16)][seed]
    a, b = MAKERS[name](n, m, d)
    for ids in (None, torch.arange(m) // 4, torch.randint(0, 5, (m,)), torch.zeros(m, dtype=torch.int64)):
        check(a, b, None if ids is None else ids[:n].clone(), ids)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("beyond", "subnormal")])
def test_winners_below_limits(name, seed):
    torch.manual_seed(seed)
    n, m, d = [(40, 60, 33), (65, 200, 8), (130, 131, 100), (17, 700, 257), (520, 600, 16)][seed]
    a, b = MAKERS[name](n, m, d)
    limits = some_limits(a, b)
    for ids in (None, torch.randint(0, 5, (m,))):
        for chosen in (limits, (limits[0], None), (None, limits[1])):
            both = [torch.full((count,), INF) if k is None else k for count, k in zip((n, m), chosen, strict=True)]
            check(a, b, None if ids is None else ids[:n].clone(), ids, limits=both)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("name", ["unit", "copies"])
def test_rows_alone(name, limited):
    """Without columns nothing is written of them, neither from candidates nor, of copies, by the sweep in fp64."""
    a, b = unit(torch.randn(300, 64)), unit(torch.randn(400, 64))
    if name == "copies":
        a, b = a[:1].repeat(800, 1), a[:1].repeat(900, 1)
    limits = some_limits(a, b) if limited else (None, None)
    both, _ = certified(a, b, limits=limits)
    options = "certified", True, False, None, None, limits[0], None
    *rows, rescored = torch.ops.gssf.hardest_negatives(a, b, None, None, *options)
    for got, expected in zip(rows[:3], both[:3], strict=True):
        assert torch.equal(got, expected)
    assert [t.numel() for t in rows[3:]] == [0, 0]
    assert int(rescored) <= (300 * 40 if name == "unit" else 800 * 900)  # scores are dense at such limits


def test_listed_pairs_are_refused():
    a, b = unit(torch.randn(300, 64)), unit(torch.randn(400, 64))
    pairs = torch.arange(301), torch.arange(300)
    with pytest.raises(ValueError, match="certified mining takes no listed pairs"):
        torch.ops.gssf.hardest_negatives(a, b, None, None, "certified", False, True, *pairs, None, None)


def test_a_false_negative_margin_is_certified():
    x, y = unit(torch.randn(1100, 64)), unit(torch.randn(1100, 64))
    y[:1000] = unit(y[:1000] + 2 * x[:1000])
    y[1000:] = y[:100]  # the same captions again: above their limits
    loss = gk.triplet_loss(x, y, false_negative_margin=0.05)
    truth = gk.reference.triplet_loss(x.double(), y.double(), false_negative_margin=0.05)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["rows", "ids"])
def test_copies_of_a_positive_are_at_its_limit(kind):
    """With margin 0 they count, however the positive's score was rounded."""
    x, y = unit(torch.randn(1100, 64)), unit(torch.randn(1100, 64))
    y = unit(x + 0.5 * y)
    copies = torch.cat((y, y))
    ids = {"pairs": "ids", "x_ids": torch.arange(1100), "y_ids": torch.arange(2200)} if kind == "ids" else {}
    terms = gk.triplet_loss(x, copies, margin=0.5, false_negative_margin=0.0, symmetric=False, reduction="none", **ids)
    torch.testing.assert_close(terms, torch.full_like(terms, 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("half", [False, True], ids=["", "one side twice"])
def test_exact_ties_go_to_the_lowest_index(half):
    for seed in range(20):
        torch.manual_seed(seed)
        a = torch.randint(-2, 3, (300, 12)).float()
        b = a if half else torch.randint(-2, 3, (420, 12)).float()
        ids = torch.arange(len(b)) // 3 if seed % 2 else None
        check(a, b, None if ids is None else ids[: len(a)], ids, ties=True)


def test_one_side_twice():
    x = unit(torch.randn(700, 50))
    ids = torch.arange(700) % 50
    for arguments in ((x, x), (x, x, ids, ids)):
        other = [t.clone() if k % 2 else t for k, t in enumerate(arguments)]
        for got, expected in zip(certified(*arguments)[0], certified(*other)[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("special", [torch.nan, INF, -INF])
def test_what_is_not_finite_is_as_in_a_sweep(special):
    a, b = torch.randn(60, 20), torch.randn(90, 20)
    a[3, 4], b[50, 1] = special, special
    results, _ = certified(a, b)
    *swept, _ = torch.ops.gssf.hardest_negatives(a, b, None, None, "sweep")
    for got, expected in zip(results, swept, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_half_precision_inputs():
    a, b = unit(torch.randn(200, 64)).half(), unit(torch.randn(300, 64)).half()
    results, _ = certified(a, b)
    for got, expected in zip(results, certified(a.float(), b.float())[0], strict=True):
        assert torch.equal(got, expected)


def test_the_thread_count_changes_no_bit():
    a, b = unit(torch.randn(1100, 64)), unit(torch.randn(1300, 64))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs, rescored = certified(a, b)
        results.append((*outputs, torch.tensor(rescored)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def test_few_scores_are_made_again():
    """Of random unit rows one or two a line; of copies all, by a sweep in fp64."""
    a, b = unit(torch.randn(1500, 512)), unit(torch.randn(1500, 512))
    assert 3000 <= check(a, b) <= 3 * 3000
    same = unit(torch.randn(1, 64)).repeat(800, 1)
    assert check(same, same.clone()) == 800 * 800


def test_the_op_takes_it_where_it_pays():
    a, b = unit(torch.randn(1100, 40)), unit(torch.randn(1100, 40))
    for got, expected in zip(torch.ops.gssf.hardest_negatives(a, b, None, None)[:5], certified(a, b)[0], strict=True):
        assert torch.equal(got, expected)


def test_scores_of_pairs_have_the_bits_of_the_winners():
    """Whatever the size: exact ones where mining is certified, else those of the sweep."""
    for n in (40, 1100):
        a, b = unit(torch.randn(n, 64)), unit(torch.randn(n, 64))
        b[n // 2 :] = b[: n // 2]  # every row twice
        hardest = gk.hardest_negatives(a, b)
        assert torch.equal(gk.pair_scores(a, b), hardest.pair_score)
        assert torch.equal(gk.pair_scores(a, b, hardest.row_index), hardest.row_score)
        index = torch.full((n,), -1)
        assert gk.pair_scores(a, b, index).eq(-INF).all()


def test_a_score_that_only_exact_arithmetic_tells_apart():
    """Two columns whose fp32 products come out in the wrong order."""
    a = torch.tensor([[1.0, 2.0**-25, 2.0**-25, 2.0**-25]]).repeat(40, 1)
    b = torch.zeros(41, 4)
    b[:, 0] = 0.5
    b[7] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    b[30] = torch.tensor([1.0, 1.0, 1.0, 1.0])  # 1 + 3 · 2⁻²⁵, which fp32 sums to 1, before and after index 7
    results, _ = certified(a, b)
    assert results[2][0] == 30
    assert results[1][0] == torch.tensor(float(Fraction(1) + 3 * Fraction(1, 2**25)), dtype=torch.float32)


def test_what_the_user_sees():
    assert gk.backends()["hardest_negatives"]["certified"] == UNIT
    a, b = unit(torch.randn(300, 64)), unit(torch.randn(400, 64))
    assert gk.rescored_candidates(a, b) == certified(a, b)[1] >= 400
    ids = torch.zeros(300, dtype=torch.int64)
    assert gk.rescored_candidates(a, a, a_ids=ids) == 0
    with pytest.raises(TypeError, match=r"^a: expected dtype float32 or float16, got torch\.float64"):
        gk.rescored_candidates(a.double(), b.double())
    with pytest.raises(ValueError, match=r"^b: "):
        gk.rescored_candidates(a, b[:7])


def test_stages_have_names_in_a_profile():
    torch.set_num_threads(1)  # a profile has this thread alone
    a, b = unit(torch.randn(600, 64)), unit(torch.randn(700, 64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        certified(a, b)
    results = {event.key.rpartition("::")[2]: event for event in profile.key_averages() if "::stage::" in event.key}
    assert set(results) == {"pack", "product", "epilogue", "fold", "rescore"}
    assert results["product"].count == results["epilogue"].count == 2 * 4  # tiles of 512 rows and 175 columns
    assert results["rescore"].count == 1


def test_errors():
    a = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="float32 or float16"):
        certified(a, a)
