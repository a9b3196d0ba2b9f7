"""The measuring instrument itself: what is wrong is refused a timing, what breaks is a row, and figures add up."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import __main__ as command_line
from bench import ceilings, compare, corpus, measure, plots, report, results, versus
from bench.measure import Case
from bench.ops import OPS
from bench.problem import Problem, Shape
from bench.runner import Entry, Plan, Run
from bench.suites import SUITES

ROOT = Path(__file__).parents[2]
CASE = Case("triplet", 300, 32, 16, "float32", "cpu")

PLANTED = """
import os, time, torch
from bench.ops import triplet

def aborts(problem):
    os.abort()

def hangs(problem):
    time.sleep(600)

def wrong_value(problem):
    return triplet.naive(problem) * 1.0001

def wrong_gradient(problem):
    loss = triplet.naive(problem)
    return loss + 1e-3 * (problem.x.sum() - problem.x.detach().sum())

def too_large(problem):
    if problem.x.shape[0] > 300:
        raise MemoryError("no room for that")
    return triplet.naive(problem)

def wrong_past_1000_rows(problem):
    x = problem.x.clone()
    if len(x) > 1000:
        x.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1000]), 0))
    return triplet.naive(problem._replace(x=x))

def holds_64_mib(problem):
    held = torch.ones(16 << 20)
    return triplet.naive(problem) + 0 * held[0]
"""


class Progress(list):
    """Collects what a run says; interrupts it at a line that holds ``stop``."""

    def __init__(self, stop=None):
        super().__init__()
        self.stop = stop

    def write(self, text):
        self.append(text)
        if self.stop and self.stop in text:
            raise KeyboardInterrupt

    def flush(self):
        pass


def rows(book, n):
    return {row["variant"]: row for row in book["rows"] if row["n"] == n}


# Workers measure the ceilings before every case, which takes longer than all else that they do here.
SMALL_CEILINGS = """
from bench import ceilings
ceilings.PRODUCT_SIZE["cpu"], ceilings.COPY_MIB["cpu"] = 256, 16
"""


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Workers import the variants above, and measure small ceilings."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted_variants.py").write_text(PLANTED)
    (folder / "sitecustomize.py").write_text(SMALL_CEILINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(folder)]))
        yield


@pytest.fixture(scope="module")
def planted_run(workers):
    """What a run kept of the variants above; two end their process, which another replaces."""
    planted = {name: f"planted_variants:{name}" for name in re.findall(r"^def (\w+)", PLANTED, re.MULTILINE)}
    *names, last = planted
    entries = [
        Entry(CASE._replace(n=1200), ("ours", *names, "naive"), seconds=0, min_turns=3),
        Entry(CASE, ("naive", last), memory=("naive", last), seconds=0, min_turns=1),
    ]
    return Run(Plan(entries, "test", planted, silence_s=8), None, Progress())()


def test_wrong_variants_get_no_timing_and_failing_ones_are_rows(planted_run):
    outputs = rows(planted_run, 1200)
    assert {name: row["status"] for name, row in outputs.items()} == {
        "ours": "ok",
        "naive": "ok",
        "wrong_value": "wrong",
        "wrong_gradient": "wrong",
        "wrong_past_1000_rows": "wrong",
        "too_large": "failed",
        "aborts": "crashed",
        "hangs": "timed out",
    }
    for name, row in outputs.items():
        assert len(row["forward_ms"]) == len(row["backward_ms"]) == (3 if row["status"] == "ok" else 0), name
    assert "signal 6" in outputs["aborts"]["note"]
    assert outputs["hangs"]["note"] == "was silent for 8 s and was stopped"
    assert "relative error 1.0e-04" in outputs["wrong_value"]["note"]
    assert max(outputs["wrong_gradient"]["errors"][1:]) > 1e-5 > outputs["wrong_gradient"]["errors"][0]
    assert "at N = 1200: the worst row of result 1 is off by" in outputs["wrong_past_1000_rows"]["note"]
    assert "no room for that" in outputs["too_large"]["note"]
    assert outputs["ours"]["checked_rows"] == 1200
    assert all(0 < ms < 60_000 for ms in outputs["ours"]["forward_ms"])
    assert len(planted_run["ceilings"]) == 1


def test_peak_memory_is_what_was_held(planted_run):
    outputs = rows(planted_run, CASE.n)
    extra_mib = outputs["holds_64_mib"]["peak_mib"] - outputs["naive"]["peak_mib"]
    assert 60 < extra_mib < 72  # 64 MiB and some allocator's slack
    assert 0 < outputs["naive"]["peak_mib"] < 16


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, workers):
    out = tmp_path / "run.json"
    entries = [Entry(CASE._replace(n=n), ("ours", "naive"), seconds=0, min_turns=2) for n in (100, 200)]
    book = Run(Plan(entries, "test"), out, Progress(stop="[2/2]"))()
    assert book["interrupted"]
    assert results.load(out)["rows"] == book["rows"]
    assert [len(row["forward_ms"]) for row in book["rows"] if row["n"] == 100] == [2, 2]
    assert not any(row["forward_ms"] for row in book["rows"] if row["n"] == 200)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("op", list(OPS))
def test_every_op_agrees_with_its_truth(op, dtype):
    case = Case(op, 130, 32, 16, dtype, "cpu")
    checker = measure.Checker(OPS[op], case)
    for name in ("ours", "naive"):
        variant = OPS[op].variants[name]()
        if variant is not None:
            assert checker(variant).why_wrong is None
    if OPS[op].differentiable:
        assert len(checker.truth) == 1 + len(checker.problem.leaves())


def test_mining_has_scores_to_keep_and_to_leave_out():
    """At the number of channels that is timed, by which scores of random rows differ more or less."""
    every, mined = (
        measure.Checker(OPS[op], Case(op, 512, 1024, 16, "float64", "cpu")).truth[0]
        for op in ("multi_similarity", "multi_similarity_mined")
    )
    assert 0 < mined.sum() < every.sum()


def test_the_quick_suite_has_a_point_of_every_family():
    for device in ("cpu", "cuda"):
        measured = {entry.case.op for entry in SUITES["quick"](device)}
        assert measured >= {op for op in OPS if not op.startswith("goal_")}
        assert "goal_nca_sig_ms" in measured


def test_a_suite_without_some_variants(monkeypatch):
    plans = []
    monkeypatch.setattr(command_line, "measured", lambda arguments, entries, out: plans.append(entries) or 0)
    for words in ((), ("--without", "compile,naive")):
        monkeypatch.setattr(sys, "argv", ["bench", "suite", "quick", "--device", "cpu", *words])
        assert command_line.main() == 0
    every, fewer = plans
    assert [entry.case for entry in fewer] == [entry.case for entry in every]
    for entry, shorter in zip(every, fewer, strict=True):
        assert shorter.variants == tuple(name for name in entry.variants if name not in ("compile", "naive"))
    assert {name for entry in every for name in entry.variants} >= {"compile", "naive", "ours"}


def test_teachers_get_no_gradient():
    problem = OPS["distillation"].inputs(Shape(20, 8, 8), torch.float32, torch.device("cpu"), 0)
    assert [tuple(leaf.shape) for leaf in problem.leaves()] == [(20, 8), (), ()]  # the student, λ and τ


def test_errors_are_relative_and_never_nan():
    truth = [torch.tensor([3.0, 4.0])]
    assert measure.errors([torch.tensor([3.0, 4.5])], truth) == pytest.approx([0.1])
    assert measure.errors([torch.tensor([3.0, float("nan")])], truth) == [float("inf")]
    assert measure.errors([torch.tensor([3.0])], truth) == [float("inf")]
    assert measure.errors([], truth) == [float("inf")]


def test_a_variant_without_a_gradient_is_no_match():
    case = CASE._replace(op="info_nce")
    checker = measure.Checker(OPS["info_nce"], case)

    def without_scale(problem: Problem):
        naive = OPS["info_nce"].variants["naive"]()
        return naive(problem._replace(scale=problem.scale.detach()))

    with pytest.raises(RuntimeError, match="no gradient for input 2 of 3"):
        checker(without_scale)


def test_floors_are_those_of_minimal_work():
    n, d, b = 1000, 64, 16
    product = 2 * n * n * d
    triplet = OPS["triplet"].work(Shape(n, d, b), 4)
    assert triplet.forward_flop == product + 2 * n * d * (b + 1)
    assert triplet.forward_bytes == 2 * n * d * 4
    assert triplet.backward_flop < 0.2 * product
    info_nce = OPS["info_nce"].work(Shape(n, d, b), 2)
    assert (info_nce.forward_flop, info_nce.backward_flop) == (product, 2 * product)
    assert info_nce.forward_bytes == 2 * n * d * 2
    sum_hinge = OPS["sum_hinge"].work(Shape(n, d, b), 4)
    assert (sum_hinge.forward_flop, sum_hinge.backward_flop) == (product, 2 * product)
    distillation = OPS["distillation"].work(Shape(n, d, b), 4)  # three halves, and one whole
    assert (distillation.forward_flop, distillation.backward_flop) == (1.5 * product, product)
    assert (distillation.forward_bytes, distillation.backward_bytes) == (3 * n * d * 4, 2 * n * d * 4)
    # 2 TFLOP/s and 10 GB/s: the product takes 0.064 ms, the bytes 0.0256
    forward, backward = ceilings.Ceilings(2.0, 10.0).floor_ms(info_nce)
    assert forward == pytest.approx(max(product / 2e12, 2 * n * d * 2 / 10e9) * 1e3)
    assert backward == pytest.approx(2 * product / 2e12 * 1e3)
    assert ceilings.Ceilings(2.0, 0.1).floor_ms(info_nce)[0] == pytest.approx(2 * n * d * 2 / 0.1e9 * 1e3)


def row(variant, forward, backward, **extra_mib):
    case = {"op": "triplet", "n": 1024, "d": 512, "block": 32, "dtype": "float32", "device": "cpu"}
    rest = {"version": "1", "status": "ok", "note": "", "errors": [1e-7], "checked_rows": 9, "peak_mib": None}
    return {**case, "variant": variant, **rest, "forward_ms": forward, "backward_ms": backward, **extra_mib}


def book(*of_rows):
    ceiling = {"device": "cpu", "dtype": "float32", "tflop_per_s": 0.2, "gb_per_s": 20.0}
    return {**results.new("test"), "rows": list(of_rows), "ceilings": [ceiling]}


OURS = row("ours", [1.0, 2.0, 4.0], [1.0, 1.0, 1.0])  # both: 2, 3, 5
NAIVE = row("naive", [5.0, 6.0, 10.0], [1.0, 3.0, 5.0])  # both: 6, 9, 15; every turn 3 times ours


def test_ratios_are_taken_turn_by_turn():
    assert results.both_ms(NAIVE) == [6.0, 9.0, 15.0]
    assert results.ratio(NAIVE, OURS) == (3.0, 3.0, 3.0)
    assert results.spread(results.both_ms(OURS)) == pytest.approx((3.0, 2.2, 4.6))  # of 2, 3 and 5
    assert results.spread([4.0]) == (4.0, 4.0, 4.0)
    assert results.spread([]) is None
    assert results.base({"ours": OURS, "naive": NAIVE}) == "ours"
    assert results.base({"ours": row("ours", [], []), "naive": NAIVE}) == "naive"


def test_report_shows_medians_ratios_and_floor():
    work = OPS["triplet"].work(Shape(1024, 512, 32), 4)
    floor_ms = sum(ceilings.Ceilings(0.2, 20.0).floor_ms(work))
    line = next(line for line in report.summary(book(OURS, NAIVE)).splitlines() if "1,024" in line)
    assert "3.00 (2.20–4.60)" in line
    assert "3.00× (3.00–3.00)" in line
    assert f"{floor_ms / 3.0:.0%}" in line
    lost = row("pml", [], [], status="crashed", note="ended with signal 11")
    assert "crashed: ended with signal 11" in report.details(book(OURS, lost))
    assert report.number(0.00123) == "0.00123"
    assert report.number(12.345) == "12.3"
    assert report.number(123456.0) == "123,456"


def test_report_goes_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    report.into(page, book(OURS, NAIVE), "plot.png")
    text = page.read_text()
    assert text.startswith("before\n<!-- bench -->\n")
    assert text.endswith("![Time over N](plot.png)\n<!-- /bench -->\nafter\n")
    assert "old" not in text
    assert "3.00×" in text
    page.write_text("no marks")
    with pytest.raises(results.ResultError, match="no lines"):
        report.into(page, book(OURS), None)
    assert page.read_text() == "no marks"


def test_headline_is_plain_pytorch_beside_each_loss_at_its_smallest_and_largest_size(tmp_path):
    sizes = [row(name, [ms], [ms], n=n) for n in (512, 64, 256) for name, ms in (("ours", n * 1.0), ("naive", n * 4.0))]
    alone = row("ours", [1.0], [1.0], op="info_nce", n=99)  # nothing to compare with
    primitive = [row(name, [1.0], [1.0], op="project") for name in ("ours", "naive")]
    single = [row("ours", [2.0], [3.0], op="sigmoid"), row("naive", [5.0], [5.0], op="sigmoid", peak_mib=30.0)]
    single[0]["peak_mib"] = 20.0
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- bench headline -->\nold\n<!-- /bench headline -->\nafter\n")
    report.into(page, book(*sizes, alone, *primitive, *single), "plot.png")
    text = page.read_text()
    assert text.startswith("before\n<!-- bench headline -->\n`test`, ")
    assert text.endswith("\n<!-- /bench headline -->\nafter\n")
    triplet, sigmoid = (f"`{op}`: {OPS[op].summary}" for op in ("triplet", "sigmoid"))
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        f"| {triplet} | 64 | 512 | float32 | 128 (128–128) | 512 (512–512) | 4.00× (4.00–4.00) |",
        f"| {triplet} | 512 | 512 | float32 | 1,024 (1,024–1,024) | 4,096 (4,096–4,096) | 4.00× (4.00–4.00) |",
        f"| {sigmoid} | 1,024 | 512 | float32 | 5.00 (5.00–5.00) | 10.0 (10.0–10.0) | 2.00× (2.00–2.00) |",
    ]
    assert "`sigmoid` at N = 1,024: 20.0 MiB, plain PyTorch 30.0 MiB" in text.replace("\n", " ")
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    assert "plot.png" not in text


def test_report_writes_every_page_that_it_is_asked_to(tmp_path, monkeypatch):
    results.save(book(OURS, NAIVE), tmp_path / "run.json")
    pages = {"docs.md": "bench", "README.md": "bench headline"}
    for name, mark in pages.items():
        (tmp_path / name).write_text(f"<!-- {mark} -->\nold\n<!-- /{mark} -->\n")
    words = ["report", tmp_path / "run.json", "--into", *(tmp_path / name for name in pages)]
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
    assert command_line.main() == 0
    for name in pages:
        text = (tmp_path / name).read_text()
        assert "old" not in text
        assert "3.00× (3.00–3.00)" in text


def test_comparison_says_where_ratios_differ():
    slower = row("naive", [11.0, 14.0, 24.0], [1.0, 1.0, 1.0])  # 12, 15, 25: 6, 5, 5 times ours
    outputs = compare.differences(book(OURS, NAIVE), book(OURS, slower))
    assert [(d.variant, d.agrees) for d in outputs] == [("naive", False)]
    assert compare.differences(book(OURS, NAIVE), book(OURS, NAIVE))[0].agrees
    overlapping = row("naive", [5.0, 8.0, 10.0], [1.0, 3.0, 5.0])  # 3, 11/3, 3
    assert compare.differences(book(OURS, NAIVE), book(OURS, overlapping))[0].agrees
    text, agree = compare.page(book(OURS, NAIVE), book(OURS, slower))
    assert not agree
    assert "0 of 1" in text


def test_curves_hold_three_sizes_and_the_floor():
    sizes = [row(name, [n * 1e-3], [0.0], n=n) for n in (64, 128, 256) for name in ("ours", "naive")]
    (panel,) = plots.curves(book(*sizes)).values()
    assert set(panel) == {"ours", "naive", "floor"}
    assert panel["ours"] == [(64, 0.064), (128, 0.128), (256, 0.256)]
    assert plots.curves(book(OURS, NAIVE)) == {}


def test_result_files_come_back_as_written(tmp_path):
    path = tmp_path / "deep" / "run.json"
    results.save(book(OURS, NAIVE), path)
    assert results.load(path)["rows"] == [OURS, NAIVE]
    for text, complaint in (("{", "not JSON"), ("[]", "not a result file"), (json.dumps({"schema": 0}), "schema")):
        path.write_text(text)
        with pytest.raises(results.ResultError, match=complaint):
            results.load(path)
    with pytest.raises(results.ResultError, match="No such file"):
        results.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run --op tripled", "--op: expected one of triplet, goal_con_con, "),
        ("run --op triplet --sizes 12,x", "--sizes: expected whole numbers >= 1"),
        ("run --op triplet --sizes 1", "--sizes: expected at least 2"),
        ("run --op triplet --dim 0", "--dim: expected whole numbers >= 1"),
        ("run --op triplet --block 7", "--block: expected a divisor of --dim 512"),
        ("run --op triplet --dtype fp8", "--dtype: expected one of float64, float32, bfloat16, float16"),
        ("run --op triplet --device tpu", "--device: expected one of cpu"),
        ("run --op triplet --against nobody", "--against: expected one of naive, compile"),
        ("run --op triplet --variant mine", "--variant: expected NAME=MODULE:FUNCTION"),
        ("run --op triplet --variant pml=a:b", "--variant: expected a name of its own"),
        ("suite slow", "suite: expected one of quick, full"),
        ("suite quick --device cpu --without nobody", "--without: expected one of compile, "),
        ("report nowhere.json", "nowhere.json: No such file"),
        ("compare nowhere.json nowhere.json", "nowhere.json: No such file"),
        ("measure", "invalid choice: 'measure'"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *words.split()])
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_card_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "suite", "quick", "--device", "cuda"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "PyTorch sees no CUDA device here" in capsys.readouterr().err


def test_versus_holds_each_op_to_its_own_truth(monkeypatch):
    cases = [Case(op, 60, 32, 16, "float32", "cpu") for op in ("goal_nca_con", "goal_con_lin_ms")]
    text = versus.table(cases, "ours", 0.0, "test")
    assert "3 turns" in text
    assert "| `goal_nca_con` |" in text
    assert "1.00× (1.00–1.00)" in text

    def off(problem):
        return OPS["goal_con_lin_ms"].variants["naive"]()(problem) * 1.01

    planted = {**OPS["goal_con_lin_ms"].variants, "ours": lambda: off}
    monkeypatch.setitem(OPS, "goal_con_lin_ms", OPS["goal_con_lin_ms"]._replace(variants=planted))
    with pytest.raises(results.ResultError, match=r"goal_con_lin_ms .* relative error 1\.0e-02"):
        versus.table(cases, "ours", 0.0, "test")


def test_files_of_the_corpus_are_unit_rows_near_their_owners(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS", 3)  # several blocks, the last one short
    for name, rows, seed in (("queries", 4, 1), ("captions", 8, 2)):
        corpus.write_embeddings(tmp_path / f"{name}.npy", rows, 512, 4, seed)
    queries, captions = (np.load(tmp_path / f"{name}.npy") for name in ("queries", "captions"))
    assert captions.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(captions, axis=1), 1, rtol=1e-6)
    scores = captions @ queries.T
    assert (scores.argmax(1) == np.arange(8) % 4).all()
    assert scores.max() < 0.5
    assert 10 < corpus.rss_anon_mib(os.getpid()) < 1 << 20
