"""Launches of `bench/calls.py` through Triton's own launcher, into a CUDA driver that does nothing.

What the interpreter and the compiler never see is how arguments are packed: tuples with None among them, numbers,
tensor descriptors. `bench/covering.py` chooses the launches; `make lowering` makes all of them (`--every-binary`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import stub_driver

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(stub_driver.compiler() is None, reason="no C compiler"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"),
]

RUN = """
import sys
from unittest import mock
from bench import covering, lowering, stub_driver
from bench.case import PRODUCTS
from gssf_kernels import _library, plan

calls = getattr(covering, sys.argv[1])()
for arch in lowering.ARCHITECTURES:
    with stub_driver.installed(arch):
        for case in (case for its_arch, case in calls if its_arch == arch):
            before, product = stub_driver.launches(), "ieee" if PRODUCTS[case.product][1] == "highest" else "tf32"
            with (
                mock.patch.object(plan, "fp32_products", lambda device: product),
                mock.patch.object(_library, "product", lowering.no_product),
            ):
                case.launcher(*case.arguments())
            assert stub_driver.launches() - before >= len(case.kernels), case
print(stub_driver.launches(), "launches")
"""


def test_every_argument_is_packed(request, tmp_path):
    every = request.config.getoption("--every-binary")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **stub_driver.environment(tmp_path)}
    command = [sys.executable, "-c", RUN, "every" if every else "covering"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > (1500 if every else 200)
