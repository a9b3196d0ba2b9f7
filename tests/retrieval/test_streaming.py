"""Search and evaluation of files: the same results as in memory, at every size of blocks and chunks, after any crash.

Embeddings are small integers, so that scores are exact, there are ties, and one equal sign decides.
"""

import signal

import numpy as np
import pytest
import retrieval_loops
import torch

import gssf_kernels as gk
from gssf_kernels import retrieval
from gssf_kernels.retrieval import checkpoint, streaming
from gssf_kernels.retrieval.blocks import Sweep

SIZES = ((None, None), (5, 7), (23, 1), (1, 57))  # rows of a block and of a chunk


@pytest.fixture(autouse=True)
def _no_warning_of_norms(monkeypatch):
    monkeypatch.setattr(
        "gssf_kernels._checks._MEASURED", {"stream_top_scores", "evaluate_files", "top_scores", "evaluate"}
    )


def whole_numbers(*shape, dtype=torch.float32):
    return torch.randint(-3, 4, shape).to(dtype)


def saved(path, **arrays):
    """Each tensor as a .npy file: its path."""
    paths = []
    for name, tensor in arrays.items():
        paths.append(path / f"{name}.npy")
        np.save(paths[-1], tensor.numpy())
    return paths


def sorted_candidates(q, c, k, allowed):
    """For each query the k best candidates that are allowed, by single scores in fp64."""
    rows = []
    for i in range(len(q)):
        scores = [(sum(float(x) * float(y) for x, y in zip(q[i], c[j], strict=True)), j) for j in range(len(c))]
        scores = sorted(((s, j) for s, j in scores if allowed(i, j, s)), key=lambda t: (-t[0], t[1]))[:k]
        rows.append(scores + [(-float("inf"), -1)] * (k - len(scores)))
    return rows


IDS = torch.arange(23) % 5, torch.arange(57) % 7
LIMITS = torch.arange(-5.0, 18.0)
SEARCHES = {
    "all": ({}, lambda i, j, s: True),
    "self": ({"exclude_self": True}, lambda i, j, s: i != j),
    "ids": (
        {"exclude_same_id": True, "query_ids": IDS[0], "candidate_ids": IDS[1].int().numpy()},
        lambda i, j, s: i % 5 != j % 7,
    ),
    "ids, self, a limit": (
        {"exclude_same_id": True, "query_ids": IDS[0], "candidate_ids": IDS[1], "exclude_self": True, "max_score": 4.0},
        lambda i, j, s: i % 5 != j % 7 and i != j and s <= 4,
    ),
    "a limit of each query": ({"max_score": LIMITS}, lambda i, j, s: s <= i - 5),
}


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("search", SEARCHES)
def test_search_against_sorted_scores(search, k, tmp_path):
    options, allowed = SEARCHES[search]
    q, c = whole_numbers(23, 4), whole_numbers(57, 4)
    expected = sorted_candidates(q, c, k, allowed)
    files = saved(tmp_path, q=q, c=c)
    for block_rows, chunk_rows in SIZES:
        result = retrieval.stream_top_scores(*files, k, block_rows=block_rows, chunk_rows=chunk_rows, **options)
        assert result.values.tolist() == [[s for s, _ in row] for row in expected]
        assert result.indices.tolist() == [[j for _, j in row] for row in expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_search_is_that_of_top_scores(dtype):
    q, c = whole_numbers(40, 8, dtype=dtype), whole_numbers(300, 8, dtype=dtype)
    expected = gk.top_scores(q, c, 9)
    result = retrieval.stream_top_scores(q, c, 9, block_rows=13, chunk_rows=32)
    assert result.values.dtype == expected.values.dtype
    assert torch.equal(result.values, expected.values)
    assert torch.equal(result.indices, expected.indices)


@pytest.mark.parametrize(
    "options", [{"normalize": True}, {"metric": gk.StructuredSimilarity(8, block_size=2)}], ids=str
)
def test_search_by_cosine_and_by_metric(options):
    q, c = torch.randn(40, 8), torch.randn(300, 8)
    if "metric" in options:
        torch.nn.init.normal_(options["metric"].blocks)
    expected = gk.top_scores(q, c, 9, **options)
    result = retrieval.stream_top_scores(q, c, 9, block_rows=13, chunk_rows=32, **options)
    assert torch.equal(result.indices, expected.indices)
    torch.testing.assert_close(result.values, expected.values, rtol=1e-6, atol=1e-6)


def test_pairs_that_are_too_many_to_ask_for_in_addition(monkeypatch):
    """With exclude_self and ids, a row asks for further scores than k; where they are too many, b is halved."""
    monkeypatch.setattr(streaming, "MOST", 7)
    options, allowed = SEARCHES["ids, self, a limit"]
    q, c = whole_numbers(23, 4), whole_numbers(57, 4)
    expected = sorted_candidates(q, c, 7, allowed)
    result = retrieval.stream_top_scores(q, c, 7, **options)
    assert result.indices.tolist() == [[j for _, j in row] for row in expected]


def test_every_chunk_takes_the_route_of_the_whole(monkeypatch):
    """On a processor with a bf16 unit, at most 2^18 scores decide; a chunk has fewer."""
    monkeypatch.setattr("gssf_kernels.dense.bf16_unit", lambda: "amx")
    routes, search = [], streaming._top_without

    def recorded(call, *pairs):
        routes.append(call.route)
        return search(call._replace(route="sweep"), *pairs)

    monkeypatch.setattr(streaming, "_top_without", recorded)
    q, c = whole_numbers(512, 4), whole_numbers(512, 4)
    for candidates, dtype in ((c, torch.float32), (c[1:], torch.float32), (c, torch.float64)):
        retrieval.stream_top_scores(q.to(dtype), candidates.to(dtype), 3, chunk_rows=400)
    assert routes == ["certified", "certified", "sweep", "sweep", "sweep", "sweep"]


def captions(n, of_each):
    return torch.arange(n * of_each) // of_each


EVALUATIONS = {
    "row i and row i": (20, 33, None, None, 1),
    "five captions": (20, 103, torch.arange(20), captions(21, 5)[:103], 1),
    "shared ids": (20, 60, torch.arange(20) % 6, torch.arange(60) % 7, 1),
    "four folds": (20, 103, torch.arange(20), captions(21, 5)[:103], 4),
    "seven folds in a mixed order": (20, 100, torch.arange(20), captions(20, 5)[torch.randperm(100)], 7),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluation_is_that_of_evaluate(case, tmp_path):
    n, m, image_ids, caption_ids, folds = EVALUATIONS[case]
    x, y = whole_numbers(n, 4), whole_numbers(m, 4)
    expected = gk.evaluate(x, y, x_ids=image_ids, y_ids=caption_ids, folds=folds)
    files = saved(tmp_path, x=x, y=y)
    for block_rows, chunk_rows in SIZES:
        sizes = {"block_rows": block_rows, "chunk_rows": chunk_rows}
        result = retrieval.evaluate_files(*files, image_ids, caption_ids, folds=folds, progress=False, **sizes)
        assert result.to_dict() == expected.to_dict()
        assert result.best_ranks.keys() == expected.best_ranks.keys()
        for way, ranks in expected.best_ranks.items():
            assert torch.equal(result.best_ranks[way], ranks)


def test_evaluation_against_sorted_scores():
    x, y = whole_numbers(20, 4), whole_numbers(60, 4)
    image_ids, caption_ids = torch.arange(20) % 6, torch.arange(60) % 7
    expected = retrieval_loops.evaluation(
        (x.double() @ y.double().T).numpy(), (image_ids[:, None] == caption_ids).numpy(), (1, 5, 10)
    )
    result = retrieval.evaluate_files(x, y, image_ids, caption_ids, progress=False, block_rows=6, chunk_rows=9)
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.filterwarnings("ignore:.*scores are NaN")
def test_evaluation_counts_nan_once():
    x, y = whole_numbers(6, 4), whole_numbers(30, 4)
    x[2, 1], y[3, 0], y[17, 2] = torch.nan, torch.nan, torch.inf
    x[5, 2] = 0  # times infinity
    ids = torch.arange(6), captions(6, 5)
    expected = gk.evaluate(x, y, x_ids=ids[0], y_ids=ids[1])
    result = retrieval.evaluate_files(x, y, *ids, progress=False, block_rows=2, chunk_rows=7)
    assert result.to_dict() == expected.to_dict()
    assert result["nan_scores"] >= 30 + 6 - 1 + 1


class Killed(BaseException):
    """Stands for a process that ends at once."""


def killed_at_unit(unit, monkeypatch):
    """Every unit writes a checkpoint, and the run ends after that many."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0)
    units, step = [0], checkpoint.Checkpoint.step

    def counted(self, *arguments):
        step(self, *arguments)
        units[0] += 1
        if units[0] == unit:
            raise Killed

    monkeypatch.setattr(checkpoint.Checkpoint, "step", counted)
    return units


def search_of_files(path):
    return lambda: retrieval.stream_top_scores(
        path / "x.npy", path / "y.npy", 5, block_rows=6, chunk_rows=30, checkpoint=path / "state"
    )


def evaluation_of_files(path):
    ids = torch.arange(20), captions(20, 5)
    return lambda: retrieval.evaluate_files(
        path / "x.npy",
        path / "y.npy",
        *ids,
        folds=2,
        block_rows=6,
        chunk_rows=30,
        checkpoint=path / "state",
        progress=False,
    ).to_dict()


@pytest.mark.parametrize(("call", "units"), [(search_of_files, 16), (evaluation_of_files, 12)])
def test_a_run_goes_on_from_every_checkpoint(call, units, tmp_path, monkeypatch):
    """Nothing is lost, nothing is done twice, and the checkpoint is gone at the end."""
    saved(tmp_path, x=whole_numbers(20, 4), y=whole_numbers(100, 4))
    run, state = call(tmp_path), tmp_path / "state"
    expected = run()
    for unit in range(1, units + 1):
        with monkeypatch.context() as patch:
            killed_at_unit(unit, patch)
            with pytest.raises(Killed):
                run()
        assert state.exists()
        with monkeypatch.context() as patch:
            rest = killed_at_unit(0, patch)
            result = run()
        assert unit + rest[0] == units
        assert not state.exists()
        pairs = zip(result, expected, strict=True) if call is search_of_files else [(result, expected)]
        assert all(torch.equal(*pair) if isinstance(pair[0], torch.Tensor) else pair[0] == pair[1] for pair in pairs)


KILLED = """
import os, signal, sys
import torch
from gssf_kernels import retrieval
from gssf_kernels.retrieval import checkpoint

checkpoint.SECONDS, checkpoint.SHARE, written = 0.0, 0, 0
save = torch.save

def save_part(content, file):
    global written
    written += 1
    save(content, file)
    if written == 7:  # while the seventh checkpoint is being written
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_part
x, y, i, j, state = sys.argv[1:]
retrieval.evaluate_files(x, y, i, j, block_rows=6, chunk_rows=30, checkpoint=state, progress=False)
"""


def test_a_killed_process_is_gone_on_from(tmp_path, monkeypatch, run_fresh):
    ids = torch.arange(20), captions(20, 5)
    x, y = whole_numbers(20, 4), whole_numbers(100, 4)
    files = saved(tmp_path, x=x, y=y, i=ids[0], j=ids[1])
    state = tmp_path / "state"
    killed = run_fresh(KILLED, *files, state)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state.exists()
    units = killed_at_unit(0, monkeypatch)
    result = retrieval.evaluate_files(*files, block_rows=6, chunk_rows=30, checkpoint=state, progress=False)
    # 4 chunks with positives and 16 of ranks; six were in the checkpoint.
    assert units[0] == 4 + 16 - 6
    assert result.to_dict() == gk.evaluate(x, y, x_ids=ids[0], y_ids=ids[1]).to_dict()
    assert not list(tmp_path.glob("state*"))


def interrupted_search(path, monkeypatch, **options):
    """A checkpoint of half a search."""
    with monkeypatch.context() as patch:
        killed_at_unit(3, patch)
        with pytest.raises(Killed):
            retrieval.stream_top_scores(path / "x.npy", path / "y.npy", 5, **search_options(path, **options))


def search_options(path, **options):
    return {"checkpoint": path / "state", "chunk_rows": 20} | options


OTHER = {
    "k": lambda path: (path / "x.npy", path / "y.npy", 4, {}),
    "chunk_rows": lambda path: (path / "x.npy", path / "y.npy", 5, {"chunk_rows": 10}),
    "max_score": lambda path: (path / "x.npy", path / "y.npy", 5, {"max_score": 3.0}),
    "metric": lambda path: (path / "x.npy", path / "y.npy", 5, {"normalize": True}),
    "exclude_self": lambda path: (path / "x.npy", path / "y.npy", 5, {"exclude_self": True}),
    "queries": lambda path: (*saved(path, x=whole_numbers(20, 4)), path / "y.npy", 5, {}),
    "candidates": lambda path: (path / "x.npy", np.load(path / "y.npy"), 5, {}),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_of_other_inputs_is_refused(name, tmp_path, monkeypatch):
    saved(tmp_path, x=whole_numbers(20, 4), y=whole_numbers(100, 4))
    interrupted_search(tmp_path, monkeypatch)
    before = (tmp_path / "state").read_bytes()
    x, y, k, options = OTHER[name](tmp_path)
    message = rf"^checkpoint: expected one of the same inputs and settings, got one with another {name} in "
    with pytest.raises(ValueError, match=message):
        retrieval.stream_top_scores(x, y, k, **search_options(tmp_path, **options))
    assert (tmp_path / "state").read_bytes() == before


def test_a_checkpoint_of_arrays_knows_every_number(tmp_path, monkeypatch):
    x, y = whole_numbers(20, 4), whole_numbers(100, 4)
    with monkeypatch.context() as patch:
        killed_at_unit(3, patch)
        with pytest.raises(Killed):
            retrieval.stream_top_scores(x, y.numpy(), 5, **search_options(tmp_path))
    y[50, 2] += 1
    with pytest.raises(ValueError, match="got one with another candidates in "):
        retrieval.stream_top_scores(x, y.numpy(), 5, **search_options(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "another dictionary"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "state"
    if content is None:
        torch.save({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^checkpoint: expected a new file or one of an interrupted run, got another"):
        retrieval.stream_top_scores(torch.eye(3), torch.eye(3), 1, checkpoint=path)
    assert path.read_bytes() == before


def test_a_file_is_replaced_when_it_is_complete_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(content, error=None):
        with checkpoint.replacing(path) as file:
            file.write(content)
            assert path.read_text() == "old"
            if error is not None:
                raise error

    with pytest.raises(OSError, match="disk full"):
        write(b"ne", OSError("disk full"))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    write(b"new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]


def test_checkpoints_are_written_after_seconds(tmp_path, monkeypatch):
    """Or after 20 times what writing takes, if that is longer."""
    now, saves = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def save(content, file):
        saves.append(content["unit"])
        now[0] += 1.0

    monkeypatch.setattr(torch, "save", save)
    state = checkpoint.Checkpoint(tmp_path / "state", {})
    for unit in range(60):
        state.step(0, unit, {})
        now[0] += 1.0
    assert saves == [5, 25, 45]


def test_the_bar_is_on_stderr_and_starts_where_the_checkpoint_stopped(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    saved(tmp_path, x=whole_numbers(20, 4), y=whole_numbers(100, 4))
    interrupted_search(tmp_path, monkeypatch)
    retrieval.stream_top_scores(tmp_path / "x.npy", tmp_path / "y.npy", 5, progress=True, **search_options(tmp_path))
    out, err = capsys.readouterr()
    assert out == ""
    assert "search:  60%" in err
    assert "5/5" in err


def test_no_bar_without_tqdm(monkeypatch, capsys):
    monkeypatch.setattr("gssf_kernels.retrieval.blocks.importlib.util.find_spec", lambda name: None)
    retrieval.stream_top_scores(torch.eye(3), torch.eye(3), 1, progress=True)
    assert capsys.readouterr() == ("", "")


def test_memory_bounds_the_blocks():
    """64 MiB of candidates; of queries as many, or fewer where k is large."""
    big = torch.empty(1, 256).expand(1 << 20, 256)

    def sizes(k):
        ids = (None, None)
        options = {"metric": None, "normalize": False, "block_rows": None, "chunk_rows": None, "device": None}
        with Sweep((big, big), ("q", "c"), ids, ids, k=k, function="stream_top_scores", **options) as sweep:
            return sweep.block_rows, sweep.chunk_rows

    assert sizes(0) == (1 << 16, 1 << 16)
    assert sizes(10) == (1 << 16, 1 << 16)
    assert sizes(1024) == ((128 << 20) // (12 * 8 * 1024), 1 << 16)


X, Y = torch.eye(3), torch.eye(4, 3)
BAD = [
    (lambda: retrieval.stream_top_scores(X, Y, 0), ValueError, "k: expected a whole number >= 1, got 0"),
    (lambda: retrieval.stream_top_scores(X, Y, 1025), ValueError, "k: expected at most 1024, got 1025"),
    (
        lambda: retrieval.stream_top_scores(X, Y.double(), 1),
        TypeError,
        "candidates: expected torch.float32 as in queries, got",
    ),
    (
        lambda: retrieval.stream_top_scores(X, Y[:, :2], 1),
        ValueError,
        "candidates: expected 3 columns to match queries",
    ),
    (
        lambda: retrieval.stream_top_scores(X, Y, 1, query_ids=torch.arange(3)),
        ValueError,
        "query_ids, candidate_ids: exp",
    ),
    (
        lambda: retrieval.stream_top_scores(X, Y, 1, exclude_same_id=True, query_ids=torch.arange(3)),
        ValueError,
        "candidate_ids: expected ids too, because queries and candidates have 3 and 4 rows",
    ),
    (
        lambda: retrieval.stream_top_scores(
            X, Y, 1, exclude_same_id=True, query_ids=torch.arange(4), candidate_ids=torch.arange(4)
        ),
        ValueError,
        "query_ids: expected 3 ids, one for each row of queries, got 4 in a tensor",
    ),
    (
        lambda: retrieval.stream_top_scores(X, Y, 1, max_score=torch.ones(4)),
        ValueError,
        "max_score: expected a number or sh",
    ),
    (
        lambda: retrieval.stream_top_scores(X, Y, 1, chunk_rows=0),
        ValueError,
        "chunk_rows: expected a whole number >= 1",
    ),
    (
        lambda: retrieval.stream_top_scores(X, Y, 1, device="cpuu"),
        ValueError,
        "device: expected a torch.device or its name",
    ),
    (
        lambda: retrieval.stream_top_scores(X, Y, 1, checkpoint=3),
        TypeError,
        "checkpoint: expected a path or None, got int",
    ),
    (
        lambda: retrieval.stream_top_scores(X, Y, 1, checkpoint="/none/state"),
        FileNotFoundError,
        "checkpoint: expected an existing directory, got /none",
    ),
    (
        lambda: retrieval.evaluate_files(Y, X),
        ValueError,
        "captions: expected at least the 4 rows of images (row i pairs",
    ),
    (
        lambda: retrieval.evaluate_files(X, Y, folds=4),
        ValueError,
        "folds: expected at most the 3 rows of images, got 4",
    ),
    (lambda: retrieval.evaluate_files(X, Y, ks=()), ValueError, "ks: expected at least one whole number"),
    (
        lambda: retrieval.evaluate_files(X, Y, torch.arange(3), torch.arange(4) + 3),
        ValueError,
        "image_ids: expected at least one row with a positive, got none among 3 and 4 rows",
    ),
    (
        lambda: retrieval.evaluate_files(X, X, torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]), folds=3),
        ValueError,
        "folds: expected the positives of a row of captions in one fold, but row 0 has positives in folds 0 and 2",
    ),
    (
        lambda: retrieval.evaluate_files(X, X, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), folds=3),
        ValueError,
        "folds: expected a positive in each, got none in fold 2 of 0..2",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_arguments_are_named(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(message)
