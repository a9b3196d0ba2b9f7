"""Other packages that compute what we do, each an adapter in one small file.

An adapter module holds

    PACKAGE = "pytorch-metric-learning"     its distribution's name on PyPI, pinned in requirements-peers.txt
    DEVICES = ("cpu", "cuda")               where it runs
    VARIANTS = {"triplet": build, …}        op name: a function that imports the package and gives the variant

A variant takes a :class:`bench.problem.Problem` and computes exactly what the op's ``naive`` does, in the way that
the package's own documentation recommends. It is checked against fp64 like every other, before it is timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from types import ModuleType

_SUFFIX = "_adapter"
# Their names on the command line: pml_adapter.py is "pml".
PEERS = sorted(
    module.name.removesuffix(_SUFFIX) for module in pkgutil.iter_modules(__path__) if module.name.endswith(_SUFFIX)
)


def adapter(name: str) -> ModuleType:
    """The adapter called ``name``; importing it imports nothing of the package."""
    return importlib.import_module(f"bench.peers.{name}{_SUFFIX}")


def serving(op: str, device: str | None = None) -> list[str]:
    """The peers that compute op (on device, if one is given)."""
    adapters = [(name, adapter(name)) for name in PEERS]
    return [name for name, a in adapters if op in a.VARIANTS and (device is None or device in a.DEVICES)]


def version(name: str) -> str | None:
    """The installed version of the peer's package, or None."""
    try:
        return importlib.metadata.version(adapter(name).PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
