"""`gk.explain`: launches, FLOPs and memory, against numbers worked out by hand."""

import collections
import importlib
import pkgutil
import re

import pytest
import torch
from explained import CALLS, KIB, D, absent, extra, kib, needs_extension, needs_triton, sides

import gssf_kernels as gk
from gssf_kernels import _library, dense, device_path, plan, work

explaining = importlib.import_module("gssf_kernels.explain")  # whose name in the package is the function's


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
