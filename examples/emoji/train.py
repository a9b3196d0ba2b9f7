"""Emoji retrieval from scratch on a CPU in about two minutes: pictures against captions in five languages.

    python examples/emoji/train.py                         # the default; writes examples/emoji/out/
    python examples/emoji/train.py --loss infonce --seed 1 --out /tmp/infonce

Trains two towers and a structured similarity with the fused triplet loss, checks that loss against its
definition as it goes, and ends with recall on the held-out pictures, the cost of both losses, and figures.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import figures
import losses
import torch
from check import Disagreement
from data import Emoji, jitter, load
from losses import MARGIN
from measure import compare
from model import CaptionTower, PictureTower
from monitor import Monitor
from recall import KS, WAYS, recall
from torch import Tensor, nn

import gssf_kernels as gk
from gssf_kernels.losses import goal

DIM = 256  # channels of the shared space
CAPTIONS = 5  # of a picture
LEARNING_RATE = 3e-3
WARM_UP = 0.05  # of the run, learning rate from 0
WEIGHT_DECAY = 0.01
GRAM_DROPOUT = 0.2
LARGE = 4096  # pairs, the larger size at which the losses are measured


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--loss",
        choices=losses.NAMES,
        default="triplet",
        help="triplet: semi-hard negatives, then the hardest (default); triplet-hardest, -semihard, -all: "
        "one choice throughout; goal: semi-hard negatives, then GOAL; infonce: the yardstick, in plain PyTorch",
    )
    parser.add_argument("--triplet", choices=goal.TRIPLET, default="nca", help="GOAL's triplet weight (default nca)")
    parser.add_argument("--pair", choices=goal.PAIR, default="con", help="GOAL's pair weights (default con)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="steps to train, 280 by default; same seed, same result")
    length.add_argument("--seconds", type=float, help="train this long instead (not reproducible)")
    parser.add_argument(
        "--batch", type=int, default=256, help="pictures a step, each with its 5 captions (default 256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--no-cost", action="store_true", help="leave out the closing measurement of time and memory")
    parser.add_argument("--naive", action="store_true", help="train with the loss that stores the scores instead")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "out",
        help="folder for figures and results.json (default examples/emoji/out)",
    )
    options = parser.parse_args()
    options.steps = 280 if options.steps is None and options.seconds is None else options.steps
    for name, least in (("steps", 1), ("batch", 2), ("threads", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name}: expected a whole number >= {least}, got {value}")
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        parser.error(f"--seconds: expected a positive number, got {options.seconds}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {options.out}: {error.strerror}")
    return options


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.pictures = PictureTower(DIM).to(memory_format=torch.channels_last)
        self.captions = CaptionTower(DIM)
        self.metric = gk.StructuredSimilarity(DIM, block_size=16)
        self.info_nce = losses.InfoNCE()

    @torch.no_grad()
    def embed(self, emoji: Emoji) -> tuple[Tensor, Tensor]:
        """a [P, D] of the pictures (weighted), b [C, D] of the captions: scores are a bᵀ."""
        self.eval()
        pictures = torch.cat([self.pictures(part.float() / 255) for part in emoji.pictures.split(512)])
        factors = self.metric.factors(pictures, self.captions(emoji.bags))
        self.train()
        return factors


class Batches:
    """Pictures in shuffled passes, without repeats inside a batch, each with all its captions."""

    def __init__(self, emoji: Emoji, size: int, generator: torch.Generator):
        self.emoji, self.size, self.generator = emoji, min(size, len(emoji.pictures)), generator
        self.order = torch.empty(0, dtype=torch.int64)

    def next(self):
        """pictures [B, 3, 32, 32], bags of N = 5B captions, and [N] the row of each caption's picture."""
        if len(self.order) < self.size:
            self.order = torch.randperm(len(self.emoji.pictures), generator=self.generator)
        picked, self.order = self.order[: self.size], self.order[self.size :]
        pictures = jitter(self.emoji.pictures[picked].float() / 255, self.generator)
        bags = self.emoji.bags.take((CAPTIONS * picked[:, None] + torch.arange(CAPTIONS)).flatten())
        kept = torch.rand(len(bags.weights), generator=self.generator) >= GRAM_DROPOUT
        bags.weights = bags.weights * kept
        owner = torch.arange(len(picked)).repeat_interleave(CAPTIONS)
        return pictures.contiguous(memory_format=torch.channels_last), bags, owner


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to 0."""
    return LEARNING_RATE * min(1.0, progress / WARM_UP) * (1 + math.cos(math.pi * progress)) / 2


def train(model: Model, splits: dict[str, Emoji], options) -> Monitor:
    """Trains the model in place; returns what was seen on the way."""
    batches = Batches(splits["train"], options.batch, torch.Generator().manual_seed(options.seed))
    decayed = [*model.pictures.parameters(), *model.captions.parameters()]
    free = [*model.metric.parameters(), *model.info_nce.parameters()]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    # The swap: the same call, once storing the scores [N, N], once (with the hardest negatives) not.
    triplet_loss = gk.reference.triplet_loss if options.naive else gk.triplet_loss
    goal_loss = gk.reference.goal_loss if options.naive else gk.goal_loss
    monitor = Monitor(options.steps)

    step, progress = 0, 0.0
    while progress < 1:
        step += 1
        progress = step / options.steps if options.steps else min(1.0, monitor.seconds / options.seconds)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress)

        pictures, bags, owner = batches.next()
        a, b = model.metric.factors(model.pictures(pictures), model.captions(bags))  # [B, D], [N, D]
        negatives = losses.choice(options.loss, progress)
        if options.loss == "infonce":
            loss = model.info_nce(a[owner], b, owner)
        else:
            # A picture meets each of its captions as a pair; by the ids, none of them is its negative.
            # A mean over pairs, for the log: Adam does not care.
            shared = {"x_ids": owner, "y_ids": owner, "reduction": "mean"}
            if negatives == "goal":
                loss = goal_loss(a[owner], b, triplet=options.triplet, pair=options.pair, **shared)
            else:
                loss = triplet_loss(a[owner], b, margin=MARGIN, negatives=negatives, **shared)
        if not torch.isfinite(loss):
            raise SystemExit(f"step {step}: the loss is {float(loss.detach())}; training has diverged")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        monitor.step(step, progress, loss, negatives, (a, b, owner), model, splits["val"])
    return monitor


def report(results: dict) -> None:
    """The closing tables."""
    test = results["test"]
    print(f"\nRecall on {results['test_pictures']} held-out pictures, 5 captions each (%)")
    print(f"  {'':20}" + "".join(f"{f'R@{k}':>8}" for k in KS))
    for way in WAYS:
        print(f"  {way.replace('_', ' '):20}" + "".join(f"{test[f'{way}_r{k}']:8.1f}" for k in KS))
    if results["cost"]:
        print("\nHardest-negative triplet loss, forward and backward (median of interleaved runs; extra memory)")
    for pairs, table in results["cost"].items():
        for name, row in table.items():
            memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:9.1f} MiB"
            spread = f"({row['time_ms_low']:.1f} to {row['time_ms_high']:.1f})"
            print(f"  N = {pairs:5}  {name:6} {row['time_ms']:9.1f} ms {spread:18}{memory}")
    check = results["check"]
    print(
        f"\n{check['checks']} checks against the definition: loss within {check['loss_error']:.1e}, "
        f"gradients within {check['gradient_error']:.1e}"
    )


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    begun = time.perf_counter()
    splits = load()
    model = Model()
    counts = f"{len(splits['train'].pictures)} pictures, {len(splits['train'].captions)} captions"
    software = f"gssf_kernels {gk.__version__}, torch {torch.__version__}, {options.threads} threads"
    name = f"GOAL {options.triplet}·{options.pair}" if options.loss == "goal" else options.loss
    print(f"{name} loss, {counts}; {software}", flush=True)
    try:
        monitor = train(model, splits, options)
    except Disagreement as error:
        raise SystemExit(f"error: {error}") from None
    steps, seconds = monitor.log["step"][-1], monitor.seconds

    test = splits["test"]
    a, b = model.embed(test)
    s = a @ b.T
    cost = {}
    a_train, b_train = model.embed(splits["train"])
    sizes = () if options.no_cost else ((min(options.batch * CAPTIONS, len(b_train)), 20), (LARGE, 7))
    for pairs, rounds in sizes:
        owner = splits["train"].owner[:pairs]
        cost[str(pairs)] = compare(a_train[owner], b_train[:pairs], owner, rounds)
    results = {
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "test": recall(s, test.owner),
        "val": {f"{way}_r{k}": monitor.log[f"val_{way}_r{k}"][-1] for way in WAYS for k in KS},
        "test_pictures": len(test.pictures),
        "check": monitor.checks,
        "training": {"steps": steps, "seconds": seconds},
        "cost": cost,
        "versions": {
            "gssf_kernels": gk.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, {platform.system()}, {options.threads} threads",
        "log": monitor.log,
    }
    report(results)

    title = f"Emoji retrieval, {name} loss, {steps} steps in {seconds:.0f} s"
    figures.gallery(options.out / "gallery.png", test, s)
    figures.curves(options.out / "curves.png", monitor.log, title)
    figures.weights(options.out / "weights.png", model.metric.diag.detach(), model.metric.blocks.detach())
    results["seconds_in_all"] = time.perf_counter() - begun
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    print(
        f"gallery.png, curves.png, weights.png, results.json in {options.out} "
        f"({results['seconds_in_all']:.0f} s in all)"
    )


if __name__ == "__main__":
    main()
