"""What a call runs on a device, determined without that device, on tensors of the meta device, which have no values.

Inside `device_path`, every op of this package goes where PyTorch's dispatcher would send it on the described device:

    cuda    to its Triton launcher, whose kernels are recorded and not run, or to plain PyTorch
    cpu     to its C++ kernel, which its fake replaces, or to plain PyTorch

An op that needs values raises an error with its name, because on a GPU it would synchronise. So does an op that mixes
devices. Other threads are not affected.
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

# Ops that synchronise on CUDA: they copy to the host, or the size of their result depends on values.
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
# Ops that launch nothing: they allocate, or they are views but do not say so in their schema.
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
    """An op that needs values, for which a GPU would synchronise, or that mixes devices."""


class Device(NamedTuple):
    """The device that is described; tensors on the meta device stand for tensors on it."""

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
    """``with device_path() as path``: path.launches are the names of the kernels, in order; PyTorch's are "aten::…".

    launch: called for each launch in place of `JITFunction.run`; None: launches are only recorded.
    """

    def __init__(self, device: Device = CARD, launch: Callable | None = None) -> None:
        super().__init__()
        self.device = device
        self.launches: list[str] = []
        self.launch = launch
        self.outside = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def note(self, kernel, *arguments, grid, warmup, **options):
        """Record a launch."""
        if all(grid):  # an empty grid launches nothing
            self.launches.append(kernel.__name__)
            if self.launch is not None:
                self.launch(kernel, *arguments, grid=grid, warmup=warmup, **options)

    def replacements(self) -> list[tuple[Any, str, Callable]]:
        """(owner, name, function) for each function that would query the device, or the address of a tensor."""
        device = self.device
        replaced: list[tuple[Any, str, Callable]] = [
            (_checks, "device_type", lambda t: device.type),
            (operands, "same", work.same),  # all addresses are 0 on the meta device
            (plan, "architecture", lambda _: device.arch),
            (plan, "processors", lambda _: device.processors),
        ]
        if _library._HAS_TRITON:
            from triton.runtime.jit import JITFunction

            replaced.append((JITFunction, "run", lambda kernel, *args, **options: self.note(kernel, *args, **options)))
        return replaced

    def library(self, function, args, kwargs, result, launches: bool) -> None:
        """Record an op of PyTorch, after it ran. launches: whether it launches a kernel on CUDA."""
        if launches:
            self.launches.append(f"aten::{_name(function)}")

    def ours(self, function, args):
        """Run an op of this package by what the dispatcher would call."""
        name = _name(function)
        if self.device.type == "cpu" and work.native(name):
            return work.FAKES[name](*args) if name in work.FAKES else function(*args)
        # The ops that it calls are recorded too. As below PyTorch's dispatcher, it may use autograd inside.
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
        others = {t.device.type for t in (*tensors((args, kwargs)), *results)} - {DEVICE}
        if others:
            raise Waits(f"aten::{name} mixes in tensors of {' and '.join(sorted(others))}")
        launches = name not in FREE and not function.is_view and any(t.numel() for t in results)
        self.library(function, args, kwargs, result, launches)
        return result


_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def device_path(arch: int = 90, launch: Callable | None = None) -> Iterator[DevicePath]:
    """The mode for a card of the architecture ``arch`` (as in `Device`), with its replacements."""
    with described(DevicePath(Device("cuda", arch), launch)) as path:
        yield path


@contextlib.contextmanager
def described(path: DevicePath) -> Iterator[DevicePath]:
    """The mode ``path``, with its replacements in place."""
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        for owner, name, function in path.replacements():
            stack.enter_context(_in_this_thread(owner, name, function))
        yield stack.enter_context(path)


@contextlib.contextmanager
def _in_this_thread(owner: Any, name: str, function: Callable) -> Iterator[None]:
    """``owner.name`` calls ``function`` in this thread, and stays as it is in other threads."""
    thread, original = threading.get_ident(), getattr(owner, name)

    def either(*arguments, **options):
        return (function if threading.get_ident() == thread else original)(*arguments, **options)

    setattr(owner, name, either)
    try:
        yield
    finally:
        setattr(owner, name, original)


def on_cuda(name: str) -> Callable:
    """The function that runs the op ``gssf::<name>`` on CUDA."""
    op = _library.OPS[name]
    return op.on_cuda if op.launcher is not None and _library._HAS_TRITON else plainly(name)


def plainly(name: str) -> Callable:
    """The function that runs the op ``gssf::<name>`` in plain PyTorch, by itself or over other ops."""
    op = _library.OPS[name]
    return lambda *arguments: op.plainly(op.call(*arguments))


def tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in ``values``, also those in lists, tuples and dicts."""
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def _name(function) -> str:
    return function.overloadpacket.__name__


def _indices(args):
    return [t for t in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()) if t is not None]
