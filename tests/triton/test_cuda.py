"""On a card: the tile table's own lines, TF32, more than 2³¹ scores or elements, streams, devices and determinism.

Small tiles meet every edge in tests marked `triton`, the case table runs on CUDA in `ops/test_values.py`, and graphs
are captured in `ops/test_capture.py`; nothing of it is repeated here.
"""

import pytest
import torch
from accuracy import error, gradients
from cases import CASES, FLOOR, LARGE
from representative import REPRESENTATIVE, leaves, step

import gssf_kernels as gk

pytest.importorskip("triton")

from kernel_modules import MODULES
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.gpu
CUDA = "cuda"
INF = float("inf")
# Of TF32's ten bits, four roundings: two operands, which may be rounded or cut off.
TF32_FLOOR = 4e-3
# Functions whose gradient follows a choice among scores: TF32 may choose otherwise than the truth does.
CHOOSING = {"hardest_negatives", "triplet_loss", "goal_loss", "gradient_space_loss", "batch_hard_loss"}


@pytest.fixture
def precision(request):
    """Of fp32 products, by torch.set_float32_matmul_precision()."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


both_precisions = pytest.mark.parametrize("precision", ["highest", "high"], indirect=True)


def check(case, dtype, precision):
    """As test_values.py does: at most twice plain PyTorch's own error, plus roundings."""
    tensors, options = case.inputs(dtype, device=CUDA)
    truth = gradients(case.reference, {name: t.double() for name, t in tensors.items()}, options)
    plain, got = (gradients(run, tensors, options) for run in (case.reference, case.ours))
    tf32 = dtype == torch.float32 and precision == "high"
    stages = [0] if tf32 and case.function in CHOOSING else [0, 1]
    for stage in stages:
        for k, (g, p, t) in enumerate(zip(got[stage], plain[stage], truth[stage], strict=True)):
            allowed = 2 * error(p, t) + (TF32_FLOOR if tf32 else FLOOR[g.dtype])
            name = ("output", "gradient")[stage]
            assert error(g, t) <= allowed, f"{name} {k}: error {error(g, t):.3g}, allowed {allowed:.3g}"


@both_precisions
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_fp32(case, precision):
    check(case, torch.float32, precision)


SMALL_TILES = [case for case in CASES if "513x513x24" in case.name or "511x1030x100" in case.name]


@pytest.mark.parametrize("precision", ["high"], indirect=True)
@pytest.mark.parametrize("case", SMALL_TILES, ids=str)
def test_tf32_on_small_tiles(case, precision):
    """Sums of hundreds of terms: the loss of a few pairs may be a small difference, which TF32 leaves little of."""
    check(case, torch.float32, precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_sixteen_bits(case, dtype):
    check(case, dtype, "highest")


@both_precisions
def test_what_tf32_chooses_is_nearly_the_best(precision):
    """The chosen negatives' true scores, where gradients are not compared above."""
    for case in (case for case in LARGE if case.function == "hardest_negatives"):
        tensors, options = case.inputs(torch.float32, device=CUDA)
        results = gk.hardest_negatives(**tensors, **options)
        s = tensors["a"].double() @ tensors["b"].double().mT
        same = gk.reference.positives(**tensors, **options)
        s = s.masked_fill(same, -INF)
        for best, index, scores in ((s.amax(1), results.row_index, s), (s.amax(0), results.col_index, s.mT)):
            has_negative = index >= 0
            assert torch.equal(has_negative, best != -INF)
            chosen = scores[has_negative].gather(1, index[has_negative, None])[:, 0]
            floor = TF32_FLOOR if precision == "high" else 1e-6
            assert float((best[has_negative] - chosen).max()) <= floor * float(best[has_negative].abs().max())


@pytest.mark.parametrize("precision", ["highest"], indirect=True)
@pytest.mark.parametrize(("n", "m", "d"), [(4096, 4096, 512), (2500, 3001, 77)])
def test_certified_mining_gives_the_bits_of_the_cpu(n, m, d, precision):
    a, b = (torch.nn.functional.normalize(torch.randn(k, d), dim=1) for k in (n, m))
    b[40:80] = b[1000:1040]  # ties
    ids = torch.arange(m) // 3
    for labels in (None, ids):
        mine = None if labels is None else labels[:n].clone()
        results = gk.hardest_negatives(a.to(CUDA), b.to(CUDA), a_ids=None if mine is None else mine.to(CUDA),
                                     b_ids=None if labels is None else labels.to(CUDA))  # fmt: skip
        for got, expected in zip(results, gk.hardest_negatives(a, b, a_ids=mine, b_ids=labels), strict=True):
            assert torch.equal(got.cpu(), expected)
    made = gk.rescored_candidates(a.to(CUDA), b.to(CUDA))
    assert n + m <= made <= 40 * (n + m)


@pytest.mark.parametrize("d", [64, 1024, 8192])
@pytest.mark.parametrize("kind", ["normal", "of one sign", "of many sizes"])
def test_what_a_tensor_core_loses_is_within_what_the_bound_allows(kind, d):
    """Four roundings of fp32 for every term: the γ of triton/certified.py."""
    a, b = torch.randn(2, 512, d, device=CUDA).unbind()
    if kind == "of one sign":
        a, b = a.abs(), b.abs()
    if kind == "of many sizes":
        a, b = (x * 10.0 ** torch.empty(512, d, device=CUDA).uniform_(-6, 6) for x in (a, b))
    a, b = a.bfloat16(), b.bfloat16()
    results = gk.hardest_negatives(a, b)
    x, y = a.double(), b.double()
    off = (results.row_score.double() - (x * y[results.row_index]).sum(1)).abs()
    size = x.norm(dim=1) * y[results.row_index].norm(dim=1)
    share = float((off / size).max()) / (d * 2.0**-22)
    print(f"{kind}, D {d}: {share:.2g} of what is allowed")
    assert share <= 1


@pytest.mark.timeout(180)  # compiles all of it, where a test otherwise has 60 s (bench/gpu_check.sh)
def test_nothing_spills_on_the_card():
    """What the driver says of every kernel of the table's lines that runs here."""
    kernels = [value for module in MODULES for value in vars(module).values() if isinstance(value, JITFunction)]
    for kernel in kernels:
        kernel.device_caches.clear()
    for dtype in (torch.float32, torch.bfloat16):
        for case in LARGE:
            tensors, options = case.inputs(dtype, device=CUDA)
            step(case, leaves(tensors), options)
    torch.cuda.synchronize()
    seen = 0
    for kernel in kernels:
        for compiled, *_ in kernel.device_caches.values():
            for results in compiled.values():
                assert results.n_spills == 0, f"{results.name}: {results.n_spills}, {results.n_regs} registers"
                seen += 1
    assert seen > 40


# Sizes past 32 bits


def best_negative(scores, places):
    """(score, index) of every row of scores [K, M], that at places [K] left out."""
    scores[torch.arange(len(places), device=scores.device), places] = -INF
    return scores.max(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_more_scores_than_32_bits_count(dtype):
    """N = M = 50,000: 2.5e9 scores; a sample of rows and columns, the first and the last among them."""
    n, d = 50_000, 16
    a, b = (torch.randn(n, d, device=CUDA).to(dtype) for _ in range(2))
    sample = torch.cat((torch.randint(n, (500,)), torch.tensor([0, n - 1]))).to(CUDA)
    pair, *results = torch.ops.gssf.hardest_negatives(a, b, None, None)[:5]
    torch.testing.assert_close(pair.double(), (a.double() * b.double()).sum(1), rtol=1e-5, atol=1e-4)
    for side, other, score, index in ((a, b, *results[:2]), (b, a, *results[2:])):
        exact, place = best_negative(side[sample].double() @ other.double().mT, sample)
        torch.testing.assert_close(score[sample].double(), exact, rtol=1e-5, atol=1e-4)
        assert (index[sample] == place).double().mean() > 0.98  # the rest may be ties to rounding
        assert int(index.min()) >= 0
        assert int(index.max()) < n
    rows, cols = gk.logsumexp_scores(a, b, scale=0.3)
    for side, other, lse in ((a, b, rows), (b, a, cols)):
        exact = (0.3 * (side[sample].double() @ other.double().mT)).logsumexp(1)
        torch.testing.assert_close(lse[sample].double(), exact, rtol=1e-5, atol=1e-5)
    sums = gk.sum_scores(a, b, "softplus", scale=0.3, bias=-1.0, positives="negate", reduction="none")
    t = 0.3 * (a[sample].double() @ b.double().mT) - 1
    each = torch.arange(len(sample), device=CUDA)
    t[each, sample] *= -1
    torch.testing.assert_close(sums[sample].double(), torch.nn.functional.softplus(t).sum(1), rtol=1e-5, atol=1e-4)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    gk.triplet_loss(x, y).backward()
    terms = results[0][sample] + 0.2 - pair[sample] >= 0  # what a row gives itself, and what columns give it
    assert x.grad[sample][terms].abs().sum(1).min() > 0
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


def room(gib):
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= gib * 2**30


@pytest.mark.skipif(not room(24), reason="less than 24 GiB free on the card")
def test_an_operand_of_more_elements_than_32_bits_count():
    m, d, n = 2_200_000, 1024, 130
    assert m * d > 1 << 31
    b = torch.randn(m, d, device=CUDA, dtype=torch.bfloat16)
    a = torch.randn(n, d, device=CUDA, dtype=torch.bfloat16)
    a[7] = b[m - 1]  # the last row is its best negative by far, and the one before for another
    a[8] = b[m - 2]
    results = gk.hardest_negatives(a, b)
    assert results.row_index[7:9].tolist() == [m - 1, m - 2]
    last = b[-4096:].double() @ a.double().mT  # [4096, N]
    torch.testing.assert_close(results.col_score[-4096:].double(), last.amax(1), rtol=1e-5, atol=1e-3)
    assert (results.col_index[-4096:] == last.argmax(1)).double().mean() > 0.98
    x, y = a.clone().requires_grad_(), b.requires_grad_()
    index = torch.arange(m - n, m, device=CUDA)
    scores = gk.pair_scores(x, y, index)
    torch.testing.assert_close(scores.double(), (a.double() * b[index].double()).sum(1), rtol=1e-5, atol=1e-3)
    dx, dy = torch.autograd.grad(scores.sum(), [x, y])
    assert torch.equal(dy[index], a)
    assert torch.equal(dx, b[index])
    assert not dy[: m - n : 4096].any()
    b = b.detach()
    projected = gk.project(b, torch.full((d,), 2.0, device=CUDA, dtype=torch.bfloat16))
    assert torch.equal(projected[-1000:], 2 * b[-1000:])


# Streams, devices, determinism


def test_two_streams_at_once():
    """Calls in turns on two streams give what they give alone."""
    names = ("metric-130x200x64-b16", "infonce-ids-random", "goal-cir-lin_ms", "batch-hard-random-300x24")
    for case in (case for case in REPRESENTATIVE if case.name in names):
        problems = [case.inputs(torch.float32, seed=seed, device=CUDA) for seed in (0, 1)]
        problems = [(leaves(tensors), options) for tensors, options in problems]
        alone = [step(case, *problem) for problem in problems]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        results = []
        for _ in range(5):
            for which, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results.append((which, step(case, *problems[which])))
        torch.cuda.synchronize()
        for which, (values, grads) in results:
            for got, expected in zip((*values, *grads), (*alone[which][0], *alone[which][1]), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_a_device_that_is_not_the_current_one(case):
    tensors, options = case.inputs(torch.float32, device="cuda:1")
    assert torch.cuda.current_device() == 0
    values, grads = step(case, leaves(tensors), options)
    assert all(t is None or t.device == torch.device("cuda:1") for t in (*values, *grads))
    tensors, options = case.inputs(torch.float32, device="cuda:0")
    first = step(case, leaves(tensors), options)
    for got, expected in zip((*values, *grads), (*first[0], *first[1]), strict=True):
        if expected is not None:
            torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [*REPRESENTATIVE, *LARGE[:4]], ids=str)
def test_the_same_bits_at_every_run(case, dtype):
    tensors, options = case.inputs(dtype, device=CUDA)
    first = step(case, leaves(tensors), options)
    for _ in range(4):
        again = step(case, leaves(tensors), options)
        for got, expected in zip((*again[0], *again[1]), (*first[0], *first[1]), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
