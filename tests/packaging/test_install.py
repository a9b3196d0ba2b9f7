"""How the package installs and reports itself: without the extension, without torch, without a compiler."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gssf_kernels as gk
from gssf_kernels import _library, plan

ROOT = Path(__file__).parents[2]
OPS = {  # those with a kernel of their own
    "project",
    "project_backward",
    "hardest_negatives",
    "hardest_negatives_backward",
    "anchor_terms",
    "anchor_terms_backward",
    "relative_negatives",
    "pair_scores",
    "pair_scores_backward",
    "logsumexp_pass",
    "softmax_pass",
    "score_sums_pass",
    "late_interaction",
    "late_interaction_backward",
    "relation_pass",
    "top_scores",
    "score_counts",
}
PLAIN_ON_CPU = {"hardest_positives"}
PLAIN = {"segment_terms", "attention_pooling", "attention_pooling_backward"}  # everywhere
THROUGH = {  # composites over those, which on CUDA have kernels of their own
    "logsumexp_scores",
    "logsumexp_scores_backward",
    "info_nce",
    "info_nce_backward",
    "score_sums",
    "score_sums_backward",
    "hardest_terms",
    "batch_hard",
    "batch_hard_backward",
    "relation_loss",
}
MOST_OPS = 34  # that are registered in all: 28 of rows, two scores of fragments with their backwards, search and counts

_HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "gssf_kernels._C":
            raise ImportError("hidden by the test")
sys.meta_path.insert(0, Hide())
"""


def test_backends_name_every_op():
    table = gk.backends()
    assert set(table) == OPS | PLAIN_ON_CPU | PLAIN | THROUGH
    built = _library.EXTENSION_ERROR is None
    cuda = {"triton", "reference"} if torch.cuda.is_available() else {"unavailable"}
    for op, active in table.items():
        assert active["cpu"] == ("cpp" if built and op not in PLAIN_ON_CPU | PLAIN else "reference")
        assert active["cuda"] in cuda


def test_few_ops_are_registered():
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gssf::")}
    assert len(names) <= MOST_OPS, sorted(names)


@pytest.mark.parametrize("op", sorted(OPS | PLAIN_ON_CPU | THROUGH))
def test_every_op_has_a_triton_launcher_of_its_own_signature(op):
    pytest.importorskip("triton")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gssf::{op}", "CUDA")
    module, _, function = _library.OPS[op].launcher.rpartition(".")
    launcher = getattr(importlib.import_module(f"gssf_kernels.triton.{module}"), function)
    names = [argument.name for argument in getattr(torch.ops.gssf, op).default._schema.arguments]
    assert list(inspect.signature(launcher).parameters) == ["call", "plan"]
    assert list(_library.OPS[op].call._fields) == names


def test_fp64_on_cuda_would_take_plain_pytorch():
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    op = _library.OPS["hardest_negatives"]
    assert plan.choose(op.name, op.plans, op.call(a, b, None, None)).route == "reference"
    for got, expected in zip(op.on_cuda(a, b, None, None), op.overload(a, b, None, None), strict=True):
        torch.testing.assert_close(got, expected)


def test_everything_works_on_the_reference_without_the_extension(run_fresh):
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
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "worked"


def test_report_says_that_the_extension_is_missing(run_fresh):
    done = run_fresh(_HIDE + "import runpy; runpy.run_module('gssf_kernels', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert "not loaded (hidden by the test)" in done.stdout
    assert "pip install --no-build-isolation" in done.stdout


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
def test_setup_without_native_code(prelude, environment, expected, run_fresh):
    code = f"""{prelude}
import sys, runpy, setuptools
seen = {{}}
setuptools.setup = lambda **arguments: seen.update(arguments)
runpy.run_path("setup.py", run_name="__main__")
assert not seen, seen
"""
    done = run_fresh(code, cwd=ROOT, environment=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("gssf_kernels:")]
    assert len(lines) == 1
    assert expected in lines[0]


@pytest.mark.parametrize("with_sources", [True, False])
@pytest.mark.parametrize("force", ["1", "0", None])
@pytest.mark.parametrize("cuda_torch", [True, False])
def test_setup_chooses_cuda(cuda_torch, force, with_sources, tmp_path):
    """csrc/cuda is built where FORCE_CUDA says so, and only there; torch is a stand-in, and nothing is built."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu.cpp").touch()
    if with_sources:
        (tmp_path / "csrc" / "cuda" / "gpu.cu").touch()
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "torch" / "utils").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("from torch import version")
    (tmp_path / "torch" / "utils" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(f"cuda = {'13.0' if cuda_torch else None!r}")
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text(f"""
CUDA_HOME = {"/somewhere" if cuda_torch else None!r}
def CUDAExtension(name, sources, **options): print("cuda", *sources)
def CppExtension(name, sources, **options): print("cpu", *sources)
BuildExtension = None
""")
    code = """
import runpy, setuptools
setuptools.setup = lambda **arguments: None
runpy.run_path("setup.py", run_name="__main__")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FORCE_CUDA": force}
    if force is None:
        del environment["FORCE_CUDA"]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    wanted = with_sources and force == "1"
    assert done.stdout.split() == (["cuda", "csrc/cpu.cpp", "csrc/cuda/gpu.cu"] if wanted else ["cpu", "csrc/cpu.cpp"])
