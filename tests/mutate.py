"""Plants one fault at a time in a copy of the sources and sees that a test catches it.

    make mutate        (python tests/mutate.py [WORDS ...], about ten minutes: most faults need a rebuild)

Words choose faults by names or files. A fault (`tests/support/planting.py`) stands beside the tests that must fail,
in `faults_<subject>.py`. One that survives, or whose place is no longer there, makes the run fail.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from planting import Fault, all_faults  # noqa: E402


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
    try:
        faulty, tests = fault.plant(folder), fault.test_files(folder)
    except LookupError as error:
        return False, str(error)
    try:
        path.write_text(faulty)
        build(folder)  # one in Python too: it undoes that of the fault before
        done = run([sys.executable, "-m", "pytest", "-x", "-q", *tests], folder)
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        # 1: tests failed; negative: the process crashed. Anything else (nothing collected, say) catches nothing.
        failing = done.returncode < 0 or (done.returncode == 1 and bool(failed))
        return failing, failed[0][7:110] if failed else f"pytest exited with {done.returncode}"
    finally:
        path.write_text(original)


def main(words: list[str]) -> int:
    faults = [f for f in all_faults() if not words or any(word in f.name or word in f.file for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "examples", "*.so", "build"))
        build(folder)
        clean = run([sys.executable, "-m", "pytest", "-x", "-q", *faults[0].test_files(folder)], folder)
        if clean.returncode:
            raise SystemExit(f"the unchanged copy fails its tests:\n{clean.stdout[-3000:]}")
        for fault in faults:
            failing, how = caught(fault, folder)
            survivors += not failing
            print(f"{'caught  ' if failing else 'SURVIVED'}  {fault.name}: {how}", flush=True)
    print(f"{len(faults) - survivors} of {len(faults)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
