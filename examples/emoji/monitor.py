"""What is watched while training: loss, active anchors, validation recall, the loss against its definition."""

import math
import sys
import time

import torch
from check import agree
from losses import MARGIN, Criterion, choice
from recall import KS, WAYS, recall
from torch import Tensor
from tqdm import tqdm

import gssf_kernels as gk

CHECK_EVERY, VALIDATE_EVERY, LOG_EVERY = 50, 20, 5  # steps


class Monitor:
    """A progress bar on a terminal, plain lines elsewhere (a bar that redraws itself is noise in a log file).

    log: for the curves. checks: comparisons of the loss with its definition, and the largest errors.
    """

    def __init__(self, steps: int | None):
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=steps, disable=not self.terminal, unit="step", dynamic_ncols=True)
        self.begun, self.worked = time.perf_counter(), time.process_time()
        self.log = {"step": [], "loss": [], "active": [], "negatives": [], "val_step": []}
        self.log |= {f"val_{way}_r{k}": [] for way in WAYS for k in KS}
        self.checks = {"checks": 0, "loss_error": 0.0, "gradient_error": 0.0}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    @property
    def cpu_seconds(self) -> float:
        """Of all threads: what a busy neighbour does not lengthen much."""
        return time.process_time() - self.worked

    def step(self, step: int, progress: float, loss: Tensor, batch, criterion: Criterion, model, val) -> None:
        """batch: the factors a [B, D], b [N, D] of this step, owner [N] and picked [B], see Criterion; or None."""
        negatives = choice(criterion.name, progress)
        last = progress >= 1
        self.bar.update()
        if batch is not None and (step % CHECK_EVERY == 1 or last):
            loss_error, gradient_error = agree(criterion, negatives, *batch)
            self.checks["checks"] += 1
            self.checks["loss_error"] = max(self.checks["loss_error"], loss_error)
            self.checks["gradient_error"] = max(self.checks["gradient_error"], gradient_error)
        if step % LOG_EVERY == 1 or last:
            row = {
                "step": step,
                "loss": float(loss.detach()),
                "active": math.nan if batch is None else active(*batch[:3]),
                "negatives": negatives,
            }
            for name, value in row.items():
                self.log[name].append(value)
        if step % VALIDATE_EVERY == 0 or last:
            self.validate(step, progress, model, val)
        if last:
            self.bar.close()

    def validate(self, step: int, progress: float, model, val) -> None:
        scores = recall(model.evaluate(val))
        self.log["val_step"].append(step)
        for name, value in scores.items():
            self.log[f"val_{name}"].append(value)
        both = " / ".join(f"{scores[f'{way}_r1']:.1f}" for way in WAYS)
        loss, active, negatives = (self.log[name][-1] for name in ("loss", "active", "negatives"))
        self.bar.set_postfix_str(f"loss {loss:.3f}, val R@1 {both} %")
        if not self.terminal:
            print(
                f"step {step:4} {100 * progress:4.0f} % {self.seconds:5.0f} s   loss {loss:.3f}   "
                f"{negatives:8}   active {active:3.0f} %   val R@1 {both} %",
                flush=True,
            )


def active(a: Tensor, b: Tensor, owner: Tensor) -> float:
    """Per cent of the pairs, both ways, with a hardest negative inside the margin."""
    with torch.no_grad():
        positive = (a[owner] * b).sum(1)
        hardest = gk.hardest_negatives(a, b, pairs="ids", a_ids=torch.arange(len(a)), b_ids=owner)
        inside = torch.cat([hardest.row_score[owner], hardest.col_score]) + MARGIN > torch.cat([positive, positive])
    return 100 * float(inside.float().mean())
