"""Two pictures, log–log: time over N of every way, with the floor that none can pass; and the roofline."""

from __future__ import annotations

from pathlib import Path

from bench import report, results

COLORS = {"ours": "#c2410c", "naive": "#1f2937", "compile": "#6b7280"}


def curves(book: dict) -> dict[tuple, dict[str, list[tuple[int, float]]]]:
    """``{(op, d, dtype, device): {variant or "floor": [(n, ms)]}}`` for what was measured at three sizes or more."""
    panels: dict[tuple, dict[str, dict[int, float]]] = {}
    for row in book["rows"]:
        time_ms = results.spread(results.both_ms(row))
        if time_ms is None:
            continue
        panel = panels.setdefault((row["op"], row["d"], row["dtype"], row["device"]), {})
        panel.setdefault(row["variant"], {})[row["n"]] = time_ms.median
        floor = report.floor_ms(book, row)
        if floor:
            panel.setdefault("floor", {})[row["n"]] = sum(floor)
    sorted_panels = {
        key: {name: sorted(points.items()) for name, points in panel.items()} for key, panel in panels.items()
    }
    return {key: panel for key, panel in sorted_panels.items() if max(map(len, panel.values())) >= 3}


def roofs(book: dict) -> dict[tuple, dict[str, list[tuple[float, float, str, int]]]]:
    """``{(dtype, device): {variant: [(FLOP per byte, TFLOP/s, op, n)]}}``, both of the op's minimal work."""
    panels: dict[tuple, dict[str, list[tuple[float, float, str, int]]]] = {}
    for row in book["rows"]:
        work, rate = report.work_of(row), report.tflop_per_s(row)
        if work is None or not rate:
            continue
        intensity = (work.forward_flop + work.backward_flop) / (work.forward_bytes + work.backward_bytes)
        panel = panels.setdefault((row["dtype"], row["device"]), {})
        panel.setdefault(row["variant"], []).append((intensity, rate, row["op"], row["n"]))
    return panels


def draw_roofline(book: dict, path: Path) -> bool:
    """Write TFLOP/s over arithmetic intensity beneath the measured ceilings; False where nothing was measured."""
    ceilings = {(c["dtype"], c["device"]): (c["tflop_per_s"], c["gb_per_s"]) for c in book["ceilings"]}
    panels = {key: panel for key, panel in roofs(book).items() if key in ceilings}
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 5.2), squeeze=False)
    for axis, (key, panel) in zip(axes.flat, panels.items(), strict=True):
        tflop, gb = ceilings[key]
        places = [x for points in panel.values() for x, *_ in points]
        reach = sorted({min(places) / 2, 1e3 * tflop / gb, max(places) * 2})
        roof = [min(tflop, x * gb / 1e3) for x in reach]
        axis.loglog(reach, roof, color="#9ca3af", linestyle=":", label=f"{tflop:.3g} TFLOP/s, {gb:.3g} GB/s")
        for name, points in panel.items():
            style = {"color": COLORS[name]} if name in COLORS else {}
            label = report.TITLES.get(name, name).strip("`")
            axis.loglog(*zip(*[p[:2] for p in points], strict=True), "o", markersize=4, label=label, **style)
        for x, rate, op, n in panel.get("ours", []):
            axis.annotate(f"{op} {n:,}", (x, rate), textcoords="offset points", xytext=(4, 3), fontsize=6)
        axis.set_title(", ".join(key), fontsize=10)
        axis.set_xlabel("FLOP per byte of minimal work")
        axis.set_ylabel("TFLOP/s of minimal work, forward + backward")
        axis.grid(True, alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


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
