"""The summary of a first light's findings, under 10,000 characters, the last thing printed."""

from __future__ import annotations

from typing import Any

from bench.report import table

MOST = 9_900  # characters
WRONG, EXCEPTIONS = 10, 6  # of each, told in full
COLUMNS = ("ours", "ours replayed", "composite", "composite replayed", "plain", "plain replayed", "bare product")


def summary(findings: list[dict[str, Any]], planned: dict[str, list[str]]) -> str:
    """The text; planned: the names of all items by family, and under "headline" and "smoke"."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for finding in findings:
        kinds.setdefault(finding["kind"], []).append(finding)
    parts = [_facts(kinds.get("facts", [])), _smoke(kinds.get("smoke", []), planned.get("smoke", []))]
    items = {name: names for name, names in planned.items() if name not in ("smoke", "headline")}
    parts += [_families(kinds, items), _wrong(kinds), _exceptions(kinds)]
    parts += [_headlines(kinds, planned.get("headline", [])), _hopper(kinds.get("hopper", []))]
    text = "\n\n".join(part for part in parts if part)
    return text if len(text) <= MOST else text[: MOST - 40].rsplit("\n", 1)[0] + "\n… (the rest is in findings.jsonl)"


def _facts(facts: list[dict[str, Any]]) -> str:
    lines = ["# First light"]
    for fact in facts:
        lines += [f"{name}: {value}" for name, value in fact.items() if name != "kind"]
    return "\n".join(lines)


def _smoke(smoke: list[dict[str, Any]], planned: list[str]) -> str:
    if not planned:
        return ""
    finding_of = {finding["name"]: finding for finding in smoke}
    lines = []
    for name in planned:
        finding = finding_of.get(name)
        if finding is None:
            lines.append(f"{name}: NOT RUN")
        elif finding.get("right"):
            lines.append(f"{name}: right")
        else:
            about = {k: v for k, v in finding.items() if k not in ("kind", "name", "kernels", "right", "traceback")}
            lines.append(f"{name}: WRONG {str(about)[:400]}")
    return "## Smoke\n" + "\n".join(lines)


def is_wrong(finding: dict[str, Any]) -> bool:
    """Whether an item's finding is not what it should be."""
    return bool(finding.get("mismatches")) or not finding["equal bits"]


def _families(kinds: dict[str, list[dict[str, Any]]], planned: dict[str, list[str]]) -> str:
    if not planned:
        return ""
    by_item = {finding["item"]: finding for finding in kinds.get("item", []) if "again" not in finding}
    failed = {finding["item"] for kind in ("exception", "died") for finding in kinds.get(kind, [])}
    rows, missing = [], []
    for family, names in planned.items():
        done = [by_item[name] for name in names if name in by_item]
        errors = [finding["error over allowed"] for finding in done]
        worst = "inf" if "inf" in errors else f"{max(errors):.2f}" if errors else "–"
        kernels = [kernel for finding in done for kernel in finding["kernels"]]
        rows.append(
            [
                family,
                f"{len(done)} of {len(names)}",
                str(sum(is_wrong(finding) for finding in done)),
                worst,
                str(sum(not finding["equal bits"] for finding in done)),
                str(sum(name in failed for name in names)),
                str(max((kernel["registers"] for kernel in kernels), default="–")),
                str(max((kernel["spills"] for kernel in kernels), default="–")),
                f"{sum(finding['seconds'] for finding in done):.0f}",
            ]
        )
        missing += [name for name in names if name not in by_item and name not in failed]
    head = ["family", "checked", "wrong", "error / allowed", "bits differ", "raised", "registers", "spills", "s"]
    text = f"## Items\n{table(head, rows)}"
    if missing:
        text += f"\nNOT REACHED: {len(missing)}, from {missing[0]} to {missing[-1]}"
    return text


def _wrong(kinds: dict[str, list[dict[str, Any]]]) -> str:
    wrong = [finding for finding in kinds.get("item", []) if is_wrong(finding) and "again" not in finding]
    if not wrong:
        return ""
    lines = [f"## Wrong: {len(wrong)}"]
    for finding in wrong[:WRONG]:
        bits = "" if finding["equal bits"] else "; runs differ in their bits"
        lines.append(f"- {finding['item']}: {finding['error over allowed']} of what is allowed{bits}")
        for mismatch in finding.get("mismatches", [])[:2]:
            lines.append("  " + ", ".join(f"{name} {value}" for name, value in mismatch.items())[:300])
        if finding.get("agree"):
            lines.append("  " + "; ".join(f"{name}: {how}" for name, how in finding["agree"].items())[:300])
    return "\n".join(lines)


def _exceptions(kinds: dict[str, list[dict[str, Any]]]) -> str:
    raised = [*kinds.get("exception", []), *kinds.get("died", [])]
    if not raised:
        return ""
    alike: dict[str, list[dict[str, Any]]] = {}
    for finding in raised:
        alike.setdefault(finding["error"][:80] + finding.get("again", ""), []).append(finding)
    lines = [f"## Raised or died: {len(raised)}"]
    for finding, *others in list(alike.values())[:EXCEPTIONS]:
        again = f" ({finding['again']})" if "again" in finding else ""
        others_alike = f" (and {len(others)} more alike)" if others else ""
        words = [line.strip() for line in finding["error"].splitlines() if line.strip()]
        message = words[0] if len(words) == 1 else f"{words[0]} … {words[-1]}"
        lines.append(f"- {finding['item']}{again}{others_alike}: {message[:400]}")
        if finding.get("launches"):
            last = finding["launches"][-1]
            lines.append(f"  last launch: {last['kernel']} grid {last['grid']} {str(last['constexprs'])[:200]}")
        if finding.get("sanitizer"):
            lines.append(f"  compute-sanitizer: {finding['sanitizer'][:400]}")
    return "\n".join(lines)


def _headlines(kinds: dict[str, list[dict[str, Any]]], planned: list[str]) -> str:
    """Medians (least–most); of a dry run they are the CPU's, of few rows."""
    if not planned:
        return ""
    by_item = {finding["item"]: finding for finding in kinds.get("headline", [])}
    rows, notes = [], []
    for name in planned:
        finding = by_item.get(name)
        if finding is None:
            notes.append(f"{name}: NOT RUN")
            continue
        if "wrong" in finding:
            notes.append(f"{name}: WRONG, not timed: {finding['wrong'][:200]}")
            continue
        ms = finding["ms"]
        share = finding["share"]
        rows.append([name, *(_ms(ms.get(column)) for column in COLUMNS), "–" if share is None else f"{share:.0%}"])
    head = ["shape, ms", "ours", "replayed", "composite", "replayed", "plain", "replayed", "product", "share"]
    stand_in = any("compared" in finding for finding in by_item.values())
    title = "## Headline shapes" + (": TIMES OF THE CPU at few rows, to try the report" if stand_in else "") + "\n"
    return title + (table(head, rows) if rows else "") + "".join(f"\n{note}" for note in notes)


def _ms(spread: list[float] | None) -> str:
    return "–" if spread is None else f"{spread[0]:.3g} ({spread[1]:.3g}–{spread[2]:.3g})"


def _hopper(calls: list[dict[str, Any]]) -> str:
    if not calls:
        return "## csrc/cuda\nNOT RUN"
    if calls[0]["right"] is None:
        return f"## csrc/cuda\nNOT RUN: {calls[0]['why']}"
    wrong = [finding for finding in calls if not finding["right"]]
    lines = [f"## csrc/cuda\n{len(calls) - len(wrong)} of {len(calls)} calls right"]
    for finding in wrong[:6]:
        lines.append(f"- {finding['name']}: {str(finding.get('results', finding.get('why', '')))[:300]}")
    return "\n".join(lines)


def status(findings: list[dict[str, Any]], planned: dict[str, list[str]]) -> int:
    """0 where everything planned was reached and is right, else 1."""
    right = set()
    for finding in findings:
        if finding["kind"] in ("exception", "died"):
            return 1
        if finding["kind"] in ("smoke", "hopper"):
            if finding["right"] is False:
                return 1
            right.add(finding["name"])
        if finding["kind"] == "item":
            if is_wrong(finding):
                return 1
            right.add(finding["item"])
        if finding["kind"] == "headline":
            if "wrong" in finding:
                return 1
            right.add(finding["item"])
    return int(any(name not in right for names in planned.values() for name in names))
