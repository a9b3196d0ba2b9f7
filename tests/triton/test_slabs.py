"""Which problems go by slabs of rows."""

import pytest
import torch
from slab_checks import sides
from triton_checks import slabs as by_slabs

pytest.importorskip("triton")

from gssf_kernels import plan
from gssf_kernels.kernels import logsumexp, slabs, sums


@by_slabs
def test_what_is_declined(monkeypatch):
    a, b = sides(20, 30, 8)
    assert slabs.takes(a, b)
    assert not slabs.takes(a, None)
    assert not slabs.takes(a[:2], b[:32])
    assert not slabs.takes(a.to(torch.float16), b.to(torch.float16))
    assert logsumexp.logsumexp_scores(a, None, None, 1.0) is NotImplemented
    relative = (None, None, 1.0, 0.0, None, None, "hinge", "exclude", True, 1.0, [True, True])
    assert sums.score_total(a, b, *relative) is NotImplemented
    monkeypatch.undo()
    assert {torch.bfloat16} == plan.ROW_PANEL_DTYPES
    assert slabs.takes(torch.empty(1025, 1, dtype=torch.bfloat16), torch.empty(1024, 1, dtype=torch.bfloat16))
    assert not slabs.takes(torch.empty(1024, 1, dtype=torch.bfloat16), torch.empty(1024, 1, dtype=torch.bfloat16))
