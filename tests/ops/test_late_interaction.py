"""Late interaction: against loops over single fragments in fp64, on the CPU, in plain PyTorch and by Triton."""

import sys
from pathlib import Path

import device_ops
import pytest
import torch
from interpreted import DEVICE, DTYPES
from triton_checks import INF, few

import gssf_kernels as gk

ROOT = Path(__file__).parents[2]
# (N, R, M, T, D): one of everything, nothing on an edge of a tile, more regions or words than a tile.
SHAPES = [(1, 1, 1, 1, 1), (3, 5, 4, 7, 9), (2, 40, 3, 33, 20), (5, 17, 9, 2, 33)]
MASKS = ["none", "both", "regions", "words"]


def problem(n, r, m, t, d, masks, seed=0):
    """(a, b, a_mask, b_mask, grad) of whole numbers: scores are exact, and many are equal. Some have no fragment."""
    random = torch.Generator().manual_seed(seed + n * r + t)
    a = torch.randint(-2, 3, (n, r, d), generator=random).float()
    b = torch.randint(-2, 3, (m, t, d), generator=random).float()
    a_mask = torch.rand(n, r, generator=random) > 0.4 if masks in ("both", "regions") else None
    b_mask = torch.rand(m, t, generator=random) > 0.4 if masks in ("both", "words") else None
    if n > 1 and a_mask is not None:
        a_mask[1] = False
    if m > 2 and b_mask is not None:
        b_mask[2] = False
    grad = torch.randint(-2, 3, (n, m), generator=random).float() / 4
    return a, b, a_mask, b_mask, grad


def loops(a, b, a_mask, b_mask, grad, mean):
    """(scores, index, da, db), a fragment at a time."""
    (N, R, _), (M, T, _) = a.shape, b.shape
    a, b = a.double(), b.double()
    scores, index = torch.zeros(N, M).double(), torch.full((N, M, T), -1)
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    for n in range(N):
        regions = [r for r in range(R) if a_mask is None or a_mask[n, r]]
        for m in range(M):
            words = [t for t in range(T) if b_mask is None or b_mask[m, t]]
            for t in range(T):
                products = [float(a[n, r] @ b[m, t]) for r in regions]
                if not products:
                    continue
                best = regions[products.index(max(products))]
                index[n, m, t] = best
                if t in words:
                    share = 1 / len(words) if mean else 1
                    scores[n, m] += share * max(products)
                    da[n, best] += share * float(grad[n, m]) * b[m, t]
                    db[m, t] += share * float(grad[n, m]) * a[n, best]
    return scores, index, da, db


def check(results, expected, tolerance=1e-6):
    for ours, right in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), right.double(), rtol=tolerance, atol=tolerance)


def run(call, a, b, a_mask, b_mask, grad, mean, stored):
    """(scores, index, da, db) by the ops; stored: whether the backward gets the index."""
    inputs = a, b, a_mask, b_mask
    scores, index = call("late_interaction", *inputs, mean, True)
    alone, nothing = call("late_interaction", *inputs, mean, False)
    assert torch.equal(alone, scores)
    assert nothing.shape == (0,)
    assert index.dtype == torch.int16
    arguments = (grad.to(scores.dtype), index if stored else None, *inputs, mean)
    da, db = call("late_interaction_backward", *arguments, [True, True])
    for needs in ([True, False], [False, True]):
        for one, both, need in zip(call("late_interaction_backward", *arguments, needs), (da, db), needs, strict=True):
            if not need:
                assert one.numel() == 0
            elif call is device_ops.composite:  # whose sums PyTorch's threads add up in any order
                torch.testing.assert_close(one, both)
            else:
                assert torch.equal(one, both)
    return scores, index, da, db


def op(name, *arguments):
    return getattr(torch.ops.gssf, name)(*arguments)


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
every_mask = pytest.mark.parametrize("masks", MASKS)
every_option = pytest.mark.parametrize(("mean", "stored"), [(True, True), (False, False), (True, False)])


@every_option
@every_mask
@every_shape
@pytest.mark.parametrize("call", [op, device_ops.composite], ids=["op", "composite"])
def test_on_the_cpu(shape, masks, mean, stored, call):
    inputs = problem(*shape, masks)
    expected = loops(*inputs, mean)
    for dtype in (torch.float32, torch.float64):
        a, b = (t.to(dtype) for t in inputs[:2])
        check(run(call, a, b, *inputs[2:], mean, stored), expected)
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (t.to(dtype) for t in inputs[:2])
        scores, index, da, db = run(call, a, b, *inputs[2:], mean, stored)
        check((scores, index), expected[:2])
        check((da, db), expected[2:], 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("stored", [True, False])
def test_many_tiles_on_the_cpu(stored):
    """Captions that end in the middle of tiles, and more regions than a tile has rows."""
    for shape in ((23, 61, 70, 29, 12), (3, 700, 5, 300, 6)):
        inputs = problem(*shape, "both")
        definition = run(device_ops.composite, *inputs, True, True)
        check(run(op, *inputs, True, stored), definition)


@few
@every_option
@pytest.mark.parametrize(
    ("shape", "masks"),
    [((1, 1, 1, 1, 1), "none"), ((3, 5, 4, 7, 9), "both"), ((2, 20, 3, 18, 17), "regions"), ((2, 3, 4, 2, 5), "words")],
)
def test_by_triton(shape, masks, mean, stored):
    a, b, *rest = problem(*shape, masks)
    expected = loops(a, b, *rest, mean)
    for dtype in DTYPES:
        inputs = [t if t is None else t.to(DEVICE) for t in (a.to(dtype), b.to(dtype), *rest)]
        results = run(device_ops.on_cuda, *inputs, mean, stored)
        check(results, expected, 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@few
def test_not_a_number_by_triton():
    a, b, *_ = problem(3, 5, 4, 7, 9, "none")
    a[1, 3, 2] = torch.nan
    scores, index = (t.cpu() for t in device_ops.late_interaction(a.to(DEVICE), b.to(DEVICE), None, None, True, True))
    expected, places = op("late_interaction", a, b, None, None, True, True)
    assert torch.equal(scores.isnan(), expected.isnan())
    assert expected[1].isnan().all()
    assert not expected[0].isnan().any()
    assert torch.equal(index, places)
    assert (places[1] == 3).all()


def test_fragments_of_minus_infinity_and_of_nothing():
    a, b = torch.full((1, 2, 1), -INF), torch.ones(1, 2, 1)
    scores, index = op("late_interaction", a, b, None, None, True, True)
    assert scores == -INF
    assert (index == -1).all()
    for shape in ((0, 3, 2, 2, 4), (2, 0, 2, 2, 4), (2, 3, 0, 2, 4), (2, 3, 2, 0, 4)):
        n, r, m, t, d = shape
        a, b = torch.randn(n, r, d, requires_grad=True), torch.randn(m, t, d, requires_grad=True)
        scores = gk.late_interaction(a, b)
        assert scores.shape == (n, m)
        assert not scores.any()
        scores.sum().backward()
        assert not a.grad.any()
        assert not b.grad.any()


def test_an_index_out_of_range():
    a, b, *_ = problem(3, 5, 4, 7, 9, "none")
    index = torch.full((3, 4, 7), 5, dtype=torch.int16)
    with pytest.raises(ValueError, match="best: expected values in"):
        op("late_interaction_backward", torch.ones(3, 4), index, a, b, None, None, True, [True, True])


def test_equal_captions_have_equal_scores_wherever_tiles_end():
    random = torch.Generator().manual_seed(0)
    regions = torch.randn(40, 36, 24, generator=random)
    words = torch.randn(1, 29, 24, generator=random).expand(90, -1, -1)
    scores = gk.late_interaction(regions, words)
    assert torch.equal(scores, scores[:, :1].expand(-1, 90))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_few_regions_take_little_memory(run_fresh):
    """In a fresh process: besides the results, 16 MiB, a few times the inputs and the tiles of two threads."""
    code = """
import torch
import gssf_kernels as gk
from bench.clock import CpuClock
torch.set_num_threads(2)
a, b = torch.nn.functional.normalize(torch.randn(2, 2048, 1, 32), dim=-1)
words = b.expand(-1, 4, -1).contiguous()
gk.late_interaction(a[:2], words[:2])
print(CpuClock(torch.device("cpu")).peak_mib(lambda: gk.late_interaction(a, words)))
"""
    done = run_fresh(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 16 + 24
