"""Small dense losses in few launches, their Triton kernels against fp64: on a GPU where there is one, else interpreted.

As in test_triton.py, the interpreter needs a process of its own, and the kernels are compiled in test_lowering.py.
"""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

from gssf_kernels.kernels import logsumexp, tiles  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])  # interpreted bf16 is wrong
INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1, 1), (1, 40, 3), (40, 1, 8), (16, 32, 16), (17, 33, 17), (50, 97, 24), (70, 70, 40)]

needs_device = pytest.mark.skipif(DEVICE is None, reason="run by test_under_the_interpreter")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tiles.Sweep(16, 32, 16, 4, 2))
    monkeypatch.setattr(tiles, "MERGE_PARTS", 2)
    monkeypatch.setattr(tiles, "MERGE_LANES", 32)
    monkeypatch.setattr(tiles, "TERMS", 16)
    monkeypatch.setattr(tiles, "GRADIENTS", dict.fromkeys(tiles.GRADIENTS, tiles.Gradients(16, 32, 16, 4, 2)))


def given(n, m, d, dtype, twice=False):
    a = torch.randn(n, d, dtype=torch.float64).to(dtype)
    return a, None if twice else torch.randn(m, d, dtype=torch.float64).to(dtype)


def truth(a, b, scale):
    """(leaves, t, row and column log-sums, pairs) in fp64."""
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in (a, b, scale)]
    x, y = leaves[0], leaves[0] if b is None else leaves[1]
    t = leaves[2] * (x @ y.T)
    t.retain_grad()
    return leaves, t, t.logsumexp(1), t.logsumexp(0), t.diagonal()


def close(got, expected, dtype, like=None):
    """Within some roundings of dtype of the largest number."""
    rtol = 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    largest = (expected if like is None else like).nan_to_num(0, 0, 0).abs().max()
    torch.testing.assert_close(got.cpu().double(), expected, rtol=rtol, atol=rtol * float(largest), equal_nan=True)


def forward(a, b, scale, learnable=True):
    on = [t if t is None else t.to(DEVICE) for t in (a, b, scale if learnable else None)]
    constant = 1.0 if learnable else float(scale)
    return (*on, constant), logsumexp.logsumexp_scores(*on, constant)


@needs_device
@every_dtype
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_log_sums(n, m, d, learnable, dtype):
    a, b = given(n, m, d, dtype)
    scale = torch.tensor(0.75)
    _, (row_max, row_log, col_max, col_log, pair) = forward(a, b, scale, learnable)
    *_, rows, cols, own = truth(a, b, scale)
    for got, expected in ((row_max + row_log, rows), (col_max + col_log, cols), (pair, own)):
        assert got.dtype == torch.float32
        assert got.shape == expected.shape
        close(got, expected.detach(), torch.float32)


@needs_device
@pytest.mark.parametrize("special", [INF, -INF, NAN])
@pytest.mark.parametrize("place", ["row", "both"])
def test_log_sums_of_special_values(place, special):
    a, b = given(40, 70, 8, torch.float32)
    a[17, 0] = special
    if place == "both":
        b[3, 0] = b[33, 0] = special
    a[:, 1], b[:, 1] = 0, 0
    a[20, 1] = b[50, 1] = INF  # 0 times it is NaN
    scale = torch.tensor(0.75)
    _, (row_max, row_log, col_max, col_log, _) = forward(a, b, scale)
    *_, rows, cols, _ = truth(a, b, scale)
    for got, expected in ((row_max + row_log, rows), (col_max + col_log, cols)):
        assert torch.equal(got.isnan().cpu(), expected.isnan())
        close(got, expected.detach(), torch.float32)


@needs_device
@every_dtype
@pytest.mark.parametrize("lines", ["row", "col", "pair", "row pair", "row col pair"])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_gradients(n, m, d, lines, dtype):
    check_gradients(n, m, d, lines, dtype, learnable=(n + m) % 2 == 0)


@needs_device
@every_dtype
@pytest.mark.parametrize("n", [1, 16, 33, 50])
def test_gradients_of_one_side_twice(n, dtype):
    check_gradients(n, n, 24, "row col pair", dtype, twice=True)
    check_gradients(n, n, 24, "row", dtype, twice=True)


@needs_device
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_what_is_not_wanted_is_empty(needs):
    check_gradients(33, 50, 24, "row col pair", torch.float32, needs=needs)


@needs_device
@every_dtype
def test_gradients_below_the_smallest_half(dtype):
    """A mean over many leaves each score little: nothing of it may be lost."""
    check_gradients(33, 50, 24, "row col pair", dtype, needs=(True, False, True), size=1e-6)


def check_gradients(n, m, d, lines, dtype, twice=False, learnable=True, needs=(True,) * 3, size=1.0):
    a, b = given(n, m, d, dtype, twice)
    if size != 1:  # gradients that halves hold, of scores' gradients that they do not
        a, b = a / 512, b * 512
    scale = torch.tensor(0.75)
    inputs, found = forward(a, b, scale, learnable)
    leaves, t, *outputs = truth(a, b, scale)
    names = ("row", "col", "pair")
    grads = [
        size * torch.randn(len(t)) if name in lines.split() else None for name, t in zip(names, outputs, strict=True)
    ]
    sum((t * g.double()).sum() for t, g in zip(outputs, grads, strict=True) if g is not None).backward()
    on = [t if t is None else t.to(DEVICE) for t in grads]
    got = logsumexp.logsumexp_scores_backward(*on, *inputs, *found[:4], [*needs])
    for gradient, leaf, need in zip(got, leaves, needs, strict=True):
        if not need or leaf is None:
            assert gradient.numel() == 0
        else:
            assert gradient.shape == leaf.shape
            parts = t.grad * t.detach() / scale if leaf is leaves[2] else None  # which may cancel
            close(gradient, leaf.grad, dtype, like=None if parts is None else parts.abs().sum())


@needs_device
def test_a_line_of_nothing_gets_no_gradient():
    """All of a row at -inf: its log-sum is -inf, and nothing flows."""
    a, b = torch.full((3, 1), 1.0), torch.full((4, 1), -INF)
    inputs, found = forward(a, b, torch.tensor(1.0))
    assert found[0].tolist() == [-INF] * 3
    assert found[1].tolist() == [-INF] * 3
    drow = torch.ones(3).to(DEVICE)
    _, db, _ = logsumexp.logsumexp_scores_backward(drow, None, None, *inputs, *found[:4], [False, True, False])
    assert db.tolist() == [[0.0]] * 4


@needs_device
def test_what_is_too_large_or_empty_is_declined(monkeypatch):
    monkeypatch.setattr(tiles, "SMALL", 40 * 50)
    for n, m, declined in ((40, 50, False), (40, 51, True), (0, 5, True), (5, 0, True)):
        a, b = given(n, m, 8, torch.float32)
        assert (forward(a, b, torch.tensor(1.0))[1] is NotImplemented) == declined


@needs_device
def test_the_same_inputs_give_the_same_bits():
    a, b = given(50, 97, 24, torch.float32)
    runs = []
    for _ in range(2):
        inputs, found = forward(a, b, torch.tensor(0.75))
        grads = (found[1], found[3], found[4])
        runs.append((*found, *logsumexp.logsumexp_scores_backward(*grads, *inputs, *found[:4], [True] * 3)))
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(DEVICE is not None, reason="this process has a device or interprets")
def test_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
