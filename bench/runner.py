"""Runs a plan: starts the worker, keeps the books, and goes on past what crashes, hangs or is interrupted."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from bench import results
from bench.measure import NAIVE_MATRICES, Case, naive_fits


class Entry(NamedTuple):
    """A case, and what of it to measure."""

    case: Case
    variants: tuple[str, ...]
    memory: tuple[str, ...] = ()  # the variants whose peak memory to take
    seconds: float = 8.0  # to spend on turns
    min_turns: int = 5
    max_turns: int = 41


class Plan(NamedTuple):
    entries: list[Entry]
    command: str
    user_variants: Mapping[str, str] = MappingProxyType({})  # name, "module:function"
    silence_s: float = 300.0  # without a word from the worker, after which it is stopped
    start_s: float = 300.0  # until its first word


class _Lost(Exception):
    """The worker is gone: (status, note)."""


class Run:
    """One run of a plan. ``book`` is up to date after every event."""

    def __init__(self, plan: Plan, out: Path | None, progress=sys.stderr) -> None:
        self.plan, self.out, self.progress = plan, out, progress
        self.book = results.new(plan.command)
        self.start = time.perf_counter()
        self.rows: dict[tuple[int, str], dict] = {}
        self.suspect: tuple[int, str] | None = None  # (entry, variant) that the worker was last busy with

    def __call__(self) -> dict:
        """The book. An interrupt ends the run and keeps what was measured."""
        try:
            self._time()
            self._memory()
        except KeyboardInterrupt:
            self.book["interrupted"] = True
            self._say("interrupted: what was measured is kept")
        for row in self.book["rows"]:
            if row["status"] == "ok" and not row["forward_ms"]:
                row.update(status="unfinished", note=results.STATUSES["unfinished"])
        self._save()
        return self.book

    def _time(self) -> None:
        """All cases; after a crash, again from the case that crashed, without the variant at fault."""
        left = [(k, list(entry.variants)) for k, entry in enumerate(self.plan.entries)]
        while left:
            cases = [(k, {**self._json(self.plan.entries[k]), "variants": names}) for k, names in left]
            self.suspect = None
            try:
                for event in self._worker({"cases": cases, "user_variants": dict(self.plan.user_variants)}):
                    if self._note(event):
                        left.pop(0)
                return
            except _Lost as lost:
                status, note = lost.args
                if self.suspect is None:
                    raise SystemExit(f"bench: the worker {note} while no variant was running") from None
                k, name = self.suspect
                self._say(f"{self.plan.entries[k].case} {name}: {note}")
                for (entry, _), row in self.rows.items():
                    if entry == k:  # its turns are no longer side by side with those to come
                        row.update(forward_ms=[], backward_ms=[])
                self._row(k, name).update(status=status, note=note)
                left[0][1].remove(name)
                if not left[0][1]:
                    left.pop(0)

    def _note(self, event: dict) -> bool:
        """Write an event into the book; True when a case is finished."""
        kind = event.pop("event")
        if kind == "ceilings":
            self._raise_ceiling(event)
        elif kind == "case":
            self.index = event["index"]
            self.suspect = None
            self._say(f"[{self.index + 1}/{len(self.plan.entries)}] {self.plan.entries[self.index].case}")
        elif kind == "begin":
            self.suspect = (self.index, event["variant"])
        elif kind == "verdict":
            row = self._row(self.index, event["variant"])
            row.update(event)
            if row["status"] != "ok":
                row.update(forward_ms=[], backward_ms=[])
                self._say(f"    {row['variant']}: {row['status']}: {row['note']}")
        elif kind == "turn":
            row = self._row(self.index, event["variant"])
            row["forward_ms"].append(round(event["forward_ms"], 5))
            row["backward_ms"].append(round(event["backward_ms"], 5))
        elif kind == "done":
            self._summary(self.index)
            self._save()
            return True
        return False

    def _raise_ceiling(self, ceiling: dict) -> None:
        """Keep the best figure of each kind that this run has seen."""
        kind = {name: ceiling[name] for name in ("device", "dtype")}
        for known in self.book["ceilings"]:
            if kind.items() <= known.items():
                known.update({name: max(value, ceiling[name]) for name, value in known.items() if name not in kind})
                return
        self.book["ceilings"].append(ceiling)

    def _memory(self) -> None:
        """Peak memory, each in a fresh process; plain PyTorch is left out where it would not fit."""
        for k, entry in enumerate(self.plan.entries):
            for name in entry.memory:
                row = self.rows.get((k, name))
                if row is None or row["status"] != "ok":
                    continue
                if name != "ours" and entry.case.device == "cpu" and not naive_fits(entry.case.n, "cpu"):
                    row["note"] = (
                        f"memory not measured: {NAIVE_MATRICES} matrices of {entry.case.n}² fp32 would not fit"
                    )
                    continue
                plan = {"peak": {"case": entry.case, "variant": name}, "user_variants": dict(self.plan.user_variants)}
                try:
                    for event in self._worker(plan):
                        row["peak_mib"] = round(event["mib"], 1)
                        self._say(f"    {entry.case} {name}: peak {row['peak_mib']:.0f} MiB")
                except _Lost as lost:
                    row["note"] = f"memory not measured: its process {lost.args[1]}"
                self._save()

    @staticmethod
    def _json(entry: Entry) -> dict:
        return {**entry._asdict(), "case": list(entry.case)}

    def _row(self, index: int, variant: str) -> dict:
        if (index, variant) not in self.rows:
            case = self.plan.entries[index].case
            row = {**case._asdict(), "variant": variant, "version": None, "status": "ok", "note": "", "errors": []}
            self.rows[index, variant] = {
                **row,
                "checked_rows": 0,
                "forward_ms": [],
                "backward_ms": [],
                "peak_mib": None,
            }
            self.book["rows"].append(self.rows[index, variant])
        return self.rows[index, variant]

    def _worker(self, plan: dict) -> Iterator[dict]:
        """The worker's events. Raises _Lost where it dies or falls silent."""
        command = [sys.executable, "-m", "bench.worker"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin
        assert process.stdout
        lines: queue.Queue[str | None] = queue.Queue()

        def listen(stream=process.stdout) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=listen, daemon=True).start()
        try:
            process.stdin.write(json.dumps(plan))
            process.stdin.close()
            limit_s = self.plan.start_s
            while (line := lines.get(timeout=limit_s)) is not None:
                yield json.loads(line)
                limit_s = self.plan.silence_s
            code = process.wait()
            if code:
                raise _Lost("crashed", f"ended with signal {-code}" if code < 0 else f"ended with status {code}")
        except queue.Empty:
            raise _Lost("timed out", f"was silent for {limit_s:.0f} s and was stopped") from None
        finally:
            process.kill()
            process.wait()

    def _summary(self, index: int) -> None:
        for (k, name), row in self.rows.items():
            took = results.spread(results.both_ms(row))
            if k == index and took:
                self._say(f"    {name:12} {took:.2f} ms, {len(row['forward_ms'])} turns")

    def _say(self, text: str) -> None:
        seconds = int(time.perf_counter() - self.start)
        print(f"{seconds // 60:2d}:{seconds % 60:02d} {text}", file=self.progress, flush=True)

    def _save(self) -> None:
        self.book["elapsed_s"] = round(time.perf_counter() - self.start, 1)
        if self.out:
            results.save(self.book, self.out)
