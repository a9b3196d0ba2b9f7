"""`evaluate` and `recall_at_k` against loops over single queries, of scores that numpy computes in fp64."""

import importlib
import warnings

import numpy as np
import pytest
import torch
from retrieval_loops import both_ties, evaluation

import gssf_kernels as gk
from gssf_kernels.reference import accumulate

module = importlib.import_module("gssf_kernels.retrieval.evaluate")  # its function has the same name
KS = (1, 2, 5, 10)
RSUM_KS = (1, 5, 10)


def integers(count, dim, seed, high=3):
    """Rows of small whole numbers: their scores are exact in every order of summation, and many are equal."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, (count, dim), generator=g, dtype=torch.float64)


def scores(x, y):
    return x.double().numpy() @ y.double().numpy().T


def same(x_ids, y_ids):
    return x_ids[:, None].numpy() == y_ids[None, :].numpy()


def agree(got, expected, nan_scores=0, folds=1):
    assert got.to_dict() == pytest.approx(
        expected | {"nan_scores": nan_scores, "folds": folds}, rel=1e-12, nan_ok=False
    )


@pytest.fixture(params=[1 << 24, 40, 1], ids=["one sweep", "chunks of queries", "query by query"])
def most_positives(request, monkeypatch):
    monkeypatch.setattr(module, "MOST_POSITIVES", request.param)


def problems():
    """(x, y, settings, positives [N, M], which scores are candidates [N, M] or None)."""
    x, y = integers(23, 6, 1), integers(41, 6, 2)
    x_ids = torch.arange(23) // 2 * 3  # ids in pairs; 18 to 33 have no caption
    y_ids = torch.tensor([0, 0, 3, 3, 3, 6, 6, 9, 12, 12, 12, 15, 100, 101, 15] + [0] * 26)
    yield "ids", x, y, {"x_ids": x_ids, "y_ids": y_ids}, same(x_ids, y_ids), None
    yield "rows", x, y, {}, np.eye(23, 41, dtype=bool), None
    pairs = torch.tensor([[3, 7], [0, 40], [3, 1], [22, 22], [3, 7], [5, 40], [0, 2]])
    listed = np.zeros((23, 41), dtype=bool)
    listed[pairs[:, 0], pairs[:, 1]] = True
    yield "listed", x, y, {"pairs": pairs}, listed, None
    ids = {"x_ids": x_ids, "y_ids": y_ids}
    yield "listed with ids", x, y, {"pairs": pairs, **ids}, listed, listed | ~same(x_ids, y_ids)
    yield "ids as pairs", x, y, {"pairs": "ids", "x_ids": x_ids.int(), "y_ids": y_ids.int()}, same(x_ids, y_ids), None


@pytest.mark.parametrize("name", [name for name, *_ in problems()])
@pytest.mark.usefixtures("most_positives")
def test_every_measure(name):
    (problem,) = [rest for label, *rest in problems() if label == name]
    x, y, settings, positive, candidate = problem
    got = gk.evaluate(x, y, ks=KS, **settings)
    expected = evaluation(scores(x, y), positive, KS, candidate)
    agree(got, expected)
    for name in ("x_to_y.mean_rank", "y_to_x.mean_rank"):
        assert got[name] > got[name.replace(".", ".optimistic.")]  # there are ties
    for k in KS:
        recall = gk.recall_at_k(x, y, k, **settings)
        assert recall == (got[f"x_to_y.recall@{k}"], got[f"y_to_x.recall@{k}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_without_ties_in_every_dtype(dtype):
    torch.manual_seed(3)
    x, y = torch.randn(30, 16).to(dtype), torch.randn(60, 16).to(dtype)
    x_ids, y_ids = torch.arange(30), torch.arange(60) // 2
    got = gk.evaluate(x, y, x_ids=x_ids, y_ids=y_ids, ks=RSUM_KS)
    agree(got, evaluation(scores(x, y), same(x_ids, y_ids), RSUM_KS))


def test_five_captions_as_vse_evaluates_them():
    """i2t and t2i of VSE++ (arXiv 1707.05612): argsort, and the best of a picture's five captions."""
    torch.manual_seed(4)
    n = 41
    images = torch.nn.functional.normalize(torch.randn(n, 24, dtype=torch.float64), dim=1)
    owner = torch.arange(n).repeat_interleave(5)
    captions = torch.nn.functional.normalize(images[owner] + 0.4 * torch.randn(5 * n, 24, dtype=torch.float64), dim=1)
    d = scores(images, captions)
    i2t, t2i = np.zeros(n), np.zeros(5 * n)
    for index in range(n):
        order = np.argsort(d[index])[::-1]
        i2t[index] = min(np.where(order == caption)[0][0] for caption in range(5 * index, 5 * index + 5))
        for caption in range(5 * index, 5 * index + 5):
            t2i[caption] = np.where(np.argsort(d[:, caption])[::-1] == index)[0][0]
    got = gk.evaluate(images, captions, x_ids=torch.arange(n), y_ids=owner)
    rsum = 0
    for way, ranks in (("x_to_y", i2t), ("y_to_x", t2i)):
        recalls = [100.0 * len(np.where(ranks < k)[0]) / len(ranks) for k in (1, 5, 10)]
        assert [100 * got[f"{way}.recall@{k}"] for k in (1, 5, 10)] == pytest.approx(recalls)
        assert got[f"{way}.median_rank"] == np.floor(np.median(ranks)) + 1
        assert got[f"{way}.mean_rank"] == pytest.approx(ranks.mean() + 1)
        rsum += sum(recalls)
    assert got["rsum"] == pytest.approx(rsum)
    assert 100 < rsum < 550


@pytest.mark.usefixtures("most_positives")
def test_one_modality():
    x, labels = integers(37, 5, 5), torch.randint(0, 9, (37,), generator=torch.Generator().manual_seed(5))
    labels[[4, 20]] = torch.tensor([50, 51])  # alone
    got = gk.evaluate(x, x_ids=labels, ks=KS)
    others = ~np.eye(37, dtype=bool)
    expected = both_ties(scores(x, x), same(labels, labels), KS, others)
    agree(got, {f"x_to_x.{name}": value for name, value in expected.items()})
    assert got["x_to_x.without_positive"] == 2


def test_metric_and_normalize():
    torch.manual_seed(6)
    x, y, ids = torch.randn(20, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64), torch.arange(30) // 2
    positive = same(ids[:20], ids)
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T
    got = gk.evaluate(x, y, x_ids=ids[:20], y_ids=ids, normalize=True)
    agree(got, evaluation(cosine.numpy(), positive, RSUM_KS))
    metric = gk.StructuredSimilarity(8, block_size=4, dtype=torch.float64)
    with torch.no_grad():
        metric.diag.normal_()
        metric.blocks.normal_()
    got = gk.evaluate(x.requires_grad_(), y, x_ids=ids[:20], y_ids=ids, metric=metric)
    s = metric(x, y).detach().numpy()
    agree(got, evaluation(s, positive, RSUM_KS))
    recall = gk.recall_at_k(x, y, 3, x_ids=ids[:20], y_ids=ids, metric=metric)
    assert recall == pytest.approx([evaluation(s, positive, (3,))[f"{way}.recall@3"] for way in ("x_to_y", "y_to_x")])


@pytest.mark.parametrize("kind", ["ids", "rows", "listed"])
@pytest.mark.usefixtures("most_positives")
def test_folds(kind):
    """Blocks of 23 rows: 5 and 6. Two rows of y belong to none, and are candidates in each."""
    x, y = integers(23, 6, 7), integers(25 if kind == "rows" else 48, 6, 8)
    owner = torch.arange(25) if kind == "rows" else torch.cat((torch.arange(46).flip(0) // 2, torch.tensor([77, 78])))
    settings = {"x_ids": torch.arange(23), "y_ids": owner}
    if kind != "ids":
        rows, cols = np.nonzero(same(torch.arange(23), owner))
        settings = {} if kind == "rows" else {"pairs": torch.tensor(np.stack((rows, cols), 1))}
    got = gk.evaluate(x, y, folds=4, **settings)
    parts = []
    for first, last in ((0, 5), (5, 11), (11, 17), (17, 23)):
        cols = ((owner >= first) & (owner < last)) | (owner >= 23)
        parts.append(evaluation(scores(x[first:last], y[cols]), same(torch.arange(first, last), owner[cols]), RSUM_KS))
    expected = {name: sum(part[name] for part in parts) / 4 for name in parts[0]}
    expected |= {"x_to_y.queries": 23, "y_to_x.queries": y.shape[0]}
    expected |= {"x_to_y.without_positive": 0, "y_to_x.without_positive": 2}
    agree(got, expected, folds=4)


def test_folds_of_one_modality():
    x, labels = integers(12, 4, 9), torch.arange(12) // 3
    got = gk.evaluate(x, x_ids=labels, ks=KS, folds=2)
    others = ~np.eye(6, dtype=bool)
    parts = [
        both_ties(scores(t, t), same(ids, ids), KS, others) for t, ids in ((x[:6], labels[:6]), (x[6:], labels[6:]))
    ]
    expected = {f"x_to_x.{name}": sum(part[name] for part in parts) / 2 for name in parts[0]}
    agree(got, expected | {"x_to_x.queries": 12}, folds=2)


def test_many_folds_of_single_rows():
    """As long as there are: the only picture of a fold is always right."""
    x = integers(6, 4, 10)
    got = gk.evaluate(x, x, folds=6)
    assert got["x_to_y.recall@1"] == got["y_to_x.map"] == 1
    assert got["folds"] == 6


@pytest.mark.parametrize("most", [1 << 24, 7])
def test_nan_scores_are_counted_warned_of_and_never_help(most, monkeypatch):
    monkeypatch.setattr(module, "MOST_POSITIVES", most)
    x, y, ids = integers(9, 4, 11), integers(18, 4, 12), torch.arange(18) // 2
    x[2, 1], y[5] = torch.nan, torch.nan
    s = scores(x, y)
    with pytest.warns(UserWarning, match="evaluate: 26 scores are NaN"):  # 18 of row 2, 9 of column 5, one of both
        got = gk.evaluate(x, y, x_ids=ids[:9], y_ids=ids)
    agree(got, evaluation(s, same(ids[:9], ids), RSUM_KS), nan_scores=26)
    with pytest.warns(UserWarning, match="recall_at_k: 26 scores are NaN"):
        assert gk.recall_at_k(x, y, x_ids=ids[:9], y_ids=ids)[0] == got["x_to_y.recall@1"]


def test_all_nan_is_no_perfect_score():
    x = torch.full((6, 4), torch.nan)
    with pytest.warns(UserWarning, match="36 scores are NaN"):
        got = gk.evaluate(x, x)
    assert got["x_to_y.recall@5"] == got["x_to_y.optimistic.recall@5"] == 0
    with pytest.warns(UserWarning, match="30 scores are NaN"):
        assert gk.evaluate(x, x_ids=torch.zeros(6).int())["nan_scores"] == 30


def test_all_equal_is_no_perfect_score():
    x = torch.ones(20, 4)
    got = gk.evaluate(x, x, ks=(1, 19, 20))
    assert [got[f"x_to_y.recall@{k}"] for k in (1, 19, 20)] == [0, 0, 1]
    assert got["y_to_x.optimistic.recall@1"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_count_of_nan_scores_is_that_of_the_matrix(dtype):
    """inf - inf, 0 inf and NaN."""
    torch.manual_seed(13)
    x, y = torch.randn(12, 4, dtype=dtype), torch.randn(15, 4, dtype=dtype)
    x[0, :2], x[1, 3], x[3], x[4, 0] = torch.inf, torch.nan, 0, -torch.inf
    y[0, 0], y[1, :2], y[3, 2], y[4, 0], y[5, 3] = torch.inf, -torch.inf, torch.nan, 0, torch.inf
    s, itself = (accumulate(x) @ accumulate(t).T for t in (y, x))
    expected = int(s.isnan().sum())
    assert module.nan_scores(x, y) == module.nan_scores(y, x) == expected
    assert expected > 12 + 15
    assert module.nan_scores(x, x) == int(itself.isnan().sum())
    assert module.nan_scores(x, x, exclude_self=True) == int(itself.isnan().sum()) - int(
        itself.diagonal().isnan().sum()
    )
    assert module.nan_scores(x[5:], y[6:]) == 0


def test_finite_rows_that_overflow_are_multiplied_in_the_order_of_the_sweep(monkeypatch):
    torch.manual_seed(13)
    x, y = torch.randn(7, 300), torch.randn(9, 300)
    x[2], x[5] = 3e38 * torch.randn(300).sign(), 1e30
    rows, cols = torch.ones(7, 9).nonzero(as_tuple=True)
    expected = int(module.swept_scores(x, y, rows, cols).isnan().sum())
    products = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda *of: products.append(of) or product(*of))
    assert module.nan_scores(x, y) == expected
    assert 0 < expected <= 9
    assert products == []


def test_only_infinite_and_large_rows_are_multiplied_to_look_for_nan(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_computed_nan", lambda a, b, _: seen.append((a.shape[0], b.shape[0])) or 0)
    x, y = torch.randn(7, 4), torch.randn(9, 4)
    x[1], y[2, 0], x[4], x[5, 2] = torch.nan, torch.inf, 1e38, -torch.inf
    assert module.nan_scores(x, y) == 9
    assert seen == [(1, 9), (1, 9), (4, 1)]


def test_no_warning_without_nan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.evaluate(integers(5, 4, 14, 1), integers(5, 4, 15, 1), normalize=True)


def test_chunks_of_queries_do_not_hold_all_positives(monkeypatch):
    """Of 40 x 40 positives 5 queries at a time; both directions, and the same result."""
    x, y, ids = integers(40, 4, 16), integers(50, 4, 17), torch.zeros(50, dtype=torch.int64)
    ids[45:] = 1
    whole = gk.evaluate(x, y, x_ids=ids[:40], y_ids=ids)
    chunks = []
    of_queries = module.of_queries

    def recorded(segments, ks):
        chunks.append((segments.starts.shape[0] - 1, segments.pessimistic.shape[0]))
        return of_queries(segments, ks)

    monkeypatch.setattr(module, "of_queries", recorded)
    monkeypatch.setattr(module, "MOST_POSITIVES", 45 * 5 + 1)
    assert gk.evaluate(x, y, x_ids=ids[:40], y_ids=ids).to_dict() == whole.to_dict()
    assert chunks == [(5, 225)] * 8 + [(5, 200)] * 8 + [(10, 200)]


X, Y, IDS = integers(6, 4, 18), integers(8, 4, 19), torch.arange(8)
BAD = {
    "folds: expected the positives of a row of y in one fold, but row 1 has positives in folds 0 and 1 of 0..1": (
        ValueError,
        {"folds": 2, "x_ids": torch.tensor([0, 1, 2, 1, 3, 4]), "y_ids": IDS},
    ),
    "folds: expected the positives of a row of y in one fold, but row 7 has positives in folds 0 and 2 of 0..2": (
        ValueError,
        {"folds": 3, "pairs": torch.tensor([[5, 7], [1, 7], [3, 3]])},
    ),
    "folds: expected the positives of a row of x in one fold, but row 0 has positives in folds 0 and 1 of 0..1": (
        ValueError,
        {"folds": 2, "y": None, "x_ids": torch.tensor([0, 1, 2, 0, 1, 2])},
    ),
    "folds: expected a positive in each, got none in fold 1 of 0..2": (
        ValueError,
        {"folds": 3, "pairs": torch.tensor([[0, 0], [5, 7]])},
    ),
    "folds: expected at most the 6 rows of x, got 7": (ValueError, {"folds": 7}),
    "folds: expected a whole number >= 1, got 0": (ValueError, {"folds": 0}),
    "folds: expected a whole number >= 1, got float": (TypeError, {"folds": 2.0}),
    "ks: expected a whole number >= 1, got 0": (ValueError, {"ks": (1, 0)}),
    "ks: expected a whole number >= 1, got float": (TypeError, {"ks": (1, 5.0)}),
    "ks: expected whole numbers >= 1, as in (1, 5, 10), got int": (TypeError, {"ks": 5}),
    "ks: expected at least one whole number >= 1, got none": (ValueError, {"ks": ()}),
    "x_ids: expected the labels of x where y is None, got None (evaluate of one modality)": (ValueError, {"y": None}),
    "y_ids: expected None where y is None, got Tensor": (ValueError, {"y": None, "x_ids": IDS[:6], "y_ids": IDS[:6]}),
    "pairs: expected None where y is None, got str": (ValueError, {"y": None, "x_ids": IDS[:6], "pairs": "ids"}),
    "x_ids: expected at least one row with a positive, got none among 6 and 8 rows": (
        ValueError,
        {"x_ids": IDS[:6], "y_ids": IDS + 6},
    ),
    "x_ids: expected at least one row with a positive, got none among 6 and 6 rows": (
        ValueError,
        {"y": None, "x_ids": IDS[:6]},
    ),
    "pairs: expected at least one pair, got none among 6 and 8 rows": (ValueError, {"pairs": IDS[:0].view(0, 2)}),
    "x: expected at least one row, got none among 0 and 8 rows": (ValueError, {"x": X[:0]}),
    "x_ids: expected shape [6], got [8]": (ValueError, {"x_ids": IDS, "y_ids": IDS}),
    "y_ids: expected ids too, because the inputs have 6 and 8 rows "
    "(the ids of one serve both only if these are equal), got None": (ValueError, {"x_ids": IDS[:6]}),
    "x_ids: expected an integer dtype (not uint64) or bool, got torch.float32": (
        TypeError,
        {"x_ids": torch.zeros(6), "y_ids": IDS},
    ),
    "y: expected x's dtype torch.float64, got torch.float32": (TypeError, {"y": Y.float()}),
    "x: expected dtype float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"x": X.long()}),
    "y: expected at least the 6 rows of x (row i pairs with row i), got [5, 4]": (ValueError, {"y": Y[:5]}),
    "metric: expected a StructuredSimilarity or None, got str": (TypeError, {"metric": "cosine"}),
    "normalize: expected True or False, got int": (TypeError, {"normalize": 1}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    error, settings = BAD[message]
    arguments = {"x": X, "y": Y} | settings
    with pytest.raises(error) as raised:
        gk.evaluate(**arguments)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "k: expected a whole number >= 1, got 0", {"k": 0}),
        (TypeError, "k: expected a whole number >= 1, got tuple", {"k": (1, 5)}),
        (TypeError, "y: expected a tensor [M, D], got NoneType", {"y": None}),
        (ValueError, "pairs: expected at least one pair, got none among 6 and 8 rows", {"pairs": IDS[:0].view(0, 2)}),
    ],
)
def test_bad_input_of_recall_at_k(error, message, settings):
    with pytest.raises(error) as raised:
        gk.recall_at_k(**({"x": X, "y": Y} | settings))
    assert str(raised.value) == message
