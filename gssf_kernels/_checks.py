"""All checks of user input. An error names the argument, what was expected and what came.

Public functions call these before any work is done. Ops and kernels trust the shapes of their inputs.
"""

import numbers
import sys
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of ids and labels. Not uint64, which has values that int64 has not.
INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32))
_LABELS = INTEGERS | {torch.bool}
# Computed at import: torch.compile of PyTorch 2.11 cannot trace this call.
AUTOCAST_DEVICES = frozenset(
    d for d in ("cpu", "cuda", "mps", "xpu", "hpu", "xla") if torch.amp.is_autocast_available(d)
)
_FLOAT_NAMES = "float32, float64, bfloat16 or float16"


def autocast(*tensors: torch.Tensor | None) -> tuple:
    """The tensors in the dtype of the surrounding ``torch.autocast`` region; unchanged outside of one.

    fp32, fp16 and bf16 are cast; fp64 is not, as in PyTorch. Arguments that are the same tensor stay the same tensor.
    """
    cast: list = []
    for k, t in enumerate(tensors):
        # By `is`, not by id(): torch.compile would guard on the id, and compile again for every batch.
        same = [c for other, c in zip(tensors[:k], cast, strict=True) if other is t]
        cast.append(same[0] if same else _autocast_one(t))
    return tuple(cast)


def device_type(t: torch.Tensor) -> str:
    """The type of t's device. `explain` replaces this function by one that returns the type of the described device."""
    return t.device.type


def _autocast_one(t):
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    device = device_type(t)
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return t
    return t.to(torch.get_autocast_dtype(device))


def floating(t, name: str, shape: str) -> None:
    """``t`` is a dense floating tensor with the rank of ``shape``, which is written as in ``"[N, D]"``."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(t).__name__}")
    if t.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected dtype {_FLOAT_NAMES}, got {t.dtype}")
    if t.layout != torch.strided or t.is_nested:
        got = "a nested one" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {got}")
    rank = shape.count(",") + 1
    if t.dim() != rank:
        raise ValueError(f"{name}: expected shape {shape}, got {list(t.shape)}")


def alike(t: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    """``t`` has the dtype and device of ``other``."""
    if t.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {other.dtype}, got {t.dtype}")
    if t.device != other.device:
        raise ValueError(f"{name}: expected {other_name}'s device {other.device}, got {t.device}")


def weight_of(t: torch.Tensor, name: str, x: torch.Tensor, x_name: str) -> None:
    """``t``, a weight of a metric, has the dtype and device of ``x``, or is fp32 where x is fp16 or bf16."""
    if t.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        if t.device != x.device:
            raise ValueError(f"{name}: expected {x_name}'s device {x.device}, got {t.device}")
        return
    alike(t, name, x, x_name)


def embeddings(a, b, a_name: str, b_name: str, *, paired: bool = True) -> None:
    """``a [N, D]`` and ``b [M, D]`` have a product ``a bᵀ``; with ``paired``, M >= N."""
    floating(a, a_name, "[N, D]")
    floating(b, b_name, "[M, D]")
    alike(b, b_name, a, a_name)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{b_name}: expected {a.shape[1]} columns to match {a_name} {list(a.shape)}, got {list(b.shape)}"
        )
    if a.shape[1] == 0:
        raise ValueError(f"{a_name}: expected at least one column, got {list(a.shape)}")
    if paired and b.shape[0] < a.shape[0]:
        raise ValueError(
            f"{b_name}: expected at least the {a.shape[0]} rows of {a_name} (row i pairs with row i), "
            f"got {list(b.shape)}"
        )


def score_matrix(s, name: str) -> None:
    """``s [N, M]`` with M >= N: every row has its positive on the diagonal."""
    floating(s, name, "[N, M]")
    if s.shape[1] < s.shape[0]:
        raise ValueError(
            f"{name}: expected at least as many columns as rows (pairs on the diagonal), got {list(s.shape)}"
        )


def ids(a_ids, b_ids, a: torch.Tensor, b: torch.Tensor, a_name: str, b_name: str) -> tuple:
    """``(a_ids, b_ids)`` as int64, or ``(None, None)``. If N = M, the ids of one input serve both."""
    if a_ids is None and b_ids is None:
        return None, None
    rows, cols = a.shape[0], b.shape[0]
    if rows != cols and (a_ids is None or b_ids is None):
        raise ValueError(
            f"{a_name if a_ids is None else b_name}: expected ids too, because the inputs have {rows} and {cols} rows "
            "(the ids of one serve both only if these are equal), got None"
        )
    name = b_name if a_ids is None else a_name
    first = labels(b_ids if a_ids is None else a_ids, name, rows, a.device)
    shared = rows == cols and (a_ids is None or b_ids is None or a_ids is b_ids)
    return first, first if shared else labels(b_ids, b_name, cols, b.device)


def ids_of_pairs(x_ids, y_ids, x: torch.Tensor, y: torch.Tensor, x_name: str, y_name: str) -> tuple:
    """:func:`ids` where row i of x and row i of y are a pair. Warns once, on the CPU, if their ids differ."""
    x_ids, y_ids = ids(x_ids, y_ids, x, y, x_name, y_name)
    if x_ids is not None and x_ids is not y_ids and readable(x_ids) and readable(y_ids):
        rows = f"row i of {x_name.removesuffix('_ids')} and row i of {y_name.removesuffix('_ids')}"
        if "pairs" not in _WARNED and bool((x_ids != y_ids[: x_ids.shape[0]]).any()):
            warn_once(
                "pairs",
                f"{x_name}, {y_name}: {rows} are a pair, but some have different ids. If ids are to say which rows are "
                'pairs, pass pairs="ids".',
            )
    return x_ids, y_ids


def labels(value, name: str, count: int, device: torch.device) -> torch.Tensor:
    """``value`` [count] on ``device``, of any integer dtype but uint64, or of bool, as int64."""
    if isinstance(value, torch.Tensor) and value.dtype != torch.int64:
        if value.dtype not in _LABELS:
            raise TypeError(f"{name}: expected an integer dtype (not uint64) or bool, got {value.dtype}")
        value = value.to(torch.int64)
    index(value, name, count, device)
    return value


def index_pairs(value, name: str, count: str) -> None:
    """``value`` is a tensor [count, 2] of integers."""
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype (not uint64 or bool), got {value.dtype}")
    if value.dim() != 2 or value.shape[1] != 2:
        raise ValueError(f"{name}: expected shape [{count}, 2], got {list(value.shape)}")


def index(value, name: str, count: int, device: torch.device | None = None) -> None:
    """``value`` is an int64 vector of ``count`` entries, on ``device`` unless that is None."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected an int64 tensor [{count}], got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != count:
        raise ValueError(f"{name}: expected shape [{count}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def metric_weights(x, diag, blocks, permutation, x_name: str = "x") -> None:
    """``diag [D]``, ``blocks [G, b, b]`` with G b = D, ``permutation [D]`` fit ``x [..., D]``."""
    dim = x.shape[-1]
    if diag is not None:
        floating(diag, "diag", "[D]")
        weight_of(diag, "diag", x, x_name)
        if diag.shape[0] != dim:
            raise ValueError(f"diag: expected shape [{dim}] to match {x_name} {list(x.shape)}, got {list(diag.shape)}")
    if blocks is not None:
        floating(blocks, "blocks", "[G, b, b]")
        weight_of(blocks, "blocks", x, x_name)
        groups, rows, cols = blocks.shape
        if rows != cols or rows == 0 or groups * rows != dim:
            raise ValueError(
                f"blocks: expected shape [G, b, b] with G*b = {dim} to match {x_name} {list(x.shape)}, "
                f"got {list(blocks.shape)}"
            )
    if permutation is not None:
        if blocks is None:
            raise ValueError("permutation: expected blocks too (it only regroups their channels), got blocks=None")
        index(permutation, "permutation", dim, x.device)
        if readable(permutation):
            true_permutation(permutation)


def readable(t: torch.Tensor) -> bool:
    """Whether values may be read: not on a GPU, where that would synchronise, and not of traced or fake tensors."""
    return t.device.type == "cpu" and type(t) is torch.Tensor and not torch.compiler.is_compiling()


_WARNED: set[str] = set()


def warn_once(subject: str, message: str) -> None:
    """Warn of ``subject`` at most once in a process."""
    if subject not in _WARNED:
        _WARNED.add(subject)
        warnings.warn(message, UserWarning, stacklevel=5)


_MEASURED: set[str] = set()
_NORM_ROWS = 256  # of each input, whose norms are looked at


def norms(loss: str, *sides) -> None:
    """At the first call of ``loss``, on the CPU, warn if the rows' mean norm says that they were not normalised."""
    if torch.compiler.is_compiling() or loss in _MEASURED:  # in this order: a graph must not depend on the set
        return
    for t in sides:
        if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dim() != 2 or not readable(t):
            continue
        _MEASURED.add(loss)
        mean = float(t.detach()[:_NORM_ROWS].double().norm(dim=1).mean()) if t.numel() else 1.0
        if not 0.5 <= mean <= 2.0:
            warn_once(
                f"norms of {loss}",
                f"{loss}: the rows have a mean norm of {mean:.3g}, and scores are plain products. If they are meant to "
                "be cosines, pass normalize=True, or normalise the rows first.",
            )


def flag(value, name: str) -> None:
    """``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def mask(value, name: str, shape, device: torch.device) -> None:
    """``value`` is a bool tensor of that shape and device."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a bool tensor {list(shape)}, True for what takes part, got {got}")
    if value.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def true_permutation(permutation: torch.Tensor, name: str = "permutation") -> None:
    """``permutation`` contains each of 0..D-1 once. This reads its values; see `readable`."""
    expected = torch.arange(permutation.shape[0], device=permutation.device)
    if not torch.equal(permutation.sort().values, expected):
        raise ValueError(f"{name}: expected each of 0..{permutation.shape[0] - 1} exactly once")


def non_negative(value, name: str) -> float:
    """``value`` as a finite float >= 0."""
    return _real(value, name, " >= 0", lambda x: x >= 0)


def positive(value, name: str) -> float:
    """``value`` as a finite float > 0."""
    return _real(value, name, " > 0", lambda x: x > 0)


def optional_non_negative(value, name: str) -> float | None:
    """``value`` as a finite float >= 0, or None."""
    return None if value is None else non_negative(value, name)


_positive = positive  # for functions with an argument of that name


def finite(value, name: str) -> float:
    """``value`` as a finite float."""
    return _real(value, name, "", lambda x: True)


def _real(value, name: str, range_name: str, allowed) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number{range_name}, got {type(value).__name__}")
    largest = sys.float_info.max  # the comparison is false for NaN too, and unlike isfinite it can be traced
    if not (-largest < value < largest and allowed(value)):  # type: ignore[operator]
        raise ValueError(f"{name}: expected a finite number{range_name}, got {value}")
    return float(value)


REDUCTIONS = ("sum", "mean", "none")


def reduction(value) -> None:
    """``value`` is "sum", "mean" or "none"."""
    choice(value, "reduction", REDUCTIONS)


def function(value, name: str) -> None:
    """``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")


def anchors(t, name: str, like: torch.Tensor) -> torch.Tensor:
    """``t``, a result of the user's function ``name``, as a constant floating tensor [N] like ``like`` [N]."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected it to give tensors [{like.shape[0]}], got {type(t).__name__}")
    if t.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected it to give dtype {_FLOAT_NAMES}, got {t.dtype}")
    if t.shape != like.shape:
        raise ValueError(f"{name}: expected it to give shape {list(like.shape)}, got {list(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected it to give tensors on {like.device}, got {t.device}")
    return t.detach().to(like.dtype)


def choice(value, name: str, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def positive_int(value, name: str) -> None:
    """``value`` is a whole number >= 1."""
    whole(value, name, 1)


def whole(value, name: str, least: int) -> None:
    """``value`` is a whole number >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected a whole number >= {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value}")


def cutoffs(value, name: str) -> tuple[int, ...]:
    """``value``, several whole numbers >= 1, as a tuple in which none is repeated."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected whole numbers >= 1, as in (1, 5, 10), got {type(value).__name__}")
    different = tuple(dict.fromkeys(value))
    for k in different:
        whole(k, name, 1)
    if not different:
        raise ValueError(f"{name}: expected at least one whole number >= 1, got none")
    return tuple(int(k) for k in different)


def parameter_dtype(dtype) -> None:
    """``dtype`` is one that parameters may have, or None for the default."""
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype: expected {_FLOAT_NAMES}, got {dtype}")


def scalar(value, name: str, like: torch.Tensor, *, positive: bool = False) -> torch.Tensor:
    """``value``, a finite number or a tensor of one element, as a 0-d tensor of the dtype of sums over ``like``.

    A tensor has to be on ``like``'s device, and its value is not checked: this never synchronises.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(value, torch.Tensor):
        if value.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected dtype {_FLOAT_NAMES}, got {value.dtype}")
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor of one element, got {list(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{name}: expected device {like.device}, got {value.device}")
        return value.reshape(()).to(dtype)
    return torch.full((), number(value, name, positive=positive), dtype=dtype, device=like.device)


def bias_of_candidates(value, name: str, b: torch.Tensor) -> torch.Tensor | None:
    """``value`` as a constant [M] in the dtype of the scores of b [M, D], or None."""
    if value is None:
        return None
    floating(value, name, "[M]")
    if value.shape[0] != b.shape[0]:
        raise ValueError(f"{name}: expected shape [{b.shape[0]}], got {list(value.shape)}")
    if value.device != b.device:
        raise ValueError(f"{name}: expected device {b.device}, got {value.device}")
    return value.detach().to(torch.float64 if b.dtype == torch.float64 else torch.float32)


def number(value, name: str, *, positive: bool = False) -> float:
    """``value`` as a finite float, > 0 if ``positive``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number or a tensor of one element, got {type(value).__name__}")
    return _positive(value, name) if positive else finite(value, name)


def scalar_or_number(value, name: str, like: torch.Tensor, *, positive: bool = False) -> torch.Tensor | float:
    """The same as :func:`scalar`, but a number stays a number: on a GPU, making a tensor of it costs a launch."""
    if isinstance(value, torch.Tensor):
        return scalar(value, name, like, positive=positive)
    return number(value, name, positive=positive)


class Logarithm(NamedTuple):
    """A scale as its natural logarithm, which the modules learn. On a GPU, the exponential would cost a launch."""

    tensor: torch.Tensor  # log κ, a scalar


def scale(value, like: torch.Tensor) -> torch.Tensor | float | Logarithm:
    """``scale``, positive, as by :func:`scalar_or_number`; a `Logarithm` stays one."""
    if isinstance(value, Logarithm):
        return Logarithm(scalar(value.tensor, "scale", like))
    return scalar_or_number(value, "scale", like, positive=True)


def fraction(value, name: str) -> float:
    """``value`` as a float in [0, 1)."""
    value = non_negative(value, name)
    if value >= 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    return value
