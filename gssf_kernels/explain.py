"""What a call would run, without running it: routes and why, launches, FLOPs and extra memory.

The call and its backward are made on tensors without values (`device_path.py`), and what they meet is noted.
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

    prints for each of the package's ops which route it takes and why, and the sums of both passes;
    ``.as_dict()`` has the same for programs. The tensors decide which device is described:

    * CPU tensors: this machine's CPU, by the compiled extension where it is loaded.
    * CUDA tensors: their own card. Fake CUDA tensors without a card, and meta tensors: one of compute capability 9.0.

    Args:
        function: the package's functions and modules, or any function of tensors that calls them. A module is copied
            for the call; its tensors may be on any device and stay as they are.
        args, kwargs: its arguments. Tensors that the function uses have to be among them, or in modules that are;
            tensors, fake or not, may lie in lists and dicts, but all on one device.

    The backward is that of the sum of all results that can be differentiated, with respect to all inputs and
    parameters that require grad, or to all floating inputs if none does. Under ``torch.no_grad()`` there is none. The
    gradient that it starts from is there before: it is not counted.

    Counted are:

    * launches (CUDA): Triton's, and PyTorch's ops that are no views, each as one (a sort is several).
    * FLOPs: of matrix products, as ``gssf_kernels/work.py`` says.
    * extra memory: the peak of what the call allocates besides its inputs, results and gradients, as PyTorch's
      tensors are allocated; in the backward with what the forward kept for it. Of what C++ and Triton allocate inside
      an op, the sides that the C++ sweep packs are counted, a thread's buffers (1 MiB each) are not.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came; and what the function
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
        wanted = [t for t in copies.values() if t.requires_grad]
        if not wanted:
            wanted = [t.requires_grad_() for t in {id(t): copies[id(t)] for t in inputs}.values() if _has_slope(t)]
        return _explained(_title(function), call, _Recorder(device, copies.values()), wanted)


@dataclasses.dataclass
class OpCall:
    """An op of the package where another one, or the function, calls it: once or, by the same route, several times."""

    name: str
    route: str
    why: str
    tile: str | None = None
    calls: int = 0
    launches: dict[str, int] = dataclasses.field(default_factory=dict)  # its own in all these calls, by kernel
    flops: int = 0  # its own
    ops: list[OpCall] = dataclasses.field(default_factory=list)  # that it calls

    def lines(self, cuda: bool, indent: str = "  ") -> Iterator[str]:
        calls = f" ({self.calls:,} calls)" if self.calls > 1 else ""
        tile = f" [{self.tile}]" if self.tile else ""
        why = f": {self.why}" if self.why else ""
        own = [_counted(sum(self.launches.values()))] if cuda and self.launches else []
        own += [_flops(self.flops)] if self.flops else []
        yield f"{indent}{self.name}{calls} → {self.route}{why}{tile}" + (f"; {', '.join(own)}" if own else "")
        for op in self.ops:
            yield from op.lines(cuda, indent + "  ")

    def totals(self) -> tuple[collections.Counter[str], int]:
        """(launches by kernel, FLOPs), with those of the ops that it calls."""
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
    kernels: dict[str, int]  # by name, PyTorch's as "aten::…"; empty on the CPU
    flops: int
    extra_mib: float
    ops: list[OpCall]

    def lines(self, name: str, besides: str) -> Iterator[str]:
        cuda = self.launches is not None
        parts = [_counted(self.launches)] if self.launches is not None else []
        parts += [_flops(self.flops), f"{self.extra_mib:,.2f} MiB {besides}"]
        yield f"{name}: {', '.join(parts)}"
        for op in self.ops:
            yield from op.lines(cuda)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns: ``str()`` is for people, ``as_dict()`` for programs."""

    function: str
    device: str
    forward: Pass
    kept_mib: float  # by the forward for the backward, besides inputs and results
    backward: Pass | None

    def as_dict(self) -> dict[str, Any]:
        """The same in dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        kept = f", of which {self.kept_mib:,.2f} MiB are kept for the backward" if self.backward is not None else ""
        lines = [f"{self.function} on {self.device}", *self.forward.lines("forward", "besides the results" + kept)]
        if self.backward is not None:
            lines += self.backward.lines("backward", "besides the gradients, with what was kept")
        return "\n".join(lines)


class _Recorder(DevicePath):
    """Notes ops, launches, FLOPs and allocations instead of names alone."""

    def __init__(self, device: Device, inputs: Iterable[Tensor]) -> None:
        super().__init__(device)
        self.stack = [OpCall("", "", "")]  # the pass, then the ops that are being called
        self.noted: dict[tuple[int, str, plan.Plan], OpCall] = {}
        self.times = 1  # how many alike turns of loops the present one stands for
        self.storages = {t.untyped_storage()._cdata: -1 for t in inputs}  # alive: their numbers
        self.allocated: list[tuple[int, int]] = []  # (number of the storage, bytes), negative where it is freed
        self.count = 0

    # What is replaced and run

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
        """The turns of a loop, of which all but the last are alike: one stands for those between the first and it."""
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
        """The same for (first row, rows) of a triangle's chunks.

        Chunks of as many rows shrink by as many columns each time. What they make is linear in those, so the middle of
        them, or both, stands for all. The first two take the most memory, and the last has no columns past its square.
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
        if any(t.device.type == self.device.type for t in tensors((args, kwargs))):  # a constant of the function's
            args, kwargs = tree_map_only(Tensor, self.described, (args, kwargs))
        device = kwargs.get("device")
        if device is not None and device.type == self.device.type:  # of a tensor that the function makes
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
        """Where calls of an op by a route are noted, below the op that makes them."""
        key = id(self.stack[-1]), name, chosen
        if key not in self.noted:
            self.noted[key] = OpCall(name, chosen.route, chosen.why, _tile(chosen.tile))
            self.stack[-1].ops.append(self.noted[key])
        self.noted[key].calls += self.times
        return self.noted[key]

    def chosen(self, name, args, arguments) -> plan.Plan:
        if self.device.type == "cpu":
            return work.on_cpu(name, arguments)
        op = _library.OPS[name]
        if op.launcher is not None and not _library._HAS_TRITON:
            return plan.Plan("composite", "Triton is not installed")
        return plan.choose(name, op.plans, op.call(*args))

    # What is noted

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
        """Count the memory of results that is new, until it is freed."""
        for t in results:
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.storages:
                self.storages[key] = self.count
                self.allocated.append((self.count, size))
                weakref.finalize(storage, self.freed, key, self.count, size).atexit = False
                self.count += 1

    def freed(self, key: int, number: int, size: int) -> None:
        self.storages.pop(key, None)
        self.allocated.append((number, -size))

    def scratch(self, size: int) -> None:
        """Memory of an op that is freed at its end."""
        self.allocated += [(self.count, size), (self.count, -size)]
        self.count += 1

    def numbers(self, results: Iterable[Tensor]) -> set[int]:
        return {self.storages.get(t.untyped_storage()._cdata, -1) for t in results}


def _explained(title: str, call: tuple, recorder: _Recorder, wanted: list[Tensor]) -> Explanation:
    """Of (function, args, kwargs) without values. wanted: what gets gradients."""
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
            grads = torch.autograd.grad(differentiable, wanted, ones, allow_unused=True)
    apart = recorder.numbers([*results, *(t for t in grads if t is not None)])
    sizes = [0 if number in apart else size for number, size in recorder.allocated]
    forward_peak, kept = _peak(sizes[:end])
    backward_peak, _ = _peak(sizes[end:], kept)
    return Explanation(
        title,
        str(device),
        _pass(forward, device, forward_peak),
        kept / MIB,
        _pass(backward, device, backward_peak) if differentiable else None,
    )


def _peak(sizes: Iterable[int], before: int = 0) -> tuple[int, int]:
    """(the most bytes at once, those at the end)."""
    alive = list(itertools.accumulate(sizes, initial=before))
    return max(alive), alive[-1]


def _pass(calls: OpCall, device: Device, peak: int) -> Pass:
    launches, flops = calls.totals()
    cuda = device.type == "cuda"
    return Pass(launches.total() if cuda else None, dict(launches) if cuda else {}, flops, peak / MIB, calls.ops)


class _Copies(TorchFunctionMode):
    """Tensors are copied without their values."""

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
    """What the tensors stand for."""
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
    """What a function holds that may be or have tensors: a partial's arguments, a method's object, itself."""
    if isinstance(function, functools.partial):
        return [*_parts(function.func), function.args, function.keywords]
    return [getattr(function, "__self__", function)]


def _title(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _has_slope(t: Tensor) -> bool:
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
