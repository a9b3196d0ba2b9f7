"""What is known of where Triton's kernels run in this process: on a GPU, under Triton's interpreter, or not at all.

The interpreter has to be chosen before Triton is imported, so that without a GPU tests marked `triton` run in another
process, which `interpreter_process.py` starts. The interpreter's bf16 is wrong: it is fp32 and fp16 there.
"""

import dataclasses
import functools
import math
import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

SPARSE_LOAD = 4096  # numbers of a load, from which it pays to read only those whose mask is true

# Every process collects the same tests.
no_bf16 = pytest.mark.skipif(DEVICE != "cuda", reason="the bf16 of Triton's interpreter is wrong")
FLOATS = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=no_bf16)]
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
both_halves = pytest.mark.parametrize("dtype", FLOATS[1:], ids=lambda d: str(d)[6:])


def hasten() -> None:
    """Spares the interpreter habits that took most of its time. No result changes.

    It reduces number by number with any function but Triton's own sums and maxima: here by halves, as on a card. It
    patches `triton.language` at every call of a function by a kernel: here once a launch. And it looks whether sums
    of integers overflow, but says so only when debugging: here it does not look. For every operation it makes the type
    and the shape of what comes out anew, and all that it knows of NumPy's dtypes: here once. And it compares shapes
    number by number and types by their names: here the same object is equal to itself. And a load whose mask
    is mostly false reads only where it is true.
    """
    from triton.language import core
    from triton.runtime import interpreter

    number_by_number, patch = interpreter.ReduceOps.generic_reduce, interpreter._patch_lang

    def reduce(self, values):
        if self.axis is None or self.keep_dims:
            return number_by_number(self, values)
        axis = self.axis % len(values[0].shape)
        while (length := values[0].handle.data.shape[axis]) > 1:
            even_and_odd = [(v.handle.data.take(range(k, length, 2), axis), v.dtype) for k in (0, 1) for v in values]
            values = self.combine_fn.fn(*(self.to_tensor(*half) for half in even_and_odd))
            values = values if isinstance(values, tuple) else (values,)
        return [self.to_tensor(v.handle.data.squeeze(axis), v.dtype) for v in values]

    @functools.cache
    def used_by(fn):
        return [m for m in (interpreter.tl, core) if any(value is m for value in fn.__globals__.values())]

    def patch_once(fn):
        return patch(fn) if any(core.is_builtin(m.load) for m in used_by(fn)) else interpreter._LangPatchScope()

    interpreter.ReduceOps.generic_reduce, interpreter._patch_lang = reduce, patch_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)

    make_type, known_dtype = core.block_type.__init__, functools.cache(interpreter._get_np_dtype)
    block_types = {}

    def one_of_a_kind(cls, element_ty, shape):
        pointer = isinstance(element_ty, core.pointer_type)
        element = (element_ty.name, element_ty.address_space) if pointer else element_ty
        shape = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if (element, shape) not in block_types:
            block_types[element, shape] = object.__new__(cls)
        return block_types[element, shape]

    def make_type_once(self, element_ty, shape):
        if not hasattr(self, "name"):
            make_type(self, element_ty, shape)
            self.sizes, self.of_elements = tuple(core._unwrap_if_constexpr(size) for size in self.shape), {}

    def make_tensor(self, handle, type):
        if not hasattr(type, "of_its_tensors"):
            shape = type.shape if type.is_block() else ()
            type.of_its_tensors = core.constexpr(math.prod(shape)), core.tuple([core.constexpr(n) for n in shape])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_its_tensors

    def dtype_of(type):
        type = type.element_ty if isinstance(type, core.block_type) else type
        return uint64 if isinstance(type, core.pointer_type) else known_dtype(type)

    def with_element_once(self, element):
        if element.is_ptr():  # it has no hash
            return core.block_type(element, self.shape)
        if element not in self.of_elements:
            self.of_elements[element] = core.block_type(element, self.shape)
        return self.of_elements[element]

    def broadcast_if_shapes_differ(self, lhs, rhs):
        if getattr(lhs.type, "sizes", None) == getattr(rhs.type, "sizes", None):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def identical_first(equal):
        return lambda self, other: self is other or equal(self, other)

    def load_where_true(pointers, mask, other, dtype):
        true = np.asarray(mask)
        if true.size < SPARSE_LOAD or 4 * np.count_nonzero(true) > true.size:
            return load(pointers, mask, other, dtype)
        values = np.array(other)
        values[true] = load(np.asarray(pointers)[true], true[true], values[true], dtype)
        return values

    wrapper = core.load.__code__  # of all that is @builtin: it looks whether there is a semantic

    def with_semantic(obj, name, member, builder, scope):
        fn = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member

        def interpreted(*arguments, **options):
            options["_semantic"] = interpreter.interpreter_semantic
            return fn(*arguments, **options)

        scope.set_attr(obj, name, interpreted)

    uint64 = interpreter._get_np_dtype(core.uint64)
    core.block_type.__new__, core.block_type.__init__ = one_of_a_kind, make_type_once
    core.tensor.__init__, interpreter._get_np_dtype = make_tensor, dtype_of
    core.block_type.with_element_ty, interpreter._patch_attr = with_element_once, with_semantic
    load, interpreter._interpreter.load = interpreter._interpreter.load, load_where_true
    semantic = type(interpreter.interpreter_semantic)
    broadcast, semantic.broadcast_impl_value = semantic.broadcast_impl_value, broadcast_if_shapes_differ
    for kind in (core.dtype, core.pointer_type, core.block_type):
        kind.__eq__ = identical_first(kind.__eq__)


if INTERPRETED:
    hasten()
