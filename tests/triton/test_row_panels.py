"""Which problems go by panels of rows."""

import device_ops
import pytest
import torch
from row_panel_checks import sides
from triton_checks import ROW_PANEL_DTYPE, row_panels

pytest.importorskip("triton")

from gssf_kernels import plan


@row_panels
def test_which_calls_take_row_panels(monkeypatch):
    a, b = sides(20, 30, 8)

    def route(a, b):
        return device_ops.route("logsumexp_scores", a, b, None, 1.0)

    assert route(a, b) == "row panels"
    assert route(a, None) == "chunks"
    assert route(a[:2], b[:32]) == "small"
    assert route(a.double(), b.double()) == "chunks"
    if torch.float16 != ROW_PANEL_DTYPE:
        assert route(a.to(torch.float16), b.to(torch.float16)) == "chunks"
    for relative, reduction, expected in (
        (False, "sum", "row panels"),
        (True, "sum", "chunks"),
        (False, "none", "chunks"),
    ):
        options = (None, None, 1.0, 0.0, None, None, "hinge", "exclude", relative, reduction, 1.0, [True, True])
        assert device_ops.route("score_sums", a, b, *options) == expected
    assert device_ops.route("info_nce", a, b, None, 1.0, None, None, 0.0, True, "mean") == "composite"
    monkeypatch.undo()
    monkeypatch.setattr(plan, "architecture", lambda device: 90)
    assert {torch.bfloat16} == plan.ROW_PANEL_DTYPES
    x, y = torch.empty(1025, 1, dtype=torch.bfloat16), torch.empty(1024, 1, dtype=torch.bfloat16)
    assert route(x, y) == "row panels"
    assert route(y, y) == "small"
