"""Two result files side by side: do their ratios agree within the spread they print?"""

from __future__ import annotations

from typing import NamedTuple

from bench import report, results


class Difference(NamedTuple):
    """One variant of one case in both files: its ratio to the first, and the first's own times."""

    case: tuple
    variant: str
    before: results.Spread
    after: results.Spread

    @property
    def agrees(self) -> bool:
        """Whether the two spreads overlap."""
        return self.before.low <= self.after.high and self.after.low <= self.before.high


def differences(before: dict, after: dict) -> list[Difference]:
    """Of everything that both files timed against the same variant."""
    compared = []
    old, new = results.cases(before), results.cases(after)
    for case in old.keys() & new.keys():
        against = results.base(old[case])
        if against is None or results.base(new[case]) != against:
            continue
        for variant in old[case].keys() & new[case].keys() - {against}:
            ratios = [results.ratio(book[case][variant], book[case][against]) for book in (old, new)]
            if ratios[0] and ratios[1]:
                compared.append(Difference(case, variant, ratios[0], ratios[1]))
    order = {case: k for k, case in enumerate(old)}
    return sorted(compared, key=lambda d: (order[d.case], d.variant))


def page(before: dict, after: dict) -> tuple[str, bool]:
    """(Markdown, whether all agree)."""
    compared = differences(before, after)
    table_rows = []
    for d in compared:
        op, n, dim, _, dtype, device = d.case
        verdict = "agree" if d.agrees else f"differ: {d.after.median / d.before.median:.2f} of before"
        spreads = [report.between(d.before, "×"), report.between(d.after, "×")]
        table_rows.append([f"`{op}`", f"{n:,}", f"{dim:,}", dtype, device, d.variant, *spreads, verdict])
    head = ["op", "N", "D", "dtype", "device", "variant", "ratio before", "ratio after", ""]
    agreeing = sum(d.agrees for d in compared)
    closing = f"{agreeing} of {len(compared)} ratios agree within the spreads of both runs."
    return f"{report.table(head, table_rows)}\n\n{closing}\n", agreeing == len(compared)
