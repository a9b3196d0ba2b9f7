"""Rows of embeddings, and ids, that are read a chunk at a time, so that they may be larger than memory.

    with open_rows("captions.npy") as rows:
        for start, chunk in chunks(rows, 65536):    # the next chunk is read meanwhile
            ...

A source is a tensor, a NumPy array or memory map, a file ``.npy`` or ``.safetensors``, or a directory of such files.
Files are read, not mapped: a chunk is the only copy, and a file that is cut short meanwhile is an error, not a crash.
"""

import ast
import ctypes
import hashlib
import json
import math
import mmap
import os
import queue
import re
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gssf_kernels import _checks

SUFFIXES = (".npy", ".safetensors")
FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
INTEGERS = _checks.INTEGERS | {torch.bool}
_NPY_DTYPES = {
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "|b1": torch.bool,
    "|u1": torch.uint8,
    "|i1": torch.int8,
    "<u2": torch.uint16,
    "<i2": torch.int16,
    "<u4": torch.uint32,
    "<i4": torch.int32,
    "<i8": torch.int64,
}
_SAFETENSORS_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "I64": torch.int64,
}
_LONGEST_HEADER = 100 << 20  # bytes, of a .safetensors file
_SKIPPED_ROWS = 8  # between two that are asked for, which are read rather than skipped
_RUN_ROWS = 4096  # that are asked for at a time
_HASHED_ENDS = 1 << 16  # bytes of each end of a file that identify its content
_HASHED_CHUNK = 16 << 20  # bytes


class Rows(ABC):
    """Rows [N, D] of embeddings or pairs, or ids [N]."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    describe: str  # what errors call it: the path of a file, or "a tensor"
    in_memory = False

    def __len__(self) -> int:
        return self.shape[0]

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1. Not to be written: a tensor's are its memory."""

    @abstractmethod
    def identity(self) -> str:
        """What tells this content from another: of files the path, size, time of change and both ends, else all."""

    def close(self) -> None:  # noqa: B027  # memory has nothing to close
        pass


class _TensorRows(Rows):
    in_memory = True

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor.detach(), tuple(tensor.shape), tensor.dtype
        self.describe = "a tensor"

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]

    def identity(self) -> str:
        return _content(self)


class _ArrayRows(Rows):
    """A NumPy array, also a memory map: what is read is a copy, so that a map's pages are not kept."""

    def __init__(self, array: Any, name: str) -> None:
        self.array, self.shape, self.describe = array, tuple(array.shape), "a NumPy array"
        text = array.dtype.str
        if text not in _NPY_DTYPES:
            raise TypeError(f"{name}: expected {_NUMBERS}, got a NumPy array of {_npy_dtype_name(text)}")
        self.dtype = _NPY_DTYPES[text]

    def read(self, start: int, stop: int) -> Tensor:
        part = self.array[start:stop]
        out = empty(part.shape, self.dtype)
        out.numpy()[...] = part
        return out

    def identity(self) -> str:
        return _content(self)


class _FileRows(Rows):
    """The tensor that begins at a place of a file."""

    def __init__(self, path: Path, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> None:
        self.path, self.dtype, self.shape, self.offset = path, dtype, shape, offset
        self.describe = str(path)
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115  # until close()
        self.lock = threading.Lock()

    def read(self, start: int, stop: int) -> Tensor:
        start, stop, _ = slice(start, stop).indices(len(self))
        out = empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        size = out.numel() * out.element_size()
        if size:
            memory = memoryview((ctypes.c_char * size).from_address(out.data_ptr())).cast("B")
            with self.lock:
                self.file.seek(self.offset + start * self.row_bytes)
                done = 0
                while done < size:
                    count = self.file.readinto(memory[done:])
                    if not count:
                        raise ValueError(f"{self.describe}: the file became shorter while it was read")
                    done += count
        return out

    def identity(self) -> str:
        size, changed = os.fstat(self.file.fileno()).st_size, os.fstat(self.file.fileno()).st_mtime_ns
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            digest.update(file.read(_HASHED_ENDS))
            file.seek(max(size - _HASHED_ENDS, 0))
            digest.update(file.read(_HASHED_ENDS))
        return f"{self.path.resolve()} at {self.offset}, {size} bytes, changed {changed}, {digest.hexdigest()}"

    def close(self) -> None:
        self.file.close()


class _ShardRows(Rows):
    """Files one after the other."""

    def __init__(self, path: Path, shards: list[Rows]) -> None:
        self.shards, self.describe, self.dtype = shards, str(path), shards[0].dtype
        self.starts = [0]
        for shard in shards:
            self.starts.append(self.starts[-1] + len(shard))
        self.shape = (self.starts[-1], *shards[0].shape[1:])

    def read(self, start: int, stop: int) -> Tensor:
        parts = []
        for first, shard in zip(self.starts, self.shards, strict=False):
            begin, end = max(start - first, 0), min(stop - first, len(shard))
            if begin < end:
                parts.append((begin, end, shard))
        if len(parts) == 1:
            begin, end, shard = parts[0]
            return shard.read(begin, end)
        out = empty((sum(end - begin for begin, end, _ in parts), *self.shape[1:]), self.dtype)
        place = 0
        for begin, end, shard in parts:
            out[place : place + end - begin] = shard.read(begin, end)
            place += end - begin
        return out

    def identity(self) -> str:
        digest = hashlib.sha256("\n".join(shard.identity() for shard in self.shards).encode())
        return f"{len(self.shards)} files in {self.describe}, {digest.hexdigest()}"

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


class SelectedRows(Rows):
    """Rows of others, at ascending places [N]; rows between them are read too if they are few."""

    def __init__(self, rows: Rows, places: Tensor) -> None:
        self.rows, self.places = rows, places
        self.shape, self.dtype, self.describe = (places.shape[0], *rows.shape[1:]), rows.dtype, rows.describe

    def read(self, start: int, stop: int) -> Tensor:
        places = self.places[start:stop]
        parts = [self.rows.read(0, 0)]
        jumps = (places.diff() > _SKIPPED_ROWS).nonzero()[:, 0] + 1
        for run in torch.tensor_split(places, jumps) if places.shape[0] else ():
            for part in run.split(_RUN_ROWS):
                first = int(part[0])
                read = self.rows.read(first, int(part[-1]) + 1)
                parts.append(read if read.shape[0] == part.shape[0] else read[(part - first).to(read.device)])
        return torch.cat(parts) if len(parts) != 2 else parts[1]

    def identity(self) -> str:
        return self.rows.identity()


_NUMBERS = "float16, float32, float64, bfloat16 (a tensor or .safetensors), or integers up to 64 bits (not uint64)"


def open_rows(source: Any, name: str = "rows", content: str | None = None) -> Rows:
    """Embeddings, ids or pairs as :class:`Rows`, whatever they are kept in.

    Args:
        source: a tensor; a NumPy array or memory map; the path of a file ``.npy`` or ``.safetensors``, in which there
            is one tensor, or ``"file.safetensors::name"``; or of a directory of such files, read in the
            order of their names (2 before 10) and agree in width and dtype.
        name: the argument, for errors.
        content: "embeddings" ([N, D] float), "ids" ([N] integers or bool), "pairs" ([P, 2] integers), None: any.

    Raises:
        FileNotFoundError: no such file or directory.
        TypeError, ValueError: the argument and the file that is wrong, what was expected and what came: an empty
            directory, shards of different width or dtype, a truncated or foreign file, dtype, number of dimensions.
    """
    if isinstance(source, Rows):
        rows = source
    elif isinstance(source, Tensor):
        if source.layout != torch.strided or source.is_nested:
            raise TypeError(f"{name}: expected a dense (strided) tensor, got {source.layout}")
        rows = _TensorRows(source)
    elif isinstance(source, str | os.PathLike):
        rows = _open_path(os.fspath(source), name)
    elif hasattr(source, "__array_interface__"):
        rows = _ArrayRows(source, name)
    else:
        raise TypeError(f"{name}: expected a tensor, a NumPy array or a path, got {type(source).__name__}")
    try:
        _check_content(rows, name, content)
    except (TypeError, ValueError):
        rows.close()
        raise
    return rows


def read_ids(source: Any, name: str, count: int, of: str) -> Tensor | None:
    """Ids [count] of the rows of the argument ``of`` as int64 on the CPU, of anything that `open_rows` takes."""
    if source is None:
        return None
    with open_rows(source, name, "ids") as rows:
        if len(rows) != count:
            raise ValueError(
                f"{name}: expected {count} ids, one for each row of {of}, got {len(rows)} in {rows.describe}"
            )
        return rows.read(0, count).to("cpu", torch.int64)


def chunks(rows: Rows, size: int, spans: list[tuple[int, int]] | None = None) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of each range of ``size`` rows, or of ``spans``, while a thread reads the next range.

    Two chunks are in memory at a time. An error in reading is raised here. The thread ends with the generator.
    """
    if spans is None:
        spans = [(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    if rows.in_memory:
        for start, stop in spans:
            yield start, rows.read(start, stop)
        return
    results: queue.SimpleQueue = queue.SimpleQueue()
    free, stopped = threading.Semaphore(), threading.Event()

    def work() -> None:
        try:
            for start, stop in spans:
                free.acquire()
                if stopped.is_set():
                    return
                results.put((start, rows.read(start, stop)))
            results.put(None)
        except BaseException as error:
            results.put(error)

    reader = threading.Thread(target=work, name=f"read {rows.describe}", daemon=True)
    reader.start()
    try:
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            free.release()
            yield item
    finally:
        stopped.set()
        free.release()
        reader.join()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of the system's, which has it back at once; malloc may keep that of chunks below 32 MiB."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)


def _content(rows: Rows) -> str:
    """The hash of all of it."""
    digest = hashlib.sha256()
    step = max(_HASHED_CHUNK // max(rows.row_bytes, 1), 1)
    for start in range(0, len(rows), step):
        part = rows.read(start, start + step).to("cpu").contiguous()
        if part.numel():
            size = part.numel() * part.element_size()
            digest.update((ctypes.c_char * size).from_address(part.data_ptr()))
    return f"content {digest.hexdigest()}"


def _check_content(rows: Rows, name: str, content: str | None) -> None:
    """Shape and dtype."""
    if content is None:
        return
    place = "" if isinstance(rows, _TensorRows | _ArrayRows) else f" in {rows.describe}"
    shape = {"embeddings": "[N, D]", "ids": "[N]", "pairs": "[P, 2]"}[content]
    if len(rows.shape) != shape.count(",") + 1 or (content == "pairs" and rows.shape[1] != 2):
        raise ValueError(f"{name}: expected shape {shape}, got {list(rows.shape)}{place}")
    dtypes, text = (FLOATS, "a float dtype") if content == "embeddings" else (INTEGERS, "an integer dtype")
    if rows.dtype not in dtypes:
        raise TypeError(f"{name}: expected {text}, got {rows.dtype}{place}")
    if content == "embeddings" and rows.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one column, got {list(rows.shape)}{place}")


def _open_path(text: str, name: str) -> Rows:
    path, key = Path(text), None
    if not path.exists() and "::" in text:
        file, _, key = text.rpartition("::")
        path = Path(file)
    if not path.exists():
        raise FileNotFoundError(f"{name}: expected a file or a directory, got none at {path}")
    return _open_directory(path, key, name) if path.is_dir() else _open_file(path, key, name)


def _open_directory(path: Path, key: str | None, name: str) -> Rows:
    files = sorted((file for file in path.iterdir() if not file.name.startswith(".")), key=_natural)
    if not files:
        raise ValueError(f"{name}: expected a directory of files {' or '.join(SUFFIXES)}, got none in {path}")
    shards: list[Rows] = []
    try:
        for file in files:
            if file.is_dir():
                raise ValueError(f"{name}: expected a directory of files, got the directory {file}")
            shards.append(_open_file(file, key, name))
            first, last = shards[0], shards[-1]
            if first.dtype != last.dtype:
                raise TypeError(
                    f"{name}: expected shards of one dtype, got {first.dtype} in {files[0]} and {last.dtype} in {file}"
                )
            if first.shape[1:] != last.shape[1:]:
                raise ValueError(
                    f"{name}: expected shards of one width, got {list(first.shape)} in {files[0]} and "
                    f"{list(last.shape)} in {file}"
                )
    except (TypeError, ValueError, OSError):
        for shard in shards:
            shard.close()
        raise
    return _ShardRows(path, shards)


def _natural(path: Path) -> list:
    """shard-2 before shard-10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), part) if place % 2 else (0, part) for place, part in enumerate(parts)]


def _open_file(path: Path, key: str | None, name: str) -> Rows:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{name}: expected a file {' or '.join(SUFFIXES)}, got {path}")
    if path.suffix == ".npy" and key is not None:
        raise ValueError(f"{name}: expected ::{key} with a .safetensors file only, got {path}")
    with open(path, "rb") as file:
        if path.suffix == ".npy":
            dtype, shape, offset = _npy_header(file, path, name)
        else:
            dtype, shape, offset = _safetensors_header(file, path, key, name)
    size = path.stat().st_size
    expected = offset + math.prod(shape) * dtype.itemsize
    if size < expected:
        raise ValueError(
            f"{name}: expected {expected} bytes for {list(shape)} of {dtype}, got {size} in {path}: it is truncated"
        )
    if not shape:
        raise ValueError(f"{name}: expected rows, got a single number in {path}")
    return _FileRows(path, dtype, shape, offset)


def _npy_header(file, path: Path, name: str) -> tuple[torch.dtype, tuple[int, ...], int]:
    """(dtype, shape, where the data begins); the format is numpy.lib.format's."""
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY":
        raise ValueError(f"{name}: expected a NumPy file, got another kind of file in {path}")
    length_format = "<H" if magic[6:7] == b"\x01" else "<I"
    try:
        (length,) = struct.unpack(length_format, file.read(struct.calcsize(length_format)))
        text = file.read(length)
        if len(text) < length:
            raise ValueError("truncated")
        header = ast.literal_eval(text.decode("latin1" if magic[6] < 3 else "utf8").strip())
        descr, fortran, shape = header["descr"], header["fortran_order"], tuple(header["shape"])
    except (struct.error, ValueError, SyntaxError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{name}: expected a NumPy file, got a header that cannot be read in {path}") from error
    if not isinstance(descr, str) or descr not in _NPY_DTYPES:
        raise TypeError(f"{name}: expected {_NUMBERS}, got {_npy_dtype_name(descr)} in {path}")
    if fortran:
        raise ValueError(f"{name}: expected C order (numpy.ascontiguousarray), got Fortran order in {path}")
    return _NPY_DTYPES[descr], shape, file.tell()


def _npy_dtype_name(descr: Any) -> str:
    if not isinstance(descr, str):
        return f"records {descr}"
    names = {"|O": "Python objects", "<u8": "uint64"}
    if descr[0] == ">" and f"<{descr[1:]}" in _NPY_DTYPES:
        return f"big-endian numbers {descr!r}"
    if descr[1:2] == "V":
        return f"untyped bytes {descr!r} (NumPy saves bfloat16 so; keep it in .safetensors)"
    return names.get(descr, f"dtype {descr!r}")


def _safetensors_header(file, path: Path, key: str | None, name: str) -> tuple[torch.dtype, tuple[int, ...], int]:
    """(dtype, shape, where the data begins): 8 bytes of length, JSON, data."""
    size = path.stat().st_size
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("longer than the file")
        header = json.loads(file.read(length))
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    except (struct.error, ValueError, AttributeError) as error:
        raise ValueError(f"{name}: expected a safetensors file, got a header that cannot be read in {path}") from error
    names = ", ".join(sorted(tensors)) or "none"
    if key is None and len(tensors) != 1:
        raise ValueError(f"{name}: expected one tensor, or which one (FILE::NAME), got {names} in {path}")
    if key is not None and key not in tensors:
        raise ValueError(f"{name}: expected a tensor {key}, got {names} in {path}")
    tensor = tensors[key] if key is not None else next(iter(tensors.values()))
    try:
        text, shape, (begin, end) = tensor["dtype"], tuple(map(int, tensor["shape"])), tensor["data_offsets"]
        dtype = _SAFETENSORS_DTYPES.get(text)
        if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError("offsets do not fit the shape")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a safetensors file, got a header that cannot be read in {path}") from error
    if dtype is None:
        raise TypeError(f"{name}: expected {_NUMBERS}, got {text} in {path}")
    return dtype, shape, 8 + length + begin
