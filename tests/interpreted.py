"""Where the tests of Triton kernels run: on a GPU if there is one, else under Triton's interpreter.

The interpreter has to be chosen before Triton is imported. Without a GPU a module's tests are therefore replaced by
one, which runs them in a process of its own. The interpreter's bf16 is wrong, so it is fp32 and fp16 there.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def where_triton_runs(module: dict) -> None:
    """For the end of a test module, on its globals()."""
    if DEVICE is not None:
        return
    for name in [name for name in module if name.startswith("test_")]:
        del module[name]

    def test_under_the_interpreter():
        """All of this module, in a process of its own."""
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", module["__file__"]],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        summary = run.stdout.strip().splitlines()[-1:]
        print(*summary)
        assert run.returncode == 0, run.stdout + run.stderr
        assert re.search(r"\d+ passed", run.stdout), summary

    module["test_under_the_interpreter"] = test_under_the_interpreter
