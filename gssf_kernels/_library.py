"""Registers ops: arguments, composite, fake and Triton launcher of an op in one call.

Ops are in the ``torch.ops.gssf`` namespace, and PyTorch's dispatcher chooses what runs:

    CPU                 C++ (``csrc/``), if the extension was built
    CUDA                what ``plan.py`` chooses: Triton (``gssf_kernels/triton``), or the composite
    anything else       the composite: plain PyTorch over other ops, or the definition

The package has no switch of its own. An op is a forward computation. Differentiation is added by a :class:`Function`,
in the file that defines the op.
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
_OPS: dict[str, str] = {}  # op: the op whose backend does its work, usually the op itself

_EXTENSION: Any = None
try:
    _EXTENSION = importlib.import_module("gssf_kernels._C")  # loading it registers the CPU kernels
    EXTENSION_ERROR = None
except ImportError as error:
    # Not built, which is a supported way to install, or built against another PyTorch. `backends()` and
    # `python -m gssf_kernels` report which. Everything works on plain PyTorch.
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
    """A registered op, called with its bundle of arguments as ``op(Call(a, b, ...))``."""

    name: str
    call: type  # a NamedTuple: the op's arguments, in the order of the schema
    composite: Callable  # plain PyTorch over other ops, or the definition
    fake: Callable
    launcher: str | None  # "module.function" of the Triton launcher
    plans: Callable  # a function of plan.py: the plans of a call on CUDA, the preferred one first
    overload: Any  # torch.ops.gssf.<name>.default

    def __call__(self, call):
        return self.overload(*call)

    def on_cuda(self, *arguments):
        """The op on CUDA, with the arguments of its schema: runs the plan that ``plan.py`` chooses."""
        call = self.call(*arguments)
        plan = planning.choose(self.name, self.plans, call)
        return self.plainly(call) if plan.composite else self.launch(call, plan)

    def launch(self, call, plan):
        """The Triton launcher. Raises TypeError for fp64."""
        dtypes = (t.dtype for t in _tensors(call) if t.is_floating_point())
        unsupported = next((dtype for dtype in dtypes if dtype not in KERNEL_DTYPES), None)
        if unsupported is not None:
            raise TypeError(f"{self.name}: kernels take float32, bfloat16 or float16, got {unsupported}")
        assert self.launcher is not None
        module, _, function = self.launcher.rpartition(".")
        return getattr(importlib.import_module(f"gssf_kernels.triton.{module}"), function)(call, plan)

    def plainly(self, call):
        """The composite, without autocast or autograd: an exported program calls ops outside of a Function."""
        device = next(t.device for t in _tensors(call))
        with outside_autocast(device), torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
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
        call: the type of the bundle of arguments. The names, types and defaults of its fields make the schema.
        returns: the type of the result in the schema, ``"Tensor"`` or ``"(Tensor, Tensor)"``.
        composite: the op in plain PyTorch, called with the bundle: a formula over other ops, or the definition.
        fake: the same on shapes only, for ``torch.compile`` and ``torch.export``.
        launcher: ``"module.function"`` in ``gssf_kernels.triton``, called with (call, plan).
        plans: a function of ``plan.py``: the plans of a call on CUDA, the preferred one first.
        mutates: the arguments that the op writes.
        through: for an op that is a composite on every device, the op in it that has backends.
        dispatched: whether `backends` lists the op.
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
    """The arguments as the schema writes them: "Tensor a, Tensor? b, str kind, Tensor? kept=None"."""
    written = {name: f"Tensor({chr(ord('a') + k)}!)" for k, name in enumerate(mutates)}
    defaults = call._field_defaults  # type: ignore[attr-defined]
    texts = []
    for name, kind in typing.get_type_hints(call).items():
        default = f'="{defaults[name]}"' if isinstance(defaults.get(name), str) else f"={defaults.get(name)}"
        text = _TYPES[kind].replace("Tensor", written.get(name, "Tensor"))
        texts.append(f"{text} {name}{default if name in defaults else ''}")
    return ", ".join(texts)


def _tensors(call):
    """The tensors among an op's arguments, also those in lists."""
    for value in call:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (t for t in value if isinstance(t, torch.Tensor))


def backends() -> dict[str, dict[str, str]]:
    """What each op runs on: ``{op: {"cpu": "cpp" | "reference", "cuda": "triton" | "reference" | "unavailable"}}``.

    ``"unavailable"`` means that PyTorch sees no CUDA device on this machine. fp64 on CUDA always takes the reference.
    ``"hardest_negatives"`` has a third key, ``"certified"``: this CPU's unit for bf16 products, which mines fp32 inputs
    exactly ("amx" or "avx512_bf16"), or "no", and fp32 products are used.
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
    """This CPU's unit for bf16 products: "amx", "avx512_bf16" or "none"; "none" too without the extension."""
    return _EXTENSION.bf16_unit() if _EXTENSION is not None else "none"


class _Positional(inspect.Signature):
    """A signature that returns the arguments as they are if all are passed by position."""

    def bind(self, *arguments, **named):
        plain = not named and len(arguments) == len(self.parameters)
        return _Bound(arguments) if plain else super().bind(*arguments, **named)


class _Bound(NamedTuple):
    """The part of `inspect.BoundArguments` that PyTorch uses."""

    args: tuple
    kwargs: Mapping[str, Any] = types.MappingProxyType({})

    def apply_defaults(self) -> None:
        pass


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` that caches the signature of its ``forward``.

    PyTorch would inspect it at every call, which is measurable in a training step on a small batch. Where ``forward``
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
    """An op whose result cannot be differentiated: that raises, in eager mode and in torch.func.

    With `once_differentiable`, torch.func, and `torch.autograd.grad` through another path, would return zero as the
    second derivative without an error.
    """

    @staticmethod
    def forward(op, *arguments):
        return op(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass  # nothing is saved, but torch.func needs the method

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("gssf_kernels: these functions are differentiable once; a second derivative was asked for")


def last_derivative(op: Callable, *arguments):
    """``op(*arguments)`` for use in a backward. Differentiating its result raises RuntimeError.

    Without ``create_graph`` no graph is recorded, so the op is called without a Function, which saves time.
    """
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return op(*arguments) if plain else _Once.apply(op, *arguments)


def may_keep(*inputs: object) -> bool:
    """Whether a backward may follow that reads kept scores. An exported program has none."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)


def outside_autocast(device: torch.device):
    """A context that disables autocast: `_checks.autocast` has already cast, and ``@`` would cast again."""
    if device.type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def distinct(*tensors: torch.Tensor | None) -> tuple:
    """The tensors, with repeated ones replaced by views: torch.compile rejects a Function that gets a tensor twice."""
    seen: list[torch.Tensor] = []
    out = []
    for t in tensors:
        repeated = t is not None and any(t is other for other in seen)
        if t is not None:
            seen.append(t)
        out.append(t.view_as(t) if repeated and t is not None else t)
    return tuple(out)


def product(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """``out = x y`` or, with ``add``, ``out += x y`` by PyTorch, summed in out's dtype."""
    options: dict[str, Any] = {} if x.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, x, y, **options, out=out)
    else:
        torch.mm(x, y, **options, out=out)
