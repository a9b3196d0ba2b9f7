"""`gk.explain`: which calls it takes, and that it computes nothing and changes nothing."""

import collections
import contextlib
import functools
import importlib
import threading

import pytest
import torch
from explained import CALLS, D, absent, extra, kib, needs_extension, routes, sides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gssf_kernels as gk
from gssf_kernels import _checks, _library, device_path

explaining = importlib.import_module("gssf_kernels.explain")  # whose name in the package is the function's


class Sentinel(TorchDispatchMode):
    """Below everything: fails where any op is to compute on values."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.add(str(function))
        for t in tree_leaves((args, kwargs, result)):
            assert not isinstance(t, torch.Tensor) or t.is_meta, function
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_computed(name, device, monkeypatch):
    function, options, _ = CALLS[name]
    x, y = torch.full((40, 16), torch.nan), torch.full((40, 16), torch.nan)
    metric = gk.StructuredSimilarity(16, 8, permutation=torch.randperm(16))
    ids = torch.zeros(40, dtype=torch.int64)
    x, y, ids = (t.to(device) for t in (x, y, ids))
    monkeypatch.setattr(explaining, "_disable_current_modes", contextlib.nullcontext)
    with Sentinel() as sentinel:
        gk.explain(function, x, y, x_ids=ids, metric=metric, **options)
    assert sentinel.seen


@needs_extension
def test_a_sentinel_is_touched_by_what_computes():
    a, b = torch.ones(3, 2), torch.ones(3, 2)
    with pytest.raises(AssertionError, match=r"gssf\.hardest_negatives"), Sentinel():
        gk.hardest_negatives(a, b)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_done_does_not_grow_with_the_sizes(name, device, monkeypatch):
    """Ten times the fp32 rows: ten times the turns of loops, of which as few are run."""
    count = collections.Counter()
    dispatch = device_path.DevicePath.__torch_dispatch__

    def counted(self, *arguments):
        count[rows] += 1
        return dispatch(self, *arguments)

    monkeypatch.setattr(device_path.DevicePath, "__torch_dispatch__", counted)
    function, options, _ = CALLS[name]
    for rows in (100_000, 1_000_000):
        x, y = absent(rows, "cpu", d=64) if device == "cpu" else sides(rows, d=64)
        explanation = gk.explain(function, x, y, **options)
        assert explanation.forward.flops >= 2 * rows * rows * 64 or not (_library._HAS_TRITON and device == "meta")
    assert count[1_000_000] <= count[100_000] + 2 < 500  # the last chunk may be shorter than the others, or not


def test_a_module_stays_as_it_is():
    loss = gk.TripletLoss(warmup=3, metric=gk.StructuredSimilarity(16, 8))
    before = {name: (t, t._version) for name, t in (*loss.named_parameters(), *loss.named_buffers())}
    explanation = gk.explain(loss, *sides(40, d=16))
    assert explanation.backward is not None
    assert {name: (t, t._version) for name, t in (*loss.named_parameters(), *loss.named_buffers())} == before
    assert (int(loss.step), loss._steps_seen, loss.training) == (0, 0, True)
    assert all(p.grad is None and p.device.type == "cpu" for p in loss.parameters())


def test_tensors_that_are_no_parameters_of_a_module():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.ones(16)
            self.tables = {"more": [torch.ones(16)]}

        def forward(self, x):
            return x * self.table + self.tables["more"][0]

    explanation = gk.explain(Scaled(), *sides(40, d=16, count=1))
    assert explanation.forward.kernels == {"aten::mul": 1, "aten::add": 1}


def test_inputs_stay_as_they_are():
    x, y = torch.ones(40, 16), torch.ones(40, 16, requires_grad=True)
    gk.explain(gk.triplet_loss, x, y)
    assert (x.requires_grad, y.requires_grad, y.grad) == (False, True, None)


def steps(explanation):
    return explanation.as_dict()["forward"], explanation.as_dict()["backward"]


def test_where_tensors_lie_is_all_the_same():
    x, y = sides(300, d=64)
    plain = steps(gk.explain(gk.info_nce_loss, x, y, scale=2.0))

    def of_a_dict(batch, options):
        return {"loss": [gk.info_nce_loss(batch["x"], batch["more"][0], scale=options["scale"])]}

    assert steps(gk.explain(of_a_dict, {"x": x, "more": [y]}, options={"scale": 2.0})) == plain
    assert steps(gk.explain(functools.partial(gk.info_nce_loss, x, scale=2.0), y)) == plain
    assert steps(gk.explain(functools.partial(gk.info_nce_loss, x, y), scale=2.0)) == plain
    loss = gk.InfoNCELoss(2.0, learnable=False)
    of_a_module = gk.explain(loss.forward, x, y)
    assert steps(of_a_module) == steps(gk.explain(loss, x, y))
    assert routes(of_a_module.forward.ops) == routes(gk.explain(gk.info_nce_loss, x, y, scale=2.0).forward.ops)


def test_fake_tensors_are_the_device_that_they_name():
    n = 2048
    assert gk.explain(gk.triplet_loss, *absent(n, "cuda")) == gk.explain(gk.triplet_loss, *sides(n))
    fake, real = absent(n, "cpu", d=16), sides(n, device="cpu", d=16)
    assert gk.explain(gk.triplet_loss, *fake) == gk.explain(gk.triplet_loss, *real)
    with FakeTensorMode():  # inside the mode too
        assert gk.explain(gk.triplet_loss, *fake).device == "cpu"


def test_the_parameters_go_where_the_inputs_are():
    loss = gk.InfoNCELoss(metric=gk.StructuredSimilarity(64, 8))
    explanation = gk.explain(loss, *sides(300, d=64))
    assert explanation.device.startswith("cuda")
    assert explanation == gk.explain(
        gk.InfoNCELoss(metric=gk.StructuredSimilarity(64, 8)).to("meta"), *sides(300, d=64)
    )


def test_what_gets_gradients():
    x, y = sides(300, d=64)
    both = gk.explain(gk.triplet_loss, x, y)
    assert both == gk.explain(gk.triplet_loss, x.requires_grad_(), y.requires_grad_())
    y.requires_grad_(False)
    assert (
        gk.explain(gk.sum_scores, x, y, "square").forward.flops
        != gk.explain(gk.sum_scores, x, y.requires_grad_(), "square").forward.flops
    )  # one product for each
    with torch.no_grad():
        assert gk.explain(gk.triplet_loss, x, y).backward is None
    ids = torch.empty(300, dtype=torch.int64, device="meta")
    assert gk.explain(lambda ids: ids + 1, ids).backward is None


def test_constants_and_new_tensors_of_a_function():
    table = torch.ones(16)

    def scaled(x):
        return (x * table + torch.arange(16) + torch.tensor(2.0) + torch.ones(16)).sum()

    explanation = gk.explain(scaled, torch.ones(40, 16))
    assert explanation.device == "cpu"
    assert explanation.backward is not None


def test_autocast_is_that_of_the_device():
    n, d = 300, 64
    (x, y), (meta_x, meta_y) = absent(n, "cpu", d=d), sides(n, d=d)
    plain = gk.explain(gk.info_nce_loss, meta_x, meta_y, scale=2.0)
    narrow = gk.explain(gk.info_nce_loss, *absent(n, "cpu", d=d, dtype=torch.bfloat16), scale=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        explanation = gk.explain(gk.info_nce_loss, x, y, scale=2.0)
        assert gk.explain(gk.info_nce_loss, meta_x, meta_y, scale=2.0) == plain
    assert routes(explanation.forward.ops) == routes(narrow.forward.ops)
    assert extra(explanation)[1] == extra(narrow)[1] + kib(casts=(2 * n * d, 2))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "function: expected a function, got int", lambda: gk.explain(3, torch.ones(2))),
        (ValueError, "args: expected at least one tensor", lambda: gk.explain(lambda: 1)),
        (ValueError, "args: expected tensors on one device", lambda: gk.explain(torch.add, torch.ones(2), *sides(2))),
        (TypeError, "args: expected dense", lambda: gk.explain(torch.neg, torch.eye(2).to_sparse())),
        (ValueError, "y: expected 8 columns", lambda: gk.explain(gk.triplet_loss, torch.ones(2, 8), torch.ones(2, 9))),
        (RuntimeError, "needs values", lambda: gk.explain(lambda x: x.sum().item(), torch.ones(2))),
        (RuntimeError, "needs the mask's values", lambda: gk.explain(lambda x: x[x > 0], *sides(2, count=1))),
        (RuntimeError, "tensors of cpu", lambda: gk.explain(lambda x: x + torch.ones(D), *sides(2, count=1))),
    ],
)
def test_errors_name_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_other_threads_see_nothing_of_it():
    types_seen = []

    def asked(x):
        thread = threading.Thread(target=lambda: types_seen.append(_checks.device_type(torch.ones(1))))
        thread.start()
        thread.join()
        types_seen.append(_checks.device_type(x))
        return x.sum()

    gk.explain(asked, *sides(3, count=1))
    assert types_seen == ["cpu", "cuda"]
    assert _checks.device_type(torch.ones(1)) == "cpu"
