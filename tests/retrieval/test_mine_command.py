"""``python -m gssf_kernels mine``: what it writes, what it refuses before any work, and that an output is whole."""

import json
import signal

import numpy as np
import pytest
import torch

import gssf_kernels as gk
from gssf_kernels.retrieval import commands, mine_command, outputs

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _no_warning_of_norms(monkeypatch):
    monkeypatch.setattr("gssf_kernels._checks._MEASURED", {"mine_hard_negatives"})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Queries, a corpus in two shards, ids and pairs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    arrays = {
        "q": torch.randint(-2, 4, (20, 3)).float(),
        "c": torch.randint(-2, 4, (70, 3)).float(),
        "qi": torch.arange(20),
        "ci": torch.arange(70) % 25,
        "pairs": torch.tensor([[0, 3], [1, 4], [1, 5], [7, 0]]),
    }
    for name, tensor in arrays.items():
        np.save(tmp_path / f"{name}.npy", tensor.numpy())
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "0.npy", arrays["c"][:30].numpy())
    np.save(tmp_path / "c" / "1.npy", arrays["c"][30:].numpy())
    return tmp_path, arrays


def run(*words):
    """The exit status of the command."""
    return commands.main(["mine", *map(str, words)])


def rows_of(path):
    """What is in an output, as a list of dictionaries."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_expected(mined):
    rows = []
    for query, (indices, scores, p) in enumerate(zip(*(t.tolist() for t in mined[:3]), strict=True)):
        count = sum(j >= 0 for j in indices)
        row = {"query": query, "negatives": indices[:count], "scores": scores[:count]}
        rows.append(row | {"positive_score": None if p != p else p})
    return rows


CALLS = {
    "row i and row i": ((), {}),
    "ids": (("--ids", "qi.npy", "ci.npy"), {"query_ids": "qi", "corpus_ids": "ci"}),
    "pairs": (("--positives", "pairs.npy"), {"positives": "pairs"}),
    "every option": (
        [
            *("--skip-top", "1", "--max-score", "5", "--min-score=-3", "--margin", "0.5", "--relative-margin", "0.25"),
            *("--sampling", "random", "--pool", "9", "--seed", "3", "--normalize"),
        ],
        {
            "skip_top": 1,
            "max_score": 5.0,
            "min_score": -3.0,
            "margin_to_positive": 0.5,
            "relative_margin": 0.25,
            "sampling": "random",
            "pool": 9,
            "seed": 3,
            "normalize": True,
        },
    ),
}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("call", CALLS)
def test_outputs(call, suffix, files, monkeypatch, capsys):
    monkeypatch.setattr(outputs, "ROWS", 7)  # row groups of 7 queries
    path, arrays = files
    words, options = CALLS[call]
    options = {name: arrays.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    expected = gk.mine_hard_negatives(arrays["q"], arrays["c"], k=5, **options)
    assert run("q.npy", "c", "--k", 5, "--out", f"out.{suffix}", *words) == 0
    assert rows_of(path / f"out.{suffix}") == rows_expected(expected)
    assert capsys.readouterr().out == f"{expected.report}\n"
    assert not [file for file in path.iterdir() if file.name.startswith(".")]
    if suffix == "parquet":
        assert pyarrow.parquet.ParquetFile(path / "out.parquet").num_row_groups == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scores_have_their_dtype(dtype, files):
    path, arrays = files
    for name in "qc":
        np.save(path / f"{name}.npy", arrays[name].numpy().astype(dtype))
    assert run("q.npy", "c.npy", "--k", 2, "--out", "out.parquet") == 0
    kind = pyarrow.float64() if dtype == np.float64 else pyarrow.float32()
    schema = pyarrow.parquet.read_schema(path / "out.parquet")
    assert schema.field("scores").type.value_type == kind
    assert schema.field("positive_score").type == kind


BAD = {
    "an output that exists": (("--out", "out.jsonl"), "--out: expected a file that does not exist, or --force, got "),
    "an output of another kind": (("--out", "out.csv"), "--out: expected a file .parquet or .jsonl, got "),
    "no such directory": (("--out", "c/none/x.jsonl"), "--out: expected a file in a directory that exists, got "),
    "no queries": (("q2.npy",), "queries: expected a file or a directory, got none at "),
    "k": (("--k", "0"), "k: expected a whole number >= 1, got 0"),
    "both": (("--k", "1000", "--skip-top", "100"), "k + skip_top: expected at most 1024, got 1100"),
    "ids of another length": (("--ids", "qi.npy", "qi.npy"), "corpus_ids: expected 70 ids, one for each row of corpus"),
    "ids of another dtype": (("--ids", "q.npy", "ci.npy"), "query_ids: expected shape [N], got [20, 3] in "),
    "pairs out of range": (("--positives", "bad_pairs.npy"), "positives: expected (row of queries, row of corpus) wit"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_and_come_before_any_work(case, files, monkeypatch, capsys):
    path, _ = files
    words, message = BAD[case]
    (path / "out.jsonl").write_text("precious")
    np.save(path / "bad_pairs.npy", np.array([[20, 0]]))
    monkeypatch.setattr("gssf_kernels.retrieval.mining.Mining.search", lambda self: pytest.fail("work was done"))
    first = words[0] if words[0].endswith(".npy") else "q.npy"
    rest = words[1:] if first == words[0] else words
    defaults = {"--k": "3", "--out": "new.jsonl"}
    extra = [word for name, value in defaults.items() if name not in rest for word in (name, value)]
    assert commands.main(["mine", first, "c.npy", *rest, *extra]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m gssf_kernels mine: error: {message}")
    assert err.count("\n") == 1
    assert (path / "out.jsonl").read_text() == "precious"
    assert not (path / "new.jsonl").exists()


def test_parquet_without_pyarrow_is_an_error_before_any_work(files, monkeypatch, capsys):
    path, _ = files
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(mine_command, "mine_hard_negatives", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(
        ImportError, match=r"^--out: writing .*out.parquet needs pyarrow: pip install pyarrow, or write"
    ):
        mine_command.run_mine(mine_options(path / "out.parquet"))


def mine_options(out):
    import argparse

    parser = argparse.ArgumentParser()
    mine_command.add_mine(parser.add_subparsers())
    return parser.parse_args(["mine", "q.npy", "c.npy", "--k", "3", "--out", str(out)])


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_an_output_is_whole_or_not_there(suffix, files, monkeypatch):
    path, _ = files
    out = path / f"out.{suffix}"
    words = ("q.npy", "c.npy", "--k", 2, "--out", out.name)
    monkeypatch.setattr(outputs, "ROWS", 7)
    parts = outputs._parts

    def broken(mined):
        for number, part in enumerate(parts(mined)):
            if number == 2:
                raise OSError("no space left on device")
            yield part

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_parts", broken)
        assert run(*words) == 2
        assert not out.exists()
    assert run(*words) == 0
    whole = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_parts", broken)
        assert run(*words, "--force") == 2
        assert out.read_bytes() == whole
    assert run(*words[:3], 3, *words[4:], "--force") == 0
    assert len(rows_of(out)[0]["negatives"]) == 3
    assert not [file for file in path.iterdir() if file.name.startswith(".")]


KILLED = """
import os, signal, sys
from gssf_kernels.retrieval import checkpoint, commands

checkpoint.SECONDS, checkpoint.SHARE = 0.0, 0
step = checkpoint.Checkpoint.step

def killing(self, stage, unit, state):
    step(self, stage, unit, state)
    if stage == 1:  # the first chunk of the search
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.Checkpoint.step = killing
commands.main(sys.argv[1:])
"""


def test_a_killed_command_goes_on(files, capsys, run_fresh):
    path, arrays = files
    words = [
        "mine",
        path / "q.npy",
        path / "c",
        "--k",
        "5",
        "--out",
        path / "out.jsonl",
        "--checkpoint",
        path / "state",
    ]
    words = [str(word) for word in words]
    killed = run_fresh(KILLED, *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (path / "state").exists()
    assert not (path / "out.jsonl").exists()
    assert commands.main([*words[:4], "4", *words[5:]]) == 2
    assert (
        "checkpoint: expected one of the same inputs and settings, got one with another k in" in capsys.readouterr().err
    )
    assert commands.main(words) == 0
    capsys.readouterr()
    assert rows_of(path / "out.jsonl") == rows_expected(gk.mine_hard_negatives(arrays["q"], arrays["c"], k=5))
    assert not (path / "state").exists()
