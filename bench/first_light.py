"""The first minutes on a GPU, turned into evidence: what runs, what is right, what is fast, and where it is not.

    python bench/first_light.py OUT [--kernels FILE]            # on a card: under four minutes, nothing is built
    python bench/first_light.py --dry-run OUT [--save-kernels FILE]   # without one: under ten minutes on two cores

Smoke programs first, then every op family in worker processes side by side (bench/light/items.py), the headline shapes
alone, the CUDA C++ kernels last. OUT gets findings.jsonl (a line a finding, written as it comes), summary.txt (also
printed last), kernels.tar.gz (the code of kernels that were wrong or raised) and log.txt. The exit status is 1 where
anything was wrong, raised, or was not reached.

Without a card the kernels are compiled for sm_90 and launched, at their real sizes, into a driver that does nothing;
the CPU's results of fewer rows go through comparison and report. --plant FAULT:ITEM puts one there ("wrong tile", "nan"
or "exception"); it and --only may be repeated. --save-kernels packs what was compiled, and --kernels brings it along to
the card, whose minutes are too few to compile in: it has to be made by the same Triton.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "bench":
    sys.path[0] = str(ROOT)  # what is imported is the package, not its files

SECONDS = {"card": 235, "dry": 590}
# Of the time, by when each stage has to be over. Without a card nearly all of it is compilation.
SHARES = {
    "card": {"smoke": 0.2, "items": 0.62, "headline": 0.9, "hopper": 1.0},
    "dry": {"smoke": 0.1, "items": 0.88, "headline": 0.99, "hopper": 1.0},
}
FIRST = ("certified", "panels")  # families that start first: the longest calls
ITEM_SECONDS = 75  # without a finding for so long, a worker hangs
SANITIZER_SECONDS = 60
RETRIES = 6  # in all; the same error is looked into once
ARCHIVE_BYTES = 15 << 20
ILLEGAL = re.compile(r"illegal memory|misaligned|illegal instruction|out.of.range|unspecified launch", re.IGNORECASE)


class Findings:
    """Where findings go: each a line of JSON, flushed at once."""

    def __init__(self, out: Path) -> None:
        self.all: list[dict[str, Any]] = []
        self.file: IO[str] = (out / "findings.jsonl").open("w")
        self.lock = threading.Lock()

    def add(self, finding: dict[str, Any]) -> None:
        with self.lock:
            self.all.append(finding)
            self.file.write(json.dumps(finding) + "\n")
            self.file.flush()


class Run:
    """One first light: its processes, its clock and its findings."""

    def __init__(self, arguments: argparse.Namespace, environment: dict[str, str], work: Path) -> None:
        self.dry, self.out, self.work = arguments.dry_run, arguments.out, work
        self.environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.environment.setdefault("OMP_NUM_THREADS", "1")
        self.planted = {item: fault for fault, _, item in (words.partition(":") for words in arguments.plant or ())}
        self.findings = Findings(self.out)
        self.log = (self.out / "log.txt").open("w")
        self.code = work / "code"
        self.code.mkdir()
        self.start, self.seconds = time.monotonic(), arguments.seconds
        self.retried: set[str] = set()
        self.lock = threading.Lock()
        self.processes: set[subprocess.Popen] = set()

    def left(self, stage: str) -> float:
        """Seconds until the stage has to be over."""
        return self.start + self.seconds * SHARES["dry" if self.dry else "card"][stage] - time.monotonic()

    def process(self, command: list[str], plan: dict | None, stage: str, limit: float, extra: dict[str, str]) -> tuple:
        """(events, how it ended): run a command that tells findings, until it ends, hangs or the stage is over."""
        process = subprocess.Popen(
            command, cwd=ROOT, env={**self.environment, **extra}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, start_new_session=True,
        )  # fmt: skip
        self.processes.add(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(plan or {}))
        process.stdin.close()
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        events, ended = [], ""
        while True:
            wait = min(limit, self.left(stage))
            try:
                line = lines.get(timeout=max(wait, 0.01))
            except queue.Empty:
                ended = "out of time" if self.left(stage) <= 0 else f"nothing heard for {limit:.0f} s"
                break
            if line is None:
                break
            event = _event(line)
            if event is None:
                continue
            events.append(event)
            if event["event"] == "finding":
                self.findings.add({k: v for k, v in event.items() if k != "event"} | extra_words(extra))
        _kill(process)
        self.processes.discard(process)
        if not ended and process.returncode:
            ended = f"exit status {process.returncode}"
        return events, ended

    def work_off(self, kind: str, tasks: list[Any], stage: str) -> None:
        """All tasks by one worker process, and by another after every exception."""
        remaining = list(tasks)
        while remaining and self.left(stage) > 3:
            plan = self._plan(kind, remaining)
            events, ended = self.process(self._worker(), plan, stage, ITEM_SECONDS, {})
            told = {event["item"] for event in events if event["event"] == "finding"}
            remaining = [task for task in remaining if str(task) not in told]
            raised = next((event for event in events if event["event"] == "exception"), None)
            if raised is None and not ended:
                return
            begun = [event["item"] for event in events if event["event"] == "begin"]
            culprit = next((task for task in remaining if begun and str(task) == begun[-1]), None)
            if ended == "out of time":
                return
            if culprit is None:
                self.findings.add({"kind": "died", "item": f"a worker of {kind}s, at its start", "error": ended})
                return
            remaining.remove(culprit)
            if raised is not None:
                self.findings.add({"kind": "exception", **{k: v for k, v in raised.items() if k != "event"}})
            else:
                self.findings.add({"kind": "died", "item": str(culprit), "error": ended})
            self._look_into(kind, culprit, stage, raised["error"] if raised else ended)

    def _look_into(self, kind: str, task: Any, stage: str, error: str) -> None:
        """Once more with launches one by one, and after an illegal access under compute-sanitizer."""
        key = error.splitlines()[0][:80]
        with self.lock:
            if key in self.retried or len(self.retried) >= RETRIES or self.left(stage) < 20:
                return
            self.retried.add(key)
        blocking = {"CUDA_LAUNCH_BLOCKING": "1"}
        events, ended = self.process(self._worker(), self._plan(kind, [task]), stage, ITEM_SECONDS, blocking)
        raised = next((event for event in events if event["event"] == "exception"), None)
        words = extra_words(blocking)
        if raised is not None:
            self.findings.add({"kind": "exception", **{k: v for k, v in raised.items() if k != "event"}, **words})
        elif ended:
            self.findings.add({"kind": "died", "item": str(task), "error": ended, **words})
        sanitizer = shutil.which("compute-sanitizer")
        if self.dry or sanitizer is None or not ILLEGAL.search(error + (raised["error"] if raised else "")):
            return
        plan, told = self._plan(kind, [task]), self.work / f"sanitizer-{len(self.retried)}.txt"
        command = [sanitizer, "--tool", "memcheck", "--print-limit", "3", "--log-file", str(told), *self._worker()]
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        _, ended = self.process(command, plan, stage, SANITIZER_SECONDS, alone)
        text = told.read_text()[:4000] if told.exists() else ended
        self.findings.add({"kind": "died", "item": str(task), "error": "under compute-sanitizer", "sanitizer": text})

    def _plan(self, kind: str, tasks: list[Any]) -> dict[str, Any]:
        return {"kind": kind, "tasks": tasks, "dry": self.dry, "planted": self.planted, "code": str(self.code)}

    def _worker(self) -> list[str]:
        return [sys.executable, "-m", "bench.light.worker"]

    def side_by_side(self, jobs: list, count: int) -> None:
        """Call every job, `count` of them at a time."""
        waiting: queue.Queue = queue.Queue()
        for job in jobs:
            waiting.put(job)

        def take() -> None:
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                job()

        threads = [threading.Thread(target=take) for _ in range(min(count, len(jobs)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that an interrupt is heard

    def smoke(self, name: str) -> None:
        command = [sys.executable, "-m", "bench.light.smoke", name, *(["--dry"] if self.dry else [])]
        events, ended = self.process(command, None, "smoke", 60, {})
        if not any(event["event"] == "finding" for event in events):
            self.findings.add({"kind": "smoke", "name": name, "right": False, "error": ended or "no finding"})

    def hopper(self) -> None:
        command = [sys.executable, "-m", "bench.light.hopper", *(["--dry"] if self.dry else [])]
        events, ended = self.process(command, None, "hopper", 30, {})
        if ended:
            last = events[-1]["name"] if events else "the first call"
            self.findings.add({"kind": "hopper", "name": f"after {last}", "right": False, "why": ended})

    def archive(self) -> None:
        """Pack kernels' code, smallest files first, as far as the size allows."""
        files = sorted(self.code.iterdir(), key=lambda path: path.stat().st_size)
        total = 0
        with tarfile.open(self.out / "kernels.tar.gz", "w:gz") as tar:
            for path in files:
                total += len(zlib.compress(path.read_bytes(), 6)) + 512
                if total > ARCHIVE_BYTES:
                    break
                tar.add(path, arcname=path.name)

    def stop(self) -> None:
        for process in list(self.processes):
            _kill(process)


def extra_words(extra: dict[str, str]) -> dict[str, str]:
    """How a finding of another try is marked."""
    return {"again": " ".join(f"{name}={value}" for name, value in extra.items())} if extra else {}


def _read(stream: IO[str], lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _kill(process: subprocess.Popen) -> None:
    """End it and what it started, if it has not ended by itself."""
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def facts(dry: bool) -> dict[str, Any]:
    """Versions, card, driver, and what tells whether kernels of another machine are the same ones."""
    import torch
    import triton

    import gssf_kernels as gk

    folder = Path(triton.__file__).parent
    about: dict[str, Any] = {
        "kind": "facts",
        "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": _said("git", "rev-parse", "--short", "HEAD") or "none",
        "mode": "dry run: NOTHING RAN ON A CARD, results are the CPU's" if dry else "on a card",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": f"{triton.__version__} {_hash(folder / '_C' / 'libtriton.so')}",
        "ptxas": _hash(folder / "backends" / "nvidia" / "bin" / "ptxas"),
        "gssf_kernels": f"{gk.__version__}, extension {'absent' if gk._library.EXTENSION_ERROR else 'loaded'}",
        "card": _said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv,noheader"),
    }
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        about["processors"] = properties.multi_processor_count
    about["card"] = about["card"] or "none"
    return about


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "none"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/first_light.py", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder for what is found")
    parser.add_argument("--dry-run", action="store_true", help="without a card: compile, launch into nothing, report")
    parser.add_argument("--only", action="append", help="items whose names hold one of these; smoke and hopper too")
    parser.add_argument("--seconds", type=float, help=f"for all of it: {SECONDS['card']}, or {SECONDS['dry']} dry")
    parser.add_argument("--workers", type=int, help="processes side by side: two thirds of the cores, all of them dry")
    parser.add_argument("--kernels", type=Path, help="compiled kernels to bring along")
    parser.add_argument("--save-kernels", type=Path, help="pack what was compiled; nothing is taken from elsewhere")
    parser.add_argument("--plant", action="append", help='dry: "wrong tile:ITEM", "nan:ITEM" or "exception:ITEM"')
    arguments = parser.parse_args()
    arguments.seconds = arguments.seconds or SECONDS["dry" if arguments.dry_run else "card"]
    cores = len(os.sched_getaffinity(0))
    arguments.workers = arguments.workers or (cores if arguments.dry_run else max(2 * cores // 3, 1))
    if importlib.util.find_spec("triton") is None:
        parser.exit(2, "first_light: Triton is not installed\n")
    if not arguments.dry_run:
        import torch

        if not torch.cuda.is_available():
            parser.exit(2, "first_light: PyTorch sees no CUDA device; --dry-run needs none\n")
    return arguments


def main() -> int:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # ends as gently
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = {}
        if arguments.kernels or arguments.save_kernels:
            cache = work / "cache"
            cache.mkdir()
            environment["TRITON_CACHE_DIR"] = str(cache)
            if arguments.kernels:
                with tarfile.open(arguments.kernels) as tar:
                    tar.extractall(cache, filter="data")
        if arguments.dry_run:
            from bench import stub_driver

            (work / "driver").mkdir()
            environment |= stub_driver.environment(work / "driver")
        status = go(Run(arguments, environment, work), arguments)
        if arguments.save_kernels:
            with tarfile.open(arguments.save_kernels, "w:xz", preset=3) as tar:
                tar.add(work / "cache", arcname=".")
    return status


def go(run: Run, arguments: argparse.Namespace) -> int:
    """All stages; whatever happens, the summary is written."""
    from bench.light import report, smoke
    from bench.light.headline import HEADLINES
    from bench.light.items import ITEMS

    def wanted(name: str) -> bool:
        return not arguments.only or any(part in name for part in arguments.only)

    programs = [name for name in smoke.PROGRAMS if wanted(f"smoke {name}")]
    families = {family: [item for item in items if wanted(str(item))] for family, items in ITEMS.items()}
    families = {family: items for family, items in families.items() if items}
    headlines = [headline for headline in HEADLINES if wanted(str(headline))]
    planned = {"smoke": programs, "headline": [str(headline) for headline in headlines]}
    planned |= {family: [str(item) for item in items] for family, items in families.items()}
    try:
        run.findings.add(facts(run.dry))
        run.side_by_side([lambda name=name: run.smoke(name) for name in programs], min(arguments.workers, 4))
        jobs = sorted(families.items(), key=lambda entry: (entry[0] not in FIRST, -len(entry[1])))
        run.side_by_side([lambda i=items: run.work_off("item", i, "items") for _, items in jobs], arguments.workers)
        run.work_off("headline", headlines, "headline")
        if wanted("hopper"):
            run.hopper()
    except KeyboardInterrupt:
        run.findings.add({"kind": "died", "item": "first_light", "error": "interrupted"})
        run.stop()
    run.archive()
    text = report.summary(run.findings.all, planned)
    files = ", ".join(sorted(path.name for path in run.out.iterdir()))
    text += f"\n\n{time.monotonic() - run.start:.0f} s; in {run.out}: {files}"
    (run.out / "summary.txt").write_text(text + "\n")
    print(text, flush=True)
    return report.status(run.findings.all, planned)


if __name__ == "__main__":
    sys.exit(main())
