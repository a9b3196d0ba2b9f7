"""How the package installs and reports itself: without the extension, without torch, without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gssf_kernels as gk
from gssf_kernels import _library

ROOT = Path(__file__).parents[1]
OPS = {"project", "project_backward", "hardest_negatives", "pair_scores", "pair_scores_backward"}

_HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "gssf_kernels._C":
            raise ImportError("hidden by the test")
sys.meta_path.insert(0, Hide())
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout, done.stderr


def test_backends_name_every_op():
    table = gk.backends()
    assert set(table) == OPS
    built = _library.EXTENSION_ERROR is None
    cuda = {"triton", "reference"} if torch.cuda.is_available() else {"unavailable"}
    for active in table.values():
        assert active["cpu"] == ("cpp" if built else "reference")
        assert active["cuda"] in cuda


def test_everything_works_on_the_reference_without_the_extension():
    code = f"""{_HIDE}
import torch, gssf_kernels as gk
assert all(active["cpu"] == "reference" for active in gk.backends().values()), gk.backends()
x, y = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8)
metric = gk.StructuredSimilarity(8, 4)
ids = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(9) // 2
loss = gk.TripletLoss(metric=metric)(x, y, *ids)
loss.backward()
got = [x.grad.clone(), metric.diag.grad.clone(), metric.blocks.grad.clone()]
x.grad = None
metric.zero_grad()
expected = gk.reference.triplet_loss(*metric.factors(x, y), x_ids=ids[0], y_ids=ids[1])
expected.backward()
torch.testing.assert_close(loss, expected)
for g, p in zip(got, (x, metric.diag, metric.blocks)):
    torch.testing.assert_close(g, p.grad)
gk.hardest_negatives(x, y), gk.pair_scores(x, y).sum().backward()
print("worked")
"""
    status, out, err = run(code)
    assert status == 0, err
    assert out.strip() == "worked"


def test_report_says_that_the_extension_is_missing():
    status, out, err = run(_HIDE + "import runpy; runpy.run_module('gssf_kernels', run_name='__main__')")
    assert status == 0, err
    assert "not loaded (hidden by the test)" in out
    assert "pip install --no-build-isolation" in out


def test_report():
    done = subprocess.run([sys.executable, "-m", "gssf_kernels"], capture_output=True, text=True, check=True)
    assert torch.__version__ in done.stdout
    for op, active in gk.backends().items():
        assert any(line.split() == [op, active["cpu"], active["cuda"]] for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("prelude", "environment", "expected"),
    [
        ("import sys; sys.modules['torch'] = None", {}, "pip install --no-build-isolation"),
        ("", {"GSSF_SKIP_NATIVE": "1"}, "GSSF_SKIP_NATIVE is set"),
        ("import torch", {"PATH": "/nonexistent", "CXX": ""}, "no C++ compiler"),
    ],
    ids=["no torch", "skipped", "no compiler"],
)
def test_setup_without_native_code(prelude, environment, expected, tmp_path):
    code = f"""{prelude}
import sys, runpy, setuptools
seen = {{}}
setuptools.setup = lambda **arguments: seen.update(arguments)
runpy.run_path("setup.py", run_name="__main__")
assert not seen, seen
"""
    status, _, err = run(code, **environment)
    assert status == 0, err
    lines = [line for line in err.splitlines() if line.startswith("gssf_kernels:")]
    assert len(lines) == 1
    assert expected in lines[0]


@pytest.mark.parametrize(("force", "kind"), [("1", "CUDAExtension"), ("0", "CppExtension"), (None, "CppExtension")])
def test_setup_chooses_cuda(force, kind, tmp_path):
    """FORCE_CUDA decides, and only where there are CUDA sources; nothing is compiled here."""
    code = """
import sys, runpy, setuptools
from torch.utils import cpp_extension
chosen = []
cpp_extension.CUDAExtension = lambda *a, **k: chosen.append(("CUDAExtension", a, k))
cpp_extension.CppExtension = lambda *a, **k: chosen.append(("CppExtension", a, k))
setuptools.setup = lambda **arguments: None
runpy.run_path("setup.py", run_name="__main__")
(name, (module, sources), options), = chosen
assert module == "gssf_kernels._C"
print(name, any(s.endswith(".cu") for s in sources))
"""
    environment = {} if force is None else {"FORCE_CUDA": force}
    status, out, err = run(code, **environment)
    assert status == 0, err
    name, has_cuda_sources = out.split()
    if list((ROOT / "csrc" / "cuda").glob("*.cu")) and not (force is None and torch.version.cuda):
        assert name == kind
    assert has_cuda_sources == str(name == "CUDAExtension")
