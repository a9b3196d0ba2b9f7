"""Retrieval of handwritten digits (one modality with labels), by a learned similarity and by cosine.

    pip install scikit-learn
    python examples/digits/train.py                       # a minute on two cores

Half of the 1,797 pictures are for training. Each picture of the other half is a query, and Recall@1 is the share whose
nearest other picture of that half shows the same digit. Compared are cosine and `gk.StructuredSimilarity`: once on the
pixels as they are, where the similarity is all that is learned, and once on a small network that is learned too.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gssf_kernels as gk

LOSSES: dict[str, Callable[..., Tensor]] = {
    "batch-hard": lambda x, labels, metric: gk.batch_hard_loss(x, labels, metric=metric),
    "circle": lambda x, labels, metric: gk.circle_loss(x, labels, scale=32.0, metric=metric),
    "NT-Xent": lambda x, labels, metric: gk.nt_xent_loss(x, labels, scale=10.0, metric=metric),
}
STEPS, BATCH = 200, 256
DIM, BLOCK = 64, 8
RATE = 1e-3  # of learning, for the network and for W


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training pictures [N, 64] and labels, test pictures and labels); the mean training picture is taken off."""
    pixels, labels = (torch.from_numpy(t) for t in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))  # the same split for every seed
    pixels, labels, half = pixels[order].float() / 16, labels[order], len(pixels) // 2
    pixels = pixels - pixels[:half].mean(0)
    return pixels[:half], labels[:half], pixels[half:], labels[half:]


def recall_at_1(x: Tensor, labels: Tensor, metric: gk.StructuredSimilarity) -> float:
    """The share of rows whose most similar other row has their label."""
    a, b = metric.factors(x, x)
    nearest = gk.hardest_negatives(a, b).row_index  # of all rows but itself
    return float((labels[nearest] == labels).double().mean())


def tower(network: bool) -> nn.Module:
    """The pixels as they are, or an embedding of them."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, DIM)) if network else nn.Identity()


def similarity(learned: bool) -> gk.StructuredSimilarity:
    """Cosine, or W = diag + blocks of 8 channels (a row of pixels), kept symmetric; both start at cosine."""
    if not learned:
        return gk.StructuredSimilarity(DIM, block_size=None, diagonal=False)
    return gk.StructuredSimilarity(DIM, BLOCK, symmetric=True)


def train(network: bool, learned: bool, loss: str, seed: int, steps: int, rate: float) -> float:
    """Recall@1 of the test digits after training, in percent."""
    torch.manual_seed(seed)
    pictures, labels, test, test_labels = digits()
    model, metric = tower(network), similarity(learned)
    parameters = [*model.parameters(), *metric.parameters()]
    if parameters:
        optimiser = torch.optim.Adam(parameters, lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            batch = torch.randperm(len(pictures))[:BATCH]
            optimiser.zero_grad()
            LOSSES[loss](model(pictures[batch]), labels[batch], metric).backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return 100 * recall_at_1(model(test), test_labels, metric)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"to train (default {STEPS})")
    parser.add_argument("--rate", type=float, default=RATE, help=f"of learning (default {RATE})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "results.json")
    options = parser.parse_args()
    start, rows = time.perf_counter(), []
    print(f"Recall@1 of the test pictures, in percent; mean and standard deviation of {options.seeds} seeds\n")
    print(f"{'embedding':12}{'loss':14}{'cosine':>16}{'learned W':>16}")
    for network in (False, True):
        for loss in LOSSES:
            cells, values = [], {}
            for learned in (False, True):
                seeds = range(options.seeds if network or learned else 1)  # cosine of pixels has nothing to learn
                recalls = [train(network, learned, loss, seed, options.steps, options.rate) for seed in seeds]
                spread = f" ± {statistics.stdev(recalls):.1f}" if len(recalls) > 1 else ""
                cells.append(f"{statistics.mean(recalls):.1f}{spread}")
                values["learned" if learned else "cosine"] = recalls
            rows.append({"network": network, "loss": loss, **values})
            print(f"{'network' if network else 'pixels':12}{loss:14}{cells[0]:>16}{cells[1]:>16}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "steps": options.steps,
        "rate": options.rate,
    }
    options.out.write_text(json.dumps({**about, "recall_at_1": rows}, indent=1) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} s; written to {options.out}")


if __name__ == "__main__":
    main()
