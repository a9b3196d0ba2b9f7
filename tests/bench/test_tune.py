"""The tuner without a card: what it tries, what it asks the compiler, and how it chooses."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from gssf_kernels import plan
from gssf_kernels.triton import tiles
from gssf_kernels.triton.tiles import Sweep

LINE = Sweep(128, 128, 64, 8, 3, tma=True)
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.mark.parametrize("key", tiles.SWEEP, ids=lambda key: "-".join(map(str, key)))
def test_candidates_differ_in_one_number(key):
    line, *others = tune.candidates(tiles.SWEEP[key], key[0])
    assert line == tiles.SWEEP[key]
    assert len({line, *others}) == len(others) + 1 >= 8
    assert all(sum(a != b for a, b in zip(line, other, strict=True)) == 1 for other in others)
    assert key[0] == 90 or not any(other.tma for other in others)
    assert {other.persistent for other in (line, *others)} == ({0, 1, 2} if line.tma else {0})


def test_every_line_has_a_problem_of_its_size():
    for arch, kind, size in tiles.SWEEP:
        n, d = tune.PROBLEMS[size]
        expected = tiles.SWEEP[arch, kind, size]
        dtype, precision = tune._product(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "architecture", lambda device, arch=arch: arch)
            product = "ieee" if precision == "highest" else "tf32"
            patch.setattr(plan, "fp32_products", lambda device, product=product: product)
            for rows in (n, tune._small_problem((arch, kind, size))[0].shape[0]):
                epilogue = size if size in ("sums", "row panels") else ""
                x = torch.zeros(rows, d, dtype=dtype)
                assert plan.Scores(x, x).tile(epilogue) == expected


@compiles
def test_the_compiler_is_asked():
    key = (80, "ieee", "wide")
    assert tune.why_not(key, tiles.SWEEP[key]) == ""
    assert "spills" in tune.why_not(key, Sweep(128, 128, 16, 4, 3))
    assert "KiB of shared memory" in tune.why_not((80, "half", "narrow"), Sweep(128, 128, 128, 8, 3))
    assert "does not compile" in tune.why_not(key, Sweep(100, 128, 16, 8, 3))
    assert tiles.SWEEP[key] != Sweep(100, 128, 16, 8, 3)


def timed(*rows):
    return [tune.Timed(tile, "", ms) for tile, ms in rows]


def test_a_line_stays_unless_another_is_faster_in_nine_turns_of_ten():
    other = LINE._replace(BK=32)
    tens = [10.0 + k % 3 for k in range(20)]
    assert tune.chosen(timed((LINE, tens), (other, [ms * 0.9 for ms in tens]))) == other
    assert tune.chosen(timed((LINE, tens), (other, [ms * 0.98 for ms in tens]))) == LINE
    assert (
        tune.chosen(timed((LINE, tens), (other, [ms * (0.8 if k % 5 else 1.1) for k, ms in enumerate(tens)]))) == LINE
    )
    fastest = LINE._replace(num_stages=4)
    both = timed((LINE, tens), (other, [ms * 0.9 for ms in tens]), (fastest, [ms * 0.7 for ms in tens]))
    assert tune.chosen(both) == fastest
    assert tune.chosen([*timed((LINE, tens)), tune.Timed(other, "spills 8 bytes", [])]) == LINE


def test_turns_are_taken_and_wrong_results_are_not_timed(monkeypatch):
    wrong, fails = LINE._replace(BN=64), LINE._replace(BM=64)

    def launcher(*_):
        tile = plan.sweep_tile(None, None, "small")
        if tile == fails:
            raise RuntimeError("no room")
        return (torch.full((3,), 2.0 if tile == wrong else 1.0), torch.zeros(3, dtype=torch.int64))

    monkeypatch.setattr(tune, "_launcher", lambda size: launcher)
    monkeypatch.setattr(tune, "problem", lambda key, device: ())
    before = torch.backends.cuda.matmul.fp32_precision
    fine = LINE._replace(num_stages=4)
    results = tune.time_line((90, "tf32", "wide"), [LINE, wrong, fails, fine], torch.device("cpu"), 0.0)
    assert torch.backends.cuda.matmul.fp32_precision == before
    notes = {one.tile: (one.note, len(one.ms)) for one in results}
    assert notes[LINE] == notes[fine] == ("", tune.TURNS[0])
    assert notes[wrong] == ("results differ from the line's by 1.0e+00", 0)
    assert notes[fails] == ("does not run: RuntimeError", 0)


def test_the_page_holds_lines_that_can_be_pasted():
    key, other = (90, "half", "wide"), LINE._replace(BK=32, tma=False, persistent=2)
    page = tune.page({key: [*timed((LINE, [2.0] * 9), (other, [1.0] * 9)), tune.Timed(LINE, "spills 8 bytes", [])]},
                     "a card", False)  # fmt: skip
    block = page.partition("```python\n")[2].partition("```")[0]
    assert eval("{" + block + "}", {"Sweep": Sweep}) == {key: other}
    assert "spills 8 bytes" in page
    assert "Out of time" in page
    assert "0.500×" in page


def test_lines_are_chosen_by_name_and_order(monkeypatch, capsys, tmp_path):
    """Both are of the card that is there; what its table lacks is left out.

    Only the first round asks processes, as on a card: each has to import torch first.
    """
    table = {(arch, kind, "wide"): LINE for arch in (80, 90) for kind in ("half", "tf32")}
    monkeypatch.setattr(tiles, "SWEEP", {**table, (80, "ieee", "wide"): LINE})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(plan, "architecture", lambda device: 90)
    monkeypatch.setattr(
        tune, "why_not", partial(str.format, "not {} {}")
    )  # a reason against every tile, so that nothing is timed
    for lines, expected in (
        ("tf32-wide,ieee-wide,half-wide", ["tf32", "half"]),
        ("half-wide", ["half"]),
        ("all", ["half", "tf32"]),
    ):
        monkeypatch.setattr(sys, "argv", ["tune", "--out", str(tmp_path / "page.md"), "--lines", lines])
        assert tune.main() == 0
        said = [line for line in capsys.readouterr().out.splitlines() if "the table's own" in line]
        assert [line.partition(":")[0] for line in said] == [f"(90, '{kind}', 'wide')" for kind in expected]
        threads = lambda workers, context: ThreadPoolExecutor(workers)  # noqa: E731
        monkeypatch.setattr(tune.concurrent.futures, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(tmp_path / "page.md"), "--lines", "half-wider"])
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 2
    assert (
        "--lines: expected all or some of half-wide, tf32-wide, ieee-wide, got 'half-wider'" in capsys.readouterr().err
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
