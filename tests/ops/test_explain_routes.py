"""`gk.explain`: routes and reasons, for a machine with and without the kernels, and how they are printed."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from explained import D, absent, extra, kib, needs_extension, needs_triton, routes, sides

import gssf_kernels as gk
from gssf_kernels import _library, dense, plan, work
from gssf_kernels.ops.hardest import HardestNegativesCall


@needs_triton
def test_a_planned_op_gives_its_plan(monkeypatch):
    """Routes, reasons and tiles are those of plan.py, forced ones too."""

    def made(call):
        return work_of_a_launcher(call.a, call.b)

    def work_of_a_launcher(a, b):
        n, m = len(a), len(b)
        score, index = a.new_empty(n), torch.empty(n, dtype=torch.int64, device=a.device)
        return score, score.clone(), index, a.new_empty(m), torch.empty(m, dtype=torch.int64, device=a.device)

    seen = []
    module = types.ModuleType("gssf_kernels.triton.of_this_test")
    module.mine = lambda call, chosen: seen.append(chosen) or made(call)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    overload = torch.ops.gssf.hardest_negatives.default
    op = _library.Op("hardest_negatives", HardestNegativesCall, made, made, "of_this_test.mine", plan.hardest, overload)
    monkeypatch.setitem(_library.OPS, "hardest_negatives", op)
    x, y = sides(128)
    (explanation,) = gk.explain(gk.hardest_negatives, x, y).forward.ops
    assert (explanation.route, explanation.why) == ("sweep", "128 x 128 scores: one sweep that stores none")
    assert explanation.tile == "64 x 64 x 16, 4 warps, 3 stages"
    assert [chosen.route for chosen in seen] == ["sweep"]
    assert "[64 x 64 x 16, 4 warps, 3 stages]" in str(gk.explain(gk.hardest_negatives, x, y))
    with plan.forced(hardest_negatives="certified"):
        (explanation,) = gk.explain(gk.hardest_negatives, x, y).forward.ops
        assert (explanation.route, seen[-1].route) == ("certified", "certified")
    (explanation,) = gk.explain(gk.hardest_negatives, x.double(), y.double()).forward.ops
    assert (explanation.route, explanation.why) == ("reference", "fp64: no matrix unit gains by it")


@needs_triton
def test_nested_ops_stand_under_the_one_that_calls_them():
    explanation = gk.explain(gk.info_nce_loss, *sides(4096), scale=2.0)
    (loss,) = explanation.forward.ops
    assert [op.name for op in loss.ops] == ["logsumexp_scores", "anchor_terms"]
    lines = str(explanation).splitlines()
    assert lines[0] == "info_nce_loss on cuda, compute capability 9.0, 132 multiprocessors"
    assert lines[1].startswith(f"forward: {explanation.forward.launches} launches, 34.36 GFLOP, ")
    assert [len(line) - len(line.lstrip()) for line in lines[2:5]] == [2, 4, 6]
    assert any(line.startswith("backward: ") for line in lines)
    as_dict = json.loads(json.dumps(explanation.as_dict()))
    assert as_dict["forward"]["ops"][0]["ops"][1]["name"] == "anchor_terms"
    assert as_dict["forward"]["launches"] == sum(as_dict["forward"]["kernels"].values())


@needs_extension
@pytest.mark.parametrize(("unit", "least"), [("amx", 1 << 18), ("avx512_bf16", 1 << 20)])
def test_what_the_cpu_mines_certified(unit, least, monkeypatch):
    monkeypatch.setattr(dense, "bf16_unit", lambda: unit)

    def mined(n, dtype=torch.float32):
        (op,) = gk.explain(gk.hardest_negatives, *absent(n, "cpu", dtype=dtype, d=40)).forward.ops
        return op

    n = round(least**0.5)
    assert mined(n).route == "certified"
    assert mined(n).why == f"{n:,} x {n:,} scores of float32, at least {least:,}: exact winners by the bf16 unit {unit}"
    assert mined(n - 1).why.endswith(f"of float32, fewer than {least:,}: a sweep that stores none")
    assert (mined(n, torch.float16).route, mined(n, torch.bfloat16).route) == ("certified", "c++")
    assert mined(n, torch.float64).why == f"{n:,} x {n:,} scores of float64: a sweep that stores none"
    rows = torch.empty(n, 40, device="meta")
    listed = work.on_cpu("hardest_negatives", {"a": rows, "b": rows, "pair_starts": torch.empty(n + 1)})
    assert str(listed) == f"c++: {n:,} x {n:,} scores of float32 with listed pairs: a sweep that stores none"
    # bf16 rows of 64 channels (from 40), of both sides and in panels: besides the results.
    explanation = gk.explain(gk.hardest_negatives, *absent(n, "cpu", d=40))
    assert extra(explanation)[0] == kib(packed=(3 * n * 64, 2))


def test_the_thresholds_are_those_of_csrc():
    source = (Path(__file__).parents[2] / "csrc" / "hardest.cpp").read_text()
    (shifts,) = re.findall(r"certified_least\(Bf16Unit unit\) \{ return unit == Bf16Unit::amx \? (.*); \}", source)
    assert [eval(text) for text in shifts.split(" : ")] == [work.CERTIFIED[unit] for unit in ("amx", "avx512_bf16")]


@needs_extension
def test_panels_are_as_large_as_packs():
    for dtype, of in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        y = torch.ones(37, 70, dtype=dtype)
        packed = torch.ops.gssf.pack(y, of)
        explanation = work.FAKES["pack"](y.to("meta"), of)
        assert (explanation.shape, explanation.dtype) == (packed.shape, packed.dtype)


def test_without_triton_cuda_runs_plain_pytorch(monkeypatch):
    monkeypatch.setattr(_library, "_HAS_TRITON", False)
    explanation = gk.explain(gk.triplet_loss, *sides(128))
    assert {(op.route, op.why) for op in explanation.forward.ops} == {("composite", "Triton is not installed")}
    assert all(name.startswith("aten::") for name in explanation.forward.kernels)
    assert explanation.forward.flops >= 2 * 128 * 128 * D


def test_without_the_extension_the_cpu_runs_plain_pytorch(monkeypatch):
    for module in (_library, dense):
        monkeypatch.setattr(module, "EXTENSION_ERROR", "left aside")
    monkeypatch.setattr(work, "native", lambda name: False)
    explanation = gk.explain(gk.info_nce_loss, *absent(128, "cpu"), scale=2.0)
    assert {route for _, route in routes((*explanation.forward.ops, *explanation.backward.ops))} == {"pytorch"}
    assert explanation.forward.ops[0].why.startswith("the compiled extension is not loaded")
    assert explanation.forward.flops == 2 * 128 * 128 * D
    assert explanation.backward.flops == 2 * 2 * 128 * 128 * D  # so few scores are kept
