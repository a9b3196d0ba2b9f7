"""What a call would run, without running it: routes and why, launches, FLOPs and extra memory.

The call and its backward run on tensors without values (`device_path.py`), and their ops are recorded.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from gssf_kernels import _checks, _library, dense, plan, work
from gssf_kernels.device_path import DEVICE, Device, DevicePath, described, tensors
from gssf_kernels.triton import tiles

MIB = 1 << 20


def explain(function: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """What ``function(*args, **kwargs)`` and its backward would run. Nothing is computed, and no value is read.

    >>> x = torch.empty(8192, 1024, device="meta")
    >>> print(gk.explain(gk.triplet_loss, x, torch.empty_like(x), margin=0.2))

    prints the route of each of the package's ops with the reason for it, and the totals of the forward and the
    backward. ``.as_dict()`` has the same for programs. The tensors decide which device is described:

    * CPU tensors: this machine's CPU, with the compiled extension if it is loaded.
    * CUDA tensors: the card that they are on.
    * Meta tensors, and fake CUDA tensors without a card: a card of compute capability 9.0.

    Args:
        function: a function or module of the package, or any function of tensors that calls them. A module is copied
            for the call; its tensors may be on any device, and are not changed.
        args, kwargs: its arguments. They, or modules among them, must contain all tensors that the function uses.
            Tensors, fake or not, may be in lists and dicts, but must all be on one device.

    The backward is that of the sum of all differentiable results. It is with respect to the inputs and parameters that
    require grad, or to all floating inputs if none does. Under ``torch.no_grad()`` there is no backward. The gradient
    that it starts from is not counted.

    On the CPU a route may depend on values: few pairs of equal id are listed. Here they are taken to be many.

    Counted are:

    * launches (CUDA): Triton's, and one for each op of PyTorch that is not a view (a sort really launches several).
    * FLOPs: those of matrix products, as ``gssf_kernels/work.py`` says.
    * extra memory: the peak of what the call allocates besides inputs, results and gradients. In the backward it
      includes what the forward kept. PyTorch's tensors are counted, and what the C++ sweep packs of a and b. The
      buffers of C++ threads (1 MiB each) are not.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came; also what the function
            itself raises.
        RuntimeError: the function needs values (``.item()``, a boolean mask), or tensors of another device.
    """
    _checks.function(function, "function")
    parts = (_parts(function), args, kwargs)
    modules = [m for m in tree_leaves(parts) if isinstance(m, nn.Module)]
    inputs, held = tensors(parts), [t for m in modules for t in (*m.parameters(), *m.buffers())]
    device = _device(inputs or held)
    with _disable_current_modes():
        copies = {id(t): _without_values(t) for t in (*inputs, *held)}
        with _Copies():
            call = copy.deepcopy((function, args, kwargs), dict(copies))
        leaves = [t for t in copies.values() if t.requires_grad]
        if not leaves:
            input_copies = {id(t): copies[id(t)] for t in inputs}.values()
            leaves = [t.requires_grad_() for t in input_copies if _differentiable(t)]
        return _explained(_title(function), call, _Recorder(device, copies.values()), leaves)


@dataclasses.dataclass
class OpCall:
    """All calls of an op of the package by the same caller and route. The caller is another op, or the function."""

    name: str
    route: str
    why: str
    tile: str | None = None
    calls: int = 0
    launches: dict[str, int] = dataclasses.field(default_factory=dict)  # by kernel, without those of ``ops``
    flops: int = 0  # without those of ``ops``
    ops: list[OpCall] = dataclasses.field(default_factory=list)  # the ops that it calls

    def text(self, cuda: bool, indent: str = "  ") -> Iterator[str]:
        """The lines of text for the op and the ops that it calls."""
        calls = f" ({self.calls:,} calls)" if self.calls > 1 else ""
        tile = f" [{self.tile}]" if self.tile else ""
        why = f": {self.why}" if self.why else ""
        counts = [_counted(sum(self.launches.values()))] if cuda and self.launches else []
        counts += [_flops(self.flops)] if self.flops else []
        yield f"{indent}{self.name}{calls} → {self.route}{why}{tile}" + (f"; {', '.join(counts)}" if counts else "")
        for op in self.ops:
            yield from op.text(cuda, indent + "  ")

    def totals(self) -> tuple[collections.Counter[str], int]:
        """(launches by kernel, FLOPs), including those of the ops that it calls."""
        launches, flops = collections.Counter(self.launches), self.flops
        for op in self.ops:
            inner, inner_flops = op.totals()
            launches.update(inner)
            flops += inner_flops
        return launches, flops


@dataclasses.dataclass(frozen=True)
class Pass:
    """The forward or the backward."""

    launches: int | None  # None on the CPU
    kernels: dict[str, int]  # launches by the kernel's name, "aten::…" for PyTorch's; empty on the CPU
    flops: int
    extra_mib: float
    ops: list[OpCall]

    def text(self, name: str, besides: str) -> Iterator[str]:
        """The lines of text for the pass."""
        cuda = self.launches is not None
        parts = [_counted(self.launches)] if self.launches is not None else []
        parts += [_flops(self.flops), f"{self.extra_mib:,.2f} MiB {besides}"]
        yield f"{name}: {', '.join(parts)}"
        for op in self.ops:
            yield from op.text(cuda)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of `explain`: ``str()`` is for people, ``as_dict()`` for programs."""

    function: str
    device: str
    forward: Pass
    kept_mib: float  # what the forward keeps for the backward, besides inputs and results
    backward: Pass | None

    def as_dict(self) -> dict[str, Any]:
        """The same in dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        kept = f", of which {self.kept_mib:,.2f} MiB are kept for the backward" if self.backward is not None else ""
        text = [f"{self.function} on {self.device}", *self.forward.text("forward", "besides the results" + kept)]
        if self.backward is not None:
            text += self.backward.text("backward", "besides the gradients, with what was kept")
        return "\n".join(text)


class _Recorder(DevicePath):
    """Records ops, launches, FLOPs and allocations."""

    def __init__(self, device: Device, inputs: Iterable[Tensor]) -> None:
        super().__init__(device)
        self.stack = [OpCall("", "", "")]  # the pass, then the ops that are being called
        self.recorded: dict[tuple[int, str, plan.Plan], OpCall] = {}  # by caller, op and plan
        self.times = 1  # how many turns of loops the current turn stands for
        self.storages = {t.untyped_storage()._cdata: -1 for t in inputs}  # the index of each storage that is alive
        self.allocated: list[tuple[int, int]] = []  # (index of the storage, bytes); bytes < 0: it is freed
        self.count = 0  # storages so far

    # Running the call

    def replacements(self):
        replaced = super().replacements()
        replaced.append((plan, "starts", lambda length, step: self.few(range(0, length, step))))
        halves = dense.halves
        replaced.append((dense, "halves", lambda *sizes: self.few_halves(list(halves(*sizes)))))
        if self.device.type == "cuda" and _library._HAS_TRITON:
            from gssf_kernels.triton.sweep import Sweep

            slabs = Sweep.slabs
            replaced.append((Sweep, "slabs", lambda sweep: self.few(list(slabs(sweep)))))
        return replaced

    def few(self, turns: Sequence) -> Iterator:
        """The first, second and last turn of a loop; the second stands for all between the first and the last.

        All turns but the last are alike.
        """
        alike = len(turns) - 2
        if alike < 2:
            yield from turns
            return
        yield turns[0]
        self.times *= alike
        yield turns[1]
        self.times //= alike
        yield turns[-1]

    def few_halves(self, turns: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The same for `dense.halves`, the (first row, rows) of a triangle's chunks.

        Of chunks with the same number of rows, each has that many fewer columns than the one before. FLOPs and bytes
        are linear in the columns, so the chunk in the middle (or the two there) stands for all. The first two need the
        most memory. The last has no columns right of its square.
        """
        for _, group in itertools.groupby(turns[:-1], key=lambda turn: turn[1]):
            alike = list(group)
            yield from alike[:2]
            others = alike[2:]
            middle = others[(len(others) - 1) // 2 : len(others) // 2 + 1] if others else []
            for turn in middle:
                self.times *= len(others) // len(middle)
                yield turn
                self.times //= len(others) // len(middle)
        yield from turns[-1:]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if any(t.device.type == self.device.type for t in tensors((args, kwargs))):  # a constant of the function
            args, kwargs = tree_map_only(Tensor, self.described, (args, kwargs))
        device = kwargs.get("device")
        if device is not None and device.type == self.device.type:  # the function makes a tensor there
            kwargs.update(device=torch.device(DEVICE))
            kwargs.pop("pin_memory", None)
        return super().__torch_dispatch__(function, types, args, kwargs)

    def described(self, t: Tensor) -> Tensor:
        return _without_values(t) if t.device.type == self.device.type else t

    def ours(self, function, args):
        name = function.overloadpacket.__name__
        arguments = dict(zip((a.name for a in function._schema.arguments), args, strict=False))
        chosen = self.chosen(name, args, arguments)
        op = self.entered(name, chosen)
        self.stack.append(op)
        try:
            results = super().ours(function, args)
        finally:
            self.stack.pop()
        if self.device.type == "cpu" and work.native(name):
            op.flops += self.times * work.native_flops(name, arguments)
            self.made(tensors(results))
            self.scratch(work.packed_bytes(name, arguments))
        if not chosen.route:
            op.route = "triton" if any(not kernel.startswith("aten::") for kernel in op.launches) else "composite"
        return results

    def entered(self, name: str, chosen: plan.Plan) -> OpCall:
        """The record of an op's calls with this plan by the current caller, with this call counted."""
        key = id(self.stack[-1]), name, chosen
        if key not in self.recorded:
            self.recorded[key] = OpCall(name, chosen.route, chosen.why, _tile(chosen.tile))
            self.stack[-1].ops.append(self.recorded[key])
        self.recorded[key].calls += self.times
        return self.recorded[key]

    def chosen(self, name, args, arguments) -> plan.Plan:
        if self.device.type == "cpu":
            return work.on_cpu(name, arguments)
        op = _library.OPS[name]
        if op.launcher is not None and not _library._HAS_TRITON:
            return plan.Plan("composite", "Triton is not installed")
        return plan.choose(name, op.plans, op.call(*args))

    # Recording

    def note(self, kernel, *arguments, grid, warmup, **options):
        if all(grid):
            self.launched(kernel.__name__, work.kernel_flops(kernel, arguments, options))

    def library(self, function, args, kwargs, result, launches):
        flops = work.library_flops(function, args, kwargs, result)
        if launches and self.device.type == "cuda":
            self.launched(f"aten::{function.overloadpacket.__name__}", flops)
        else:
            self.stack[-1].flops += self.times * flops
        self.made(tensors(result))

    def launched(self, name: str, flops: int) -> None:
        op = self.stack[-1]
        op.launches[name] = op.launches.get(name, 0) + self.times
        op.flops += self.times * flops

    def made(self, results: Iterable[Tensor]) -> None:
        """Record the memory of the results that is new, until it is freed."""
        for t in results:
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.storages:
                self.storages[key] = self.count
                self.allocated.append((self.count, size))
                weakref.finalize(storage, self.freed, key, self.count, size).atexit = False
                self.count += 1

    def freed(self, key: int, index: int, size: int) -> None:
        self.storages.pop(key, None)
        self.allocated.append((index, -size))

    def scratch(self, size: int) -> None:
        """Record memory that an op frees at its end."""
        self.allocated += [(self.count, size), (self.count, -size)]
        self.count += 1

    def indices(self, results: Iterable[Tensor]) -> set[int]:
        return {self.storages.get(t.untyped_storage()._cdata, -1) for t in results}


def _explained(title: str, call: tuple, recorder: _Recorder, leaves: list[Tensor]) -> Explanation:
    """Run call, (function, args, kwargs) without values, and its backward with respect to ``leaves``."""
    function, args, kwargs = call
    device = recorder.device
    grads: tuple[Tensor | None, ...] = ()
    with described(recorder):
        results = tensors(function(*args, **kwargs))
        forward, end = recorder.stack[0], len(recorder.allocated)
        differentiable = [t for t in results if t.requires_grad]
        backward = recorder.stack[0] = OpCall("", "", "")
        if differentiable:
            with _disable_current_modes():
                ones = [torch.empty(t.shape, dtype=t.dtype, device=DEVICE) for t in differentiable]
            recorder.storages.update({t.untyped_storage()._cdata: -1 for t in ones})
            grads = torch.autograd.grad(differentiable, leaves, ones, allow_unused=True)
    uncounted = recorder.indices([*results, *(t for t in grads if t is not None)])
    sizes = [0 if index in uncounted else size for index, size in recorder.allocated]
    forward_peak, kept = _peak(sizes[:end])
    backward_peak, _ = _peak(sizes[end:], kept)
    return Explanation(
        title,
        str(device),
        _pass(forward, device, forward_peak),
        kept / MIB,
        _pass(backward, device, backward_peak) if differentiable else None,
    )


def _peak(sizes: Iterable[int], initial: int = 0) -> tuple[int, int]:
    """(the most bytes at any time, the bytes at the end)."""
    alive = list(itertools.accumulate(sizes, initial=initial))
    return max(alive), alive[-1]


def _pass(calls: OpCall, device: Device, peak: int) -> Pass:
    launches, flops = calls.totals()
    cuda = device.type == "cuda"
    return Pass(launches.total() if cuda else None, dict(launches) if cuda else {}, flops, peak / MIB, calls.ops)


class _Copies(TorchFunctionMode):
    """In this mode `copy.deepcopy` copies tensors without their values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__:
            t, memo = args
            return memo.setdefault(id(t), _without_values(t))
        return function(*args, **(kwargs or {}))


def _without_values(t: Tensor) -> Tensor:
    """A leaf like t on the meta device."""
    if t.layout != torch.strided:
        raise TypeError(f"args: expected dense (strided) tensors, got layout {t.layout}")
    empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
    if isinstance(t, nn.Parameter):
        return nn.Parameter(empty, requires_grad=t.requires_grad)
    return empty.requires_grad_(t.requires_grad)


def _device(values: Sequence[Tensor]) -> Device:
    """The device that the tensors are on, or stand for."""
    if not values:
        raise ValueError("args: expected at least one tensor, to tell which device is meant, got none")
    types = sorted({"cuda" if t.is_meta else t.device.type for t in values})
    if len(types) > 1:
        raise ValueError(f"args: expected tensors on one device (meta tensors mean cuda), got {' and '.join(types)}")
    if types[0] not in ("cpu", "cuda"):
        raise ValueError(f"args: expected tensors on cpu, cuda or meta, got {types[0]}")
    cards = [t.device for t in values if t.is_cuda] if torch.cuda.is_available() else []
    if cards:
        return Device("cuda", plan.architecture(cards[0]), plan.processors(cards[0]))
    return Device(types[0])


def _parts(function: Callable) -> list:
    """The objects of a function that may contain tensors: a partial's arguments, a method's object, itself."""
    if isinstance(function, functools.partial):
        return [*_parts(function.func), function.args, function.keywords]
    return [getattr(function, "__self__", function)]


def _title(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _differentiable(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _tile(tile: tiles.Sweep | None) -> str | None:
    if tile is None:
        return None
    parts = [f"{tile.BN} x {tile.BM} x {tile.BK}", f"{tile.num_warps} warps", f"{tile.num_stages} stages"]
    parts += ["tensor descriptors"] if tile.tma else []
    parts += ["persistent"] if tile.persistent else []
    return ", ".join(parts)


def _counted(count: int) -> str:
    return f"{count:,} launch{'' if count == 1 else 'es'}"


def _flops(flops: int) -> str:
    return f"{flops / 1e9:,.2f} GFLOP"
