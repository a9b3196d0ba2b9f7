"""Time and extra memory of one loss step (forward and backward), naive against fused, on real embeddings.

Time: medians of runs that take turns, so that a busy neighbour slows both. Memory: each in a fresh process
that loads the embeddings, runs both losses once on 64 captions (libraries allocate on first use), resets the
high-water mark of its resident memory, runs one step, and reads the mark again. Linux only; elsewhere None.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from losses import MARGIN
from torch import Tensor

import gssf_kernels as gk

KERNELS = {"naive": gk.reference, "fused": gk}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def step(kernels, a: Tensor, b: Tensor, owner: Tensor) -> None:
    """owner: [N], the row of a of each row of b."""
    loss = kernels.triplet_loss(a, b, margin=MARGIN, pairs="ids", x_ids=torch.arange(len(a)), y_ids=owner)
    torch.autograd.grad(loss, (a, b))


def compare(a: Tensor, b: Tensor, owner: Tensor, rounds: int) -> dict[str, dict]:
    """For naive and fused: time_ms, its quartiles time_ms_low and time_ms_high, peak_mib, for N = len(b) pairs."""
    a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    times = {name: [] for name in KERNELS}
    for turn in range(rounds + 1):
        for name, kernels in KERNELS.items():
            start = time.perf_counter()
            step(kernels, a, b, owner)
            if turn:  # the first turn warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "embeddings.pt"
        torch.save((a.detach(), b.detach(), owner), file)
        for name, taken in times.items():
            low, middle, high = statistics.quantiles(taken, n=4)
            table[name] = {
                "time_ms": middle,
                "time_ms_low": low,
                "time_ms_high": high,
                "peak_mib": peak_mib(name, file),
            }
    return table


def peak_mib(name: str, file: Path) -> float | None:
    if not CLEAR.exists():
        return None
    command = [sys.executable, __file__, name, str(file), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of the {name} loss failed:\n{done.stderr}")
    return float(done.stdout)


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (high-water mark). Not getrusage: its mark survives fork and exec."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def child(name: str, file: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    a, b, owner = torch.load(file)
    a.requires_grad_()
    b.requires_grad_()
    for kernels in KERNELS.values():
        step(kernels, *(t[:64].detach().requires_grad_() for t in (a, b)), owner[:64])
    CLEAR.write_text("5")
    before = resident_mib("VmRSS")
    step(KERNELS[name], a, b, owner)
    print(resident_mib("VmHWM") - before)


if __name__ == "__main__":
    child(*sys.argv[1:])
