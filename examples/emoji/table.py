"""The table of examples/emoji/README.md: every loss on the same budget, several seeds, mean ± spread.

    python examples/emoji/table.py                                        # all rows, seeds 0, 1, 2
    python examples/emoji/table.py --rows triplet,goal-nca-con --seeds 0,1 --steps 280

Runs train.py once a row and seed, --jobs at a time on one thread each (an hour in all), and prints Markdown:
R@1 / R@5 / R@10 on the test pictures in %, mean ± half the range over the seeds, and the mean processor time of
training, with that of the teachers where there are some. Runs already in --out are kept.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recall import KS, WAYS

HERE = Path(__file__).parent
# Label: options of train.py.
ROWS = {
    "triplet": ["--loss", "triplet"],
    "goal-con-lin": ["--loss", "goal", "--triplet", "con", "--pair", "lin"],
    "goal-nca-con": ["--loss", "goal", "--triplet", "nca", "--pair", "con"],
    "goal-nca-sig": ["--loss", "goal", "--triplet", "nca", "--pair", "sig"],
    "goal-cir-lin": ["--loss", "goal", "--triplet", "cir", "--pair", "lin"],
    "goal-cir-lin_ms": ["--loss", "goal", "--triplet", "cir", "--pair", "lin_ms"],
    "goal-nca-sig_ms": ["--loss", "goal", "--triplet", "nca", "--pair", "sig_ms"],
    "infonce": ["--loss", "infonce"],
    "siglip": ["--loss", "siglip"],
    "triplet-all": ["--loss", "triplet-all"],
    "distill": ["--loss", "distill"],
}


def run(row: str, words: list[str], seed: int, options) -> dict:
    """The results of one training run, by train.py with these words; of an earlier one if it is there."""
    folder = options.out / f"{row}-{options.steps}-{seed}"
    file = folder / "results.json"
    if not file.exists():
        command = [sys.executable, HERE / "train.py", *words, "--seed", seed, "--steps", options.steps]
        command += ["--threads", 1, "--no-cost", "--out", folder]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{row}, seed {seed}, failed:\n{done.stdout}{done.stderr}")
    results = json.loads(file.read_text())
    print(
        f"{row}, seed {seed}: {cells([results])[0]}, {results['training']['seconds']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return results


def cells(runs: list[dict]) -> list[str]:
    """One cell a direction, and one of time."""
    found = []
    for way in WAYS:
        values = [[one["test"][f"{way}_r{k}"] for one in runs] for k in KS]
        found.append(" / ".join(f"{statistics.mean(v):.1f} ± {(max(v) - min(v)) / 2:.1f}" for v in values))
    seconds = f"{statistics.mean(one['training']['cpu_seconds'] for one in runs):.0f}"
    if runs[0]["teachers"]:
        seconds += f" + {statistics.mean(one['teachers']['cpu_seconds'] for one in runs):.0f} for the teachers"
    return [*found, seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="commas between; default all")
    parser.add_argument("--seeds", default="0,1,2", help="commas between; default 0,1,2")
    parser.add_argument("--steps", type=int, default=280, help="of every run; default 280")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default 2")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "table", help="folder of the runs")
    options = parser.parse_args()
    rows = options.rows.split(",")
    for row in rows:
        if row not in ROWS:
            parser.error(f"--rows: expected some of {', '.join(ROWS)}, got {row!r}")
    if not all(seed.isdigit() for seed in options.seeds.split(",")):
        parser.error(f"--seeds: expected whole numbers with commas between, got {options.seeds!r}")
    if options.jobs < 1:
        parser.error(f"--jobs: expected a whole number >= 1, got {options.jobs}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {row: [pool.submit(run, row, ROWS[row], seed, options) for seed in seeds] for row in rows}
        table = {row: cells([one.result() for one in of_row]) for row, of_row in runs.items()}
    heads = ["loss", *(way.replace("_", " ") for way in WAYS), "processor s"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row, found in table.items():
        print(f"| `{row}` | " + " | ".join(found) + " |")


if __name__ == "__main__":
    main()
