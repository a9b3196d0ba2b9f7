"""What a call runs on a device, found without the device: on tensors of the meta device, which have no values at all.

Inside `device_path` every op of ours goes where PyTorch's dispatcher would send it on the device described:

    cuda    to its Triton launcher, whose kernels are noted and not run, or to plain PyTorch
    cpu     to its C++ kernel, of which the fake stands in, or to plain PyTorch

Whatever needs values is refused by its name: on a GPU it would wait for them. So is whatever leaves the device or comes
from another one. Other threads see nothing of this.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gssf_kernels import _checks, _library, plan, work
from gssf_kernels.triton import operands

DEVICE = "meta"

# Ops that copy to the host on CUDA, or whose result's size is known there alone.
WAITS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "coalesce",
    "_coalesce",
    "equal",
    "histc",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "to_sparse",
    "_to_sparse",
    "unique_consecutive",
    "unique_dim",
}
# Ops that launch nothing: they make or look at memory. What is a view is known from its schema.
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
}


class Waits(RuntimeError):
    """Something that needs values, for which a GPU would be waited for, or that leaves the device."""


class Device(NamedTuple):
    """The device that tensors without values stand for."""

    type: str = "cuda"  # or "cpu"
    arch: int = 90  # as `plan.architecture` gives it: 90 for compute capability 9.0, 80 for all others
    processors: int = 132  # of an H100 or H200

    def __str__(self) -> str:
        if self.type == "cpu":
            return "cpu"
        cards = "compute capability 9.0" if self.arch == 90 else "a compute capability other than 9.0"
        return f"cuda, {cards}, {self.processors} multiprocessors"


CARD = Device()


class DevicePath(TorchDispatchMode):
    """``with device_path() as path``: path.launches are the kernels' names, in order; PyTorch's as "aten::…".

    launch: what runs a kernel in the place of `JITFunction.run`, or None: then kernels are only noted.
    """

    def __init__(self, device: Device = CARD, launch: Callable | None = None) -> None:
        super().__init__()
        self.device = device
        self.launches: list[str] = []
        self.launch = launch
        self.outside = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def note(self, kernel, *arguments, grid, warmup, **options):
        """In place of a launch."""
        if all(grid):  # an empty grid is none
            self.launches.append(kernel.__name__)
            if self.launch is not None:
                self.launch(kernel, *arguments, grid=grid, warmup=warmup, **options)

    def replacements(self) -> list[tuple[Any, str, Callable]]:
        """(owner, name, function) of what would ask the device, or a tensor where it is."""
        device = self.device
        replaced: list[tuple[Any, str, Callable]] = [
            (_checks, "device_type", lambda t: device.type),
            (operands, "same", work.same),  # here all addresses are 0
            (plan, "architecture", lambda _: device.arch),
            (plan, "processors", lambda _: device.processors),
        ]
        if _library._HAS_TRITON:
            from triton.runtime.jit import JITFunction

            replaced.append((JITFunction, "run", lambda kernel, *args, **options: self.note(kernel, *args, **options)))
        return replaced

    def library(self, function, args, kwargs, result, launches: bool) -> None:
        """PyTorch's own op, after it. launches: whether it is a kernel on CUDA."""
        if launches:
            self.launches.append(f"aten::{_name(function)}")

    def ours(self, function, args):
        """An op of ours, by what the dispatcher would call."""
        name = _name(function)
        if self.device.type == "cpu" and work.native(name):
            return work.FAKES[name](*args) if name in work.FAKES else function(*args)
        # What it calls is seen too, and may use autograd inside, as below PyTorch's own dispatcher.
        with torch._C._ForceDispatchKeyGuard(*self.outside), self:
            return (on_cuda(name) if self.device.type == "cuda" else plainly(name))(*args)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _name(function)
        if function.namespace == "gssf":
            return self.ours(function, args)
        if name in ("mm", "addmm") and "out_dtype" in str(function._schema) and "out" in kwargs:
            # PyTorch 2.11 has no such products on this device.
            self.library(function, args, kwargs, kwargs["out"], True)
            return kwargs["out"]
        if name in WAITS:
            raise Waits(f"aten::{name} needs values, which a GPU is waited for")
        if name.startswith(("index", "_index_put")) and any(t.dtype == torch.bool for t in _indices(args)):
            raise Waits(f"aten::{name} by a mask needs the mask's values, which a GPU is waited for")
        result = function(*args, **kwargs)
        results = tensors(result)
        places = {t.device.type for t in (*tensors((args, kwargs)), *results)}
        if places - {DEVICE}:
            raise Waits(f"aten::{name} meets tensors of {' and '.join(sorted(places - {DEVICE}))} too")
        launches = name not in FREE and not function.is_view and any(t.numel() for t in results)
        self.library(function, args, kwargs, result, launches)
        return result


_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def device_path(arch: int = 90, launch: Callable | None = None) -> Iterator[DevicePath]:
    """The mode for a card of an architecture, and around it what would ask a card."""
    with described(DevicePath(Device("cuda", arch), launch)) as path:
        yield path


@contextlib.contextmanager
def described(path: DevicePath) -> Iterator[DevicePath]:
    """The mode, and around it its replacements."""
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        for owner, name, function in path.replacements():
            stack.enter_context(_in_this_thread(owner, name, function))
        yield stack.enter_context(path)


@contextlib.contextmanager
def _in_this_thread(owner: Any, name: str, function: Callable) -> Iterator[None]:
    """``owner.name`` is function for calls from this thread."""
    thread, before = threading.get_ident(), getattr(owner, name)

    def either(*arguments, **options):
        return (function if threading.get_ident() == thread else before)(*arguments, **options)

    setattr(owner, name, either)
    try:
        yield
    finally:
        setattr(owner, name, before)


def on_cuda(name: str) -> Callable:
    """What an op of ours is on CUDA."""
    op = _library.OPS[name]
    return op.on_cuda if op.launcher is not None and _library._HAS_TRITON else plainly(name)


def plainly(name: str) -> Callable:
    """An op of ours in plain PyTorch, over other ops of ours or alone."""
    op = _library.OPS[name]
    return lambda *arguments: op.plainly(op.call(*arguments))


def tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in values, in lists and the like too."""
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def _name(function) -> str:
    return function.overloadpacket.__name__


def _indices(args):
    return [t for t in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()) if t is not None]
