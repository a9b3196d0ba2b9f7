"""Rows that are read a chunk at a time: every kind of source, its errors, and the thread that reads ahead."""

import json
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from gssf_kernels.retrieval.sources import SelectedRows, chunks, open_rows, read_ids

save_file = pytest.importorskip("safetensors.torch").save_file

FLOATS = (torch.float16, torch.float32, torch.float64, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


def saved(tensor, path):
    """The tensor in a file of the kind that the suffix says."""
    if path.suffix == ".npy":
        np.save(path, tensor.numpy())
    else:
        save_file({"rows": tensor.contiguous()}, path)
    return path


def as_array(tensor, path):
    return tensor.numpy()


def as_map(tensor, path):
    saved(tensor, path / "map.npy")
    return np.load(path / "map.npy", mmap_mode="r")


def as_npy(tensor, path):
    return saved(tensor, path / "rows.npy")


def as_safetensors(tensor, path):
    return str(saved(tensor, path / "rows.safetensors"))


def as_named(tensor, path):
    save_file({"text": tensor * 0, "image": tensor.contiguous()}, path / "both.safetensors")
    return f"{path / 'both.safetensors'}::image"


def as_shards(tensor, path):
    """In the order of numbers 1, 2, 10 and of two kinds; one is empty."""
    folder = path / "shards"
    folder.mkdir()
    (folder / ".hidden").write_text("not a shard")
    saved(tensor[:3], folder / "part-1.npy")
    saved(tensor[3:4], folder / "part-2.safetensors")
    saved(tensor[4:4], folder / "part-9.npy")
    saved(tensor[4:], folder / "part-10.npy")
    return folder


def as_tensor(tensor, path):
    return tensor


KINDS = (as_tensor, as_array, as_map, as_npy, as_safetensors, as_named, as_shards)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for kind in KINDS
        for dtype in FLOATS
        if dtype != torch.bfloat16 or kind in (as_tensor, as_safetensors, as_named)  # NumPy has no bfloat16
    ],
)
def test_every_range_of_every_source(kind, dtype, tmp_path):
    expected = torch.randn(9, 5).to(dtype)
    with open_rows(kind(expected, tmp_path), "x", "embeddings") as rows:
        assert (rows.shape, rows.dtype, len(rows)) == ((9, 5), dtype, 9)
        for start in range(10):
            for stop in range(start, 10):
                assert torch.equal(rows.read(start, stop), expected[start:stop])
        for size in (1, 2, 4, 9, 100):
            parts = list(chunks(rows, size))
            assert [start for start, _ in parts] == list(range(0, 9, size))
            assert torch.equal(torch.cat([part for _, part in parts]), expected)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ids(kind, dtype, tmp_path):
    expected = torch.tensor([3, 1, 4, 1, 5, 9, 2]).to(dtype)
    assert torch.equal(read_ids(kind(expected, tmp_path), "ids", 7, "x"), expected.long())


def test_a_number_of_ids_that_does_not_fit(tmp_path):
    path = saved(torch.arange(6), tmp_path / "ids.npy")
    with pytest.raises(ValueError, match=rf"^ids: expected 7 ids, one for each row of x, got 6 in {path}"):
        read_ids(path, "ids", 7, "x")


def test_selected_rows(tmp_path):
    expected = torch.randn(40, 3)
    places = torch.tensor([0, 1, 2, 5, 6, 17, 18, 19, 39])
    with open_rows(saved(expected, tmp_path / "rows.npy")) as rows:
        selected = SelectedRows(rows, places)
        assert selected.shape == (9, 3)
        for start in range(10):
            for stop in range(start, 10):
                assert torch.equal(selected.read(start, stop), expected[places[start:stop]])


def test_reversed_and_strided_arrays():
    array = np.arange(24.0).reshape(6, 4)
    with open_rows(array[::-1, ::2]) as rows:
        assert rows.read(1, 3).tolist() == [[16, 18], [12, 14]]


def empty(path):
    (path / "empty").mkdir()
    return path / "empty"


def shards_of(*tensors):
    def make(path):
        for number, tensor in enumerate(tensors):
            saved(tensor, path / f"{number}.npy")
        return path

    return make


def cut(suffix):
    def make(path):
        file = saved(torch.randn(9, 5), path / f"rows{suffix}")
        file.write_bytes(file.read_bytes()[:-1])
        return file

    return make


def file_of(content, name):
    def make(path):
        (path / name).write_bytes(content)
        return path / name

    return make


def npy_of(array):
    def make(path):
        np.save(path / "rows.npy", array, allow_pickle=True)
        return path / "rows.npy"

    return make


def safetensors_header(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


OTHERS = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}
BAD = {
    "missing": (
        lambda path: path / "none.npy",
        FileNotFoundError,
        "expected a file or a directory, got none at {path}/none",
    ),
    "empty directory": (
        empty,
        ValueError,
        "expected a directory of files .npy or .safetensors, got none in {path}/empty",
    ),
    "shards of other width": (
        shards_of(torch.zeros(2, 3), torch.zeros(2, 4)),
        ValueError,
        "expected shards of one width, got [2, 3] in {path}/0.npy and [2, 4] in {path}/1.npy",
    ),
    "shards of other dtype": (
        shards_of(torch.zeros(2, 3), torch.zeros(2, 3).double()),
        TypeError,
        "expected shards of one dtype, got torch.float32 in {path}/0.npy and torch.float64 in {path}/1.npy",
    ),
    "a foreign shard": (
        file_of(b"read me", "README.md"),
        ValueError,
        "expected a file .npy or .safetensors, got {path}/README.md",
    ),
    "directory in a directory": (lambda path: empty(path).parent, ValueError, "got the directory {path}/empty"),
    "truncated npy": (
        cut(".npy"),
        ValueError,
        "expected 308 bytes for [9, 5] of torch.float32, got 307 in {path}/rows.npy",
    ),
    "truncated safetensors": (cut(".safetensors"), ValueError, "in {path}/rows.safetensors: it is truncated"),
    "truncated header": (
        file_of(b"\x93NUMPY\x01\x00\x76\x00{'descr'", "x.npy"),
        ValueError,
        "got a header that cannot be read in {path}/x.npy",
    ),
    "foreign npy": (file_of(b"PK\x03\x04 a zip file", "x.npy"), ValueError, "got another kind of file in {path}/x.npy"),
    "empty npy": (file_of(b"", "x.npy"), ValueError, "got another kind of file in {path}/x.npy"),
    "foreign safetensors": (
        file_of(b"x" * 99, "x.safetensors"),
        ValueError,
        "got a header that cannot be read in {path}/x.s",
    ),
    "empty safetensors": (file_of(b"", "x.safetensors"), ValueError, "got a header that cannot be read in {path}/x.s"),
    "safetensors with wrong offsets": (
        file_of(safetensors_header({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}), "x.safetensors"),
        ValueError,
        "got a header that cannot be read in {path}/x.safetensors",
    ),
    "safetensors of an unknown dtype": (
        file_of(safetensors_header({"a": {"dtype": "F8_E5M2", "shape": [2], "data_offsets": [0, 2]}}), "x.safetensors"),
        TypeError,
        "got F8_E5M2 in {path}/x.safetensors",
    ),
    "two tensors": (
        lambda path: save_file(OTHERS, path / "x.safetensors") or path / "x.safetensors",
        ValueError,
        "expected one tensor, or which one (FILE::NAME), got a, b in {path}/x.safetensors",
    ),
    "no such tensor": (
        lambda path: save_file(OTHERS, path / "x.safetensors") or f"{path}/x.safetensors::c",
        ValueError,
        "expected a tensor c, got a, b in {path}/x.safetensors",
    ),
    "a name in npy": (
        lambda path: f"{saved(torch.zeros(2, 2), path / 'x.npy')}::c",
        ValueError,
        "expected ::c with a .safetensors file only, got {path}/x.npy",
    ),
    "objects": (npy_of(np.array([{}, None])), TypeError, "got Python objects in {path}/rows.npy"),
    "records": (npy_of(np.zeros(3, [("x", "<f4")])), TypeError, "got records [('x', '<f4')] in {path}/rows.npy"),
    "big-endian": (npy_of(np.zeros((2, 2), ">f4")), TypeError, "got big-endian numbers '>f4' in {path}/rows.npy"),
    "uint64": (npy_of(np.zeros(2, np.uint64)), TypeError, "got uint64 in {path}/rows.npy"),
    "complex": (npy_of(np.zeros((2, 2), np.complex64)), TypeError, "got dtype '<c8' in {path}/rows.npy"),
    "Fortran order": (npy_of(np.zeros((2, 3), order="F")), ValueError, "got Fortran order in {path}/rows.npy"),
    "integers": (
        npy_of(np.zeros((2, 3), np.int32)),
        TypeError,
        "expected a float dtype, got torch.int32 in {path}/rows.npy",
    ),
    "one dimension": (npy_of(np.zeros(3)), ValueError, "expected shape [N, D], got [3] in {path}/rows.npy"),
    "three dimensions": (
        npy_of(np.zeros((3, 1, 1))),
        ValueError,
        "expected shape [N, D], got [3, 1, 1] in {path}/rows.npy",
    ),
    "no column": (npy_of(np.zeros((3, 0))), ValueError, "expected at least one column, got [3, 0] in {path}/rows.npy"),
    "a number": (npy_of(np.float32(3)), ValueError, "expected rows, got a single number in {path}/rows.npy"),
    "no source": (lambda path: 7, TypeError, "expected a tensor, a NumPy array or a path, got int"),
    "an array of objects": (lambda path: np.array([[{}]]), TypeError, "got a NumPy array of Python objects"),
    "a sparse tensor": (lambda path: torch.eye(2).to_sparse(), TypeError, "expected a dense (strided) tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_named(case, tmp_path):
    make, kind, message = BAD[case]
    with pytest.raises(kind) as error:
        open_rows(make(tmp_path), "captions", "embeddings")
    assert str(error.value).startswith("captions: ")
    assert message.replace("{path}", str(tmp_path)) in str(error.value)


def test_ids_and_pairs_of_wrong_kind(tmp_path):
    path = saved(torch.zeros(4), tmp_path / "ids.npy")
    with pytest.raises(TypeError, match=rf"^ids: expected an integer dtype, got torch.float32 in {path}"):
        open_rows(path, "ids", "ids")
    with pytest.raises(ValueError, match=r"^pairs: expected shape \[P, 2\], got \[4, 3\]$"):
        open_rows(torch.zeros(4, 3, dtype=torch.int64), "pairs", "pairs")


def test_a_file_that_becomes_shorter_is_an_error(tmp_path):
    path = saved(torch.randn(1000, 5), tmp_path / "rows.npy")
    with open_rows(path) as rows:
        assert rows.read(0, 10).shape == (10, 5)
        with open(path, "r+b") as file:
            file.truncate(10000)
        with pytest.raises(ValueError, match=rf"^{path}: the file became shorter while it was read"):
            list(chunks(rows, 300))


def reading():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read ")]


def test_errors_of_the_thread_come_to_the_consumer_and_it_ends(tmp_path):
    class Broken(SelectedRows):
        def read(self, start, stop):
            if start >= 6:
                raise OSError(f"disk at {start}")
            return super().read(start, stop)

    with open_rows(saved(torch.randn(9, 5), tmp_path / "rows.npy")) as rows:
        read = []
        with pytest.raises(OSError, match="disk at 6"):
            read.extend(start for start, _ in chunks(Broken(rows, torch.arange(9)), 3))
    assert read == [0, 3]
    assert not reading()


def test_the_thread_ends_with_a_consumer_that_stops(tmp_path):
    with open_rows(saved(torch.randn(100, 5), tmp_path / "rows.npy")) as rows:
        generator = chunks(rows, 1)
        assert next(generator)[0] == 0
        assert len(reading()) == 1
        generator.close()
        assert not reading()


def anonymous_mib():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts anonymous memory")
@pytest.mark.parametrize("kind", [as_npy, as_map, as_safetensors])
def test_reading_keeps_two_chunks_in_memory(kind, tmp_path):
    source = kind(torch.ones(1 << 18, 64), tmp_path)  # 64 MiB
    with open_rows(source) as rows:
        before, most, total = anonymous_mib(), 0.0, 0.0
        for _, part in chunks(rows, 1 << 14):  # 4 MiB
            total += float(part.sum())
            most = max(most, anonymous_mib())
    assert total == 1 << 24
    assert most - before < 24, "three chunks and what the allocator keeps"
