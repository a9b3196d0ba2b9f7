"""The three pictures a run leaves: what is retrieved, how training went, what the similarity learned."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from data import LANGUAGES, Emoji
from matplotlib.patches import Rectangle
from recall import WAYS
from torch import Tensor

INK, MUTED, RULE = "#1f2430", "#717885", "#dfe2e8"
BLUE, ORANGE, GREEN, RED = "#2f6db5", "#d9822b", "#2e9e5b", "#c8504b"
plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",  # ships with matplotlib and covers all five languages
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
)
TOP = 5


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


def picture(figure, box, emoji: Emoji, p: int, frame: str | None) -> None:
    """Picture p at box = (left, bottom, width, height) in inches, framed in a colour or not."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    axes.imshow(emoji.pictures[p].permute(1, 2, 0).numpy(), interpolation="lanczos", extent=(0, 1, 0, 1))
    axes.set(xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
    axes.axis("off")
    line = {"edgecolor": frame or RULE, "linewidth": 3 if frame else 0.8, "facecolor": "none"}
    axes.add_patch(Rectangle((-0.06, -0.06), 1.12, 1.12, clip_on=False, **line))


def queries(emoji: Emoji, count: int) -> list[int]:
    """Captions to show, drawn with a fixed seed, languages in turn: what comes, not the best of it.

    Pictures are spread over the list, which runs from faces and people to things, symbols and flags.
    """
    generator = torch.Generator().manual_seed(3)
    span = len(emoji.pictures) / count
    chosen = [int(span * (k + float(torch.rand((), generator=generator)))) for k in range(count)]
    codes = list(LANGUAGES)
    return [
        next(c for c in range(5 * p, 5 * p + 5) if emoji.languages[c] == codes[k % 5]) for k, p in enumerate(chosen)
    ]


def gallery(path: Path, emoji: Emoji, s: Tensor) -> None:
    """s [P, C] of the test split. Left: caption to pictures. Right: picture to captions."""
    rows, step, left, middle = 10, 0.98, 3.35, 8.15
    figure = plt.figure(figsize=(15, rows * step + 1.25))
    width, height = figure.get_size_inches()

    def text(x, y, words, **style):
        return figure.text(x / width, y / height, words, **style)

    heading = {"fontsize": 14, "fontweight": "bold", "va": "baseline"}
    note = {"fontsize": 9, "color": MUTED, "va": "baseline"}
    text(0.35, height - 0.45, "Caption to pictures", **heading)
    text(
        0.35,
        height - 0.7,
        f"the five best of {len(s)} held-out pictures; the right one framed in green",
        **note,
    )
    text(middle, height - 0.45, "Picture to captions", **heading)
    text(
        middle,
        height - 0.7,
        f"the three best of {s.shape[1]:,} held-out captions; right ones in green",
        **note,
    )

    for row, c in enumerate(queries(emoji, rows)):
        bottom = height - 1.0 - (row + 1) * step + 0.08
        language, right = LANGUAGES[emoji.languages[c]], int(emoji.owner[c])
        text(0.35, bottom + 0.7, language, fontsize=8.5, color=BLUE, fontweight="bold", va="center")
        shown = textwrap.fill(textwrap.shorten(emoji.captions[c], 92, placeholder=" …"), 36)
        text(0.35, bottom + 0.55, shown, fontsize=9.5, va="top", linespacing=1.2)
        for k, p in enumerate(s[:, c].topk(TOP).indices.tolist()):
            picture(figure, (left + 0.87 * k, bottom, 0.8, 0.8), emoji, p, GREEN if p == right else None)

    for row, c in enumerate(queries(emoji, rows)):
        p = int(emoji.owner[c])
        bottom = height - 1.0 - (row + 1) * step + 0.08
        picture(figure, (middle, bottom, 0.8, 0.8), emoji, p, None)
        for k, found in enumerate(s[p].topk(3).indices.tolist()):
            hit = int(emoji.owner[found]) == p
            y = bottom + 0.65 - 0.25 * k
            text(
                middle + 1.0,
                y,
                emoji.languages[found],
                fontsize=8.5,
                color=BLUE,
                fontweight="bold",
                va="center",
            )
            words = textwrap.shorten(emoji.captions[found], 74, placeholder=" …")
            text(middle + 1.3, y, words, fontsize=9.5, color=GREEN if hit else INK, va="center")
    save(figure, path)


def curves(path: Path, log: dict[str, list], title: str) -> None:
    """log: step, loss, active (% of anchors), negatives at every logged step; val_step and val_*_r1/r5."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=12)
    axes[0].plot(log["step"], log["loss"], color=BLUE, linewidth=1.4)
    axes[0].set(title="Training loss per pair", xlabel="step", ylim=(0, None))

    for way, colour in zip(WAYS, (BLUE, ORANGE), strict=True):
        for k, style in ((1, "-"), (5, ":")):
            label = f"{way.replace('_', ' ')}, R@{k}"
            axes[1].plot(log["val_step"], log[f"val_{way}_r{k}"], style, color=colour, linewidth=1.8, label=label)
    axes[1].set(title="Recall on the validation pictures", xlabel="step", ylabel="%", ylim=(0, 100))
    axes[1].legend(loc="lower right")

    axes[2].plot(log["step"], log["active"], color=RED, linewidth=1.6)
    for at in range(1, len(log["step"])):
        if log["negatives"][at] != log["negatives"][at - 1]:
            for axis in axes:
                axis.axvline(log["step"][at], color=MUTED, linewidth=1, linestyle="--")
            here = {"xy": (log["step"][at], 6), "textcoords": "offset points", "fontsize": 9, "color": MUTED}
            axes[2].annotate(log["negatives"][at - 1], xytext=(-5, 0), ha="right", **here)
            axes[2].annotate(log["negatives"][at], xytext=(5, 0), ha="left", **here)
    axes[2].set(title="Anchors with a negative inside the margin", xlabel="step", ylabel="%", ylim=(0, 104))
    save(figure, path)


def weights(path: Path, diag: Tensor, blocks: Tensor) -> None:
    """diag [D], blocks [G, b, b] of the learned W = diag(w) + blockdiag(B)."""
    groups, width, _ = blocks.shape
    dim = groups * width
    matrix = torch.block_diag(*blocks)
    norms = blocks.flatten(1).norm(dim=1)
    figure = plt.figure(figsize=(14, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.05))
    title = f"Learned similarity  W = diag(w) + blockdiag(B):  {dim} channels, {groups} blocks of {width}×{width}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12)

    axes = figure.add_subplot(grid[0, :2])
    axes.bar(np.arange(dim), diag.sort(descending=True).values.numpy() - 1, bottom=1, width=1.0, color=BLUE)
    axes.axhline(1, color=MUTED, linewidth=1)
    axes.set(title="Channel weights w, sorted (all began at 1)", xlim=(-0.5, dim - 0.5), xlabel="channel")
    axes = figure.add_subplot(grid[1, :2])
    axes.bar(np.arange(groups), norms.numpy(), width=0.7, color=ORANGE)
    axes.set(title="Frobenius norm of each block (all began at 0)", xlabel="block", xlim=(-0.6, groups - 0.4))

    axes = figure.add_subplot(grid[:, 2])
    shown = matrix[: 8 * width, : 8 * width].numpy()
    limit = float(np.abs(shown).max()) or 1.0
    drawn = axes.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set(title=f"The first {len(shown) // width} blocks of B", xticks=range(0, len(shown) + 1, width))
    axes.set(yticks=range(0, len(shown) + 1, width), xlim=(-0.5, len(shown) - 0.5), ylim=(len(shown) - 0.5, -0.5))
    axes.grid(False)
    figure.colorbar(drawn, ax=axes, shrink=0.85)
    save(figure, path)


@torch.no_grad()
def attentions(path: Path, emoji: Emoji, model) -> None:
    """Where the K representations of ten pictures look; model: of graph.py."""
    chosen = [int(emoji.owner[c]) for c in queries(emoji, 10)]
    pictures = emoji.pictures[chosen].float() / 255
    maps = model.attentions(pictures)  # [10, K, 8, 8]
    count = maps.shape[1]
    figure, axes = plt.subplots(count + 1, len(chosen), figsize=(13, 1.45 * (count + 1) + 0.5), layout="constrained")
    title = f"Attention of the {count} representations of a picture (held-out pictures); darker: more"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12)
    for column, one in enumerate(pictures):
        shown = one.permute(1, 2, 0).numpy()
        axes[0, column].imshow(shown, interpolation="lanczos", extent=(0, 8, 8, 0))
        for k in range(count):
            axes[k + 1, column].imshow(shown, interpolation="lanczos", extent=(0, 8, 8, 0), alpha=0.35)
            axes[k + 1, column].imshow(
                maps[column, k].numpy(), cmap="Blues", vmin=0, alpha=0.75, extent=(0, 8, 8, 0), interpolation="nearest"
            )
    for axis in axes.flat:
        axis.axis("off")
    save(figure, path)


@torch.no_grad()
def heads(path: Path, structure) -> None:
    """The learned W = diag(w) + blockdiag(B) of every head of an attention layer; structure: its weights."""
    matrices = [torch.diag(w) + torch.block_diag(*b) for w, b in zip(structure.diag, structure.blocks, strict=True)]
    limit = float(max((m - torch.eye(len(m))).abs().max() for m in matrices)) or 1.0
    figure, axes = plt.subplots(1, len(matrices), figsize=(13, 3.9), layout="constrained")
    title = "Learned W of each attention head, less the identity from which it starts"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12)
    for k, (axis, matrix) in enumerate(zip(axes, matrices, strict=True)):
        change = (matrix - torch.eye(len(matrix))).numpy()
        image = axis.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(title=f"head {k}")
        axis.grid(False)
    figure.colorbar(image, ax=axes, shrink=0.8)
    save(figure, path)
