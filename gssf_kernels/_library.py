"""Where every op is registered: its arguments, plain PyTorch, fake and launcher, in one call.

An op lives in the ``torch.ops.gssf`` namespace and PyTorch's dispatcher picks what runs:

    CPU                 C++ (``csrc/``), if the extension was built
    CUDA                what ``plan.py`` chooses: Triton (``gssf_kernels/triton``), or the composite
    anything else       the composite: plain PyTorch over other ops, or the definition

There is no switch of our own. Ops are forward computations only; differentiation is added on top by a
:class:`Function` in the file that defines the op.
"""

import contextlib
import importlib
import importlib.util
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from gssf_kernels import plan as planning
from gssf_kernels._checks import AUTOCAST_DEVICES

_LIBRARY = torch.library.Library("gssf", "FRAGMENT")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_OPS: dict[str, str] = {}  # name: the op whose backend does its work, most often itself

_EXTENSION: Any = None
try:
    _EXTENSION = importlib.import_module("gssf_kernels._C")  # loading it registers the CPU kernels
    EXTENSION_ERROR = None
except ImportError as error:
    # Not built (a supported way to install), or built against another PyTorch: `backends()` and
    # `python -m gssf_kernels` report which, and everything works on plain PyTorch.
    EXTENSION_ERROR = str(error)


_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    list[torch.Tensor]: "Tensor[]",
    list[torch.Tensor | None]: "Tensor?[]",
    float: "float",
    float | None: "float?",
    list[float]: "float[]",
    int: "int",
    torch.SymInt: "SymInt",
    str: "str",
    bool: "bool",
    list[bool]: "bool[]",
}


class Op(NamedTuple):
    """A registered op: called with its bundle of arguments, as ``op(Call(a, b, ...))``."""

    name: str
    call: type  # a NamedTuple: the op's arguments, in the schema's order
    composite: Callable  # plain PyTorch over other ops, or the definition: what runs where nothing faster does
    fake: Callable
    launcher: str | None  # "module.function" of the Triton launcher
    plans: Callable  # of plan.py: the routes there are on CUDA for a call, the best first
    overload: Any  # torch.ops.gssf.<name>.default

    def __call__(self, call):
        return self.overload(*call)

    def on_cuda(self, *arguments):
        """What the op is on CUDA, of the schema's arguments: what `plan` chooses."""
        call = self.call(*arguments)
        plan = planning.choose(self.name, self.plans, call)
        return self.plainly(call) if plan.composite else self.launch(call, plan)

    def launch(self, call, plan):
        """The Triton launcher, which takes no fp64."""
        wide = next((t for t in _tensors(call) if t.is_floating_point() and t.dtype not in KERNEL_DTYPES), None)
        if wide is not None:
            raise TypeError(f"{self.name}: kernels take float32, bfloat16 or float16, got {wide.dtype}")
        assert self.launcher is not None
        module, _, function = self.launcher.rpartition(".")
        return getattr(importlib.import_module(f"gssf_kernels.triton.{module}"), function)(call, plan)

    def plainly(self, call):
        """The composite, outside of any autocast region."""
        device = next(t.device for t in _tensors(call))
        with outside_autocast(device):
            return self.composite(call)


KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
OPS: dict[str, Op] = {}


def register(
    name: str,
    call: type,
    returns: str,
    *,
    composite: Callable,
    fake: Callable,
    launcher: str | None = None,
    plans: Callable = planning.composite_only,
    mutates: tuple[str, ...] = (),
    through: str | None = None,
    dispatched: bool = True,
) -> Op:
    """Register ``gssf::<name>``, whose arguments are the fields of the NamedTuple ``call``.

    Args:
        name: the op's name.
        call: the arguments; the schema is made of the fields' names, types and defaults.
        returns: the schema's result, ``"Tensor"`` or ``"(Tensor, Tensor)"``.
        composite: plain PyTorch of the bundle ``call``: a formula over other ops, or the definition.
        fake: the same on shapes only, for ``torch.compile`` and ``torch.export``.
        launcher: ``"module.function"`` under ``gssf_kernels.triton``, called with (call, plan).
        plans: of ``plan.py``, gives the routes that there are on CUDA for a call, the best first.
        mutates: the arguments that are written.
        through: for a composite that serves every device, the op in it that has backends.
        dispatched: whether the package calls it; `backends` lists only what it does.
    """
    _LIBRARY.define(f"{name}({_arguments(call, mutates)}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    op = Op(name, call, composite, fake, launcher, plans, getattr(torch.ops.gssf, name).default)
    _LIBRARY.impl(name, lambda *arguments: op.plainly(call(*arguments)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gssf::{name}", lambda *arguments: fake(call(*arguments)), lib=_LIBRARY)
    if launcher is not None and _HAS_TRITON:
        _LIBRARY.impl(name, op.on_cuda, "CUDA")
    OPS[name] = op
    if dispatched:
        _OPS[name] = through or name
    return op


def _arguments(call: type, mutates: tuple[str, ...]) -> str:
    """The schema's arguments: "Tensor a, Tensor? b, str kind, Tensor? pair=None"."""
    written = {name: f"Tensor({chr(ord('a') + k)}!)" for k, name in enumerate(mutates)}
    defaults = call._field_defaults  # type: ignore[attr-defined]
    texts = []
    for name, kind in typing.get_type_hints(call).items():
        default = f'="{defaults[name]}"' if isinstance(defaults.get(name), str) else f"={defaults.get(name)}"
        text = _TYPES[kind].replace("Tensor", written.get(name, "Tensor"))
        texts.append(f"{text} {name}{default if name in defaults else ''}")
    return ", ".join(texts)


def _tensors(call):
    """The tensors among an op's arguments, in lists too."""
    for value in call:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (t for t in value if isinstance(t, torch.Tensor))


def backends() -> dict[str, dict[str, str]]:
    """What will really run: ``{op: {"cpu": "cpp" | "reference", "cuda": "triton" | "reference" | "unavailable"}}``.

    ``"unavailable"`` means that PyTorch sees no CUDA device on this machine. fp64 on CUDA always
    takes the reference. ``"hardest_negatives"`` has a third key, ``"certified"``: the unit for bf16 products by which
    fp32 inputs are mined exactly on this CPU ("amx" or "avx512_bf16"), or "no": then fp32 products do it.
    """
    has_cuda = torch.cuda.is_available()
    table = {}
    for name, worker in _OPS.items():
        op = f"gssf::{worker}"
        cpu = "cpp" if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU") else "reference"
        cuda = "triton" if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA") else "reference"
        table[name] = {"cpu": cpu, "cuda": cuda if has_cuda else "unavailable"}
    unit = bf16_unit()
    table["hardest_negatives"]["certified"] = unit if unit != "none" else "no"
    return table


def bf16_unit() -> str:
    """The unit for products of bf16 numbers that this CPU has: "amx", "avx512_bf16" or "none", also if unknown."""
    return _EXTENSION.bf16_unit() if _EXTENSION is not None else "none"


class _Positional(inspect.Signature):
    """A signature that binds arguments as they come where all are there, by position."""

    def bind(self, *arguments, **named):
        plain = not named and len(arguments) == len(self.parameters)
        return _Bound(arguments) if plain else super().bind(*arguments, **named)


class _Bound(NamedTuple):
    """What PyTorch asks of an `inspect.BoundArguments`."""

    args: tuple
    kwargs: Mapping[str, Any] = types.MappingProxyType({})

    def apply_defaults(self) -> None:
        pass


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` whose ``forward`` has its signature with it.

    PyTorch takes the signature apart at every call otherwise, which shows in a small batch's step. Where ``forward``
    takes ``*arguments``, ``call`` is the op's bundle, which names them: torch.compile asks how many there are.
    """

    call: Any = None

    def __init_subclass__(cls):
        super().__init_subclass__()
        if "forward" in vars(cls):
            parameters = list(inspect.signature(cls.forward).parameters.values())
            if cls.call is not None:
                kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
                parameters = [inspect.Parameter(name, kind) for name in cls.call._fields]
            vars(cls.forward)["__signature__"] = _Positional(parameters)


class _Once(Function):
    """An op as the last derivative: differentiating it again raises, in eager mode and in torch.func alike.

    (`once_differentiable` is passed over by torch.func, and by `torch.autograd.grad` of another path: second
    derivatives would come out as zero, silently.)
    """

    @staticmethod
    def forward(op, *arguments):
        return op(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass  # nothing to keep, but torch.func asks for it

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("gssf_kernels: these functions are differentiable once; a second derivative was asked for")


def last_derivative(op: Callable, *arguments):
    """``op(*arguments)`` for use in a backward: its result cannot be differentiated again.

    Without ``create_graph`` it has no history in any case, and the time of a Function is saved.
    """
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return op(*arguments) if plain else _Once.apply(op, *arguments)


def outside_autocast(device: torch.device):
    """A context for plain PyTorch below the casts of `_checks.autocast`; in the region ``@`` would cast once more."""
    if device.type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def distinct(*tensors: torch.Tensor | None) -> tuple:
    """The tensors with repeats replaced by views: torch.compile takes no tensor twice in one Function."""
    seen: list[torch.Tensor] = []
    out = []
    for t in tensors:
        repeated = t is not None and any(t is other for other in seen)
        if t is not None:
            seen.append(t)
        out.append(t.view_as(t) if repeated and t is not None else t)
    return tuple(out)


def product(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """``out = x y`` or ``out += x y`` by PyTorch, summed in out's dtype."""
    options: dict[str, Any] = {} if x.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, x, y, **options, out=out)
    else:
        torch.mm(x, y, **options, out=out)
