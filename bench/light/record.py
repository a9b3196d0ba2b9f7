"""What a call launches: every kernel with its tile, resources and arguments, and its code for the archive."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import lowering

LAST = 4  # launches whose arguments are told after an exception: an error of the card comes late
CODE = ("ttgir", "ptx", "cubin")
_RUN = JITFunction.run  # Triton's own

_resources: dict[str, dict[str, int]] = {}  # by the kernel's hash


def argument(value: Any) -> Any:
    """An argument of a launch in words: what a kernel may be specialised on, and no values."""
    if isinstance(value, torch.Tensor):
        alignment = next((2**k for k in range(8, 0, -1) if value.data_ptr() % 2**k == 0), 1)
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} stride {list(value.stride())} on {alignment} bytes"
    if isinstance(value, TensorDescriptor):
        return f"descriptor {value.block_shape} of {argument(value.base)}"
    if isinstance(value, tuple | list):
        return [argument(item) for item in value]
    return value if isinstance(value, int | float | str | bool | type(None)) else getattr(value, "__name__", str(value))


class Recorder:
    """The launches since the last `clear`, in order. launch: what runs a kernel, by default Triton itself."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.fails = False  # planted: the second launch raises
        self.kernels: dict[str, Any] = {}  # by hash: Triton's compiled kernels
        self.order: list[tuple[str, str, dict[str, Any]]] = []  # name, hash, constexprs that are numbers or words
        self.last: deque[dict[str, Any]] = deque(maxlen=LAST)

    def clear(self) -> None:
        self.kernels.clear()
        self.order.clear()
        self.last.clear()

    def launch(self, kernel: JITFunction, *arguments: Any, grid: tuple, warmup: bool, **options: Any) -> Any:
        """In the place of `JITFunction.run`."""
        name = kernel.__name__
        constants = {k: argument(v) for k, v in options.items()}
        told = {"kernel": name, "grid": list(grid), "arguments": argument(arguments), "constexprs": constants}
        self.last.append(told)
        compiled = _RUN(kernel, *arguments, grid=grid, warmup=warmup, **options)
        told["hash"] = compiled.hash
        self.kernels[compiled.hash] = compiled
        self.order.append((name, compiled.hash, constants))
        if self.fails and len(self.order) == 2:
            raise RuntimeError("planted: an illegal memory access was encountered")
        return compiled

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Launches of this process go through it."""
        with mock.patch.object(JITFunction, "run", lambda kernel, *a, **options: self.launch(kernel, *a, **options)):
            yield

    def summary(self) -> list[dict[str, Any]]:
        """Each kernel once: its tile and what it takes of the card."""
        lines, seen = [], set()
        for name, key, constants in self.order:
            if key in seen:
                continue
            seen.add(key)
            shown = ("BN", "BM", "BK", "BR", "BL", "BC", "num_warps", "num_stages", "TMA", "PERSISTENT", "EPILOGUE")
            tile = {k: constants[k] for k in shown if k in constants}
            lines.append({"kernel": name, **tile, **self._resources_of(self.kernels[key])})
        return lines

    def _resources_of(self, compiled: Any) -> dict[str, int]:
        """From the driver that loaded it; without a card from the binary."""
        if compiled.hash not in _resources:
            if self.dry:
                used = lowering.resources(lowering.Lowered("", compiled, ()))
                _resources[compiled.hash] = {"registers": used.registers, "spills": used.stack}
            else:
                _resources[compiled.hash] = {"registers": compiled.n_regs, "spills": compiled.n_spills}
        return {**_resources[compiled.hash], "shared": compiled.metadata.shared}

    def tile(self) -> tuple[int, int]:
        """(BN, BM) of the sweep that was launched, (1, 1) if there was none."""
        for name, _, constants in self.order:
            if name == "sweep_kernel":
                return constants["BN"], constants["BM"]
        return 1, 1

    def save_code(self, folder: Path, keys: list[str] | None = None) -> list[str]:
        """Write the code of these kernels (by hash), or of all; return the files' names."""
        files = []
        for key in self.kernels if keys is None else keys:
            compiled = self.kernels.get(key)
            for kind in CODE:
                code = compiled.asm.get(kind) if compiled is not None else None
                if compiled is not None and code:
                    path = folder / f"{compiled.name}-{key[:12]}.{kind}"
                    path.write_bytes(code if isinstance(code, bytes) else code.encode())
                    files.append(path.name)
        return files
