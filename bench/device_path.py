"""What runs on a CUDA device, run without one: on tensors of the meta device, which have no values at all.

Inside `DevicePath` every op of ours goes where PyTorch would send it on CUDA: to its Triton launcher, whose kernels are
noted and not run, or to the plain PyTorch that serves all devices. Whatever would wait for a GPU has to look at values
that are not there, or is refused by its name, and so is whatever leaves the device or comes from another one.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.jit import JITFunction

from gssf_kernels import _library, dense
from gssf_kernels.kernels import operands, tiles

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


class Waits(AssertionError):
    """Something that would wait for the device, or leave it."""


class DevicePath(TorchDispatchMode):
    """``with device_path() as path``: path.launches are the kernels' names, in order; PyTorch's as "aten::…".

    launch: what runs a kernel in the place of `JITFunction.run`, or None: then kernels are only noted.
    """

    def __init__(self, launch=None):
        super().__init__()
        self.launches: list[str] = []
        self.launch = launch
        self.outside = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def note(self, kernel, *arguments, grid, warmup, **options):
        """In place of a launch."""
        if all(grid):  # an empty grid is none
            self.launches.append(kernel.__name__)
            if self.launch is not None:
                self.launch(kernel, *arguments, grid=grid, warmup=warmup, **options)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.namespace == "gssf":
            # What it calls is seen too, and may use autograd inside, as below PyTorch's own dispatcher.
            with torch._C._ForceDispatchKeyGuard(*self.outside), self:
                return _on_cuda(name)(*args)
        if name in ("mm", "addmm") and "out_dtype" in str(function._schema) and "out" in kwargs:
            self.launches.append(f"aten::{name}")  # PyTorch 2.11 has no such products on this device
            return kwargs["out"]
        if name in WAITS:
            raise Waits(f"aten::{name} waits for the device")
        if name.startswith(("index", "_index_put")) and any(t.dtype == torch.bool for t in _indices(args)):
            raise Waits(f"aten::{name} by a mask waits for the device")
        result = function(*args, **kwargs)
        found = _tensors(result)
        places = {t.device.type for t in (*_tensors((args, kwargs)), *found)}
        if places - {DEVICE}:
            raise Waits(f"aten::{name} meets {sorted(places)}")
        if name not in FREE and not function.is_view and any(t.numel() for t in found):
            self.launches.append(f"aten::{name}")
        return result


@contextlib.contextmanager
def device_path(arch: int = 90, launch=None):
    """The mode, and around it what would ask a card."""
    path = DevicePath(launch)
    chunk = {**dense.CHUNK_SCORES, DEVICE: dense.CHUNK_SCORES["cuda"]}
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *a, **options: path.note(kernel, *a, **options)),
        mock.patch.object(tiles, "architecture", return_value=arch),
        mock.patch.object(tiles, "processors", return_value=132),
        mock.patch.object(dense, "CHUNK_SCORES", chunk),
        mock.patch.object(dense, "operand", lambda x, dtype: x),  # as on CUDA
        mock.patch.object(operands, "same", _same),  # here all addresses are 0
        path,
    ):
        yield path


def _same(x, y):
    storages = {t.untyped_storage()._cdata for t in (x, y)}
    return len(storages) == 1 and x.storage_offset() == y.storage_offset() and x.shape == y.shape


def _on_cuda(name):
    """What an op of ours is there."""
    if name in _library.OPS:
        return _library.OPS[name].on_cuda
    reference = _library._REFERENCES[name]
    return _library._lazy(_library._LAUNCHERS[name], reference) if name in _library._LAUNCHERS else reference


def _tensors(values):
    return [t for t in tree_flatten(values)[0] if isinstance(t, torch.Tensor)]


def _indices(args):
    return [t for t in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()) if t is not None]
