"""Evaluation and mining of files that are larger than what they hold in memory, killed half-way and resumed.

    python -m bench.corpus [--captions 1000000] [--queries 10000] [--dim 256] [--out bench/results/cpu-corpus.json]

Each command (``python -m gssf_kernels eval`` and ``mine``) runs twice: undisturbed, then killed (SIGKILL) after half of
that time and started again from its checkpoint. Outputs have to be the same, byte by byte. Memory is the highest
RssAnon, read every 10 ms: anonymous pages, without those of files that the system can drop.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.results import machine

ROWS = 50_000  # written at a time


def write_embeddings(path: Path, rows: int, dim: int, owner_rows: int, seed: int) -> None:
    """Unit rows near those of their owners, row i's being i % owner_rows: file ``path``."""
    owners = np.random.default_rng(0).standard_normal((owner_rows, dim), dtype=np.float32)
    random = np.random.default_rng(seed)
    file = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dim))
    for first in range(0, rows, ROWS):
        owner = np.arange(first, min(first + ROWS, rows)) % owner_rows
        x = owners[owner] + 2 * random.standard_normal((len(owner), dim), dtype=np.float32)
        file[first : first + len(owner)] = x / np.linalg.norm(x, axis=1, keepdims=True)
    file.flush()


def run(words: list[str], kill_after_s: float | None = None) -> dict[str, Any]:
    """Run a command; its time, highest RssAnon and exit status."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "gssf_kernels", *words], stdout=subprocess.DEVNULL)
    anonymous_mib = 0.0
    while process.poll() is None:
        if kill_after_s is not None and time.perf_counter() - start > kill_after_s:
            process.send_signal(signal.SIGKILL)
            process.wait()
            break
        anonymous_mib = max(anonymous_mib, rss_anon_mib(process.pid))
        time.sleep(0.01)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "anonymous_mib": round(anonymous_mib),
        "status": process.returncode,
    }


def rss_anon_mib(pid: int) -> float:
    """Anonymous pages of a process now; 0 if it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    kib = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
    return kib[0] / 1024 if kib else 0.0


def measure(folder: Path, name: str, words: list[str], out: Path) -> dict[str, Any]:
    """A command undisturbed, killed, and resumed. Raises RuntimeError where that is not what happened."""
    checkpoint, undisturbed_out = folder / "checkpoint", out.with_stem(f"{out.stem}-undisturbed")
    option = {"eval": "--json", "mine": "--out"}[words[0]]
    runs = {"undisturbed": run([*words, option, str(undisturbed_out)])}
    print(f"{name}, undisturbed: {runs['undisturbed']}", flush=True)
    resumable = [*words, "--checkpoint", str(checkpoint), option, str(out)]
    runs["killed"] = run(resumable, kill_after_s=runs["undisturbed"]["seconds"] / 2)
    if not checkpoint.exists() or out.exists():
        raise RuntimeError(f"{name}: expected a checkpoint and no output after SIGKILL, ran {runs['killed']}")
    runs["resumed"] = run(resumable)
    print(f"{name}, killed: {runs['killed']}, resumed: {runs['resumed']}", flush=True)
    statuses = [runs[way]["status"] for way in ("undisturbed", "killed", "resumed")]
    if statuses != [0, -signal.SIGKILL, 0]:
        raise RuntimeError(f"{name}: expected statuses 0, {-signal.SIGKILL}, 0, got {statuses}")
    if out.read_bytes() != undisturbed_out.read_bytes():
        raise RuntimeError(f"{name}: the resumed run wrote another {out.name} than the undisturbed one")
    return runs | {"output_bytes": out.stat().st_size, "outputs_equal": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, default=30, help="negatives of each query")
    parser.add_argument("--folder", type=Path, help="where the files are written, 1 KiB for each row of 256")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu-corpus.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        queries, captions = options.queries, options.captions
        files = {key: str(folder / f"{key}.npy") for key in ("queries", "captions", "query_ids", "caption_ids")}
        write_embeddings(Path(files["queries"]), queries, options.dim, queries, 1)
        write_embeddings(Path(files["captions"]), captions, options.dim, queries, 2)
        np.save(files["query_ids"], np.arange(queries))
        np.save(files["caption_ids"], np.arange(captions) % queries)
        inputs = [files["queries"], files["captions"], "--ids", files["query_ids"], files["caption_ids"]]
        mined = folder / "negatives.jsonl"
        runs = {
            "evaluate": measure(folder, "evaluate", ["eval", *inputs], folder / "measures.json"),
            "mine": measure(folder, "mine", ["mine", *inputs, "--k", str(options.k)], mined),
        }
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m bench.corpus " + " ".join(sys.argv[1:]),
        "machine": machine() | {"cores": os.cpu_count()},
        "captions": captions,
        "queries": queries,
        "dim": options.dim,
        "negatives": options.k,
        "runs": runs,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
