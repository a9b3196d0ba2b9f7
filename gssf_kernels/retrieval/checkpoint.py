"""The state of a long run in a file, from which the same call goes on after a crash.

A file takes its name when it is complete and on the disk, so that under the name there is never a part of one.
"""

import contextlib
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_kernels.retrieval.sources import Rows, open_rows

SECONDS = 5.0  # between two checkpoints
SHARE = 20  # or this many times what writing the last one took, if that is longer


class Saved(NamedTuple):
    """What a checkpoint holds."""

    stage: int
    unit: int  # the next one
    state: dict[str, Tensor]


class Checkpoint:
    """A file with the state of a sweep. Raises ValueError if it exists and is of other inputs or settings."""

    def __init__(self, path: Any, fingerprint: dict[str, str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"checkpoint: expected a path or None, got {type(path).__name__}")
        self.path, self.fingerprint = Path(path), fingerprint
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"checkpoint: expected an existing directory, got {self.path.parent}")
        self.saved = self._load() if self.path.exists() else None
        self.written_at, self.writing_s = time.monotonic(), 0.0

    def _load(self) -> Saved:
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            fingerprint, saved = content["gssf_kernels"], Saved(content["stage"], content["unit"], content["state"])
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"checkpoint: expected a new file or one of an interrupted run, got another kind of file in {self.path}"
            ) from error
        for name in self.fingerprint | fingerprint:
            ours, theirs = self.fingerprint.get(name, "none"), fingerprint.get(name, "none")
            if ours != theirs:
                raise ValueError(
                    f"checkpoint: expected one of the same inputs and settings, got one with another {name} in "
                    f"{self.path} ({theirs}; now {ours}). Remove it to start anew"
                )
        return saved

    def step(self, stage: int, unit: int, state: dict[str, Tensor]) -> None:
        """Write the state before ``unit``, if the last time is long enough ago."""
        now = time.monotonic()
        if now - self.written_at < max(SECONDS, SHARE * self.writing_s):
            return
        content = {"gssf_kernels": self.fingerprint, "stage": stage, "unit": unit, "state": state}
        with replacing(self.path) as file:
            torch.save(content, file)
        self.written_at = time.monotonic()
        self.writing_s = self.written_at - now

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file to write, which takes the place of ``path`` when it is complete and on the disk, not before."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError, AttributeError):  # a system on which directories are no files
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def described(value: Any) -> str:
    """What tells an input or a setting from another."""
    if isinstance(value, Tensor):
        value = open_rows(value)
    if isinstance(value, Rows):
        return f"{list(value.shape)} {value.dtype} {value.identity()}"
    return repr(value)
