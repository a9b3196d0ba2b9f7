"""The clock of a GPU, on one that is made up: what it does, in which order, and that the host's share is not in it."""

from types import SimpleNamespace

import pytest
import torch

from bench import clock, measure
from bench.measure import Case
from bench.ops import OPS
from bench.problem import Shape

CYCLES_PER_MS = 1.5e6
FLUSH_MS = 0.2


class Card:
    """A host and a GPU, each with a time in ms: work starts when it is enqueued and what came before is done."""

    def __init__(self):
        self.host = self.gpu = 0.0
        self.done = []  # (what, when it ended)

    def launch(self, what, gpu_ms, host_ms=0.02):
        self.host += host_ms
        self.gpu = max(self.gpu, self.host) + gpu_ms
        self.done.append((what, self.gpu))

    def synchronize(self, device=None):
        self.host = self.gpu = max(self.host, self.gpu)
        self.done.append(("synchronize", self.host))

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace()

        def record():
            self.launch("event", 0.0, 0.001)
            event.at = self.gpu

        event.record = record
        event.elapsed_time = lambda other: other.at - event.at
        return event


@pytest.fixture
def card(monkeypatch):
    made = Card()
    cuda = SimpleNamespace(
        Event=made.event,
        synchronize=made.synchronize,
        _sleep=lambda cycles: made.launch("sleep", cycles / CYCLES_PER_MS),
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=50 << 20),
    )

    def empty(count, dtype, device):
        assert count * 4 >= 200 << 20
        return SimpleNamespace(zero_=lambda: made.launch("flush", FLUSH_MS))

    monkeypatch.setattr(clock, "torch", SimpleNamespace(cuda=cuda, empty=empty, int32=torch.int32))
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: made.host / 1e3))
    return made


def step(card, launches, gpu_ms=0.01, host_ms=0.1):
    return lambda: [card.launch("kernel", gpu_ms, host_ms) for _ in range(launches)]


def test_order_of_what_a_step_is_measured_by(card):
    timer = clock.CudaClock("cuda:0")
    del card.done[:]
    timer.time_ms(step(card, 2), step(card, 1))
    assert [what for what, _ in card.done] == [
        "synchronize", "flush", "sleep", "event", "kernel", "kernel", "event", "kernel", "event", "synchronize",
    ]  # fmt: skip


def test_the_host_s_share_is_not_measured(card):
    """30 launches take the host 3 ms and the card 0.3."""
    timer = clock.CudaClock("cuda:0")
    assert timer.cycles_per_ms == pytest.approx(CYCLES_PER_MS, rel=0.01)  # less what its own launch takes
    for _ in range(4):
        forward, backward = timer.time_ms(step(card, 20), step(card, 10), of="slow to launch")
        assert forward == pytest.approx(0.2)
        assert backward == pytest.approx(0.1)
    assert timer.host_ms["slow to launch"] == pytest.approx(3.0, rel=0.01)
    card.synchronize()
    start = card.gpu
    step(card, 30)()
    assert card.gpu - start == pytest.approx(3.01)  # what an idle card takes


def test_the_sleep_is_what_the_host_needs_and_half_as_much(card):
    timer = clock.CudaClock("cuda:0")
    slept = []
    for _ in range(3):
        before = len(card.done)
        timer.time_ms(step(card, 10), of="one")
        at = [when for what, when in card.done[before:] if what in ("flush", "sleep")]
        slept.append(at[1] - at[0])
    assert slept[0] == pytest.approx(clock.MAX_SLEEP_MS, rel=0.01)  # nothing is known of the step yet
    assert slept[1:] == pytest.approx([1.5, 1.5], rel=0.01)


def test_steps_are_told_apart(card):
    """A step that is quick to launch does not take the sleep of one that is slow from it."""
    timer = clock.CudaClock("cuda:0")
    for _ in range(3):
        assert timer.time_ms(step(card, 100), of="slow") == [pytest.approx(1.0)]
        assert timer.time_ms(step(card, 1), of="quick") == [pytest.approx(0.01)]
    assert timer.host_ms["slow"] > 50 * timer.host_ms["quick"]


def test_a_compilation_is_not_slept_for(card):
    timer = clock.CudaClock("cuda:0")
    timer.time_ms(lambda: card.launch("compiled", 0.1, 9000.0), of="one")
    before = card.gpu
    timer.time_ms(step(card, 1), of="one")
    assert card.gpu - before < clock.MAX_SLEEP_MS + 1


def test_a_turn_says_which_step_it_is(monkeypatch):
    asked = []

    def time_ms(*stages, of=None):
        asked.append(of)
        return [stage() or 1.0 for stage in stages]

    case = Case("info_nce", 20, 8, 8, "float32", "cpu")
    monkeypatch.setitem(measure._clocks, "cpu", SimpleNamespace(time_ms=time_ms))
    op = OPS["info_nce"]
    problem = op.inputs(Shape(20, 8, 8), torch.float32, torch.device("cpu"), 0)
    ways = [op.variants[name]() for name in ("ours", "naive")]
    for variant in ways:
        measure.turn(op, case, variant, problem)
    assert asked == [(case, variant) for variant in ways]
