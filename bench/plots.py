"""Time over N, log–log: every way, ours, and the floor that no way can pass."""

from __future__ import annotations

from pathlib import Path

from bench import report, results

COLORS = {"ours": "#c2410c", "naive": "#1f2937", "compile": "#6b7280"}


def curves(book: dict) -> dict[tuple, dict[str, list[tuple[int, float]]]]:
    """``{(op, d, dtype, device): {variant or "floor": [(n, ms)]}}`` for what was measured at three sizes or more."""
    found: dict[tuple, dict[str, dict[int, float]]] = {}
    for row in book["rows"]:
        took = results.spread(results.both_ms(row))
        if took is None:
            continue
        panel = found.setdefault((row["op"], row["d"], row["dtype"], row["device"]), {})
        panel.setdefault(row["variant"], {})[row["n"]] = took.median
        floor = report.floor_ms(book, row)
        if floor:
            panel.setdefault("floor", {})[row["n"]] = sum(floor)
    lines = {key: {name: sorted(at.items()) for name, at in panel.items()} for key, panel in found.items()}
    return {key: panel for key, panel in lines.items() if max(len(line) for line in panel.values()) >= 3}


def draw(book: dict, path: Path) -> bool:
    """Write the picture; False where nothing was measured at three sizes."""
    panels = curves(book)
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.0 * columns, 4.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((op, d, dtype, device), lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            style = {"linestyle": ":", "color": "#9ca3af"} if name == "floor" else {"marker": "o", "markersize": 4}
            if name in COLORS:
                style["color"] = COLORS[name]
            label = report.TITLES.get(name, name).strip("`")
            axis.loglog(*zip(*points, strict=True), label=label, **style)
        axis.set_title(f"{op}, D = {d}, {dtype}, {device}", fontsize=10)
        axis.set_xlabel("N")
        axis.set_ylabel("forward + backward, ms")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.xaxis.set_minor_formatter(lambda *_: "")
        axis.set_xticks(sorted({n for points in lines.values() for n, _ in points}))
        axis.tick_params(axis="x", labelrotation=45, labelsize=8)
        axis.grid(True, alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
