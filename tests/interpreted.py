"""Where the tests of Triton kernels run: on a GPU if there is one, else under Triton's interpreter.

The interpreter has to be chosen before Triton is imported. Without a GPU a module's tests are therefore skipped, and
one is added that runs them in a process of its own. The interpreter's bf16 is wrong, so it is fp32 and fp16 there.
"""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def where_triton_runs(module: dict) -> None:
    """For the end of a test module, on its globals(): its tests run on a GPU, except under the interpreter."""
    if INTERPRETED:
        return
    for name in [name for name in module if name.startswith("test_")]:
        module[name] = pytest.mark.gpu(module[name])
    if DEVICE is not None:
        return

    def test_under_the_interpreter():
        """All of this module, in a process of its own."""
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", module["__file__"]],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        summary = run.stdout.strip().splitlines()[-1:]
        print(*summary)
        assert run.returncode == 0, run.stdout + run.stderr
        assert re.search(r"\d+ passed", run.stdout), summary

    module["test_under_the_interpreter"] = test_under_the_interpreter


def hasten() -> None:
    """Spares the interpreter three habits that took most of its time. No result changes.

    It reduces number by number with any function but Triton's own sums and maxima: here by halves, as on a card. It
    patches `triton.language` at every call of a function by a kernel: here once a launch. And it looks whether sums
    of integers overflow, but says so only when debugging: here it does not look.
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

    def patch_once(fn):
        modules = [m for m in (interpreter.tl, core) if any(value is m for value in fn.__globals__.values())]
        return patch(fn) if any(core.is_builtin(m.load) for m in modules) else interpreter._LangPatchScope()

    interpreter.ReduceOps.generic_reduce, interpreter._patch_lang = reduce, patch_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


if INTERPRETED:
    hasten()
