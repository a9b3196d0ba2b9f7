"""A result file: what was measured, on what, by which command; and the figures derived from it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import NamedTuple

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
KEY = ("op", "n", "d", "block", "dtype", "device")  # what identifies a case

# A result file is one JSON object:
#   schema, date, command, commit ("abc1234", "+" behind it where the tree differed), elapsed_s, interrupted
#   machine   {cpu, threads, gpu, python, torch, triton, gssf_kernels, matmul_precision, backends}
#   ceilings  [{device, dtype, tflop_per_s, gb_per_s}]
#   rows      [{op, n, d, block, dtype, device, variant, version, status, note, errors, checked_rows,
#               forward_ms [turn], backward_ms [turn], peak_mib}]
# A row's status is one of these:
STATUSES = {
    "ok": "timed",
    "wrong": "disagrees with fp64 truth; not timed",
    "absent": "there is no such variant in this version",
    "skipped": "its package is not installed, or does not run on this device",
    "failed": "raised an error",
    "crashed": "took its process down",
    "timed out": "gave no sign of life",
    "unfinished": "the run was interrupted before it was timed",
}


class ResultError(ValueError):
    """A result file that cannot be read; the message is one line."""


def new(command: str) -> dict:
    """An empty book for one run."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "elapsed_s": 0.0,
        "interrupted": False,
        "machine": machine(),
        "ceilings": [],
        "rows": [],
    }


def machine() -> dict:
    """What a figure must stand beside."""
    import torch

    import gssf_kernels as gk
    from gssf_kernels import plan
    from gssf_kernels.__main__ import cpu_description

    try:
        import triton
    except ImportError:
        triton = None
    return {
        "cpu": cpu_description(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "gssf_kernels": gk.__version__,
        "matmul_precision": {device: plan.fp32_products(device) for device in ("cpu", "cuda")},
        "backends": gk.backends(),
    }


def _commit() -> str | None:
    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def save(book: dict, path: Path) -> None:
    """Write book to path, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(_dump(book))
    os.replace(beside, path)


def _dump(book: dict) -> str:
    """JSON with one line a row, so that a change of figures reads well in a diff."""
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in book["rows"])
    head = json.dumps({**book, "rows": None}, indent=1, ensure_ascii=False)
    return head.replace('"rows": null', '"rows": [\n' + rows + "\n ]" if rows else '"rows": []') + "\n"


def load(path: Path) -> dict:
    """Read a result file; ResultError, in one line, where it is none."""
    try:
        book = json.loads(path.read_text())
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ResultError(f"{path}: not JSON ({error})") from None
    if not isinstance(book, dict) or book.get("schema") != SCHEMA or not isinstance(book.get("rows"), list):
        raise ResultError(f"{path}: not a result file of schema {SCHEMA} (write it with `python -m bench run`)")
    return book


def case_of(row: dict) -> tuple:
    """What identifies the row's case: rows of equal case were measured together."""
    return tuple(row[name] for name in KEY)


def cases(book: dict) -> dict[tuple, dict[str, dict]]:
    """``{case: {variant: row}}``, in the order of the file."""
    of_case: dict[tuple, dict[str, dict]] = {}
    for row in book["rows"]:
        of_case.setdefault(case_of(row), {})[row["variant"]] = row
    return of_case


class Spread(NamedTuple):
    """Median, and the tenth and ninetieth percentile."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


def spread(values: list[float]) -> Spread | None:
    """Of some figures; None of none."""
    if len(values) < 2:
        return Spread(*values * 3) if values else None
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), tenths[0], tenths[-1])


def both_ms(row: dict) -> list[float]:
    """Forward + backward of each turn."""
    return [f + b for f, b in zip(row["forward_ms"], row["backward_ms"], strict=True)]


def base(rows: dict[str, dict]) -> str | None:
    """The variant that the others are held against: ours, or plain PyTorch where we have none."""
    return next((name for name in ("ours", "naive") if rows.get(name, {}).get("forward_ms")), None)


def ratio(row: dict, against: dict) -> Spread | None:
    """How many times as long as ``against`` the row took, turn by turn."""
    pairs = zip(both_ms(row), both_ms(against), strict=False)
    return spread([theirs / ours for theirs, ours in pairs])
