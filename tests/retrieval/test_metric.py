"""`RetrievalMetric`: batches, ranks, devices; its results are those of `evaluate` on all rows."""

import copy
import json
import subprocess
import sys

import pytest
import retrieval_ranks
import torch

import gssf_kernels as gk

X, Y, X_IDS, Y_IDS = retrieval_ranks.rows()
KS = (1, 3)


def filled(**settings):
    metric = gk.RetrievalMetric(KS, **settings)
    metric.update(X[:3], Y[:2], X_IDS[:3], Y_IDS[:2])
    metric.update(X[3:], Y[2:], X_IDS[3:], Y_IDS[2:])
    return metric


EXPECTED = gk.evaluate(X, Y, x_ids=X_IDS, y_ids=Y_IDS, ks=KS).to_dict()


def test_batches_are_the_whole():
    metric = filled()
    assert metric.compute() == EXPECTED
    assert all(type(value) in (float, int) for value in metric.compute().values())  # as log_dict takes them


def test_rows_after_compute_and_reset():
    metric = gk.RetrievalMetric(KS)
    metric.update(X[:3], Y[:2], X_IDS[:3], Y_IDS[:2])
    before = metric.compute()
    assert before["x_to_y.queries"] == 3
    before["x_to_y.queries"] = 99  # the user may write to it
    assert metric.compute()["x_to_y.queries"] == 3
    metric.update(X[3:], Y[2:], X_IDS[3:], Y_IDS[2:])
    assert metric.compute() == EXPECTED
    metric.reset()
    with pytest.raises(ValueError, match="update: expected rows before compute, got none"):
        metric.compute()
    metric.update(X[:4], Y[:4])
    assert metric.compute() == gk.evaluate(X[:4], Y[:4], ks=KS).to_dict()


def test_forward_adds_rows_and_gives_the_measures_of_the_batch():
    metric = gk.RetrievalMetric(KS)
    metric(X[:3], Y[:2], X_IDS[:3], Y_IDS[:2])
    batch = metric(X[3:], Y[2:], X_IDS[3:], Y_IDS[2:])
    assert batch == gk.evaluate(X[3:], Y[2:], x_ids=X_IDS[3:], y_ids=Y_IDS[2:], ks=KS).to_dict()
    assert metric.compute() == EXPECTED != batch


def test_pairs_by_row_and_one_modality():
    metric = gk.RetrievalMetric(KS)
    for part in (slice(0, 2), slice(2, 7)):
        metric.update(X[part], Y[part])
    assert metric.compute() == gk.evaluate(X, Y[:7], ks=KS).to_dict()
    metric.reset()
    for part in (slice(0, 5), slice(5, 11)):
        metric.update(Y[part], x_ids=Y_IDS[part])
    assert metric.compute() == gk.evaluate(Y, x_ids=Y_IDS, ks=KS).to_dict()


def test_settings_reach_evaluate():
    assert filled(normalize=True).compute() == pytest.approx(
        gk.evaluate(X, Y, x_ids=X_IDS, y_ids=Y_IDS, ks=KS, normalize=True).to_dict()
    )
    folds = filled(folds=2)
    assert folds.compute() == gk.evaluate(X, Y, x_ids=X_IDS, y_ids=Y_IDS, ks=KS, folds=2).to_dict()
    assert folds.compute() != EXPECTED
    similarity = gk.StructuredSimilarity(4, block_size=2)
    with torch.no_grad():
        similarity.diag.copy_(torch.tensor([1.0, -2, 3, 0]))
    metric = filled(metric=similarity)
    expected = gk.evaluate(X, Y, x_ids=X_IDS, y_ids=Y_IDS, ks=KS, metric=similarity).to_dict()
    assert metric.compute() == expected != EXPECTED
    assert metric.metric is similarity


def test_weights_of_the_metric_stay_the_models():
    metric = filled(metric=gk.StructuredSimilarity(4, block_size=None))
    assert list(metric.parameters()) == []
    assert metric.state_dict() == {}


def test_rows_are_detached_and_move_but_keep_their_dtype():
    x = X.clone().requires_grad_()
    metric = gk.RetrievalMetric(KS)
    metric.update(2 * x, Y, X_IDS, Y_IDS)
    assert not metric.x[0].requires_grad
    assert metric.half().double().x[0].dtype == torch.float32
    assert metric.x_ids[0].dtype == torch.int64
    assert copy.deepcopy(metric).compute() == metric.compute()
    moved = metric.to("meta")
    assert {t.device.type for name in ("x", "y", "x_ids", "y_ids") for t in getattr(moved, name)} == {"meta"}
    assert metric.device.type == "meta"
    metric.reset()
    assert metric.device.type == "meta"  # where empty ranks make their tensors


def test_autocast_changes_nothing():
    torch.manual_seed(1)
    x, y = torch.randn(40, 16), torch.randn(40, 16)
    metric = gk.RetrievalMetric(KS)
    with torch.autocast("cpu", torch.bfloat16):
        batch = metric(x, y)
    assert batch == metric.compute() == gk.evaluate(x, y, ks=KS).to_dict()


@pytest.mark.parametrize(
    ("error", "message", "batch"),
    [
        (ValueError, "y: expected it in every batch or in none, got None in batch 2", (X, None, X_IDS)),
        (ValueError, "x_ids: expected it in every batch or in none, got None in batch 2", (X, Y[:7])),
        (ValueError, "x_ids, y_ids: expected ids of 7 and 11 rows, got None", (X, Y)),
        (ValueError, "x_ids: expected the labels of x where y is None, got None", (X,)),
        (ValueError, "y_ids: expected None where y is None, got Tensor", (X, None, X_IDS, X_IDS)),
        (ValueError, "x_ids: expected shape [7], got [11]", (X, Y, Y_IDS, Y_IDS)),
        (
            TypeError,
            "x: expected the first batch's dtype torch.float32, got torch.float64",
            (X.double(), Y.double(), X_IDS, Y_IDS),
        ),
        (ValueError, "x: expected 4 columns as in the first batch, got [7, 3]", (X[:, 1:], Y[:, 1:], X_IDS, Y_IDS)),
        (TypeError, "x: expected a tensor [N, D], got list", ([1.0], Y)),
    ],
)
def test_bad_batches_are_refused_and_leave_nothing(error, message, batch):
    metric = filled()
    with pytest.raises(error) as raised:
        metric.update(*batch)
    assert str(raised.value) == message
    assert metric.compute() == EXPECTED
    assert [len(getattr(metric, name)) for name in ("x", "y", "x_ids", "y_ids")] == [2] * 4


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "ks: expected a whole number >= 1, got 0", {"ks": (0,)}),
        (TypeError, "metric: expected a StructuredSimilarity or None, got str", {"metric": "cosine"}),
        (ValueError, "folds: expected a whole number >= 1, got 0", {"folds": 0}),
        (TypeError, "normalize: expected True or False, got int", {"normalize": 1}),
        (TypeError, "sync_on_compute: expected True or False, got NoneType", {"sync_on_compute": None}),
        (
            ValueError,
            "normalize: expected False with a metric, which has its own, got True",
            {"normalize": True, "metric": gk.StructuredSimilarity(4, block_size=2)},
        ),
    ],
)
def test_bad_settings(error, message, settings):
    with pytest.raises(error) as raised:
        gk.RetrievalMetric(**settings)
    assert str(raised.value) == message


def test_two_ranks(tmp_path):
    """Rows of both, in the order of ranks; see retrieval_ranks.py for what each has. This process is rank 0."""
    command = [sys.executable, retrieval_ranks.__file__, "1", str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            first = retrieval_ranks.results(0, tmp_path / "store")
            second = json.loads(other.communicate(timeout=100)[0])
        finally:
            other.kill()

    def evaluated(x=X, y=Y, **settings):
        return gk.evaluate(x, y, ks=KS, **settings).to_dict()

    ids = {"x_ids": X_IDS, "y_ids": Y_IDS}
    expected = {
        "uneven": evaluated(**ids),
        "bf16": evaluated(X.bfloat16(), Y.bfloat16(), normalize=True, **ids),
        "of rank 1 alone": evaluated(X[5:], Y[3:], x_ids=X_IDS[5:], y_ids=Y_IDS[3:]),
        "pairs by row": evaluated(y=Y[:7]),
        "one modality": evaluated(y=None, x_ids=X_IDS // 2),
        "no rows": "update: expected rows before compute, got none",
        "fp64": evaluated(X.double(), Y.double(), **ids),
    }
    for name, value in expected.items():
        assert first[name] == second[name] == value, name
    assert first["not synchronised"] == expected["uneven"]
    assert second["not synchronised"] == expected["of rank 1 alone"]
    assert first["other dtype"] == second["other dtype"]
    assert "compute: expected rows of one kind on all ranks, got (columns, dtype, states)" in first["other dtype"]
