"""What the similarity, the loss and the further methods bring: equal budgets, three seeds, a table and a plot.

    python examples/emoji/compare.py                       # all runs; those already in --out are kept
    python examples/emoji/compare.py --tune                # the trials on validation pictures, for SigLIP's start

Cosine, Diag, B-Diag and both (`gk.StructuredSimilarity`), each with the triplet loss, GOAL (nca·con), InfoNCE and
SigLIP; and, with both, distillation from two teachers, graph patterns and fragment matching. A run that was interrupted
is made again, the others are read. Prints Markdown, and puts it into docs/report.md between its markers, with the plot.
"""

import argparse
import json
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from figures import BLUE, GREEN, MUTED, ORANGE, RED, save
from model import METRICS
from recall import WAYS
from table import HERE, run

REPORT = HERE.parents[1] / "docs"
NAMES = {"cosine": "cosine", "diag": "Diag", "blocks": "B-Diag", "both": "Diag + B-Diag"}
SIGLIP = {"scale": 5.0, "bias": -5.5, "rate": 1e-3}  # chosen by --tune
LOSSES = {
    "triplet": ["--loss", "triplet"],
    "GOAL": ["--loss", "goal", "--triplet", "nca", "--pair", "con"],
    "InfoNCE": ["--loss", "infonce"],
    "SigLIP": ["--loss", "siglip", *(word for name, value in SIGLIP.items() for word in (f"--{name}", str(value)))],
}
FURTHER = {
    "InfoNCE + distillation": ["--loss", "distill"],
    "graph pattern": ["--loss", "graph"],
    "fragment matching": ["--loss", "fragments"],
}
ROWS = {
    **{(loss, metric): [*words, "--metric", metric] for loss, words in LOSSES.items() for metric in METRICS},
    **{(name, "both"): words for name, words in FURTHER.items()},
}
# (scale, bias, learning rate) that SigLIP may start from. The first is the paper's, for batches of 32,768: there the
# pull of a positive and the push of all negatives are about equal at first. Here that bias is -log(255) = -5.5.
TRIALS = [
    (10, -10, 3e-3),
    (10, -5.5, 3e-3),
    (10, -10, 1e-3),
    (10, -5.5, 1e-3),
    (20, -5.5, 1e-3),
    (10, -5.5, 3e-4),
    (5, -5.5, 1e-3),
    (5, -5.5, 3e-4),
    (3, -5.5, 1e-3),
    (3, -5.5, 3e-3),
]
TRIAL_SEED = 3  # none of the table's
START, END = "<!-- comparison -->", "<!-- /comparison -->"


def folder(loss: str, metric: str) -> str:
    return f"{loss}-{metric}".replace(" ", "").replace("+", "-").lower()


def r_at_1(results: dict, part: str = "test") -> float:
    """R@1, the mean of both ways, in per cent."""
    return statistics.mean(results[part][f"{way}_r1"] for way in WAYS)


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def table(results: dict) -> str:
    """Markdown: R@1 of every loss and similarity, then of the further methods."""
    lines = ["| R@1, % | " + " | ".join(NAMES.values()) + " |", "|---|" + "---|" * len(NAMES)]
    for loss in LOSSES:
        lines.append(f"| {loss} | " + " | ".join(cell([r_at_1(r) for r in results[loss, m]]) for m in METRICS) + " |")
    lines += [f"| {name} | | | | {cell([r_at_1(r) for r in results[name, 'both']])} |" for name in FURTHER]
    return "\n".join(lines)


def details(results: dict) -> str:
    """Markdown: both ways, R@1 and R@10, and the processor time of training."""
    lines = ["| | picture to caption R@1 / R@10 | caption to picture R@1 / R@10 | processor s |", "|---|---|---|---|"]
    for (loss, metric), runs in results.items():
        ways = [" / ".join(cell([r["test"][f"{way}_r{k}"] for r in runs]) for k in (1, 10)) for way in WAYS]
        seconds = [r["training"]["cpu_seconds"] + (r["teachers"] or {"cpu_seconds": 0})["cpu_seconds"] for r in runs]
        lines.append(f"| {loss}, {NAMES[metric]} | {ways[0]} | {ways[1]} | {statistics.mean(seconds):.0f} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """A group of points for each loss, one for each similarity; every seed is shown."""
    figure, axis = plt.subplots(figsize=(11, 4.6), layout="constrained")
    colours = dict(zip(METRICS, (MUTED, ORANGE, GREEN, BLUE), strict=True))
    groups = [*LOSSES, *FURTHER]
    for place, loss in enumerate(groups):
        for k, metric in enumerate(METRICS if loss in LOSSES else ["both"]):
            values = [r_at_1(r) for r in results[loss, metric]]
            x = place + (k - 1.5) * 0.18 if loss in LOSSES else place
            axis.plot([x] * len(values), values, "o", color=colours[metric], alpha=0.45, markersize=5)
            axis.plot(x, statistics.mean(values), "_", color=colours[metric], markersize=17, markeredgewidth=3)
    for metric, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=NAMES[metric])
    best = max(statistics.mean(r_at_1(r) for r in results[loss, "cosine"]) for loss in LOSSES)
    axis.axhline(best, color=RED, linewidth=1, linestyle="--", label="best loss with cosine")
    axis.set(xticks=range(len(groups)), xticklabels=groups, ylabel="%", ylim=(0, None))
    axis.set_title("R@1 on held-out pictures, mean of both ways; a point is a seed, a bar their mean")
    axis.legend(loc="lower left", ncols=5)
    axis.grid(axis="x", visible=False)
    save(figure, path)


def tune(options) -> None:
    """R@1 on the validation pictures for every trial."""
    words = {
        f"siglip-{scale}{bias}-{rate}": ["--loss", "siglip", "--scale", scale, "--bias", bias, "--rate", rate]
        for scale, bias, rate in TRIALS
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {name: pool.submit(run, name, of, TRIAL_SEED, options) for name, of in words.items()}
    print("| scale, bias, learning rate | R@1 on validation pictures, % |\n|---|---|")
    for (scale, bias, rate), one in zip(TRIALS, runs.values(), strict=True):
        print(f"| {scale}, {bias}, {rate} | {r_at_1(one.result(), 'val'):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="the trials alone")
    parser.add_argument("--seeds", type=int, default=3, help="how many; default 3")
    parser.add_argument("--steps", type=int, default=140, help="of every run; default 140")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each; default 2")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "compare", help="folder of the runs")
    parser.add_argument("--report", type=Path, default=REPORT, help="folder of report.md and its plot")
    options = parser.parse_args()
    if options.tune:
        return tune(options)
    rows = {row: [*words, *["--teacher-steps", options.steps] * ("distill" in words)] for row, words in ROWS.items()}
    with ThreadPoolExecutor(options.jobs) as pool:
        pending = {
            row: [pool.submit(run, folder(*row), words, seed, options) for seed in range(options.seeds)]
            for row, words in rows.items()
        }
        results = {row: [one.result() for one in runs] for row, runs in pending.items()}
    about = (
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, Python {platform.python_version()}, one thread for "
        f"each run, {options.steps} steps of 256 pictures with their 1,280 captions (teachers: as many each), "
        f"{options.seeds} seeds: mean ± half the range. R@1 of the first table is the mean of both ways."
    )
    text = f"{about}\n\n{table(results)}\n\n{details(results)}\n"
    print(text)
    plot(results, options.report / "report.png")
    summary = {"about": about, "r_at_1": {", ".join(row): [r_at_1(r) for r in runs] for row, runs in results.items()}}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    page = options.report / "report.md"
    if page.exists() and START in (whole := page.read_text()):
        before, after = whole.split(START)[0], whole.split(END)[1]
        page.write_text(f"{before}{START}\n{text}{END}{after}")


if __name__ == "__main__":
    main()
