"""Bad input: which error, which argument it names, what it says came."""

import math

import pytest
import torch

import gssf_kernels as gk

X, Y = torch.randn(4, 8), torch.randn(6, 8)
IDS4, IDS6 = torch.arange(4), torch.arange(6)

SIDES = [
    (torch.randn(4), Y, ValueError, r"\[N, D\].*got \[4\]", 0),
    (torch.randn(2, 4, 8), Y, ValueError, r"\[N, D\].*\[2, 4, 8\]", 0),
    (X, torch.randn(6, 9), ValueError, r"8 columns.*\[6, 9\]", 1),
    (X, torch.randn(3, 8), ValueError, r"at least the 4 rows.*\[3, 8\]", 1),
    (torch.randn(4, 0), torch.randn(4, 0), ValueError, r"at least one column.*\[4, 0\]", 0),
    (X, Y.double(), TypeError, r"torch.float32.*torch.float64", 1),
    (X.long(), Y.long(), TypeError, r"float32.*torch.int64", 0),
    (X.bool(), Y, TypeError, r"torch.bool", 0),
    (X.cfloat(), Y.cfloat(), TypeError, r"torch.complex64", 0),
    (X.to(torch.float8_e4m3fn), Y, TypeError, r"float8", 0),
    (X.to_sparse(), Y, TypeError, r"dense.*sparse", 0),
    (X.to("meta"), Y, ValueError, r"device", 1),
    (X.tolist(), Y, TypeError, r"tensor.*list", 0),
    (None, Y, TypeError, r"NoneType", 0),
]
CALLS = [
    (lambda a, b: gk.triplet_loss(a, b), "xy"),
    (lambda a, b: gk.triplet_loss(a, b, negatives="all"), "xy"),
    (lambda a, b: gk.TripletLoss()(a, b), "xy"),
    (lambda a, b: gk.goal_loss(a, b), "xy"),
    (lambda a, b: gk.goal_loss(a, b, pair="sig_ms"), "xy"),
    (lambda a, b: gk.gradient_space_loss(a, b, lambda anchor: anchor[:2]), "xy"),
    (lambda a, b: gk.hardest_negatives(a, b), "ab"),
    (lambda a, b: gk.pair_scores(a, b), "ab"),
]


_CALL_IDS = ["triplet", "triplet-all", "module", "goal", "goal-relative", "gradient-space", "hardest", "pairs"]


@pytest.mark.parametrize(("call", "names"), CALLS, ids=_CALL_IDS)
@pytest.mark.parametrize(("a", "b", "kind", "message", "culprit"), SIDES)
def test_sides(call, names, a, b, kind, message, culprit):
    with pytest.raises(kind, match=rf"^{names[culprit]}: .*{message}"):
        call(a, b)


BAD_IDS = [
    ({"x_ids": IDS4}, ValueError, "y_ids: .*4 and 6 rows"),
    ({"y_ids": IDS6}, ValueError, "x_ids: .*4 and 6 rows"),
    ({"x_ids": IDS6, "y_ids": IDS6}, ValueError, r"x_ids: expected shape \[4\], got \[6\]"),
    ({"x_ids": IDS4, "y_ids": IDS4}, ValueError, r"y_ids: expected shape \[6\], got \[4\]"),
    ({"x_ids": IDS4[:, None], "y_ids": IDS6}, ValueError, r"x_ids: .*got \[4, 1\]"),
    ({"x_ids": IDS4.to(torch.uint64), "y_ids": IDS6}, TypeError, "x_ids: .*not uint64.*got torch.uint64"),
    ({"x_ids": IDS4.float(), "y_ids": IDS6}, TypeError, "x_ids: .*got torch.float32"),
    ({"x_ids": IDS4, "y_ids": IDS6.to("meta")}, ValueError, "y_ids: expected device cpu, got meta"),
    ({"x_ids": [0, 1, 2, 3], "y_ids": IDS6}, TypeError, "x_ids: .*got list"),
]


@pytest.mark.parametrize(("ids", "kind", "message"), BAD_IDS)
def test_ids(ids, kind, message):
    for which in ("hardest", "all", "semihard"):
        with pytest.raises(kind, match=f"^{message}"):
            gk.triplet_loss(X, Y, negatives=which, **ids)
    for pair in ("con", "lin_ms"):
        with pytest.raises(kind, match=f"^{message}"):
            gk.goal_loss(X, Y, pair=pair, **ids)
    with pytest.raises(kind, match=f"^{message}"):
        gk.goal_weights(X @ Y.T, **ids)
    with pytest.raises(kind, match=f"^{message}".replace("x_ids", "a_ids").replace("y_ids", "b_ids")):
        gk.hardest_negatives(X, Y, **{k.replace("x_", "a_").replace("y_", "b_"): v for k, v in ids.items()})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"margin": -0.1}, ValueError, "margin: .*>= 0, got -0.1"),
        ({"margin": math.nan}, ValueError, "margin: .*got nan"),
        ({"margin": math.inf}, ValueError, "margin: .*got inf"),
        ({"margin": "0.2"}, TypeError, "margin: .*got str"),
        ({"margin": True}, TypeError, "margin: .*got bool"),
        ({"margin": 10**400}, ValueError, "margin: .*finite"),
        ({"margin": torch.tensor(0.2)}, TypeError, "margin: .*got Tensor"),
        ({"negatives": "hard"}, ValueError, "negatives: .*'hardest', 'all', 'semihard', got 'hard'"),
        ({"reduction": "avg"}, ValueError, "reduction: .*'sum', 'mean', 'none', got 'avg'"),
        ({"diagnostics": 1}, TypeError, "diagnostics: .*got int"),
    ],
)
def test_options(options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.triplet_loss(X, Y, **options)
    with pytest.raises(kind, match=f"^{message}"):
        gk.TripletLoss(**options)
    if {"margin", "reduction"} & options.keys():
        with pytest.raises(kind, match=f"^{message}"):
            gk.batch_hard_loss(X, IDS4, **options)
        with pytest.raises(kind, match=f"^{message}"):
            gk.BatchHardLoss(**options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"warmup": -1}, ValueError, "warmup: .*>= 0, got -1"),
        ({"warmup": 2.0}, TypeError, "warmup: .*got float"),
        ({"warmup": True}, TypeError, "warmup: .*got bool"),
        ({"warmup": 5, "negatives": "all"}, ValueError, "warmup: expected 0 with negatives='all'.*got 5"),
    ],
)
def test_warmup(options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.TripletLoss(**options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"triplet": "circle"}, ValueError, "triplet: .*'con', 'nca', 'cir', got 'circle'"),
        ({"pair": "ms"}, ValueError, "pair: .*'lin_ms', 'sig_ms', got 'ms'"),
        ({"tau": 0}, ValueError, "tau: .*> 0, got 0"),
        ({"tau": math.inf}, ValueError, "tau: .*finite.*got inf"),
        ({"alpha": -1.0}, ValueError, "alpha: .*> 0, got -1.0"),
        ({"beta": math.nan}, ValueError, "beta: .*> 0, got nan"),
        ({"beta": torch.tensor(10.0)}, TypeError, "beta: .*> 0, got Tensor"),
        ({"lam": math.inf}, ValueError, "lam: expected a finite number, got inf"),
        ({"lam": None}, TypeError, "lam: expected a number, got NoneType"),
        ({"positive_threshold": -0.1}, ValueError, "positive_threshold: .*>= 0, got -0.1"),
        ({"negative_threshold": "0"}, TypeError, "negative_threshold: .*>= 0, got str"),
    ],
)
def test_goal_options(options, kind, message):
    for call in (
        lambda: gk.goal_loss(X, Y, **options),
        lambda: gk.GoalLoss(**options),
        lambda: gk.goal_weights(X @ Y.T, **options),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            call()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction: .*got 'avg'"),
        ({"metric": torch.nn.Linear(3, 3)}, TypeError, "metric: .*Linear"),
        ({"diagnostics": None}, TypeError, "diagnostics: .*NoneType"),
    ],
)
def test_what_goal_shares_with_the_general_form(options, kind, message):
    for call in (
        lambda: gk.goal_loss(X, Y, **options),
        lambda: gk.GoalLoss(**options),
        lambda: gk.gradient_space_loss(X, Y, lambda anchor: anchor[:2], **options),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            call()


@pytest.mark.parametrize(
    ("scores", "kind", "message"),
    [
        (torch.randn(4), ValueError, r"\[N, M\].*got \[4\]"),
        (torch.randn(5, 4), ValueError, r"as many columns as rows.*got \[5, 4\]"),
        (torch.ones(4, 4).long(), TypeError, "torch.int64"),
        (torch.randn(4, 4).to_sparse(), TypeError, "dense.*sparse"),
        ([[1.0]], TypeError, "list"),
    ],
)
def test_scores(scores, kind, message):
    with pytest.raises(kind, match=f"^scores: .*{message}"):
        gk.goal_weights(scores)


NOT_ANCHORS = [
    (1.0, TypeError, r"tensors \[4\], got float"),
    (None, TypeError, r"tensors \[4\], got NoneType"),
    (torch.ones(()), ValueError, r"shape \[4\], got \[\]"),
    (torch.ones(4, 1), ValueError, r"shape \[4\], got \[4, 1\]"),
    (torch.ones(6), ValueError, r"shape \[4\], got \[6\]"),
    (torch.ones(4).long(), TypeError, "got torch.int64"),
    (torch.ones(4, device="meta"), ValueError, "on cpu, got meta"),
]


@pytest.mark.parametrize(("returned", "kind", "message"), NOT_ANCHORS)
def test_what_weights_and_value_give(returned, kind, message):
    for both in ((returned, torch.ones(4)), (torch.ones(4), returned)):
        with pytest.raises(kind, match=f"^weights: .*{message}"):
            gk.gradient_space_loss(X, Y, lambda anchor, both=both: both)
    with pytest.raises(kind, match=f"^value: .*{message}"):
        gk.gradient_space_loss(X, Y, lambda anchor: anchor[:2], value=lambda anchor: returned)


@pytest.mark.parametrize(
    ("returned", "got"), [(None, "NoneType"), (torch.ones(4), "Tensor"), ((torch.ones(4),) * 3, "3 of them")]
)
def test_weights_give_two(returned, got):
    with pytest.raises(TypeError, match=f"^weights: .*two tensors.*got {got}"):
        gk.gradient_space_loss(X, Y, lambda anchor: returned)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"weights": "con"}, TypeError, "weights: .*function, got str"),
        ({"value": 1.0}, TypeError, "value: .*function, got float"),
        ({"relative": True}, TypeError, "relative: .*RelativeTerms or None, got bool"),
        ({"relative": gk.RelativeTerms("lin")}, ValueError, r"relative\.kind: .*'exponential', 'linear', got 'lin'"),
        ({"relative": gk.RelativeTerms(alpha=0.0)}, ValueError, r"relative\.alpha: .*> 0, got 0.0"),
        ({"relative": gk.RelativeTerms(beta="1")}, TypeError, r"relative\.beta: .*got str"),
        ({"relative": gk.RelativeTerms(negative_threshold=-1)}, ValueError, r"relative\.negative_threshold: .*got -1"),
    ],
)
def test_gradient_space_options(options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.gradient_space_loss(X, Y, **{"weights": lambda anchor: anchor[:2], **options})


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (None, TypeError, "got NoneType"),
        (IDS6, ValueError, r"expected shape \[4\], got \[6\]"),
        (IDS4[:, None], ValueError, r"got \[4, 1\]"),
        (IDS4.to(torch.uint64), TypeError, "not uint64.*got torch.uint64"),
        (IDS4.float(), TypeError, "torch.float32"),
        (IDS4.to("meta"), ValueError, "device cpu, got meta"),
        ([0, 1, 2, 3], TypeError, "list"),
    ],
)
def test_labels(labels, kind, message):
    for call in (gk.batch_hard_loss, gk.BatchHardLoss()):
        with pytest.raises(kind, match=f"^labels: .*{message}"):
            call(X, labels)


def test_batch_hard_names_its_side():
    for x, kind in ((torch.randn(4), ValueError), (X.long(), TypeError), (None, TypeError), (X[:, :0], ValueError)):
        with pytest.raises(kind, match=r"^x: "):
            gk.batch_hard_loss(x, IDS4)


D, B = torch.ones(8), torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.tensor(1.0),), ValueError, r"x: .*\[\.\.\., D\].*got shape \[\]"),
        ((X.int(), D.int()), TypeError, "x: .*torch.int32"),
        ((torch.randn(4, 0),), ValueError, "x: .*at least one channel"),
        (("x",), TypeError, "x: .*str"),
        ((X, torch.ones(7)), ValueError, r"diag: expected shape \[8\].*got \[7\]"),
        ((X, D.double()), TypeError, "diag: .*float32, got torch.float64"),
        ((X, torch.ones(8, 1)), ValueError, r"diag: .*\[8, 1\]"),
        ((X, D.to("meta")), ValueError, "diag: .*device cpu, got meta"),
        ((X, D, torch.zeros(2, 3, 3)), ValueError, r"blocks: .*G\*b = 8.*\[2, 3, 3\]"),
        ((X, D, torch.zeros(2, 4, 5)), ValueError, r"blocks: .*\[2, 4, 5\]"),
        ((X, D, torch.zeros(8, 8)), ValueError, r"blocks: .*\[8, 8\]"),
        ((X, D, B.half()), TypeError, "blocks: .*float16"),
    ],
)
def test_projection(arguments, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.project(*arguments)


@pytest.mark.parametrize(
    ("permutation", "kind", "message"),
    [
        (torch.arange(7), ValueError, r"expected shape \[8\], got \[7\]"),
        (torch.arange(8).int(), TypeError, "torch.int64"),
        (torch.zeros(8, dtype=torch.long), ValueError, "exactly once"),
        (torch.arange(8) + 1, ValueError, "exactly once"),
        (list(range(8)), TypeError, "list"),
    ],
)
def test_permutation(permutation, kind, message):
    with pytest.raises(kind, match=f"^permutation: .*{message}"):
        gk.project(X, D, B, permutation=permutation)
    with pytest.raises(kind, match=f"^permutation: .*{message}"):
        gk.StructuredSimilarity(8, 4, permutation=permutation)


def test_a_permutation_spoilt_later_is_found():
    """By a checkpoint, say."""
    metric = gk.StructuredSimilarity(8, 4, permutation=torch.arange(8))
    metric.permutation.zero_()
    for call in (lambda: metric.project(X), lambda: gk.triplet_loss(X, Y, metric=metric)):
        with pytest.raises(ValueError, match=r"^permutation: .*exactly once"):
            call()


@pytest.mark.parametrize("normalize", ["no", None, 1])
def test_normalize_is_a_flag(normalize):
    with pytest.raises(TypeError, match=r"^normalize: "):
        gk.project(X, D, normalize=normalize)


def test_the_right_side_is_named():
    metric = gk.StructuredSimilarity(8, 4)
    for call in (
        lambda: metric.factors(X, None),
        lambda: metric(X, [1, 2]),
        lambda: gk.triplet_loss(X, [1, 2], metric=metric),
        lambda: gk.triplet_loss(X, [1, 2], metric=metric, negatives="all"),
    ):
        with pytest.raises(TypeError, match=r"^y: "):
            call()


def test_permutation_needs_blocks():
    with pytest.raises(ValueError, match=r"^permutation: .*blocks"):
        gk.project(X, D, permutation=torch.arange(8))
    with pytest.raises(ValueError, match=r"^permutation: .*block_size"):
        gk.StructuredSimilarity(8, None, permutation=torch.arange(8))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dim": 0}, ValueError, "dim: .*got 0"),
        ({"dim": 8.0}, TypeError, "dim: .*float"),
        ({"dim": 8, "block_size": 3}, ValueError, "block_size: .*divisor of dim=8, got 3"),
        ({"dim": 8, "block_size": 0}, ValueError, "block_size: .*got 0"),
        ({"dim": 8, "block_size": 16}, ValueError, "block_size: .*got 16"),
        ({"dim": 8, "block_size": True}, TypeError, "block_size: .*bool"),
        ({"dim": 8, "block_size": 4, "normalize": "no"}, TypeError, "normalize: .*str"),
        ({"dim": 8, "block_size": 4, "diagonal": 1}, TypeError, "diagonal: .*int"),
        ({"dim": 8, "block_size": 4, "dtype": torch.cfloat}, TypeError, "dtype: .*complex64"),
        ({"dim": 8, "block_size": 4, "dtype": torch.int32}, TypeError, "dtype: .*int32"),
    ],
)
def test_metric(options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.StructuredSimilarity(**options)


def test_metric_of_a_loss_must_be_one():
    with pytest.raises(TypeError, match=r"^metric: .*Linear"):
        gk.TripletLoss(metric=torch.nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"^metric: .*Linear"):
        gk.triplet_loss(X, Y, metric=torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"^diag: .*\[8\].*got \[16\]"):
        gk.triplet_loss(X, Y, metric=gk.StructuredSimilarity(16, 4))
    with pytest.raises(TypeError, match=r"^diag: .*torch.float64, got torch.float32"):
        gk.triplet_loss(X.double(), Y.double(), metric=gk.StructuredSimilarity(8, 4))


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        (torch.tensor([0, 1, 2, 6]), ValueError, r"-1\.\.5, got 0\.\.6"),
        (torch.tensor([0, 1, 2, -2]), ValueError, r"-1\.\.5, got -2\.\.2"),
        (torch.tensor([0, 1, 2]), ValueError, r"shape \[4\], got \[3\]"),
        (torch.tensor([0.0, 1, 2, 3]), TypeError, "float32"),
    ],
)
def test_pair_index(index, kind, message):
    with pytest.raises(kind, match=f"^index: .*{message}"):
        gk.pair_scores(X, Y, index)


def test_ops_called_directly_refuse_what_would_corrupt():
    """The ops trust their callers in most things, but never read or write outside a tensor."""
    if gk.backends()["pair_scores"]["cpu"] != "cpp":
        pytest.skip("the C++ extension is not built")
    out = torch.tensor([0, 9])
    with pytest.raises(ValueError, match="rows, cols"):
        torch.ops.gssf.pair_scores(X, Y, out, out)
    with pytest.raises(ValueError, match="rows, cols"):
        torch.ops.gssf.pair_scores_backward(torch.ones(2), out, out, X, Y, [True, True])
    fine = torch.tensor([0, 1])
    for a, b in ((X, Y[:, :4]), (X[0], Y), (X, Y.double())):
        with pytest.raises(ValueError, match="a, b"):
            torch.ops.gssf.pair_scores(a, b, fine, fine)
        with pytest.raises(ValueError, match="a, b"):
            torch.ops.gssf.pair_scores_backward(torch.ones(2), fine, fine, a, b, [True, True])
    assert torch.ops.gssf.pair_scores(X[:, :0], Y[:, :0], fine, fine).tolist() == [0, 0]
    with pytest.raises(ValueError, match="y: "):
        torch.ops.gssf.hardest_negatives_backward(
            *(torch.ones(n) for n in (4, 4, 6)),
            torch.zeros(4).long(),
            torch.zeros(6).long(),
            X,
            Y[:, :4],
            None,
            None,
            None,
            True,
            [True] * 4,
        )
    with pytest.raises(ValueError, match="hardest_negatives"):
        torch.ops.gssf.hardest_negatives(X.cfloat(), Y.cfloat(), None, None)
    with pytest.raises(ValueError, match="hardest_negatives"):
        torch.ops.gssf.hardest_negatives(Y, X, None, None)
    with pytest.raises(ValueError, match="a_ids"):
        torch.ops.gssf.hardest_negatives(X, Y, IDS4, IDS4)
    with pytest.raises(ValueError, match="diag"):
        torch.ops.gssf.project(X, None, torch.ones(7), None, None, False)
    with pytest.raises(ValueError, match="permutation"):
        torch.ops.gssf.project(X, None, None, B, torch.arange(8) + 1, False)
