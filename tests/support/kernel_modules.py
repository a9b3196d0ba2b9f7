"""The modules of Triton kernels; None where there is no Triton, and tests marked `triton` are skipped.

from kernel_modules import hardest, tiles
"""

import importlib
import pkgutil

from interpreter_process import FOUND

from gssf_kernels import triton as kernels

NAMES = tuple(module.name for module in pkgutil.iter_modules(kernels.__path__))
MODULES = tuple(importlib.import_module(f"gssf_kernels.triton.{name}") for name in NAMES) if FOUND else ()
globals().update(dict(zip(NAMES, MODULES, strict=True)) if FOUND else dict.fromkeys(NAMES))
