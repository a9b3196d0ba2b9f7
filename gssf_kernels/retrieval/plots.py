"""A picture of an evaluation: how many queries rank their best positive where. Needs matplotlib."""

import os
from typing import Any

import torch

from gssf_kernels.retrieval.measures import RetrievalResult

INK, MUTED, RULE = "#1f2430", "#717885", "#dfe2e8"
COLOURS = ("#2f6db5", "#d9822b")  # of the two directions
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "savefig.facecolor": "white",
    "legend.frameon": False,
}


def require_matplotlib() -> None:
    """ImportError that says how to install it, if it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plot: expected matplotlib, got none installed; pip install matplotlib") from error


def save_plot(
    result: RetrievalResult, path: str | os.PathLike, x: str = "x", y: str = "y", format: str = "png"
) -> None:
    """Write the recall curve and the histogram of ranks of each direction as one picture.

    The curve is R@K over all K; where ties matter, a band reaches from pessimistic to optimistic ranks. x, y: what the
    rows of x and of y are called.

    Raises:
        ImportError: there is no matplotlib.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    names = {"x": x, "y": y}
    ranks = {way: best[:, best[0] > 0].sort(1).values for way, best in result.best_ranks.items()}
    largest = max(int(best.max()) for best in ranks.values())
    bins = rank_bins(largest)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        curve, histogram = figure.subplots(1, 2)
        for place, (way, best) in enumerate(ranks.items()):
            style: Any = {"color": COLOURS[place], "label": f"{names[way[0]]} → {names[way[-1]]}"}
            ks, (pessimistic, optimistic) = recall_curve(best, largest)
            curve.plot(ks, pessimistic, drawstyle="steps-post", linewidth=1.8, **style)
            if bool((pessimistic != optimistic).any()):
                style["label"] += ", ties as hits"
                curve.fill_between(ks, pessimistic, optimistic, step="post", alpha=0.18, linewidth=0, **style)
            count = torch.histogram(best[0].double(), torch.tensor([*bins, largest + 1]).double()).hist
            width = 0.8 / len(ranks)
            left = [bin - 0.4 + width * place for bin in range(len(bins))]
            histogram.bar(left, (100 * count / best.shape[1]).tolist(), width, align="edge", color=COLOURS[place])
        curve.set(title="Recall", xlabel="K", ylabel="R@K")
        curve.set(xscale="log", xlim=(1, max(largest, 2)), ylim=(0, 101))
        curve.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest < 1000 else (1,)))
        curve.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        curve.xaxis.set_minor_formatter(NullFormatter())
        curve.legend(loc="lower right")
        histogram.set(title="Rank of the best positive", xlabel="rank, ties as mistakes", ylabel="share of queries")
        histogram.set_xticks(
            range(len(bins)), bin_labels(bins, largest), rotation=35, ha="right", rotation_mode="anchor"
        )
        histogram.grid(axis="x", visible=False)
        for axes in (curve, histogram):
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        figure.savefig(path, dpi=150, format=format)


def recall_curve(best: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(K from 1 to the largest, where R@K changes; R@K in percent [2, K]), from ranks [2, Q], ascending."""
    ks = torch.cat((torch.tensor([1, largest]), best.reshape(-1))).unique()
    reached = torch.searchsorted(best.contiguous(), ks.expand(2, -1).contiguous(), right=True)
    return ks, 100 * reached / best.shape[1]


def rank_bins(largest: int) -> list[int]:
    """The first rank of each bin: 1, 2, 5, 10, 20, 50, … up to the largest rank."""
    firsts = (first * 10**power for power in range(len(str(largest))) for first in (1, 2, 5))
    return [first for first in firsts if first <= largest]


def bin_labels(bins: list[int], largest: int) -> list[str]:
    ends = [following - 1 for following in bins[1:]] + [largest]
    return [f"{first:,}" if first == end else f"{first:,}–{end:,}" for first, end in zip(bins, ends, strict=True)]


__all__ = ["save_plot"]
