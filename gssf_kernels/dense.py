"""The loop over chunks of ``s = a bᵀ``, for losses in which every score carries gradient.

    for each chunk R of rows:   s = a[R] bᵀ;   pass over s;   da[R] = ds b,   db += dsᵀ a[R]

The pass reads the chunk and adds to row and column statistics of O(N + M). If a gradient is needed, it replaces s by
dscores (ds). It is an op: C++ on the CPU, Triton on CUDA, plain PyTorch elsewhere. If s is symmetric, only its upper
triangle is computed (:func:`triangle`). The products are those of ``csrc/product.h`` on the CPU, and PyTorch's
elsewhere.

Extra memory is one chunk besides the gradients. On the CPU there is also b packed for the products: an fp32 copy
forward, two with a gradient; of fp32 or fp64 none if all scores are one chunk. The same inputs give the same bits, on
the CPU at every thread count.

bf16 inputs stay bf16 on CUDA, and on CPUs with a unit for bf16 products (AVX-512 BF16, AMX; ``csrc/bf16.h``). A product
of two bf16 numbers is exact there, and the sums are fp32. As in plain PyTorch, ds is rounded to bf16 before the
products for da and db, which are summed in fp32.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gssf_kernels import _checks, _library, plan
from gssf_kernels._library import EXTENSION_ERROR
from gssf_kernels.plan import accumulation_dtype, fp32_products


def chunk_rows(a: Tensor, b: Tensor) -> int:
    """Rows of a in one chunk. It depends only on the problem, so that the same inputs are summed in the same order."""
    scores = plan.chunk_scores(_checks.device_type(a))
    return min(max(scores // max(b.shape[0], 1), plan.MIN_CHUNK_ROWS), max(a.shape[0], 1))


def chunks(
    a: Tensor,
    b: Tensor,
    visit: Callable[[Tensor, int], None],
    needs: Sequence[bool] = (False, False),
    scores: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Call ``visit(s [R, M], first)`` for every chunk of ``s = a bᵀ``, whose first row is row ``first`` of a.

    Args:
        a: [N, D] float.
        b: [M, D] of a's dtype.
        visit: with ``needs``, replaces s by ``ds = dL/ds``.
        needs: whether da and db are computed.
        scores: s [N, M], if it has been computed before; each chunk is copied from it.

    Returns:
        (da [N, D], db [M, D]) in the scores' dtype, or None for what ``needs`` leaves out.
    """
    dtype, rows = accumulation_dtype(a.dtype), chunk_rows(a, b)
    factor = OnceRight if a.shape[0] <= rows else Right
    columns = factor(b.mT, dtype) if scores is None else None
    channels = factor(b, dtype) if needs[0] else None
    buffer = a.new_empty(rows, b.shape[0], dtype=dtype)
    da = a.new_empty(a.shape, dtype=dtype) if needs[0] else None
    db = (b.new_empty if a.shape[0] else b.new_zeros)(b.shape, dtype=dtype) if needs[1] else None
    for first in plan.starts(a.shape[0], rows):
        part = operand(a[first : first + rows], dtype)  # [R, D]
        s = buffer[: part.shape[0]]  # [R, M]
        if columns is not None:
            columns.product(part, s)
        elif scores is not None:
            s.copy_(scores[first : first + rows])
        visit(s, first)
        ds = gradient(s, part) if any(needs) else s
        if da is not None and channels is not None:
            channels.product(ds, da[first : first + rows])
        if db is not None:
            Right(part, dtype).product(ds.mT, db, add=first > 0)
    return da, db


def kept_shape(a: Tensor, b: Tensor | None, keep: str) -> tuple[int, ...]:
    """The shape of what a forward keeps for the backward; `ops.logsumexp.kept_for` says what ``keep`` is.

    "scores": s = a bᵀ [N, M] if it is small, else [0, M]. "means": [N, D], or [0, D] where a kernel takes few launches
    without them. [0] where nothing is kept, and with b=None, which means that b is a. Traced sizes choose by
    arithmetic, so that no graph depends on them.
    """
    device, most = _checks.device_type(a), plan.KEPT_SCORES.get(_checks.device_type(a), 0)
    if not keep or b is None or (keep == "scores" and not most):
        return (0,)
    n, m = a.shape[0], b.shape[0]
    if keep == "scores":
        return n * torch.sym_min(1, most // torch.sym_max(n * m, 1)), m
    return n * torch.sym_min(1, n * m // (plan.KEPT_MEANS.get(device, 0) + 1)), a.shape[1]


def halves(n: int, limit: int, step: int, max_rows: int) -> Iterable[tuple[int, int]]:
    """(first row, rows) of each chunk of a symmetric s [n, n].

    Rows are a multiple of ``step``: at most ``max_rows``, of at most ``limit`` scores, but never fewer than ``step``.

    `explain` replaces this function, as it does `plan.starts`, and runs only a few of the chunks.
    """
    first = 0
    while first < n:
        count = min(max(min(limit // (n - first), max_rows) // step, 1) * step, n - first)
        yield first, count
        first += count


def triangle(
    inputs: Sequence[Tensor], visit: Callable[[list[Tensor], int], None], need: bool, other: Tensor | None = None
) -> Tensor | None:
    """Call ``visit([s_k [R, N − first]], first)`` for every chunk of the upper triangle of ``s_k = x_k x_kᵀ``.

    A chunk begins on the diagonal: its row and column 0 are row ``first`` of x. So ``visit`` sees every pair of rows
    once, except in the square ``s_k[:, :R]``, where it sees both (i, j) and (j, i).

    Args:
        inputs: the x_k, [N, any] each.
        visit: with ``need``, replaces s_0 by that part of a symmetric ``E = dL/ds``.
        need: whether the gradient is computed.
        other: [N, D], for ``s_0 = x_0 otherᵀ``, which must be symmetric too; None: x_0.

    Returns:
        ``E x_0``, or ``E other``, [N, D] in the scores' dtype, or None without ``need``.

    Time: half a product for each s_k, and a whole one for the gradient.
    """
    dtype, n = accumulation_dtype(inputs[0].dtype), inputs[0].shape[0]
    lefts = [operand(x, dtype) for x in inputs]
    factors = lefts if other is None else [operand(other, dtype), *lefts[1:]]
    rights = [Right(y.mT, dtype) for y in factors]
    x, channels = lefts[0], Right(factors[0], dtype) if need else None
    limit = max(2 * chunk_rows(x, x) * n // (1 + len(inputs)), 1)  # scores of a chunk of one s_k
    max_rows = plan.square_rows(_checks.device_type(x), n)
    step = max(right.width for right in rights)
    buffers = x.new_empty(len(inputs), min(max(limit, step * n), n * n), dtype=dtype)
    dx = x.new_zeros(x.shape, dtype=dtype) if need else None
    for first, count in halves(n, limit, step, max_rows):
        width, rows = n - first, slice(first, first + count)
        scores = [buffer[: count * width].view(count, width) for buffer in buffers]
        for s, left, right in zip(scores, lefts, rights, strict=True):
            right.part(column=first).product(left[rows], s)
        if other is not None:  # in the square too, a score and its mirror must be one number
            square = scores[0][:, :count]
            square.copy_(square.triu() + square.triu(1).mT)
        visit(scores, first)
        if channels is not None and dx is not None:
            ds = gradient(scores[0], x)
            channels.part(row=first).product(ds, dx[rows], add=True)
            if rows.stop < n:
                channels.part(row=first, stop=rows.stop).product(ds[:, count:].mT, dx[rows.stop :], add=True)
    return dx


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the left factor of a product: unchanged on CUDA and for a CPU's bf16 unit, else converted to ``dtype``.

    Those multiply 16-bit numbers and sum in fp32.
    """
    return x if _checks.device_type(x) == "cuda" or on_bf16_unit(x) else x.to(dtype)


def gradient(s: Tensor, part: Tensor) -> Tensor:
    """ds as the left factor of a product: on CUDA in the dtype of ``part``. On the CPU the product rounds it."""
    return s.to(part.dtype) if _checks.device_type(s) == "cuda" else s


def on_bf16_unit(x: Tensor) -> bool:
    """Whether x is bf16, on a CPU with a unit for bf16 products."""
    return x.dtype == torch.bfloat16 and _checks.device_type(x) == "cpu" and bf16_unit() != "none"


def multiplies_fp32(y: Tensor, dtype: torch.dtype) -> bool:
    """Whether products with y are the extension's, in fp32 or fp64."""
    rough = dtype == torch.float32 and fp32_products(_checks.device_type(y)) == "bf16"
    return _checks.device_type(y) == "cpu" and EXTENSION_ERROR is None and not rough and not on_bf16_unit(y)


@functools.cache
def bf16_unit() -> str:
    """`_library.bf16_unit`, cached."""
    return _library.bf16_unit()


class Right:
    """``y [k, m]`` as the right factor of many products; on the CPU a copy of y packed into panels (``csrc/types.h``).

    On a CPU with a bf16 unit bf16 stays bf16, and a left factor of fp32, which only ds is, is rounded to bf16. PyTorch
    multiplies if the extension is not built, and fp32 if PyTorch's setting allows fp32 products to round to bf16.
    """

    def __init__(self, y: Tensor, dtype: torch.dtype):
        unit = on_bf16_unit(y)
        self.packed = unit or multiplies_fp32(y, dtype)
        self.width = 64 if unit else 32  # `part` takes multiples of it
        self.y = torch.ops.gssf.pack(y, y.dtype if unit else dtype) if self.packed else operand(y, dtype)

    def part(self, row: int = 0, stop: int | None = None, column: int = 0) -> "Right":
        """y[row:stop, column:], not copied. All are multiples of ``width``."""
        part = copy.copy(self)
        part.y = self.y[column // self.y.shape[2] :, row:stop] if self.packed else self.y[row:stop, column:]
        return part

    def product(self, x: Tensor, out: Tensor, add: bool = False) -> None:
        """``out = x y`` or, with ``add``, ``out += x y``, summed in out's dtype."""
        if self.packed:
            torch.ops.gssf.multiply(x, self.y, out, add)
            return
        _library.product(x, self.y, out, add)


class OnceRight:
    """`Right` for one product, to the bit: on the CPU each thread packs the columns of y that it multiplies."""

    def __init__(self, y: Tensor, dtype: torch.dtype):
        self.y, self.dtype = y, dtype

    def product(self, x: Tensor, out: Tensor) -> None:
        """``out = x y``, summed in out's dtype."""
        if multiplies_fp32(self.y, self.dtype):
            torch.ops.gssf.multiply(x, self.y, out, False)
        else:
            Right(self.y, self.dtype).product(x, out)


def unit_of(dtype: torch.dtype, *grads: Tensor | None) -> Tensor | None:
    """For fp16 the largest magnitude of the gradients, a scalar, which ds is divided by; else None.

    On a GPU ds is rounded to fp16, and the factor 1/N of a mean would make it underflow. The caller multiplies the
    products of ds by it.
    """
    nonempty = [g for g in grads if g is not None and g.numel()]
    if dtype != torch.float16 or not nonempty:
        return None
    unit = torch.stack([g.abs().amax() for g in nonempty]).amax()
    return torch.where(unit == 0, 1, unit)
