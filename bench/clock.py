"""Time and memory of one device: the processor's own clock, or CUDA events behind a cold L2."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FLUSH_L2S = 4  # how many times the L2's size is written before a timed step
HEAD_START = 1.5  # how long the GPU sleeps before a step, in times what the host took to enqueue the step last time
MAX_SLEEP_MS = 50.0
CALIBRATION_CYCLES = 10_000_000


class CpuClock:
    """Wall time. Inputs are as warm as a training step leaves them: just made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time_ms(self, *stages: Callable[[], Any], of: Any = None) -> list[float]:
        """Milliseconds of each stage, run one after the other. (of: CudaClock's.)"""
        marks = [time.perf_counter()]
        for stage in stages:
            stage()
            marks.append(time.perf_counter())
        return [(end - start) * 1e3 for start, end in itertools.pairwise(marks)]

    def peak_mib(self, stage: Callable[[], Any]) -> float:
        """High-water of the process's resident set over stage, less what it held before."""
        before = _status_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water starts again at what is held now
        stage()
        return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


class CudaClock:
    """Times between events on the current stream, each step behind a flushed L2, without what the host takes.

    A launch costs the host tens of microseconds, which an idle GPU would wait for between two events. So the GPU sleeps
    before the first event while the host enqueues the whole step: as long as the host took for that step the last time,
    and half as long again. The first call of a step is this trial, and no measurement; it sleeps longest.

    The host's share shows again where the host takes longer than MAX_SLEEP_MS can hide, or waits for the GPU halfway.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(FLUSH_L2S * max(l2_bytes, 1 << 20) // 4, dtype=torch.int32, device=device)
        self.host_ms: dict[Any, float] = {}  # what enqueueing a step took last
        for _ in range(2):  # the first loads the kernel
            start, end = self._events(2)
            start.record()
            torch.cuda._sleep(CALIBRATION_CYCLES)
            end.record()
            torch.cuda.synchronize(device)
        self.cycles_per_ms = CALIBRATION_CYCLES / start.elapsed_time(end)

    @staticmethod
    def _events(count: int) -> list[torch.cuda.Event]:
        return [torch.cuda.Event(enable_timing=True) for _ in range(count)]

    def time_ms(self, *stages: Callable[[], Any], of: Any = None) -> list[float]:
        """Milliseconds of each stage, run one after the other.

        of: what tells one step from another, hashable; steps of one kind cost the host about the same.
        """
        events = self._events(len(stages) + 1)
        sleep_ms = min(HEAD_START * self.host_ms.get(of, MAX_SLEEP_MS), MAX_SLEEP_MS)
        torch.cuda.synchronize(self.device)
        self.flush.zero_()
        torch.cuda._sleep(int(sleep_ms * self.cycles_per_ms))
        events[0].record()
        began = time.perf_counter()
        for stage, event in zip(stages, events[1:], strict=True):
            stage()
            event.record()
        self.host_ms[of] = (time.perf_counter() - began) * 1e3
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]

    def peak_mib(self, stage: Callable[[], Any]) -> float:
        """The allocator's peak over stage, less what was allocated before."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        stage()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def clock(device: torch.device) -> CpuClock | CudaClock:
    """The clock of device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock(device)
