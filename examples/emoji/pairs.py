"""Time of a training step by `pairs="ids"`, and with every picture repeated for its captions: the same gradient.

    python examples/emoji/pairs.py [--steps 20] [--losses triplet,infonce]

Towers, loss, backward and optimiser on batches of 256 pictures and 1,280 captions. Both ways take the same batches in
turns; prints the median time of a step, of the loss alone (forward and backward), and the median of the ratios. The
first batch also shows that the gradients agree; those of triplet-all do not, which counts a repeated picture as five
negatives of a caption.
"""

import argparse
import statistics
import time

import losses
import optimise
import torch
from data import Batches, load
from losses import Criterion
from model import Model
from torch import Tensor


class Repeated(Criterion):
    """The same loss with a row of a for every caption."""

    def value(self, kernels, kind: str, a: Tensor, b: Tensor, owner: Tensor, picked: Tensor) -> Tensor:
        return super().value(Rows(kernels, owner), kind, a, b, owner, picked)

    def match(self, kernels, a: Tensor, b: Tensor, pairs: dict) -> Tensor:
        owner = pairs["y_ids"]
        return self.info_nce(a[owner], b, x_ids=owner, y_ids=owner)


class Rows:
    """The functions of ``kernels``, called with the pictures repeated."""

    def __init__(self, kernels, owner: Tensor):
        self.kernels, self.owner = kernels, owner

    def __getattr__(self, name: str):
        def call(a: Tensor, b: Tensor, **options) -> Tensor:
            ids = {"pairs": None, "x_ids": self.owner, "y_ids": self.owner}
            return getattr(self.kernels, name)(a[self.owner], b, **(options | ids))

        return call


def step(model: Model, criterion: Criterion, optimiser, batch) -> tuple[float, float]:
    """Milliseconds of the whole step, and of the loss."""
    pictures, bags, owner, picked = batch
    begun = time.perf_counter()
    a, b = model.metric.factors(model.pictures(pictures), model.captions(bags))
    leaves = [t.detach().requires_grad_() for t in (a, b)]
    before = time.perf_counter()
    loss = criterion(*leaves, owner, picked, 1.0)
    loss.backward()
    after = time.perf_counter()
    torch.autograd.backward([a, b], [t.grad for t in leaves])
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return 1000 * (time.perf_counter() - begun), 1000 * (after - before)


def difference(model: Model, criteria: list[Criterion], batch) -> float:
    """The largest difference of the gradients with respect to both sides, relative to the largest entry."""
    pictures, bags, owner, picked = batch
    with torch.no_grad():
        sides = model.metric.factors(model.pictures(pictures), model.captions(bags))
    gradients = []
    for criterion in criteria:
        leaves = [t.clone().requires_grad_() for t in sides]
        gradients.append(torch.autograd.grad(criterion(*leaves, owner, picked, 1.0), leaves))
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(*gradients, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", default="triplet,goal,infonce,siglip")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    emoji = load()["train"]
    for name in options.losses.split(","):
        comparable = [loss for loss in losses.NAMES if loss not in ("distill", "triplet-all")]
        if name not in comparable:
            parser.error(f"--losses: expected some of {', '.join(comparable)}, got {name!r}")
        times: dict[str, list[tuple[float, float]]] = {"ids": [], "repeated": []}
        runs = {}
        for way, kind in (("ids", Criterion), ("repeated", Repeated)):
            torch.manual_seed(0)
            model, criterion = Model(), kind(name)
            runs[way] = model, criterion, optimise.adamw(list(model.parameters()), list(criterion.parameters()))
        batches = Batches(emoji, 256, torch.Generator().manual_seed(0))
        error = difference(runs["ids"][0], [run[1] for run in runs.values()], batches.next())
        if error > 1e-4:
            raise SystemExit(f"{name}: the gradients of both ways differ by {error:.1e} of their largest entry")
        for k in range(options.steps + 2):
            batch = batches.next()
            for way, run in runs.items():
                taken = step(*run, batch)
                if k >= 2:  # the first two warm up
                    times[way].append(taken)
        cells = []
        for k, what in ((0, "step"), (1, "loss")):
            ids, repeated = ([t[k] for t in times[way]] for way in ("ids", "repeated"))
            ratio = statistics.median(r / i for r, i in zip(repeated, ids, strict=True))
            cells.append(f"{what} {statistics.median(repeated):.1f} → {statistics.median(ids):.1f} ms ({ratio:.2f}×)")
        print(f"{name:16}" + "   ".join(cells) + f"   gradients within {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
