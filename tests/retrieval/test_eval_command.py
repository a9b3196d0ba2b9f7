"""``python -m gssf_kernels eval``: what it prints and writes, what it refuses, and its picture."""

import json
import os
import runpy
import sys

import numpy as np
import pytest
import torch

import gssf_kernels as gk
from gssf_kernels import __main__ as report_module
from gssf_kernels.reference import RankSegments
from gssf_kernels.retrieval import checkpoint, commands, plots, streaming
from gssf_kernels.retrieval.measures import of_queries, result_of

N, EACH = 12, 3


@pytest.fixture
def files(tmp_path, monkeypatch):
    """12 images with 3 captions each, as small whole numbers, in the working directory."""
    monkeypatch.chdir(tmp_path)
    g = np.random.default_rng(0)
    images = g.integers(-3, 4, (N, 6))
    captions = images.repeat(EACH, 0) + g.integers(-5, 6, (N * EACH, 6))
    np.save("images.npy", images.astype(np.float32))
    np.save("captions.npy", captions.astype(np.float32))
    np.save("image_ids.npy", np.arange(N))
    np.save("caption_ids.npy", np.arange(N).repeat(EACH))
    return tmp_path


def expected(**settings):
    x, y, x_ids, y_ids = (torch.from_numpy(np.load(f"{name}.npy")) for name in NAMES)
    return gk.evaluate(x, y, x_ids=x_ids, y_ids=y_ids, **settings)


NAMES = ("images", "captions", "image_ids", "caption_ids")
EVAL = ["eval", "images.npy", "captions.npy", "--ids", "image_ids.npy", "caption_ids.npy"]


def refused(words, capsys):
    """The one line that a refused call prints."""
    try:
        status = commands.main(words)
    except SystemExit as stop:  # argparse's errors
        status = stop.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.count("\n") == 1
    return printed.err.removesuffix("\n")


@pytest.mark.usefixtures("files")
def test_prints_and_writes_what_evaluate_gives(capsys):
    assert commands.main([*EVAL, "--folds", "2", "--k", "1", "5", "10", "--json", "out.json"]) == 0
    result = expected(folds=2)
    assert capsys.readouterr().out == result.table("image", "caption") + "\n"
    with open("out.json") as file:
        assert json.load(file) == result.to_dict()
    assert 0.1 < result["x_to_y.recall@1"] < 1


@pytest.mark.usefixtures("files")
def test_a_checkpoint_is_gone_on_from_and_removed(monkeypatch, capsys):
    command = [*EVAL, "--checkpoint", "state", "--json", "out.json"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SECONDS", 0.0)
        patch.setattr(checkpoint, "SHARE", 0)
        patch.setattr(streaming.Counted, "result", stopped)
        with pytest.raises(KeyboardInterrupt):
            commands.main(command)
    with monkeypatch.context() as patch:  # both passes were done
        patch.setattr(streaming, "swept_scores", stopped)
        assert commands.main(command) == 0
    with open("out.json") as file:
        assert json.load(file) == expected().to_dict()
    assert not os.path.exists("state")
    with open("state", "w") as file:
        file.write("not a checkpoint")
    capsys.readouterr()
    message = refused([*EVAL, "--checkpoint", "state"], capsys)
    assert "checkpoint: expected a new file or one of an interrupted run" in message


def stopped(*_):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("files")
def test_settings(capsys):
    assert commands.main([*EVAL, "--k", "2", "--normalize", "--json", "out.json"]) == 0
    with open("out.json") as file:
        got = json.load(file)
    assert got == pytest.approx(expected(ks=(2,), normalize=True).to_dict())
    assert got != pytest.approx(expected(ks=(2,)).to_dict())
    assert "NDCG@2" in capsys.readouterr().out


def test_rows_that_pair_and_shards(files, capsys):
    rows = np.load("captions.npy")[:N]
    (files / "shards").mkdir()
    for place, part in enumerate(np.array_split(rows, 3)):
        np.save(files / "shards" / f"{place}.npy", part)
    assert commands.main(["eval", "images.npy", "shards", "--json", "out.json"]) == 0
    x = torch.from_numpy(np.load("images.npy"))
    assert json.loads((files / "out.json").read_text()) == gk.evaluate(x, torch.from_numpy(rows)).to_dict()
    capsys.readouterr()


def test_outputs_are_not_replaced_without_force(files, capsys):
    (files / "out.json").write_text("mine")
    line = refused([*EVAL, "--json", "out.json"], capsys)
    assert line == (
        "python -m gssf_kernels eval: error: --json: expected a file that does not exist, or --force, got out.json"
    )
    assert (files / "out.json").read_text() == "mine"
    assert commands.main([*EVAL, "--json", "out.json", "--force"]) == 0
    assert json.loads((files / "out.json").read_text())["folds"] == 1
    assert sorted(path.name for path in files.iterdir()) == sorted([*(f"{name}.npy" for name in NAMES), "out.json"])


def test_an_error_while_writing_leaves_nothing(files, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "save_plot", full)
    line = refused([*EVAL, "--plot", "out.png"], capsys)
    assert line == "python -m gssf_kernels eval: error: [Errno 28] No space left on device"
    assert sorted(path.name for path in files.iterdir()) == sorted(f"{name}.npy" for name in NAMES)


REFUSED = {
    "--json: expected a file in a directory that exists, got none/out.json": [*EVAL, "--json", "none/out.json"],
    "--json: expected a file, got the directory .": [*EVAL, "--json", "."],
    "--plot: expected another file than --json, got out": [*EVAL, "--json", "out", "--plot", "./out"],
    "IMAGES: expected a file or a directory, got none at none.npy": ["eval", "none.npy", "captions.npy"],
    "caption_ids: expected 36 ids, one for each row of captions, got 12 in image_ids.npy": [
        *EVAL[:4],
        "image_ids.npy",
        "image_ids.npy",
    ],
    "argument --k: expected a whole number >= 1, got 0": [*EVAL, "--k", "1", "0"],
    "argument --folds: expected a whole number >= 1, got 1.5": [*EVAL, "--folds", "1.5"],
    "folds: expected at most the 12 rows of images, got 13": [*EVAL, "--folds", "13"],
    "the following arguments are required: CAPTIONS": ["eval", "images.npy"],
    "argument --ids: expected 2 arguments": [*EVAL[:-1]],
    "CAPTIONS: expected 12 rows as in IMAGES (row i pairs with row i), got 36: pass --ids IMAGE_IDS CAPTION_IDS, files "
    "of integers that are equal where they belong together; with 3 captions after one another: numpy.arange(12) and "
    "numpy.arange(12).repeat(3)": EVAL[:3],
    "CAPTIONS: expected 36 rows as in IMAGES (row i pairs with row i), got 12: pass --ids IMAGE_IDS CAPTION_IDS, files "
    "of integers that are equal where they belong together": ["eval", "captions.npy", "images.npy"],
}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, capsys):
    assert refused(REFUSED[message], capsys) == f"python -m gssf_kernels eval: error: {message}"


def test_another_command(capsys):
    assert "error: argument COMMAND: invalid choice: 'evil'" in refused(["evil"], capsys)


@pytest.mark.usefixtures("files")
def test_nan_is_one_line_on_stderr(capsys):
    images = np.load("images.npy")
    images[2] = np.nan
    np.save("images.npy", images)
    assert commands.main(EVAL) == 0
    printed = capsys.readouterr()
    assert "36 scores are NaN, and count as mistakes" in printed.out
    assert [line for line in printed.err.splitlines() if "36 scores are NaN" in line] == printed.err.splitlines()
    assert printed.err.startswith("warning: evaluate_files: 36 scores are NaN")


@pytest.mark.usefixtures("files")
def test_dispatch(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gssf_kernels", *EVAL])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(report_module.__file__, run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == expected().table("image", "caption") + "\n"
    monkeypatch.setattr(sys, "argv", ["gssf_kernels"])
    runpy.run_path(report_module.__file__, run_name="__main__")
    assert capsys.readouterr().out == report_module.report() + "\n"


def drawn(result, tmp_path, monkeypatch):
    """The figure that `save_plot` writes."""
    figure = pytest.importorskip("matplotlib.figure")
    figures = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *of, **how: figures.append(self) or save(self, *of, **how)
    )
    plots.save_plot(result, tmp_path / "out", "image", "caption")
    assert (tmp_path / "out").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return figures[0]


def test_picture(files, monkeypatch):
    result = expected()
    curve, histogram = drawn(result, files, monkeypatch).axes
    for line, way in zip(curve.lines, ("x_to_y", "y_to_x"), strict=True):
        assert line.get_xdata()[0] == 1
        assert line.get_ydata()[0] == pytest.approx(100 * result[f"{way}.recall@1"])
        at_five = [y for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if x <= 5][-1]
        assert at_five == pytest.approx(100 * result[f"{way}.recall@5"])
        assert line.get_ydata()[-1] == 100
    labels = [text.get_text() for text in curve.get_legend().get_texts()]
    assert labels[0] == "image → caption"
    assert labels.count("caption → image") == 1
    heights = [[bar.get_height() for bar in bars] for bars in histogram.containers]
    assert [sum(of_way) for of_way in heights] == pytest.approx([100, 100])
    assert [of_way[0] for of_way in heights] == pytest.approx(
        [100 * result[f"{w}.recall@1"] for w in result.best_ranks]
    )
    ticks = [tick.get_text() for tick in histogram.get_xticklabels()]
    assert max(int(best.max()) for best in result.best_ranks.values()) == 10
    assert ticks == ["1", "2–4", "5–9", "10"]
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title("left") for axes in (curve, histogram))


def test_picture_of_ties(tmp_path, monkeypatch):
    """A band from pessimistic to optimistic recall; bars of pessimistic ranks, without the query that has none."""
    ranks = torch.tensor([1, 3, 7, 8])
    tied = RankSegments(torch.tensor([0, 1, 2, 2, 3, 4]), torch.zeros(4).long(), ranks, torch.tensor([1, 1, 2, 8]))
    result = result_of({"x_to_y": of_queries(tied, (1,))}, (1,), 0)
    curve, histogram = drawn(result, tmp_path, monkeypatch).axes
    (line,), (band,) = curve.lines, curve.collections
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 3, 7, 8], [25, 25, 50, 75, 100])
    assert band.get_paths()[0].get_extents().get_points().tolist() == [[1, 25], [8, 100]]
    assert [text.get_text() for text in curve.get_legend().get_texts()] == [
        "image → caption",
        "image → caption, ties as hits",
    ]
    assert [bar.get_height() for bar in histogram.containers[0]] == [25, 25, 50]
    assert [bar.get_x() for bar in histogram.containers[0]] == pytest.approx([-0.4, 0.6, 1.6])


def test_picture_of_one_modality_in_which_all_is_right(tmp_path, monkeypatch):
    result = gk.evaluate(torch.eye(4).repeat(2, 1), x_ids=torch.arange(8) % 4)
    curve, histogram = drawn(result, tmp_path, monkeypatch).axes
    assert [list(line.get_ydata()) for line in curve.lines] == [[100]]
    assert [bar.get_height() for bar in histogram.containers[0]] == [100]


def test_bins_of_ranks():
    assert plots.rank_bins(1) == [1]
    assert plots.rank_bins(49) == [1, 2, 5, 10, 20]
    assert plots.rank_bins(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert plots.bin_labels([1, 2, 5, 10], 1234) == ["1", "2–4", "5–9", "10–1,234"]
    assert plots.bin_labels([1, 2], 2) == ["1", "2"]


@pytest.mark.usefixtures("files")
def test_picture_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused([*EVAL, "--plot", "out.png"], capsys)
    assert line.endswith("error: plot: expected matplotlib, got none installed; pip install matplotlib")
