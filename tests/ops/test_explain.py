"""`gk.explain`: what it reports, against numbers worked out by hand, and that it computes nothing."""

import collections
import contextlib
import functools
import importlib
import json
import pkgutil
import re
import sys
import threading
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gssf_kernels as gk
from gssf_kernels import _checks, _library, dense, device_path, plan, work

explaining = importlib.import_module("gssf_kernels.explain")  # whose name in the package is the function's

KIB = 1 << 10
D = 1024
needs_triton = pytest.mark.skipif(not _library._HAS_TRITON, reason="Triton is not installed")
needs_extension = pytest.mark.skipif(_library.EXTENSION_ERROR is not None, reason="the extension is not loaded")


def sides(n, dtype=torch.float32, device="meta", d=D, count=2):
    return [torch.empty(n, d, dtype=dtype, device=device) for _ in range(count)]


def absent(n, device, **options):
    """Fake tensors: of no memory, on a device that need not be there."""
    with FakeTensorMode():
        return sides(n, device=device, **options)


def routes(ops):
    """[(op, route)] as they come, with those that they call."""
    return [pair for op in ops for pair in ((op.name, op.route), *routes(op.ops))]


def extra(explanation):
    """KiB of (forward, kept, backward)."""
    passes = (explanation.forward.extra_mib, explanation.kept_mib, explanation.backward.extra_mib)
    return tuple(mib * 1024 for mib in passes)


def kib(**parts):
    """The sum of (count, bytes each), in KiB."""
    return sum(count * size for count, size in parts.values()) / KIB


@needs_triton
def test_triplet_of_128_on_cuda():
    n = 128
    explanation = gk.explain(gk.triplet_loss, *sides(n))
    assert (explanation.forward.launches, explanation.backward.launches) == (3, 2)
    assert explanation.forward.flops == 2 * n * n * D
    assert explanation.backward.flops == 0  # 2N + M rows are gathered
    kept = kib(scores=(3 * n, 4), places=(2 * n, 8))
    # Tiles of 64 x 64: each leaves a score and a place (int16) for each of its rows and columns.
    partial = kib(rows=(n * (n // 64), 4 + 2), columns=(n * (n // 64), 4 + 2))
    assert extra(explanation) == (kept + partial, kept, kept + kib(gradients=(3 * n, 4)))


@needs_triton
def test_triplet_of_8192_on_cuda():
    n = 8192
    explanation = gk.explain(gk.triplet_loss, *sides(n))
    assert (explanation.forward.launches, explanation.backward.launches) == (11, 14)
    assert (explanation.forward.flops, explanation.backward.flops) == (2 * n * n * D, 0)
    kept = kib(scores=(3 * n, 4), places=(2 * n, 8))
    # Certified: bf16 copies; of each of 64 x 64 tiles two scores and a place for 128 rows and 128 columns; and for each
    # row of either side a norm, what rounding lost, a bound and the exact score (fp64).
    copies = kib(bf16=(2 * n * D, 2), partial=(2 * 64 * n, 4 + 2 + 4), lines=(2 * n, 4 * 8), blocks=(2 * 64, 2 * 8))
    forward, kept_found, backward = extra(explanation)
    assert (forward, kept_found) == (kept + copies, kept)
    # Backward, when the 3N edges are sorted: the places that were kept, the gradients of the scores, twice; edges with
    # both their ends, sorted and in which order; two counters of N, and two of N + 1 where a row's edges begin.
    edges = kib(places=(2 * n, 8), gradients=(2 * 3 * n, 4), ends=(2 * 3 * n, 8), sort=(2 * 3 * n, 8))
    assert backward == edges + kib(counters=(2 * n, 8), begins=(2 * (n + 1), 8))


@needs_triton
def test_info_nce_of_16384_in_bf16_on_cuda():
    n = 16384
    explanation = gk.explain(gk.info_nce_loss, *sides(n, torch.bfloat16), scale=10.0)
    assert explanation.forward.flops == 2 * n * n * D  # one sweep
    assert explanation.backward.flops == 3 * 2 * n * n * D  # the scores again, ds b and dsᵀ a
    kept = kib(logs=(4 * n, 4))
    # Of tiles of 128 x 128 a maximum and a sum for each row and column; the scores of the pairs.
    assert extra(explanation)[:2] == (kept + kib(partial=(2 * n * n // 128, 2 * 4), pairs=(n, 4)), kept)
    # Backward: both gradients in fp32, and ds of a row panel of 2²⁶ scores; gradients of both log-sums and the pairs;
    # a sum for each tile of 128 x 64 of two panels (one is made before the other is let go), four sums of panels.
    panel = 2**26 // n
    tiles = kib(sums=(2 * (panel // 128) * (n // 64), 4), panels=(n // panel, 8))
    whole = kib(gradients=(2 * n * D, 4), ds=(panel * n, 2), lines=(3 * n, 4))
    assert extra(explanation)[2] == kept + whole + tiles
    sweeps = n // panel
    assert explanation.backward.kernels["sweep_kernel"] == sweeps
    assert explanation.backward.kernels["aten::mm"] + explanation.backward.kernels["aten::addmm"] == 2 * sweeps


@needs_triton
def test_siglip_of_8192_on_cuda():
    n = 8192
    explanation = gk.explain(gk.sigmoid_loss, *sides(n), scale=10.0, bias=-1.0)
    assert (explanation.forward.flops, explanation.backward.flops) == (
        3 * 2 * n * n * D,
        0,
    )  # the gradient is made in the forward
    kept = kib(gradients=(2 * n * D, 4), slopes=(2, 4))  # and what scale and bias get
    # One chunk of all 2²⁶ scores; of tiles of 16 x 64 three sums for each row; three sums of each row.
    chunk = kib(scores=(n * n, 4), partial=(3 * n * (n // 64), 4), rows=(3 * n, 4))
    numbers = kib(scale_and_bias=(2, 4))
    assert extra(explanation)[:2] == (kept - kib(slopes=(2, 4)) + chunk + numbers, kept)
    assert extra(explanation)[2] == kept + kib(slopes=(2, 4))
    assert explanation.backward.kernels == {"scaled_kernel": 1}


@needs_triton
def test_distillation_of_8192_on_cuda():
    n = 8192
    explanation = gk.explain(gk.relational_distillation_loss, *sides(n, count=3), lam=0.5, tau=0.07)
    # Three triangles, in two chunks of 2²⁵ scores at most: all columns of the first half of the rows, then what is left
    # of a square of a quarter. Then E x, where the second half's part of the first chunk comes by its transpose.
    scores = n * n // 2 + n * n // 4
    assert explanation.forward.flops == 3 * 2 * scores * D + 2 * n * n * D
    chunk = kib(scores=(3 * n * n // 2, 4), gradient=(n * D, 4))
    assert extra(explanation)[0] > chunk
    assert extra(explanation)[0] < chunk + kib(partial=(3 * (n // 2) * (n // 64), 4), rows=(4 * n, 4))
    kept = kib(gradient=(n * D, 4))
    assert kept <= extra(explanation)[1] < kept + 1
    assert explanation.backward.kernels == {"scaled_kernel": 1}


@needs_extension
def test_triplet_of_8192_on_the_cpu():
    n = 8192
    explanation = gk.explain(gk.triplet_loss, *absent(n, "cpu"))
    assert explanation.device == "cpu"
    assert (explanation.forward.launches, explanation.forward.kernels) == (None, {})
    assert (explanation.forward.flops, explanation.backward.flops) == (2 * n * n * D, 0)
    kept = kib(scores=(3 * n, 4), places=(2 * n, 8))
    gradients = kib(gradients=(3 * n, 4))
    if dense.bf16_unit() == "none":
        assert extra(explanation) == (kept + kib(packed=(n * D, 4)), kept, kept + gradients)
        assert explanation.forward.ops[0].route == "c++"
    else:  # both sides in bf16, and one in panels besides
        assert extra(explanation) == (kept + kib(packed=(3 * n * D, 2)), kept, kept + gradients)
        assert explanation.forward.ops[0].route == "certified"


CALLS = {  # of x and y; launches (forward, backward) of small ones as tests of launches have them
    "triplet": (gk.triplet_loss, {}, (3, 2)),
    "all negatives": (gk.triplet_loss, {"negatives": "all"}, (3, 1)),
    "info_nce": (gk.info_nce_loss, {"scale": 10.0}, (2, 2)),
    "sigmoid": (gk.sigmoid_loss, {"scale": 10.0, "bias": -1.0}, (2, 1)),
    "goal": (gk.goal_loss, {}, (3, 2)),
    "goal with relative terms": (gk.goal_loss, {"pair": "sig_ms"}, (2, 2)),
}


@needs_triton
@pytest.mark.parametrize("n", [128, 1024])
@pytest.mark.parametrize("name", CALLS)
def test_launches_of_few_scores(name, n):
    function, options, expected = CALLS[name]
    explanation = gk.explain(function, *sides(n, d=512), **options)
    assert (explanation.forward.launches, explanation.backward.launches) == expected
    of_ops = [op.totals()[0] for op in explanation.forward.ops]
    assert sum(of_ops, collections.Counter()) == collections.Counter(explanation.forward.kernels)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CALLS)
def test_loops_of_which_few_turns_are_run(name, dtype, monkeypatch):
    """The sums are those of all turns: of slabs, of chunks, and of a call that runs them all."""
    monkeypatch.setitem(plan.CHUNK_SCORES, "cuda", 3000 * 500)
    monkeypatch.setattr("gssf_kernels.triton.tiles.SLAB_ENTRIES", 1)
    function, options, _ = CALLS[name]
    a, b = (t.requires_grad_() for t in sides(5000, dtype, d=64))
    few = gk.explain(function, a, b, **options)
    with device_path.device_path() as path:
        loss = function(a, b, **options)
        torch.autograd.grad(loss, [a, b], torch.empty((), device="meta", dtype=loss.dtype))
    together = collections.Counter(few.forward.kernels) + collections.Counter(few.backward.kernels)
    assert together == collections.Counter(path.launches)
    monkeypatch.setattr(explaining._Recorder, "few", lambda self, turns: iter(turns))
    assert gk.explain(function, a, b, **options) == few


ONE_SIDE = {
    "distillation": lambda x: gk.relational_distillation_loss(x, x, x, lam=0.5, tau=0.07),
    "info_nce": lambda x: gk.info_nce_loss(x, x, scale=2.0),
}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ONE_SIDE)
def test_chunks_of_a_triangle_of_which_few_are_run(name, device, monkeypatch):
    """Runs of many chunks of as many rows, odd and even, and few chunks of ever more rows; the last one is ragged."""
    for n, chunk, dtype in ((1999, 16_000, torch.bfloat16), (1536, 500_000, torch.float32)):
        monkeypatch.setattr(plan, "CHUNK_SCORES", {"cpu": chunk, "cuda": chunk})
        (x,) = absent(n, device, dtype=dtype, d=64, count=1)
        few = gk.explain(ONE_SIDE[name], x)
        with monkeypatch.context() as whole:
            whole.setattr(explaining._Recorder, "few_halves", lambda self, turns: iter(turns))
            assert gk.explain(ONE_SIDE[name], x) == few


def test_turns_that_stand_for_others():
    """Sums over all turns, of what is alike and of what is linear in the columns that are left."""
    recorder = explaining._Recorder(device_path.Device("cpu"), [])
    for count in range(1, 14):
        turns = [(32 * k, 32) for k in range(count)] + [(32 * count, 7)]
        run = [(first, recorder.times) for first, _ in recorder.few_halves(turns)]
        assert sum(times for _, times in run) == count + 1
        assert sum(times * (1000 - first) for first, times in run) == sum(1000 - first for first, _ in turns)
        assert sum(recorder.times for _ in recorder.few(turns)) == count + 1
    assert recorder.times == 1


@needs_triton
def test_symmetric_scores_are_half():
    n = 4096
    (x,) = sides(n, torch.bfloat16, count=1)
    labels = torch.empty(n, dtype=torch.int64, device="meta")
    assert gk.explain(gk.batch_hard_loss, x, labels).forward.flops == n * n * D
    if _library.EXTENSION_ERROR is None:
        (x,) = absent(n, "cpu", count=1)
        assert gk.explain(gk.hardest_negatives, x, x).forward.flops == n * n * D


@needs_triton
def test_both_gradients_of_one_side():
    n = 128
    (x,) = sides(n, count=1)
    explanation = gk.explain(gk.info_nce_loss, x, x, scale=10.0)
    assert (explanation.forward.flops, explanation.backward.flops) == (2 * n * n * D, 3 * 2 * n * n * D)


@needs_triton
def test_a_metric_of_few_scores():
    """x goes through the blocks, and back with their gradient; y's gradient does too."""
    n, m, d, b = 300, 337, 64, 8
    (x,), (y,) = sides(n, d=d, count=1), sides(m, d=d, count=1)
    metric = gk.StructuredSimilarity(d, b)
    explanation = gk.explain(gk.triplet_loss, x.requires_grad_(), y.requires_grad_(), metric=metric)
    assert explanation.forward.flops == 2 * n * m * d + 2 * n * d * b
    assert explanation.backward.flops == 2 * (2 * n + m) * d * b


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_projection_by_blocks(device):
    n, b = 512, 32
    metric = gk.StructuredSimilarity(D, b, device=device)
    (x,) = absent(n, "cpu", count=1) if device == "cpu" else sides(n, count=1)
    explanation = gk.explain(gk.project, x.requires_grad_(), metric.diag, metric.blocks)
    if _library._HAS_TRITON if device == "meta" else _library.EXTENSION_ERROR is None:
        assert explanation.forward.flops == 2 * n * D * b
        assert explanation.backward.flops == 2 * 2 * n * D * b  # of x and of the blocks


def test_pytorchs_own_products():
    x, y = sides(300, d=64)
    explanation = gk.explain(lambda x, y: (x @ y.T).relu(), x, y)
    assert explanation.forward.ops == []
    assert explanation.forward.kernels == {"aten::mm": 1, "aten::relu": 1}
    assert explanation.forward.flops == 2 * 300 * 300 * 64
    assert explanation.backward.flops == 2 * explanation.forward.flops
    # The result of mm is let go, that of relu is the call's.
    assert extra(explanation) == (300 * 300 * 4 / KIB, 0, 300 * 300 * 4 / KIB)


def test_what_the_backward_starts_from_is_not_counted():
    """Nor are views of it."""
    x, y = sides(300, d=64)
    assert extra(gk.explain(lambda x: (x * 2).view(-1), x)) == (0, 0, 0)
    kept = gk.explain(lambda x, y: (x * y).exp(), x, y)
    assert extra(kept) == (300 * 64 * 4 / KIB, 0, 300 * 64 * 4 / KIB)


@needs_triton
def test_every_kernel_of_products_has_its_flops():
    """Any that reaches a `tl.dot`, but for the one whose products depend on labels."""
    from triton.runtime.jit import JITFunction

    from gssf_kernels import triton as kernels

    def multiplies(function, seen):
        if function in seen:
            return False
        seen.add(function)
        called = (function.fn.__globals__.get(name) for name in re.findall(r"\b([A-Za-z_]\w*)\(", function.src))
        return "tl.dot(" in function.src or any(multiplies(f, seen) for f in called if isinstance(f, JITFunction))

    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    functions = {n: f for module in modules for n, f in vars(module).items() if isinstance(f, JITFunction)}
    launched = {n for n, f in functions.items() if n.endswith("_kernel") and multiplies(f, set())}
    assert launched - {"positives_kernel"} == set(work.KERNELS)


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


class Call(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor
    a_ids: torch.Tensor | None = None
    b_ids: torch.Tensor | None = None
    route: str = ""


@needs_triton
def test_a_planned_op_gives_its_plan(monkeypatch):
    """Routes, reasons and tiles are those of plan.py, forced ones too."""

    def made(call):
        return work_of_a_launcher(call.a, call.b)

    def work_of_a_launcher(a, b):
        n, m = len(a), len(b)
        score, index = a.new_empty(n), torch.empty(n, dtype=torch.int64, device=a.device)
        return score, score.clone(), index, a.new_empty(m), torch.empty(m, dtype=torch.int64, device=a.device)

    seen = []
    module = types.ModuleType("gssf_kernels.triton.of_this_test")
    module.mine = lambda call, chosen: seen.append(chosen) or made(call)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    overload = torch.ops.gssf.hardest_negatives.default
    op = _library.Op("hardest_negatives", Call, made, made, "of_this_test.mine", plan.hardest, overload)
    monkeypatch.setitem(_library.OPS, "hardest_negatives", op)
    x, y = sides(128)
    (explanation,) = gk.explain(gk.hardest_negatives, x, y).forward.ops
    assert (explanation.route, explanation.why) == ("sweep", "128 x 128 scores: one sweep that stores none")
    assert explanation.tile == "64 x 64 x 16, 4 warps, 3 stages"
    assert [chosen.route for chosen in seen] == ["sweep"]
    assert "[64 x 64 x 16, 4 warps, 3 stages]" in str(gk.explain(gk.hardest_negatives, x, y))
    with plan.forced(hardest_negatives="certified"):
        (explanation,) = gk.explain(gk.hardest_negatives, x, y).forward.ops
        assert (explanation.route, seen[-1].route) == ("certified", "certified")
    (explanation,) = gk.explain(gk.hardest_negatives, x.double(), y.double()).forward.ops
    assert (explanation.route, explanation.why) == ("reference", "fp64: no matrix unit gains by it")


@needs_triton
def test_nested_ops_stand_under_the_one_that_calls_them():
    explanation = gk.explain(gk.info_nce_loss, *sides(4096), scale=2.0)
    (loss,) = explanation.forward.ops
    assert [op.name for op in loss.ops] == ["logsumexp_scores", "anchor_terms"]
    lines = str(explanation).splitlines()
    assert lines[0] == "info_nce_loss on cuda, compute capability 9.0, 132 multiprocessors"
    assert lines[1].startswith(f"forward: {explanation.forward.launches} launches, 34.36 GFLOP, ")
    assert [len(line) - len(line.lstrip()) for line in lines[2:5]] == [2, 4, 6]
    assert any(line.startswith("backward: ") for line in lines)
    as_dict = json.loads(json.dumps(explanation.as_dict()))
    assert as_dict["forward"]["ops"][0]["ops"][1]["name"] == "anchor_terms"
    assert as_dict["forward"]["launches"] == sum(as_dict["forward"]["kernels"].values())


@needs_extension
@pytest.mark.parametrize(("unit", "least"), [("amx", 1 << 18), ("avx512_bf16", 1 << 20)])
def test_what_the_cpu_mines_certified(unit, least, monkeypatch):
    monkeypatch.setattr(dense, "bf16_unit", lambda: unit)

    def mined(n, dtype=torch.float32):
        (op,) = gk.explain(gk.hardest_negatives, *absent(n, "cpu", dtype=dtype, d=40)).forward.ops
        return op

    n = round(least**0.5)
    assert mined(n).route == "certified"
    assert mined(n).why == f"{n:,} x {n:,} scores of float32, at least {least:,}: exact winners by the bf16 unit {unit}"
    assert mined(n - 1).why.endswith(f"of float32, fewer than {least:,}: a sweep that stores none")
    assert (mined(n, torch.float16).route, mined(n, torch.bfloat16).route) == ("certified", "c++")
    assert mined(n, torch.float64).why == f"{n:,} x {n:,} scores of float64: a sweep that stores none"
    # bf16 rows of 64 channels (from 40), of both sides and in panels: besides five results of N.
    explanation = gk.explain(gk.hardest_negatives, *absent(n, "cpu", d=40))
    assert extra(explanation)[0] == kib(packed=(3 * n * 64, 2), pairs=(n, 4))


def test_the_thresholds_are_those_of_csrc():
    source = (Path(__file__).parents[2] / "csrc" / "hardest.cpp").read_text()
    (shifts,) = re.findall(r"certified_least\(Bf16Unit unit\) \{ return unit == Bf16Unit::amx \? (.*); \}", source)
    assert [eval(text) for text in shifts.split(" : ")] == [work.CERTIFIED[unit] for unit in ("amx", "avx512_bf16")]


@needs_extension
def test_panels_are_as_large_as_packs():
    for dtype, of in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        y = torch.ones(37, 70, dtype=dtype)
        packed = torch.ops.gssf.pack(y, of)
        explanation = work.FAKES["pack"](y.to("meta"), of)
        assert (explanation.shape, explanation.dtype) == (packed.shape, packed.dtype)


def test_without_triton_cuda_runs_plain_pytorch(monkeypatch):
    monkeypatch.setattr(_library, "_HAS_TRITON", False)
    explanation = gk.explain(gk.triplet_loss, *sides(128))
    assert {(op.route, op.why) for op in explanation.forward.ops} == {("composite", "Triton is not installed")}
    assert all(name.startswith("aten::") for name in explanation.forward.kernels)
    assert explanation.forward.flops >= 2 * 128 * 128 * D


def test_without_the_extension_the_cpu_runs_plain_pytorch(monkeypatch):
    for module in (_library, dense):
        monkeypatch.setattr(module, "EXTENSION_ERROR", "left aside")
    monkeypatch.setattr(work, "native", lambda name: False)
    explanation = gk.explain(gk.info_nce_loss, *absent(128, "cpu"), scale=2.0)
    assert {route for _, route in routes((*explanation.forward.ops, *explanation.backward.ops))} == {"pytorch"}
    assert explanation.forward.ops[0].why.startswith("the compiled extension is not loaded")
    assert explanation.forward.flops == 2 * 128 * 128 * D
    assert explanation.backward.flops == 2 * 2 * 128 * 128 * D  # so few scores are kept


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
