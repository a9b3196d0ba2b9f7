"""Emoji retrieval from scratch on a CPU in about two minutes: pictures against captions in five languages.

    python examples/emoji/train.py                         # the default; writes examples/emoji/out/
    python examples/emoji/train.py --loss infonce --seed 1 --out /tmp/infonce

Trains two towers and a structured similarity with one of the package's losses, checks that loss against its
definition as it goes, and ends with recall on the held-out pictures, the cost of the triplet loss and of its
definition, and figures.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import figures
import losses
import optimise
import teachers
import torch
from check import Disagreement
from data import CAPTIONS, Batches, Emoji, load
from fragments import FragmentModel
from graph import GraphModel
from losses import Criterion
from measure import compare
from model import METRICS, Model
from monitor import Monitor
from recall import KS, WAYS, recall

import gssf_kernels as gk
from gssf_kernels.losses import goal

TEACHER_STEPS = 280  # as the student; better on the validation pictures than 140
LARGE = 4096  # pairs, the larger size at which the losses are measured


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--loss",
        choices=losses.NAMES + losses.APART,
        default="triplet",
        help="triplet: semi-hard negatives, then the hardest (default); triplet-hardest, -semihard, -all: "
        "one choice throughout; goal: semi-hard negatives, then GOAL; infonce, siglip: CLIP's and SigLIP's; distill: "
        "infonce and relational distillation from two teachers, trained first; graph, fragments: several "
        "representations of a picture, its patches against words, each with a triplet loss",
    )
    parser.add_argument("--metric", choices=METRICS, default="both", help="what W has: nothing, diag, blocks, both")
    parser.add_argument("--scale", type=float, default=losses.SIGLIP["scale"], help="siglip's at the start")
    parser.add_argument("--bias", type=float, default=losses.SIGLIP["bias"], help="siglip's at the start")
    parser.add_argument("--rate", type=float, default=optimise.LEARNING_RATE, help="of learning, at its highest")
    parser.add_argument("--triplet", choices=goal.TRIPLET, default="nca", help="GOAL's triplet weight (default nca)")
    parser.add_argument("--pair", choices=goal.PAIR, default="con", help="GOAL's pair weights (default con)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="steps to train, 280 by default; same seed, same result")
    length.add_argument("--seconds", type=float, help="train this long instead (not reproducible)")
    parser.add_argument(
        "--batch", type=int, default=256, help="pictures a step, each with its 5 captions (default 256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation (default 0)")
    parser.add_argument(
        "--teacher-steps", type=int, help=f"distill: steps to train each teacher (default {TEACHER_STEPS})"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--no-cost", action="store_true", help="leave out the closing measurement of time and memory")
    parser.add_argument("--naive", action="store_true", help="train with the definition, which stores the scores")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "out",
        help="folder for figures and results.json (default examples/emoji/out)",
    )
    options = parser.parse_args()
    options.steps = 280 if options.steps is None and options.seconds is None else options.steps
    for name, least in (("steps", 1), ("batch", 2), ("threads", 1), ("seed", 0), ("teacher_steps", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}: expected a whole number >= {least}, got {value}")
    if options.teacher_steps is not None and options.loss != "distill":
        parser.error(f"--teacher-steps: expected with --loss distill alone, got --loss {options.loss}")
    if options.loss == "distill":
        options.teacher_steps = options.teacher_steps or TEACHER_STEPS
    if options.loss in losses.APART:
        options.no_cost = True  # which is that of the default
        if options.naive:
            parser.error(f"--naive: expected a loss of embeddings, got --loss {options.loss}")
    for name in ("scale", "rate"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name}: expected a positive number, got {getattr(options, name)}")
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        parser.error(f"--seconds: expected a positive number, got {options.seconds}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {options.out}: {error.strerror}")
    return options


def train(model: Model, criterion: Criterion, splits: dict[str, Emoji], options) -> Monitor:
    """Trains the model in place; returns what was seen on the way."""
    batches = Batches(splits["train"], options.batch, torch.Generator().manual_seed(options.seed))
    structure = [p for name, p in model.named_parameters() if name.startswith("metric.") or ".structure." in name]
    decayed = [p for p in model.parameters() if all(p is not other for other in structure)]
    optimiser = optimise.adamw(decayed, [*structure, *criterion.parameters()])
    monitor = Monitor(options.steps)

    step, progress = 0, 0.0
    while progress < 1:
        step += 1
        progress = step / options.steps if options.steps else min(1.0, monitor.seconds / options.seconds)
        optimise.set_learning_rate(optimiser, progress, options.rate)
        loss, batch = model.loss(batches, criterion, progress)
        optimise.step(optimiser, loss, f"step {step}")
        monitor.step(step, progress, loss, batch, criterion, model, splits["val"])
    return monitor


def taught(options, splits: dict[str, Emoji]):
    """The teachers' rows for "distill" and what they took; (None, None) for the other losses."""
    if options.loss != "distill":
        return None, None
    rows, facts = teachers.train(splits, options.teacher_steps, options.batch, options.seed, options.naive)
    print(
        f"teachers: {facts['steps']} steps each, {facts['seconds']:.0f} s; on validation pictures an augmented picture "
        f"finds itself in {facts[teachers.KNOWN_PICTURES]:.1f} %, a caption the next language's in "
        f"{facts[teachers.KNOWN_CAPTIONS]:.1f} %",
        flush=True,
    )
    return rows, facts


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
    model = {"graph": GraphModel, "fragments": FragmentModel}.get(options.loss, Model)(options.metric)
    counts = f"{len(splits['train'].pictures)} pictures, {len(splits['train'].captions)} captions"
    software = f"gssf_kernels {gk.__version__}, torch {torch.__version__}, {options.threads} threads"
    name = f"GOAL {options.triplet}·{options.pair}" if options.loss == "goal" else options.loss
    print(f"{name} loss, {counts}; {software}", flush=True)
    try:
        rows, facts = taught(options, splits)
        modes = {"triplet": options.triplet, "pair": options.pair}
        siglip = {"scale": options.scale, "bias": options.bias}
        criterion = Criterion(options.loss, naive=options.naive, goal=modes, siglip=siglip, teachers=rows)
        monitor = train(model, criterion, splits, options)
    except Disagreement as error:
        raise SystemExit(f"error: {error}") from None
    steps, seconds, cpu_seconds = monitor.log["step"][-1], monitor.seconds, monitor.cpu_seconds

    test = splits["test"]
    s = model.scores(test)
    cost = {}
    if not options.no_cost:
        a_train, b_train = model.embed(splits["train"])
    sizes = () if options.no_cost else ((min(options.batch * CAPTIONS, len(b_train)), 20), (LARGE, 7))
    for pairs, rounds in sizes:
        owner = splits["train"].owner[:pairs]
        cost[str(pairs)] = compare(a_train[: int(owner[-1]) + 1], b_train[:pairs], owner, rounds)
    results = {
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "test": recall(model.evaluate(test)),
        "val": {f"{way}_r{k}": monitor.log[f"val_{way}_r{k}"][-1] for way in WAYS for k in KS},
        "test_pictures": len(test.pictures),
        "check": monitor.checks,
        "training": {"steps": steps, "seconds": seconds, "cpu_seconds": cpu_seconds},
        "teachers": facts,
        "learned": criterion.learned(),
        "cost": cost,
        "versions": {
            "gssf_kernels": gk.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, {platform.system()}, {options.threads} threads",
        "log": monitor.log,
    }
    if results["learned"]:
        print("learned: " + ", ".join(f"{name} {value:.3g}" for name, value in results["learned"].items()))
    report(results)

    title = f"Emoji retrieval, {name} loss, {steps} steps in {seconds:.0f} s"
    figures.gallery(options.out / "gallery.png", test, s)
    figures.curves(options.out / "curves.png", monitor.log, title)
    if options.metric == "both":
        figures.weights(options.out / "weights.png", model.metric.diag.detach(), model.metric.blocks.detach())
    if isinstance(model, GraphModel):
        figures.attentions(options.out / "attentions.png", test, model)
    if isinstance(model, FragmentModel):
        figures.heads(options.out / "heads.png", model.captions.attention.structure)
    results["seconds_in_all"] = time.perf_counter() - begun
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    print(
        f"{', '.join(sorted(file.name for file in options.out.iterdir()))} in {options.out} "
        f"({results['seconds_in_all']:.0f} s in all)"
    )


if __name__ == "__main__":
    main()
