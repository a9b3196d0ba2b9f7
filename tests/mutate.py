"""Plants one fault at a time in a copy of the sources and sees that a test catches it.

    make mutate        (python tests/mutate.py [NAME ...], about ten minutes: most faults need a rebuild)

A fault (`tests/faults.py`) is a file, a piece of its text, what takes its place, and the test files that must fail. One
that survives, or whose text is no longer there, makes the run fail.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]


def run(command, folder, **environment):
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
    )


def build(folder: Path) -> None:
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], folder)
    if done.returncode:
        raise SystemExit(f"the copy does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def caught(fault: Fault, folder: Path) -> tuple[bool, str]:
    """(whether a test failed, the first that did)."""
    path = folder / fault.file
    original = path.read_text()
    if original.count(fault.text) == 0:
        return False, f"its text is no longer in {fault.file}"
    try:
        path.write_text(original.replace(fault.text, fault.instead))
        build(folder)  # one in Python too: it undoes that of the fault before
        done = run([sys.executable, "-m", "pytest", "-x", "-q", *fault.tests.split()], folder)
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        # 1: tests failed; negative: the process crashed. Anything else (nothing collected, say) catches nothing.
        found = done.returncode < 0 or (done.returncode == 1 and bool(failed))
        return found, failed[0][7:110] if failed else f"pytest exited with {done.returncode}"
    finally:
        path.write_text(original)


def main(names):
    faults = [f for f in FAULTS if not names or any(name in f.name for name in names)]
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "examples", "*.so", "build"))
        build(folder)
        clean = run([sys.executable, "-m", "pytest", "-x", "-q", *FAULTS[0].tests.split()], folder)
        if clean.returncode:
            raise SystemExit(f"the unchanged copy fails its tests:\n{clean.stdout[-3000:]}")
        for fault in faults:
            found, how = caught(fault, folder)
            survivors += not found
            print(f"{'caught  ' if found else 'SURVIVED'}  {fault.name}: {how}", flush=True)
    print(f"{len(faults) - survivors} of {len(faults)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
