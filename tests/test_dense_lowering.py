"""The passes' kernels compiled ahead of time for sm_80 and sm_90; see test_lowering.py."""

import os
import re

import pytest
import torch

pytest.importorskip("triton")

from test_lowering import check, compiled  # noqa: F401  # the fixture is taken by its name

from gssf_kernels.kernels import dense

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
R, M, K = 64, 4096, 1024


@pytest.fixture
def chunk():
    return torch.zeros(R, M), torch.ones(())


def no_atomics(kernels):
    assert not any(re.search(r"\b(atom|red)\.", kernel.asm["ptx"]) for _, kernel in kernels)


def test_logsumexp_pass(compiled, chunk, tmp_path):  # noqa: F811
    lines = (torch.zeros(R), torch.zeros(R), torch.zeros(M), torch.zeros(M))
    kernels = compiled(dense.logsumexp_pass, *chunk, *lines)
    check(kernels, compiled.arch, {"logsumexp_kernel"}, tmp_path)
    no_atomics(kernels)


@pytest.mark.parametrize("both", [True, False])
def test_softmax_pass(compiled, chunk, both, tmp_path):  # noqa: F811
    row, col = torch.zeros(R), torch.zeros(M)
    kernels = compiled(dense.softmax_pass, *chunk, row, row, row, col, col, col if both else None, row)
    check(kernels, compiled.arch, {"softmax_kernel"}, tmp_path)
    no_atomics(kernels)


@pytest.mark.parametrize(("positives", "ids"), [("include", False), ("exclude", True), ("negate", True)])
@pytest.mark.parametrize("kind", ["hinge", "softplus", "abs", "square"])
def test_score_sums_pass(compiled, chunk, kind, positives, ids, tmp_path):  # noqa: F811
    row, col, columns = torch.zeros(R), torch.zeros(K), positives == "exclude"
    labels = (torch.zeros(R, dtype=torch.int64), torch.zeros(M, dtype=torch.int64)) if ids else (None, None)
    terms = (row, row, col, col) if columns else (row, None, None, None)
    out = torch.zeros(3, R), torch.zeros(2, K if columns else 0)
    kernels = compiled(dense.score_sums_pass, *chunk, *terms, *labels, 0, kind, positives, True, *out)
    check(kernels, compiled.arch, {"score_sums_kernel"}, tmp_path)
    no_atomics(kernels)


@pytest.mark.parametrize("kind", ["abs", "square"])
def test_relation_pass(compiled, chunk, kind, tmp_path):  # noqa: F811
    s, lam = chunk
    kernels = compiled(dense.relation_pass, s, s, s, lam, kind, True, torch.zeros(3, R))
    check(kernels, compiled.arch, {"relation_kernel"}, tmp_path)
    no_atomics(kernels)
