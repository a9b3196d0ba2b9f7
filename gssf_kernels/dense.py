"""The gradient sweep: ``s = a bᵀ`` in chunks of rows, for losses in which every score carries gradient.

    for each chunk R of rows:   s = a[R] bᵀ;   pass over s;   da[R] = ds b,   db += dsᵀ a[R]

The pass reads the chunk, adds to statistics of O(N + M) and, where gradients are wanted, leaves ds in place of s. It is
an op: C++ on the CPU, Triton on CUDA, plain PyTorch elsewhere. Where s is symmetric, a chunk begins at its own first
column and half of the work is left out (:func:`triangle`). The products are our own on the CPU (``csrc/product.h``) and
the library's elsewhere. Extra memory is one chunk besides the gradients and, on the CPU, b packed for the products: an
fp32 copy forward, two with a gradient. The same inputs give the same bits, on the CPU whatever the number of threads.

bf16 sides stay bf16 on CUDA and on CPUs with a unit for it (AVX-512 BF16, AMX; ``csrc/bf16.h``): the products of scores
are exact there and their sums fp32; ds is rounded to bf16 before its own two, as in plain PyTorch, and da and db are
summed in fp32.
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
    """Rows of a in one chunk: of the problem alone, so that the same inputs are summed in the same order."""
    scores = plan.CHUNK_SCORES.get(_checks.device_type(a), plan.CHUNK_SCORES["cpu"])
    return min(max(scores // max(b.shape[0], 1), plan.MIN_CHUNK_ROWS), max(a.shape[0], 1))


def chunks(
    a: Tensor,
    b: Tensor,
    visit: Callable[[Tensor, int], None],
    needs: Sequence[bool] = (False, False),
    known: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Call ``visit(s [R, M], first)`` for every chunk of ``s = a bᵀ``, whose first row is row ``first`` of a.

    Where s [N, M] is ``known``, that is taken and left as it is.

    Where ``needs`` says so, visit leaves ``ds = dL/ds`` in place of s, and ``(da [N, D], db [M, D])`` come back in the
    scores' dtype.
    """
    dtype, rows = accumulation_dtype(a.dtype), chunk_rows(a, b)
    columns = Right(b.mT, dtype) if known is None else None
    channels = Right(b, dtype) if needs[0] else None
    buffer = a.new_empty(rows, b.shape[0], dtype=dtype)
    da = a.new_empty(a.shape, dtype=dtype) if needs[0] else None
    db = (b.new_empty if a.shape[0] else b.new_zeros)(b.shape, dtype=dtype) if needs[1] else None
    for first in plan.starts(a.shape[0], rows):
        part = operand(a[first : first + rows], dtype)  # [R, D]
        s = buffer[: part.shape[0]]  # [R, M]
        if columns is not None:
            columns.product(part, s)
        elif known is not None:
            s.copy_(known[first : first + rows])
        visit(s, first)
        ds = gradient(s, part) if any(needs) else s
        if da is not None and channels is not None:
            channels.product(ds, da[first : first + rows])
        if db is not None:
            Right(part, dtype).product(ds.mT, db, add=first > 0)
    return da, db


def keeps(a: Tensor, b: Tensor | None) -> bool:
    """Whether s = a bᵀ is small enough to be kept for a backward; of one side twice (None) half a product is not."""
    return b is not None and a.shape[0] * b.shape[0] <= plan.KEPT_SCORES.get(_checks.device_type(a), 0)


def halves(n: int, limit: int, step: int) -> Iterable[tuple[int, int]]:
    """(first row, rows) of the chunks of a symmetric s [n, n]: as many steps of rows as have at most ``limit`` scores.

    As for :func:`starts`, `explain` runs few of them.
    """
    first = 0
    while first < n:
        count = min(max(limit // (n - first) // step, 1) * step, n - first)
        yield first, count
        first += count


def triangle(sides: Sequence[Tensor], visit: Callable[[list[Tensor], int], None], need: bool) -> Tensor | None:
    """The same for symmetric ``s_k = x_k x_kᵀ``, x_k [N, any] the sides, from each chunk's place on the diagonal on.

    ``visit([s_k [R, N − first]], first)`` sees every score once, but for those of the square ``s_k[:, :R]``, which has
    both halves. Where ``need``, it leaves in place of s_0 that part of a symmetric ``E = dL/ds``, and ``E x_0``
    comes back: half products for the scores, a whole one for the gradient.
    """
    dtype, n = accumulation_dtype(sides[0].dtype), sides[0].shape[0]
    lefts = [operand(x, dtype) for x in sides]
    rights = [Right(x.mT, dtype) for x in lefts]
    x, channels = lefts[0], Right(lefts[0], dtype) if need else None
    limit = max(2 * chunk_rows(x, x) * n // (1 + len(sides)), 1)  # scores of one of the chunks there are
    step = max(right.width for right in rights)
    buffers = x.new_empty(len(sides), min(max(limit, step * n), n * n), dtype=dtype)
    dx = x.new_zeros(x.shape, dtype=dtype) if need else None
    for first, count in halves(n, limit, step):
        width, rows = n - first, slice(first, first + count)
        scores = [buffer[: count * width].view(count, width) for buffer in buffers]
        for s, left, right in zip(scores, lefts, rights, strict=True):
            right.after(column=first).product(left[rows], s)
        visit(scores, first)
        if channels is not None and dx is not None:
            ds = gradient(scores[0], x)
            channels.after(row=first).product(ds, dx[rows], add=True)
            Right(x[rows], dtype).product(ds[:, count:].mT, dx[rows.stop :], add=True)
    return dx


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a product's left side: 16-bit numbers where a unit sums them in fp32, as on CUDA; else in ``dtype``."""
    return x if _checks.device_type(x) == "cuda" or on_bf16_unit(x) else x.to(dtype)


def gradient(s: Tensor, part: Tensor) -> Tensor:
    """ds as a product's left side, in the place of ``part``: of its dtype on CUDA. On the CPU the product rounds it."""
    return s.to(part.dtype) if _checks.device_type(s) == "cuda" else s


def on_bf16_unit(x: Tensor) -> bool:
    """Whether x is bf16 on a CPU with a unit for products of such numbers."""
    return x.dtype == torch.bfloat16 and _checks.device_type(x) == "cpu" and bf16_unit() != "none"


@functools.cache
def bf16_unit() -> str:
    """amx, avx512_bf16 or none, which it is too where the extension is not built."""
    return _library.bf16_unit()


class Right:
    """``y [k, m]`` as the right side of many products: on the CPU packed once into panels (``csrc/types.h``), a copy.

    bf16 stays bf16 on a unit for it, and left sides are rounded to it, of which ds alone is wider. The library
    multiplies where the extension is not built, and fp32 where PyTorch's setting allows its products to round to bf16.
    """

    def __init__(self, y: Tensor, dtype: torch.dtype):
        rough = dtype == torch.float32 and fp32_products(_checks.device_type(y)) == "bf16"
        unit = on_bf16_unit(y)
        self.packed = unit or (_checks.device_type(y) == "cpu" and EXTENSION_ERROR is None and not rough)
        self.width = 64 if unit else 32  # multiples of it are where columns may begin, and rows
        self.y = torch.ops.gssf.pack(y, y.dtype if unit else dtype) if self.packed else operand(y, dtype)

    def after(self, row: int = 0, column: int = 0) -> "Right":
        """y[row:, column:], not copied; row and column multiples of ``width``."""
        part = copy.copy(self)
        part.y = self.y[column // self.y.shape[2] :, row:] if self.packed else self.y[row:, column:]
        return part

    def product(self, x: Tensor, out: Tensor, add: bool = False) -> None:
        """``out = x y`` or ``out += x y``, summed in out's dtype."""
        if self.packed:
            torch.ops.gssf.multiply(x, self.y, out, add)
            return
        _library.product(x, self.y, out, add)


def unit_of(dtype: torch.dtype, *grads: Tensor | None) -> Tensor | None:
    """For fp16 the largest of the gradients' magnitudes, to be divided out and put back; else None.

    On a GPU ds is rounded to fp16 there, and the 1/N of a mean would push it below the smallest number.
    """
    some = [g for g in grads if g is not None and g.numel()]
    if dtype != torch.float16 or not some:
        return None
    unit = torch.stack([g.abs().amax() for g in some]).amax()
    return torch.where(unit == 0, 1, unit)
