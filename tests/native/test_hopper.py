"""The Hopper sweep of csrc/cuda: on an emulated card everywhere, on a real one where there is one and it was built.

The emulator (hopper_emulator.h, in the module `internals`) runs the kernel sources themselves on the CPU; copies and
products happen at once, as late as can be or at random. It knows nothing of the card's speed, and takes the PTX ISA at
its word.
"""

import math

import device_ops
import pytest
import torch

import gssf_kernels as gk
from gssf_kernels import plan
from gssf_kernels.ops.logsumexp import Call
from gssf_kernels.triton import hopper, tiles

DTYPES = (torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")
WHEN = ["AT_ONCE", "LATE", "AT_RANDOM"]  # of the emulator
REAL = torch.cuda.is_available() and torch.cuda.get_device_capability(0) == (9, 0) and plan.hopper_built()

not_built = pytest.mark.skipif(not REAL, reason="no sm_90 device, or csrc/cuda was not built")
ON_CARD = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.hopper, not_built])
needs_card = pytest.mark.parametrize("device", [ON_CARD], indirect=True)  # too much for the emulator


@pytest.fixture
def emulator(internals):
    """The settings of the emulated card, on which torch.ops.gssf_emulated run."""
    internals.emulator.settings()
    return internals.emulator


@pytest.fixture(params=["emulated", ON_CARD])
def device(request, monkeypatch):
    """Where inputs lie: on the card, or on the CPU, for the emulated one."""
    if request.param == "emulated":
        request.getfixturevalue("emulator")
        monkeypatch.setattr(hopper, "ops", torch.ops.gssf_emulated)
        return "cpu"
    return "cuda"


@pytest.fixture
def card(device):
    """card(a, b, a_ids, b_ids): the launcher's hardest negatives, on the CPU."""

    def run(a, b, a_ids=None, b_ids=None):
        on = [None if x is None else x.to(device) for x in (a, b, a_ids, b_ids)]
        return [x.cpu() for x in hopper.hardest_negatives(*on)]

    return run


@pytest.fixture
def log_sums(device):
    """log_sums(a, b, scale): the launcher's log-sums, on the CPU; scale: a tensor or a number."""

    def run(a, b, scale=1.0):
        scale_tensor, constant = (scale.to(device), 1.0) if isinstance(scale, torch.Tensor) else (None, scale)
        return [x.cpu() for x in hopper.logsumexp_scores(a.to(device), b.to(device), scale_tensor, constant)]

    return run


def whole_numbers(n, m, d, dtype, low=-3, high=4):
    """Numbers whose sums are exact in any order."""
    return torch.randint(low, high, (n, d)).to(dtype), torch.randint(low, high, (m, d)).to(dtype)


def truth(a, b, a_ids=None, b_ids=None):
    a, b = a.double(), b.double()
    return [gk.reference.pair_scores(a, b), *gk.reference.hardest_negatives(a, b, a_ids=a_ids, b_ids=b_ids)[:4]]


def assert_exact(results, expected):
    """Equal bits, NaN for NaN: pair_score, row_score, row_index, col_score, col_index."""
    for ours, right in zip(results, expected, strict=True):
        assert ours.dtype == (torch.int64 if right.dtype == torch.int64 else torch.float32)
        torch.testing.assert_close(ours.to(right.dtype), right, rtol=0, atol=0, equal_nan=True)


# N and M on and around the edges of tiles (128, 256), D of swizzles (64) and of the two shapes (512)
SHAPES = [(1, 1, 1), (1, 1, 8), (1, 40, 3), (3, 130, 8), (128, 128, 64), (127, 129, 63), (129, 257, 40), (130, 300, 72)]
SHAPES += [(128, 256, 512), (127, 255, 511), (130, 513, 520), (257, 300, 1024), (300, 700, 100)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("ids", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_shapes(card, n, m, d, ids, dtype):
    a, b = whole_numbers(n, m, d, dtype)
    labels = (torch.randint(0, max(n // 3, 1), (n,)), torch.randint(0, max(n // 3, 1), (m,))) if ids else (None, None)
    assert_exact(card(a, b, *labels), truth(a, b, *labels))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("d", [8, 200, 512, 1024])
def test_error_is_that_of_an_fp32_product(card, d, dtype):
    a, b = torch.randn(150, d).to(dtype), torch.randn(310, d).to(dtype)
    results, expected = card(a, b), truth(a, b)
    plain = (a.float() @ b.float().T).fill_diagonal_(-INF)
    for ours, right, same in ((results[1], expected[1], plain.amax(1)), (results[3], expected[3], plain.amax(0))):
        error, theirs = (ours.double() - right).abs().max(), (same.double() - right).abs().max()
        assert error <= 2 * theirs + 4 * torch.finfo(torch.float32).eps * right.abs().max()
    scores = (a.double() @ b.double().T).fill_diagonal_(-INF)
    named = torch.cat((scores.gather(1, results[2][:, None])[:, 0], scores.gather(0, results[4][None])[0]))
    torch.testing.assert_close(named, torch.cat((expected[1], expected[3])), rtol=1e-4, atol=1e-4)


IDS = {
    "distinct": lambda n: torch.arange(n),
    "equal": lambda n: torch.zeros(n, dtype=torch.int64),
    "fives": lambda n: torch.arange(n) // 5,
    "far apart": lambda n: torch.arange(n) * 2 + (n == 400),
    "low bits alike": lambda n: (torch.arange(n) % 7) * 2**32 + 5,
    "extreme": lambda n: torch.where(torch.arange(n) % 2 == 0, 2**63 - 1, -(2**63)),
}


@pytest.mark.parametrize("d", [16, 512])
@pytest.mark.parametrize("kind", IDS)
def test_ids(card, kind, d):
    labels = IDS[kind](270), IDS[kind](400)
    for a, b in (
        whole_numbers(270, 400, d, torch.bfloat16),
        [2 * torch.nn.functional.one_hot(x % 89 % d, d).bfloat16() for x in labels],  # equal ids score highest
    ):
        assert_exact(card(a, b, *labels), truth(a, b, *labels))


@pytest.mark.parametrize("d", [2, 512])
def test_ties_go_to_the_lowest_index(card, d):
    a, b = torch.ones(260, d).bfloat16(), torch.ones(530, d).bfloat16()
    _, _, row_index, _, col_index = card(a, b)
    assert row_index.tolist() == [1] + [0] * 259
    assert col_index.tolist() == [1] + [0] * 529
    a, b = torch.zeros(260, d).bfloat16(), torch.zeros(530, d).bfloat16()
    a[:, 0], b[:, 0] = torch.randint(0, 2, (260,)), torch.randint(0, 2, (530,))
    assert_exact(card(a, b), truth(a, b))


@pytest.mark.parametrize("d", [16, 512])
@pytest.mark.parametrize("place", [0, 7, 63, 64, 127, 128, 255, 256, 299])
def test_nan_wins_and_the_first_one_stays(card, place, d):
    a, b = whole_numbers(300, 300, d, torch.float16)
    b[place, 1] = NAN
    b[min(place + 30, 299)] = NAN
    assert_exact(card(a, b), truth(a, b))
    a[place, 3] = NAN
    assert_exact(card(a, b), truth(a, b))


@pytest.mark.parametrize("d", [16, 512])
def test_nan_of_positives_counts_for_nothing(card, d):
    a, b = whole_numbers(140, 140, d, torch.bfloat16)
    a[5], b[5] = 0, 0
    a[5, 0], b[5, 0] = INF, 0
    b[:5, 0], b[6:, 0] = 1, 1  # s_55 = inf · 0 alone is NaN
    results = card(a, b)
    assert results[0].isnan().nonzero().flatten().tolist() == [5]
    assert_exact(results, truth(a, b))


@pytest.mark.parametrize("d", [16, 512])
def test_infinities(card, d):
    a, b = whole_numbers(200, 300, d, torch.bfloat16)
    a, b = a.abs() + 1, b.abs() + 1
    b[3], b[140] = -INF, INF
    assert_exact(card(a, b), truth(a, b))
    b[:] = -INF
    results = card(a, b)
    assert_exact(results, truth(a, b))
    assert (results[2] == -1).all()
    assert (results[4] == -1).all()


def test_layouts(card):
    a, b = whole_numbers(140, 2 * 150, 48, torch.bfloat16)
    for left, right in (
        (a.T.contiguous().T, b[::2]),
        (a[:, 1:41], b[:150, 8:]),
        (a[:1].expand(140, 48), b[:150]),
        (a[:, ::2], b[:150, ::2]),
    ):
        assert_exact(card(left, right[:, : left.shape[1]]), truth(left, right[:, : left.shape[1]]))


def test_no_rows(card):
    results = card(torch.ones(0, 16).bfloat16(), torch.ones(3, 16).bfloat16())
    assert [len(x) for x in results] == [0, 0, 0, 3, 3]
    assert (results[3] == -INF).all()
    assert (results[4] == -1).all()


def test_equal_inputs_give_equal_bits(card):
    a, b = torch.randn(300, 520).bfloat16(), torch.randn(610, 520).bfloat16()
    first = card(a, b)
    for _ in range(3):
        for x, y in zip(card(a, b), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 8), torch.ones(4, 8)), "bfloat16 or float16"),
        ((torch.ones(4, 8).bfloat16(), torch.ones(4, 8).half()), "both bfloat16 or both float16"),
        ((torch.ones(4, 8).half(), torch.ones(3, 8).half()), "M >= N"),
        ((torch.ones(4, 0).half(), torch.ones(4, 0).half()), "D >= 1"),
        ((torch.ones(4, 8).half(), torch.ones(4, 8).half(), torch.zeros(4, dtype=torch.int64)), "or neither"),
    ],
    ids=["fp32", "two dtypes", "fewer columns", "no channels", "one side's ids"],
)
def test_bad_input(card, arguments, message):
    with pytest.raises((TypeError, RuntimeError), match=message):
        card(*arguments)


# Log-sums.


def log_truth(a, b, scale=1.0):
    """(row_max, row_lse, col_max, col_lse, pair) in fp64, by the definition."""
    t = (a.double() @ b.double().T) * float(scale)
    return t.amax(1), t.logsumexp(1), t.amax(0), t.logsumexp(0), t.diagonal()


def assert_log_sums(results, expected, rtol=2e-6):
    """Maxima and pairs exact; each log-sum as it is kept, as a number added to the maximum."""
    row_max, row_log, col_max, col_log, pair = results
    row_top, row_lse, col_top, col_lse, positive_logit = expected
    for ours, right in ((row_max, row_top), (col_max, col_top), (pair, positive_logit)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, right.float(), rtol=0, atol=0)
    for ours, right in ((row_log, row_lse - row_top), (col_log, col_lse - col_top)):
        torch.testing.assert_close(ours.double(), right, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("n", "m", "d"), [*SHAPES, (40, 1, 8), (300, 130, 72), (513, 130, 520)])
def test_log_sums_of_shapes(log_sums, n, m, d, dtype):
    a, b = whole_numbers(n, m, d, dtype)
    assert_log_sums(log_sums(a, b, 0.125), log_truth(a, b, 0.125))
    scale = torch.tensor(-0.5)  # a learned one may have any sign: its value is not looked at
    assert_log_sums(log_sums(a, b, scale), log_truth(a, b, scale))


@pytest.mark.parametrize("d", [64, 512])
@pytest.mark.parametrize("scale", [2.0**-7, 1.0, 64.0, 1024.0])
def test_log_sums_over_any_range(log_sums, scale, d):
    """One line's scores lie thousands apart, another's are all alike; none is lost against another line's."""
    a, b = whole_numbers(200, 300, d, torch.bfloat16, -1, 2)
    a[::3] *= 8
    a[5] = 0
    b[::7] *= 16
    b[9] = 0
    assert_log_sums(log_sums(a, b, scale), log_truth(a, b, scale))


def test_log_sum_of_one_large_score_is_its_tail(log_sums):
    """log Σ e^(t - max) where all others are e^-20: what a loss near 0 is made of."""
    a, b = torch.zeros(130, 64).bfloat16(), torch.zeros(257, 64).bfloat16()
    a[:, 0], b[:, 0] = 1, -20
    a[:, 1], b[:, 1] = torch.arange(130) % 2, 0
    b[140, 0] = 0
    row_max, row_log, *_ = log_sums(a, b)
    assert (row_max == 0).all()
    tail = torch.tensor(256.0, dtype=torch.float64).mul(math.exp(-20)).log1p()
    torch.testing.assert_close(row_log.double(), tail.expand(130), rtol=0, atol=1.2e-7)  # fp32's step at 1


@pytest.mark.parametrize("d", [16, 512])
@pytest.mark.parametrize("place", [0, 63, 127, 128, 256, 299])
def test_log_sums_of_nan_and_infinities(log_sums, place, d):
    a, b = whole_numbers(300, 300, d, torch.float16)
    a[place, 1] = NAN
    results = log_sums(a, b)
    lse = results[0] + results[1], results[2] + results[3]
    assert lse[0].isnan().nonzero().flatten().tolist() == [place]
    assert lse[1].isnan().all()

    a, b = whole_numbers(300, 300, d, torch.float16, 1, 3)
    b[place] = INF
    for scale, end in ((1.0, INF), (torch.tensor(-1.0), -INF)):
        row_max, row_log, col_max, col_log, pair = log_sums(a, b, scale)
        others = torch.arange(300) != place
        assert col_max[place] == pair[place] == end
        assert (col_max[place] + col_log[place]) == end
        right = log_truth(a, b[others], scale)
        if end == INF:
            assert ((row_max + row_log) == INF).all()
        else:  # what is -inf adds nothing
            torch.testing.assert_close((row_max + row_log).double(), right[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close((col_max + col_log)[others].double(), right[3], rtol=1e-6, atol=1e-6)


def test_log_sums_of_nothing(log_sums):
    for n, m in ((0, 3), (3, 0), (0, 0)):
        results = log_sums(torch.ones(n, 16).bfloat16(), torch.ones(m, 16).bfloat16())
        assert [len(x) for x in results] == [n, n, m, m, 0]
        assert all((x == -INF).all() for x in results)


def test_log_sums_are_the_loss_s_own(device, monkeypatch):
    """InfoNCE's loss and gradients with the forward's log-sums from here: what the table would switch on."""
    a, b = (torch.nn.functional.normalize(torch.randn(n, 96), dim=1).bfloat16() for n in (140, 200))
    kept = torch.empty(0, device=device)
    forward = torch.ops.gssf.logsumexp_scores

    def by_hopper(a, b, scale, constant, keep, columns):
        assert columns
        return *hopper.logsumexp_scores(a, a if b is None else b, scale, constant), kept

    losses = []
    for op in (forward, by_hopper):
        x, y = (t.to(device, copy=True).requires_grad_() for t in (a, b))
        scale = torch.tensor(14.3, device=device, requires_grad=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.gssf, "logsumexp_scores", op)
            loss = gk.info_nce_loss(x, y, scale=scale)
            losses.append((loss, *torch.autograd.grad(loss, (x, y, scale))))
    for ours, right in zip(*losses, strict=True):
        torch.testing.assert_close(ours, right, rtol=2e-5 if ours.dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 8), torch.ones(4, 8)), "bfloat16 or float16"),
        ((torch.ones(4, 8).bfloat16(), torch.ones(4, 8).half()), "both bfloat16 or both float16"),
        ((torch.ones(4, 0).half(), torch.ones(4, 0).half()), "D >= 1"),
        ((torch.ones(4, 8).half(), torch.ones(4, 8).half(), torch.ones(2)), "one fp32 number"),
        ((torch.ones(4, 8).half(), torch.ones(4, 8).half(), torch.ones((), dtype=torch.float64)), "one fp32 number"),
    ],
    ids=["fp32", "two dtypes", "no channels", "two scales", "fp64 scale"],
)
def test_bad_input_of_log_sums(log_sums, arguments, message):
    with pytest.raises((TypeError, RuntimeError), match=message):
        log_sums(*arguments)


# What only the emulator can show.


def test_op_itself_asks_for_aligned_rows(emulator):
    x = torch.ones(4, 9).half()
    with pytest.raises(RuntimeError, match="rows that start on 16 bytes"):
        torch.ops.gssf_emulated.hardest_negatives_hopper(x, x, None, None)


@pytest.mark.parametrize("d", [40, 400, 1032])  # one stage a tile; more than the ring has, in either shape
@pytest.mark.parametrize("copies", WHEN)
@pytest.mark.parametrize("products", WHEN)
def test_every_order_of_events_gives_the_same(emulator, products, copies, d):
    a, b = whole_numbers(260, 530, d, torch.bfloat16)
    labels = torch.randint(0, 50, (260,)), torch.randint(0, 50, (530,))
    expected = truth(a, b, *labels)
    for seed in range(4):
        emulator.settings(1 + seed % 3, getattr(emulator, copies), getattr(emulator, products), seed)
        assert_exact(torch.ops.gssf_emulated.hardest_negatives_hopper(a, b, *labels), expected)


@pytest.mark.parametrize("d", [40, 400, 1032])
@pytest.mark.parametrize("products", WHEN)
def test_every_order_of_events_gives_the_same_log_sums(emulator, products, d):
    a, b = whole_numbers(260, 530, d, torch.bfloat16)
    op = torch.ops.gssf_emulated.logsumexp_scores_hopper
    emulator.settings()
    expected = op(a, b, None, 0.1)
    assert_log_sums(expected, log_truth(a, b, torch.tensor(0.1)))
    for seed in range(4):
        emulator.settings(1 + seed % 3, emulator.AT_RANDOM, getattr(emulator, products), seed)
        for ours, right in zip(op(a, b, None, 0.1), expected, strict=True):
            assert torch.equal(ours, right)


@pytest.mark.parametrize("processors", [1, 5])
@pytest.mark.parametrize("d", [40, 512])
def test_log_sums_in_slabs(emulator, d, processors):
    a, b = whole_numbers(700, 300, d, torch.float16, -1, 2)
    emulator.settings(processors)
    assert_log_sums(torch.ops.gssf_emulated.log_sums_in_slabs(a, b, None, 2.0), log_truth(a, b, 2.0))


@pytest.mark.parametrize("processors", [1, 2, 5, 132])
@pytest.mark.parametrize("d", [40, 512])
def test_slabs_and_processors_change_nothing(emulator, d, processors):
    a, b = whole_numbers(700, 900, d, torch.float16, -1, 2)
    emulator.settings(processors)
    assert_exact(torch.ops.gssf_emulated.in_slabs(a, b, None, None), truth(a, b))


# What only a card can show.


@needs_card
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("d", [8, 64, 200, 256, 511, 512, 1024])
@pytest.mark.parametrize(("n", "m"), [(4096, 4096), (1000, 20_011), (8192, 8192)])
def test_large(card, n, m, d, dtype):
    a, b = whole_numbers(n, m, d, dtype, -1, 2)
    expected = truth(a.cuda(), b.cuda())
    for _ in range(3):
        assert_exact(card(a, b), [x.cpu() for x in expected])


@needs_card
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("d", [64, 200, 512, 1024])
@pytest.mark.parametrize(("n", "m"), [(4096, 4096), (20_011, 1000), (8192, 8192)])
def test_log_sums_of_many(log_sums, n, m, d, dtype):
    a, b = whole_numbers(n, m, d, dtype, -1, 2)
    expected = [x.cpu() for x in log_truth(a.cuda(), b.cuda(), 0.5)]
    for _ in range(3):
        assert_log_sums(log_sums(a, b, 0.5), expected)


@needs_card
def test_on_another_stream(card):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        a, b = whole_numbers(500, 600, 128, torch.bfloat16)
        assert_exact(card(a, b), truth(a, b))


# Where it takes over.


def test_nothing_is_dispatched_to_it_yet():
    assert frozenset() == tiles.HOPPER_CUDA


@pytest.fixture
def on_hopper(monkeypatch):
    """As if tensors were on a card of compute capability 9.0, and csrc/cuda were built. Changes the table's lines."""
    monkeypatch.setattr(plan, "architecture", lambda device: 90)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    return lambda *lines: monkeypatch.setattr(tiles, "HOPPER_CUDA", frozenset(lines))


def test_the_table_sends_its_lines_here(on_hopper, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(hopper, "hardest_negatives", lambda *arguments: tuple("12345"))
    a = torch.zeros(1100, 520, dtype=torch.bfloat16)
    op = "hardest_negatives"
    assert not plan.hopper(op, a, a)
    on_hopper((op, "half", "wide"))
    assert device_ops.hardest_negatives(a, a, None, None) == tuple("12345")
    assert not plan.hopper("logsumexp_scores", a, a)
    assert not plan.hopper(op, a.float(), a.float())
    assert not plan.hopper(op, a[:, :64], a[:, :64])
    assert not plan.hopper(op, a[:100], a[:100])
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    assert not plan.hopper(op, a, a)


def test_the_table_sends_log_sums_here(on_hopper, monkeypatch):
    logsumexp = pytest.importorskip("gssf_kernels.triton.logsumexp")
    monkeypatch.setattr(hopper, "logsumexp_scores", lambda *arguments: (arguments, *"bcde"))
    a, b, scale = torch.zeros(1100, 64).half(), torch.zeros(1200, 64).half(), torch.ones(())
    call = Call(a, b, scale, 1.0)
    assert next(plan.logsumexp(call)).route != "hopper"
    on_hopper(("logsumexp_scores", "half", "narrow"))
    choice = next(plan.logsumexp(call))
    assert choice.route == "hopper"
    arguments, *_, kept = logsumexp.logsumexp_scores(call, choice)
    assert all(x is y for x, y in zip(arguments, (a, b, scale, 1.0), strict=True))
    assert kept.shape == (0,)
    arguments, *_ = logsumexp.logsumexp_scores(Call(a, None, None, 2.0), choice)
    assert arguments[1] is a
    assert arguments[2:] == (None, 2.0)
