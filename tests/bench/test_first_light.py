"""bench/first_light.py without a card: planted faults come out, processes that die are replaced, nothing is lost."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import gssf_kernels as gk
from bench import first_light, stub_driver
from bench.light import compare, report, worker
from bench.light.headline import HEADLINES
from bench.light.items import FAMILIES, ITEMS, SHAPES, Item
from bench.light.record import Recorder
from bench.ops import OPS

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(stub_driver.compiler() is None, reason="no C compiler")
NARROW = "hardest_negatives bf16 4224x4352x320"


@dataclasses.dataclass
class Light:
    """What a dry run left."""

    status: int
    findings: list
    summary: str
    archived: list

    def of(self, kind, item=None):
        return [f for f in self.findings if f["kind"] == kind and item in (None, f.get("item"))]


def dry_run(out, *words):
    command = [sys.executable, str(ROOT / "bench/first_light.py"), "--dry-run", str(out), "--workers", "1", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, timeout=300)
    assert (out / "summary.txt").exists(), done.stdout + done.stderr
    findings = [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]
    with tarfile.open(out / "kernels.tar.gz") as tar:
        archived = tar.getnames()
    assert (out / "summary.txt").read_text().strip() == done.stdout.strip()
    return Light(done.returncode, findings, done.stdout, archived)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A dry run of three items and of the smoke programs."""
    words = "--only", "hardest_negatives bf16 129x257x40", "--only", "smoke"
    return dry_run(tmp_path_factory.mktemp("right") / "out", *words)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A dry run of three items, with a fault in each."""
    faults = f"exception:{NARROW}", f"wrong tile:{NARROW} ids", f"nan:{NARROW} b = a"
    words = (word for fault in faults for word in ("--plant", fault))
    return dry_run(tmp_path_factory.mktemp("wrong") / "out", "--only", NARROW, *words)


@needs_compiler
def test_nothing_wrong_without_a_fault(right):
    assert right.status == 0, right.summary
    (facts,) = right.of("facts")
    assert "NOTHING RAN ON A CARD" in facts["mode"]
    assert {finding["item"] for finding in right.of("item")} == {
        f"hardest_negatives bf16 129x257x40{variant}" for variant in ("", " ids", " b = a")
    }
    for finding in right.of("item"):
        assert finding["error over allowed"] <= 1
        assert finding["equal bits"]
        kernels = {kernel["kernel"]: kernel for kernel in finding["kernels"]}
        assert {"sweep_kernel", "merge_kernel"} <= set(kernels)
        assert 0 < kernels["sweep_kernel"]["registers"] <= 255
        assert kernels["sweep_kernel"]["BN"] == 64
        assert all(kernel["spills"] == 0 and kernel["shared"] >= 0 for kernel in kernels.values())
    assert "hardest_negatives | 3 of 3 | 0" in right.summary


@needs_compiler
def test_the_smoke_programs_are_launched(right):
    programs = {finding["name"]: finding for finding in right.of("smoke")}
    assert set(programs) == {"tma", "tile", "persistent", "products"}
    assert programs["persistent"]["kernels"][0]["PERSISTENT"]
    assert not programs["tile"]["kernels"][0]["PERSISTENT"]


@needs_compiler
def test_a_planted_wrong_tile(wrong):
    assert wrong.status == 1
    (finding,) = wrong.of("item", f"{NARROW} ids")
    assert report.is_wrong(finding)
    (mismatch,) = finding["mismatches"]
    assert (mismatch["result"], mismatch["first"], mismatch["wrong rows"]) == ("row_score", [128], 128)
    assert mismatch["value"] == pytest.approx(mismatch["truth"] + 1)
    assert mismatch["share"] == "tile row 1"
    assert not mismatch["nan"]
    assert finding["equal bits"]
    assert finding["agree"] == {"persistent=0": "right", "tma=False": "right", "three programs": "right"}
    assert any(name.endswith(".cubin") for name in finding["code"])
    of_others = wrong.of("item", f"{NARROW} b = a") + wrong.of("exception")
    assert set(wrong.archived) == {name for one in (finding, *of_others) for name in one["code"]}
    assert "share tile row 1" in wrong.summary


@needs_compiler
def test_a_planted_nan(wrong):
    (finding,) = wrong.of("item", f"{NARROW} b = a")
    assert report.is_wrong(finding)
    (mismatch,) = finding["mismatches"]
    assert (mismatch["result"], mismatch["first"], mismatch["nan"]) == ("d a", [5, 3], True)
    assert finding["error over allowed"] == "inf"
    assert finding["agree"]["persistent=0"] == "wrong, the same bits"


@needs_compiler
def test_a_planted_exception_is_looked_into_and_the_rest_goes_on(wrong):
    assert {finding["item"] for finding in wrong.of("item")} == {f"{NARROW} ids", f"{NARROW} b = a"}
    first, again = wrong.of("exception")
    assert first["item"] == again["item"] == NARROW
    assert "again" not in first
    assert again["again"] == "CUDA_LAUNCH_BLOCKING=1"
    assert "illegal memory access" in first["error"]
    assert "in launch" in first["traceback"]
    launch = first["launches"][-1]
    assert launch["kernel"] == "merge_kernel"
    assert launch["constexprs"]["BN"] == 128
    sweep = first["launches"][0]
    assert sweep["arguments"][0].startswith("descriptor [128, 64] of bfloat16[4224, 320] stride [320, 1] on ")
    for kind in ("ttgir", "ptx", "cubin"):
        assert any(name.startswith("merge_kernel") and name.endswith(kind) for name in wrong.archived)
    assert "NOT REACHED" not in wrong.summary
    assert "last launch: merge_kernel" in wrong.summary


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(worker's program, seconds) -> (the run, the findings of three items)."""

    def start(program, seconds=60.0, dry=True):
        (tmp_path / "work").mkdir()
        arguments = argparse.Namespace(dry_run=dry, out=tmp_path, seconds=seconds, plant=None)
        light = first_light.Run(arguments, {}, tmp_path / "work")
        monkeypatch.setattr(light, "_worker", lambda: [sys.executable, "-c", PREAMBLE + program])
        monkeypatch.setattr(first_light, "ITEM_SECONDS", 2)
        light.work_off("item", ITEMS["panels"] + ITEMS["batch_hard"][:1], "items")
        return light

    return start


PREAMBLE = """
import json, os, signal, sys, time
tasks = [f"{f[0]} {f[1]} {f[2]}x{f[3]}x{f[4]} {f[5]}".rstrip() for f in json.load(sys.stdin)["tasks"]]
def say(event, **fields): print(json.dumps({"event": event, **fields}), flush=True)
def fine(name): say("begin", item=name); say("finding", kind="item", item=name)
def begin(name): say("begin", item=name)
"""


def names():
    return [str(item) for item in ITEMS["panels"] + ITEMS["batch_hard"][:1]]


def test_a_process_that_is_killed_is_replaced(run):
    light = run("""
for name in tasks:
    if name.startswith("sigmoid"): begin(name); os.kill(os.getpid(), signal.SIGKILL)
    fine(name)
""")
    first, second, third = names()
    done = [finding["item"] for finding in light.findings.all if finding["kind"] == "item"]
    assert done == [first, third]
    died = [finding for finding in light.findings.all if finding["kind"] == "died"]
    assert [(finding["item"], finding["error"]) for finding in died] == [(second, "exit status -9")] * 2
    assert "again" in died[1]


def test_a_process_that_hangs_is_killed_and_replaced(run):
    light = run("""
for name in tasks:
    if name.startswith("info_nce") and "CUDA_LAUNCH_BLOCKING" not in os.environ: begin(name); time.sleep(60)
    fine(name)
""")
    first, *rest = names()
    died = [finding for finding in light.findings.all if finding["kind"] == "died"]
    assert [(finding["item"], finding["error"]) for finding in died] == [(first, "nothing heard for 2 s")]
    done = [(finding["item"], "again" in finding) for finding in light.findings.all if finding["kind"] == "item"]
    assert done == [(first, True), *((name, False) for name in rest)]


SANITIZER = """#!/bin/sh
while [ "$1" != -m ] && [ "$1" != -c ]; do [ "$1" != --log-file ] || log=$2; python=$1; shift; done
echo "Invalid __global__ read of size 4 bytes, memory cache $PYTORCH_NO_CUDA_MEMORY_CACHING" > "$log"
exec "$python" "$@"
"""


def test_an_illegal_access_is_looked_into_by_the_sanitizer(run, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").write_text(SANITIZER)
    (tmp_path / "bin" / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    program = """
for name in tasks:
    begin(name)
    if name.startswith("info_nce"):
        say("exception", item=name, error="CUDA error: an illegal memory access was encountered", launches=[])
        sys.exit(1)
    fine(name)
"""
    light = run(program, dry=False)
    first, *rest = names()
    raised = [finding for finding in light.findings.all if finding["kind"] in ("exception", "died")]
    assert [finding["item"] for finding in raised] == [first] * 3
    assert raised[1]["again"] == "CUDA_LAUNCH_BLOCKING=1"
    assert raised[2]["sanitizer"] == "Invalid __global__ read of size 4 bytes, memory cache 1\n"
    assert [finding["item"] for finding in light.findings.all if finding["kind"] == "item"] == rest
    text = report.summary(raised, {})
    assert "compute-sanitizer: Invalid __global__ read" in text


def test_a_worker_that_cannot_start_says_so_once(run):
    light = run("sys.exit(7)")
    assert [(finding["kind"], finding["error"]) for finding in light.findings.all] == [("died", "exit status 7")]


def test_when_time_is_up_what_was_found_is_kept(run):
    light = run("fine(tasks[0]); begin(tasks[1]); time.sleep(60)", seconds=6.0)
    assert [finding["item"] for finding in light.findings.all if finding["kind"] == "item"] == names()[:1]
    text = report.summary([*light.findings.all[:0]], {"panels": names()})
    assert "NOT REACHED: 3" in text


# The comparison itself


def problem(name):
    family, product, shape, *variant = name.split(" ", 3)
    item = Item(family, product, *map(int, shape.split("x")), *variant)
    tensors, options = item.inputs("cpu")
    return item, tensors, *compare.truth(item, tensors, options), compare.results(item, gk, tensors, options)


def shares(item, tensors, exact, plain, ours):
    return {verdict.name: verdict.share for verdict in compare.judge(item, tensors, ours, exact, plain)}


@pytest.mark.parametrize("family", [family for family in ITEMS if family != "panels"])
def test_the_cpu_is_right_by_it(family):
    for item in [item for item in ITEMS[family] if item.n < 1000] or [ITEMS[family][-1].reduced()]:
        assert max(shares(*problem(str(item))).values()) <= 1, str(item)


@pytest.mark.parametrize(
    "name", ["hardest_negatives ieee 600x700x40", "info_nce bf16 600x700x40", "sigmoid tf32 600x700x40 ids"]
)
def test_one_wrong_row_of_hundreds_is_seen(name):
    item, tensors, exact, plain, ours = problem(name)
    gradient = next(key for key in ours if key.startswith("d ") and ours[key].dim() == 2)
    ours[gradient] = ours[gradient].clone()
    row = int(exact[gradient].norm(dim=1).argsort()[len(exact[gradient]) // 2])
    ours[gradient][row] *= -1
    verdicts = {verdict.name: verdict for verdict in compare.judge(item, tensors, ours, exact, plain)}
    assert verdicts[gradient].share > 1
    assert verdicts[gradient].wrong == [row]
    assert all(verdict.share <= 1 for key, verdict in verdicts.items() if key != gradient)


def test_another_place_of_an_equal_score_is_wrong():
    item, tensors, exact, plain, ours = problem("hardest_negatives ieee 600x700x40")
    ours["col_index"] = ours["col_index"].clone()
    ours["col_index"][650] += 1
    assert shares(item, tensors, exact, plain, ours)["col_index"] == float("inf")
    verdict = next(v for v in compare.judge(item, tensors, ours, exact, plain) if v.name == "col_index")
    about = compare.describe(verdict, ours, exact, (128, 256))
    assert about["first"] == [650]
    assert about["value"] == about["truth"] + 1
    assert about["share"].startswith("tile column 2, and all name one tile row: ")
    assert about["diagonal"] is False


def test_a_number_of_the_wrong_sign_is_seen():
    item, tensors, exact, plain, ours = problem("info_nce bf16 129x257x40")
    assert shares(item, tensors, exact, plain, ours)["d scale"] <= 1
    ours["d scale"] = -ours["d scale"]
    assert shares(item, tensors, exact, plain, ours)["d scale"] > 100


def test_the_precision_of_products_is_seen():
    """Products rounded to TF32 are no fp32 products."""
    item, tensors, exact, plain, _ = problem("info_nce ieee 600x700x40")

    def rounded(t):
        return ((t.detach().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32).requires_grad_()

    options = item.inputs("cpu")[1]
    rough = compare.results(item, gk, {k: rounded(t) if t.dim() else t for k, t in tensors.items()}, options)
    assert max(shares(item, tensors, exact, plain, rough).values()) > 10
    assert max(shares(item._replace(product="tf32"), tensors, exact, plain, rough).values()) <= 1


def test_bits_that_differ_are_seen():
    first = {"x": torch.tensor([1.0, float("nan")]), "i": torch.tensor([1, 2])}
    assert compare.equal_bits(first, {name: t.clone() for name, t in first.items()})
    assert not compare.equal_bits(first, {**first, "x": torch.tensor([1.0000001, float("nan")])})
    assert not compare.equal_bits({"x": torch.tensor(0.0)}, {"x": torch.tensor(-0.0)})


def test_every_family_has_every_shape_and_product():
    for family, items in ITEMS.items():
        assert len(set(items)) == len(items)
        if family in ("certified", "panels"):
            continue
        kinds = {(item.product, item.n, item.m, item.d, item.variant) for item in items}
        assert len(kinds) == 4 * len(SHAPES) * len(FAMILIES[family].variants)
    assert all(item.n * item.m > 1 << 26 for item in ITEMS["panels"])


def test_every_op_with_a_kernel_is_in_a_family():
    """But for what only others call: a new op needs its family."""
    public = {name for name in gk.__all__ if callable(getattr(gk.reference, name, None)) and name[0].islower()}
    without = {
        "similarity",  # the matrix of small problems: `project` and a product
        "gradient_space_loss",  # the kernels of goal_loss, weights by the user's function
        "goal_weights",  # plain PyTorch
        "triplet_from_scores",  # the same
        "structured_attention",  # `project` and PyTorch's fused attention
    }
    assert {family.function for family in FAMILIES.values()} == public - without


def test_the_summary_stays_within_its_characters():
    launches = [{"kernel": "k" * 100, "grid": [1], "constexprs": {"BN": 1}}]
    findings = [{"kind": "facts", "card": "none"}]
    for k in range(200):
        findings.append({"kind": "exception", "item": f"item {k}", "error": "e" * 900, "launches": launches})
        mismatches = [{"result": "r" * 500}] * 3
        findings.append(
            {"kind": "item", "item": f"wrong {k}", "kernels": [], "error over allowed": 2.0, "equal bits": False,
             "mismatches": mismatches, "agree": {"tma=False": "w" * 300}, "seconds": 1.0}
        )  # fmt: skip
    planned = {f"family {k}": [f"item {j}" for j in range(k, 200, 20)] for k in range(20)}
    text = report.summary(findings, {**planned, "smoke": ["tma"], "headline": ["triplet"]})
    assert len(text) < 10_000
    assert "tma: NOT RUN" in text
    assert report.status(findings, planned) == 1


def test_without_a_card_it_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "bench/first_light.py"), str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


# What a card would run, as far as it goes without one


def test_on_a_card_an_item_runs_at_its_size_over_poisoned_memory(monkeypatch, tmp_path):
    """On the CPU in the card's place."""
    poisoned, inputs = [], Item.inputs
    monkeypatch.setattr(worker, "poison", poisoned.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Item, "inputs", lambda item, device: inputs(item, "cpu"))
    item = Item("certified", "ieee", 130, 140, 16)
    finding = worker.check(item, worker.Card(Recorder(dry=False)), tmp_path)
    assert len(poisoned) == worker.REPEATS
    assert "compared" not in finding
    assert finding["error over allowed"] <= 1
    assert finding["equal bits"]
    certified = gk.backends()["hardest_negatives"]["certified"] != "no"
    assert finding["the CPU's bits"] is (True if certified else None)


def test_a_result_that_reads_unwritten_memory_is_seen(monkeypatch, tmp_path):
    """Another value at every run: the bits differ, and the definition is missed."""
    inputs, results, runs = Item.inputs, compare.results, []

    def unwritten(item, module, tensors, options):
        outputs = results(item, module, tensors, options)
        if module is gk:
            runs.append(item)
            outputs["d x"] = outputs["d x"] + len(runs)
        return outputs

    monkeypatch.setattr(worker, "poison", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Item, "inputs", lambda item, device: inputs(item, "cpu"))
    monkeypatch.setattr(compare, "results", unwritten)
    item = Item("triplet", "ieee", 130, 140, 16)
    finding = worker.check(item, worker.Card(Recorder(dry=False)), tmp_path)
    assert not finding["equal bits"]
    assert [mismatch["result"] for mismatch in finding["mismatches"]] == ["d x"]
    assert set(finding["agree"].values()) == {"wrong, other bits"}


def test_poison_fills_what_the_allocator_holds_free(monkeypatch):
    made, empty = [], torch.empty

    def allocate(size, dtype, device):
        made.append(empty(size, dtype=dtype))
        return made[-1]

    blocks = [{"state": "inactive", "size": 512}, {"state": "active_allocated", "size": 1024}]
    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{"blocks": blocks}])
    worker.poison(torch.device("cpu"))
    sizes = [len(memory) for memory in made]
    assert 512 in sizes
    assert 1024 not in sizes
    for memory in made:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            assert memory[:16].view(dtype).isnan().all()


def test_headlines_are_ops_of_the_bench():
    assert len(set(HEADLINES)) == len(HEADLINES)
    assert {headline.op for headline in HEADLINES} <= set(OPS)
