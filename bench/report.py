"""Markdown from a result file: one summary line a case, the details of every row, the ceilings they stand under."""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path

from bench import results
from bench.ceilings import Ceilings
from bench.ops import OPS
from bench.problem import Shape, Work

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
PRIMITIVES = {"project", "pair_scores", "hardest_negatives", "nearest", "top_scores"}  # no losses: not in the headline
TITLES = {"ours": "ours", "naive": "plain PyTorch", "compile": "`torch.compile`"}


def work_of(row: dict) -> Work | None:
    """The least that the row's case must do; None for an op that is no longer there."""
    if row["op"] not in OPS:
        return None
    return OPS[row["op"]].work(Shape(row["n"], row["d"], row["block"]), ITEM_BYTES[row["dtype"]])


def floor_ms(book: dict, row: dict) -> tuple[float, float] | None:
    """(forward, backward) floor of the row's case under the ceilings of its own run; None where none was measured."""
    work = work_of(row)
    for ceiling in book["ceilings"]:
        if (ceiling["device"], ceiling["dtype"]) == (row["device"], row["dtype"]) and work:
            return Ceilings(ceiling["tflop_per_s"], ceiling["gb_per_s"]).floor_ms(work)
    return None


def achieved(book: dict, row: dict) -> float | None:
    """The floor's share of the row's time, forward + backward: 1 is as fast as this machine can."""
    floor, took = floor_ms(book, row), results.spread(results.both_ms(row))
    return sum(floor) / took.median if floor and took else None


def tflop_per_s(row: dict) -> float | None:
    """Minimal work over time, forward + backward."""
    took, work = results.spread(results.both_ms(row)), work_of(row)
    if not took or not work:
        return None
    return (work.forward_flop + work.backward_flop) / took.median / 1e9


def number(value: float | None) -> str:
    """Three significant digits, thousands set apart; a dash for none."""
    if value is None:
        return "–"
    if value >= 999.5:
        return f"{value:,.0f}"
    exponent = math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(2 - exponent, 0)}f}"


def between(spread: results.Spread | None, unit: str = "") -> str:
    """median (10th–90th percentile)."""
    if spread is None:
        return "–"
    return f"{number(spread.median)}{unit} ({number(spread.low)}–{number(spread.high)})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(book: dict) -> str:
    """One line a case: our time, how many times as long every other way took, turn by turn."""
    cases = [rows for rows in results.cases(book).values() if results.base(rows) == "ours"]
    timed = (name for rows in cases for name, row in rows.items() if row["forward_ms"] and name != "ours")
    names = list(dict.fromkeys(timed))
    head = ["op", "N", "D", "dtype", "ours, ms", "of the floor"]
    head += [f"{TITLES.get(name, name)} / ours" for name in names]
    table_rows = []
    for rows in cases:
        ours = rows["ours"]
        share = achieved(book, ours)
        cells = [f"`{ours['op']}`", f"{ours['n']:,}", f"{ours['d']:,}", ours["dtype"]]
        cells += [between(results.spread(results.both_ms(ours))), f"{share:.0%}" if share else "–"]
        for name in names:
            measured = name in rows and rows[name]["forward_ms"]
            cells.append(between(results.ratio(rows[name], ours), "×") if measured else "")
        table_rows.append(cells)
    return table(head, table_rows)


def memory(book: dict) -> str:
    """Peak extra memory, where it was measured."""
    table_rows = []
    for rows in results.cases(book).values():
        peaks = {name: row["peak_mib"] for name, row in rows.items() if row["peak_mib"] is not None}
        for name, peak in peaks.items():
            row, ours = rows[name], peaks.get("ours")
            times = f"{peak / ours:.1f}×" if ours and name != "ours" else ""
            title = TITLES.get(name, name)
            table_rows.append(
                [f"`{row['op']}`", f"{row['n']:,}", f"{row['d']:,}", row["dtype"], title, number(peak), times]
            )
    return table(["op", "N", "D", "dtype", "variant", "peak MiB", "/ ours"], table_rows) if table_rows else ""


def details(book: dict) -> str:
    """Every row, and why the missing ones are missing."""
    parts = []
    by_op: dict[str, list] = {}
    for rows in results.cases(book).values():
        by_op.setdefault(next(iter(rows.values()))["op"], []).append(rows)
    for op, cases in by_op.items():
        lines = []
        for rows in cases:
            against = results.base(rows)
            for name, row in rows.items():
                title = " ".join(filter(None, (TITLES.get(name, name), row["version"] if name not in TITLES else "")))
                start = [f"{row['n']:,}", f"{row['d']:,}", row["dtype"], title]
                if not row["forward_ms"]:
                    lines.append([*start, f"{row['status']}: {row['note']}", "", "", "", "", ""])
                    continue
                forward, backward = (results.spread(row[f"{stage}_ms"]) for stage in ("forward", "backward"))
                times = "1" if name == against else between(results.ratio(row, rows[against]), "×") if against else "–"
                share, error = achieved(book, row), max(row["errors"], default=None)
                gradients = between(backward) if backward and backward.high else "–"
                line = [between(forward), gradients, times, number(tflop_per_s(row))]
                line += [f"{share:.0%}" if share else "–", "–" if error is None else f"{error:.0e}"]
                lines.append([*start, *line])
        head = [
            "N",
            "D",
            "dtype",
            "variant",
            "forward, ms",
            "backward, ms",
            "times the first",
            "TFLOP/s of minimal work",
        ]
        head += ["of the floor", "error"]
        title = f"### `{op}`: {OPS[op].summary}" if op in OPS else f"### `{op}`"
        parts += [title, table(head, lines)]
    return "\n\n".join(parts)


def origin(book: dict) -> str:
    """Command, date, commit, machine and versions, in a sentence."""
    m = book["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['threads']} threads"
    versions = f"torch {m['torch']}, Python {m['python']}, gssf_kernels {m['gssf_kernels']}"
    triton = f", Triton {m['triton']}" if m["triton"] and m["gpu"] else ""
    interrupted = " Interrupted." if book["interrupted"] else ""
    return (
        f"`{book['command']}`, {book['date'][:10]}, commit {book['commit']}: {where}; {versions}{triton}.{interrupted}"
    )


def provenance(book: dict) -> str:
    """origin, and the ceilings that the same run measured."""
    ceilings = "; ".join(
        f"{c['dtype']} on {c['device']} {number(c['tflop_per_s'])} TFLOP/s (matrix product), "
        f"{number(c['gb_per_s'])} GB/s (copy)"
        for c in book["ceilings"]
    )
    return f"{origin(book)} Ceilings of the same run: {ceilings or 'not measured'}."


READING = (
    "Milliseconds are medians (10th–90th percentile) of interleaved turns, forward + backward; ratios go turn by "
    "turn. Every variant agreed with fp64 truth before it was timed. *Of the floor*: the least time that the op's "
    "minimal matrix work, or its minimal traffic, takes at the measured ceilings, over ours."
)


def whole(book: dict, plot: str | None, roofline: str | None = None) -> str:
    """The report as a page."""
    parts = [f"# Measured on {book['machine']['gpu'] or book['machine']['cpu']}", provenance(book), READING]
    parts += [f"![Time over N]({plot})"] if plot else []
    parts += [summary(book)]
    table_of_memory = memory(book)
    parts += ["## Peak extra memory of one step", table_of_memory] if table_of_memory else []
    parts += ["## Roofline", f"![TFLOP/s over arithmetic intensity]({roofline})"] if roofline else []
    parts += ["## Every row", details(book)]
    return "\n\n".join(parts) + "\n"


def headline(book: dict) -> str:
    """Each loss at its smallest and largest N beside plain PyTorch, and the peak memory of a step where measured."""
    timed: dict[tuple[str, str], list[dict]] = {}
    for rows in results.cases(book).values():
        timed_both = all(name in rows and rows[name]["forward_ms"] for name in ("ours", "naive"))
        if timed_both and rows["ours"]["op"] not in PRIMITIVES:
            timed.setdefault((rows["ours"]["op"], rows["ours"]["dtype"]), []).append(rows)
    lines = []
    for (op, dtype), cases in timed.items():
        cases.sort(key=lambda rows: (rows["ours"]["n"], rows["ours"]["d"]))
        for rows in cases[:: max(len(cases) - 1, 1)]:
            ours, naive = rows["ours"], rows["naive"]
            times = [between(results.spread(results.both_ms(row))) for row in (ours, naive)]
            ratio = between(results.ratio(naive, ours), "×")
            title = f"`{op}`: {OPS[op].summary}" if op in OPS else f"`{op}`"
            lines.append([title, f"{ours['n']:,}", f"{ours['d']:,}", dtype, *times, ratio])
    head = ["loss", "N", "D", "dtype", "ours, ms", "plain PyTorch, ms", "plain PyTorch / ours"]
    peaks = []
    for rows in results.cases(book).values():
        peak = {name: rows[name]["peak_mib"] for name in ("ours", "naive") if name in rows}
        if peak.get("ours") and peak.get("naive"):
            case = f"`{rows['ours']['op']}` at N = {rows['ours']['n']:,}"
            peaks.append(f"{case}: {number(peak['ours'])} MiB, plain PyTorch {number(peak['naive'])} MiB")
    reading = (
        "Milliseconds are medians (10th–90th percentile) of interleaved turns, forward + backward. Every variant "
        "agreed with fp64 truth before it was timed."
    )
    if peaks:
        reading += f" Peak extra memory of one step, {'; '.join(peaks)}."
    return "\n\n".join([wrapped(origin(book)), table(head, lines), wrapped(reading)])


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def summary_block(book: dict, plot: str | None) -> str:
    """provenance, summary and peak memory, with the plot."""
    image = f"![Time over N]({plot})" if plot else ""
    parts = [wrapped(provenance(book)), summary(book), wrapped(READING), memory(book), image]
    return "\n\n".join(part for part in parts if part)


def into(page: Path, book: dict, plot: str | None) -> None:
    """Rewrite the page's blocks: ``<!-- bench -->`` holds summary_block, ``<!-- bench headline -->`` headline."""
    blocks = {"bench": summary_block(book, plot), "bench headline": headline(book)}
    mark = re.compile(rf"(<!-- ({'|'.join(blocks)}) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    text, written = mark.subn(lambda match: f"{match[1]}{blocks[match[2]]}\n{match[3]}", page.read_text())
    if not written:
        names = " or ".join(f"<!-- {name} --> and <!-- /{name} -->" for name in blocks)
        raise results.ResultError(f"{page}: no lines {names} to write between")
    page.write_text(text)
